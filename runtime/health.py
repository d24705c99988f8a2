"""Report whether a training of this machine lives: ``python -m runtime.health``, for containers and cron.

It looks at the folders that living supervisors hold, and judges silence as they do: START_SECONDS from the start
of the workers to their first heartbeat, HANG_SECONDS after that. A supervisor restarts what hangs by itself, so an
unhealthy training is one whose supervisor does not get that far. Exit code 0, or 1 with the reason. Standard
library only; a tenth of a second.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.control import FOLDER_PREFIX, seconds_since
from runtime.locking import NO_LOCK_ERRORS
from runtime.processes import SWEEP_SECONDS, is_held
from runtime.supervisor import Limits

# A supervisor that found a hang has swept the workers and started others by then.
GRACE_SECONDS = SWEEP_SECONDS + Limits.longest_delay_seconds


def living() -> Iterator[Path]:
    """Yield the control folder of every training of this machine."""
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*")):
        try:
            if is_held(folder):
                yield folder
        except OSError as error:  # it has just ended, or belongs to another user
            if error.errno in NO_LOCK_ERRORS:
                yield folder


def find_fault(folder: Path, limits: Limits) -> str:
    """Return why the training of this control folder is unhealthy, "" if it is not."""
    silence, since_start = seconds_since(folder)
    if silence <= limits.hang_seconds + GRACE_SECONDS or since_start <= limits.start_seconds + GRACE_SECONDS:
        return ""
    return f"no heartbeat for {silence:.0f} s"


def main() -> int:
    """Print a line for every training of this machine, and return the exit code."""
    try:
        limits = Limits.from_environment(os.environ)
    except ValueError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    faults = {folder.name: find_fault(folder, limits) for folder in living()}
    for name, fault in faults.items():
        sys.stdout.write(f"{name}: {fault or 'healthy'}\n")
    if not faults:
        sys.stdout.write(f"no training runs here (none holds a folder in {tempfile.gettempdir()})\n")
    return int(not faults or any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
