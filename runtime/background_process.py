"""Run the program as a low-priority child that exits with its parent; started as a script.

A module of its own, so that the child watches its parent before anything large is imported.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "continuous_training.py"


def lower_priority(niceness: int = 19) -> None:
    """Give this process a low priority, by default the lowest."""
    if sys.platform != "win32":
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))


def be_background() -> None:
    """Give this process the lowest priority, and let it exit as soon as its standard input ends."""
    lower_priority()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held at interpreter exit
        pass
    os._exit(1)


if __name__ == "__main__":
    be_background()
    sys.path.insert(0, str(SCRIPT.parent))
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
