"""The next run's bars, fetched in a process of low priority while a run trains."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from data_sources.lake.quality import closed_before

log = logging.getLogger("continuous_training")

TOP_UP_SECONDS = 600.0
PICK_UP_SECONDS = 5.0  # a process that is nearly done may finish when the run ends


class Prefetch:
    """Refreshes the lake for the next run while this one trains, in a process of low priority. A context manager.

    It starts with the first epoch of a run, so that missing bars have the whole run to arrive, and once more when
    about ten minutes are left, so that the next run begins with fresh ones. Its result is taken as it is when the
    run ends: a source that is down delays the background process only. A process that still works then is killed;
    the lake keeps what arrived. One that has given its result may go on with what no run waits for, such as order
    flow of former bars; it is killed as soon as another one is due.

    Args:
        command: the process to start. Each line that it prints is ignored, or JSON: its result,
            ``{"now_ns": ..., "bars": ..., "warnings": [...]}``, then perhaps ``{"later_warning": ...}``. None:
            nothing is fetched ahead (other ranks; a market that needs no refresh).
        clock: seconds, for tests.
    """

    def __init__(self, command: Sequence[str] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._command = command
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque()  # of the child; the reader appends
        self._last_line = ""
        self._ready_ns: int
        self._bars: str
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
        self._listen()
        if (self._child is not None and not self._has_result) or epochs_left == 0:
            return
        if not self._starts:
            self._start(now)
        elif len(self._starts) == 1 and now - self._starts[0] >= TOP_UP_SECONDS:
            seconds_left = epochs_left * (now - self._began) / self._epochs
            if seconds_left <= TOP_UP_SECONDS:
                self._start(now)

    def take(self) -> tuple[int, str]:
        """End the run; return up to when the lake was refreshed meanwhile, and which bars are ready.

        Returns:
            ns UTC; 0 if it was not: the caller must refresh. A refresh that has begun and is far from done counts,
            too. And the fingerprint of the snapshot up to then, "" if there is none.
        """
        wait_until = time.monotonic() + (0.0 if self._ready_ns else PICK_UP_SECONDS)
        self._listen()
        while self._child is not None and not self._has_result and time.monotonic() < wait_until:
            time.sleep(0.05)
            self._listen()
        if self._child is not None and not self._ready_ns:
            log.warning("the background refresh is not done; this run takes the bars that have arrived")
            self._ready_ns = closed_before(time.time_ns())
        self._end_child()
        ready = self._ready_ns, self._bars
        for warning in (*self._warnings, *self._later_warnings):
            log.warning(warning)
        self._begin_run()
        return ready

    def _begin_run(self) -> None:
        self._began = self._clock()
        self._epochs = 0
        self._starts: list[float] = []
        self._has_result = False
        self._ready_ns = 0
        self._bars = ""
        self._warnings: list[str] = []
        self._later_warnings: list[str] = []

    def _start(self, now: float) -> None:
        assert self._command is not None
        self._end_child()
        self._starts.append(now)
        # No GPUs, one core, rank 0; a session (on Windows: a group) of its own, out of Ctrl+C's reach.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RANK": "0"}
        new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        low_priority = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)
        try:
            self._child = subprocess.Popen(
                self._command,
                env=os.environ | quiet,
                stdin=subprocess.PIPE,  # closes when this process is gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=new_group | low_priority,
            )
        except OSError as error:
            log.warning(f"the next run's bars are not fetched in the background: {error}")
            return
        assert self._child.stdout is not None
        self._lines, self._last_line, self._has_result = deque(), "it printed nothing", False
        self._reader = threading.Thread(target=_read, args=(self._child.stdout, self._lines), daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        """Take what the child has printed, and note its end."""
        if self._child is None:
            return
        has_ended = self._child.poll() is not None
        if has_ended and self._reader is not None:
            self._reader.join()
        while self._lines:
            line = self._lines.popleft()
            try:
                message = json.loads(line)
                if "later_warning" in message:
                    self._later_warnings.append(str(message["later_warning"]))
                    continue
                ready_ns, bars, warnings = (
                    int(message["now_ns"]),
                    str(message["bars"]),
                    list(message["warnings"]),
                )
            except (ValueError, KeyError, TypeError):
                self._last_line = line
                continue
            self._ready_ns, self._bars, self._warnings, self._has_result = ready_ns, bars, warnings, True
        if has_ended:
            if self._child.returncode or not self._has_result:
                log.warning(f"the background refresh failed: {self._last_line[:300]}")
            self._end_child()

    def _end_child(self) -> None:
        child, reader, self._child, self._reader = self._child, self._reader, None, None
        if child is not None:
            child.kill()
            child.wait()
            assert child.stdin is not None and child.stdout is not None and reader is not None
            reader.join()
            child.stdin.close()
            child.stdout.close()


def _read(output: IO[bytes], lines: deque[str]) -> None:
    """Append the lines of a process to ``lines`` as they come."""
    for line in output:
        if text := line.decode("utf-8", "replace").strip():
            lines.append(text)
