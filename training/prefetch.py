"""The next run's refresh, made while a run trains: a process of low priority that never outlives the training.

It starts with the first epoch of a run, so that what is missing has the whole run to come, and once more when
about ten minutes are left, so that what the next run begins with is fresh. When the run ends, its result is
taken as it is: a source that is down has delayed the background process only. A process that still works then is
killed; the lake keeps what arrived.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.distributed import Ranks

SCRIPT = Path(__file__).resolve().parent.parent / "continuous_training.py"
TOP_UP_SECONDS = 600.0
PICK_UP_SECONDS = 5.0  # a process that is nearly done may finish when the run ends


class Prefetch:
    """Starts, watches and ends the background refreshes of one training. A context manager.

    Args:
        command: the process to start; its last line of output is ``{"now_ns": ..., "warnings": [...]}``. None:
            nothing is ever fetched ahead (other ranks; a market that needs no refresh).
        warn: told what went wrong.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        command: Sequence[str] | None,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._warn = warn
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._ready_ns = 0
        self._warnings: list[str] = []
        self._begin_run()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_child()

    def after_epoch(self, epochs_left: int) -> None:
        """Start what is due; returns at once."""
        if self._command is None:
            return
        now = self._clock()
        self._epochs += 1
        if self._child is not None and self._child.poll() is not None:
            self._take_result()
        if self._child is not None or epochs_left == 0:
            return
        if not self._starts:
            self._start(now)
        elif len(self._starts) == 1 and now - self._starts[0] >= TOP_UP_SECONDS:
            seconds_left = epochs_left * (now - self._began) / self._epochs
            if seconds_left <= TOP_UP_SECONDS:
                self._start(now)

    def take(self) -> int:
        """End the run: return up to when the lake was brought up to date meanwhile, ns UTC, and forget it.

        0: it was not, so that the caller must refresh. What was begun and is far from done still counts.
        """
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(0.0 if self._ready_ns else PICK_UP_SECONDS)
            if self._child.poll() is not None:
                self._take_result()
            elif not self._ready_ns:
                self._warn(
                    "the refresh in the background is not done; this run takes the bars that have arrived"
                )
                self._ready_ns = time.time_ns()
        self._end_child()
        ready_ns = self._ready_ns
        for warning in self._warnings:
            self._warn(warning)
        self._begin_run()
        return ready_ns

    def _begin_run(self) -> None:
        self._began = self._clock()
        self._epochs = 0
        self._starts: list[float] = []
        self._ready_ns = 0
        self._warnings = []

    def _start(self, now: float) -> None:
        assert self._command is not None
        self._starts.append(now)
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its process ended
        # Nobody else's ranks, GPUs or cores; a session (on Windows: a group) of its own, out of Ctrl+C's reach.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RANK": "0"}
        new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        low_priority = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)
        try:
            self._child = subprocess.Popen(
                self._command,
                env=os.environ | quiet,
                stdin=subprocess.PIPE,  # its end tells the child that this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=new_group | low_priority,
            )
        except OSError as error:
            output.close()
            self._warn(f"the next run's bars are not fetched ahead: {error}")
            return
        self._output = output

    def _take_result(self) -> None:
        """Read what the ended child said."""
        assert self._child is not None and self._output is not None
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        try:
            told = json.loads(lines[-1])
            self._ready_ns, self._warnings = int(told["now_ns"]), list(told["warnings"])
        except (ValueError, KeyError, TypeError):
            self._warn(f"the refresh in the background failed: {lines[-1][:300]}")
        self._end_child()

    def _end_child(self) -> None:
        child, output, self._child, self._output = self._child, self._output, None, None
        if child is not None:
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        if output is not None:
            output.close()


def refresh_ahead(settings: Any, ranks: Ranks) -> list[str] | None:
    """Return the command that refreshes the bars of ``settings``; None on other ranks, or where none is needed."""
    if not ranks.is_first or set(settings.sources) == {"simulated"}:
        return None
    from training.cli import flags_of

    return [sys.executable, "-P", __file__, "data", "--background", *flags_of(settings)]


def be_background() -> None:
    """Make this process the child: of the lowest priority, and gone as soon as its standard input ends.

    Before anything large is imported, so that no second passes in which it could be left alone.
    """
    if sys.platform != "win32":
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    be_background()
    sys.path.insert(0, str(SCRIPT.parent))
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
