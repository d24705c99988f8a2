"""The next run's bars, fetched in a process of low priority while a run trains."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import tempfile
import time
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
    the lake keeps what arrived.

    Args:
        command: the process to start; its last line of output is ``{"now_ns": ..., "warnings": [...]}``. None:
            nothing is fetched ahead (other ranks; a market that needs no refresh).
        clock: seconds, for tests.
    """

    def __init__(self, command: Sequence[str] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._command = command
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
        """End the run; return the time (ns UTC) up to which the lake was refreshed meanwhile.

        0 if it was not: the caller must refresh. A refresh that has begun and is far from done counts, too.
        """
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(0.0 if self._ready_ns else PICK_UP_SECONDS)
            if self._child.poll() is not None:
                self._take_result()
            elif not self._ready_ns:
                log.warning("the background refresh is not done; this run takes the bars that have arrived")
                self._ready_ns = closed_before(time.time_ns())
        self._end_child()
        ready_ns = self._ready_ns
        for warning in self._warnings:
            log.warning(warning)
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
        # No GPUs, one core, rank 0; a session (on Windows: a group) of its own, out of Ctrl+C's reach.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RANK": "0"}
        new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        low_priority = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)
        output: IO[bytes] | None = None
        try:
            output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its process ended
            self._child = subprocess.Popen(
                self._command,
                env=os.environ | quiet,
                stdin=subprocess.PIPE,  # closes when this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=new_group | low_priority,
            )
        except OSError as error:
            if output is not None:
                output.close()
            log.warning(f"the next run's bars are not fetched in the background: {error}")
            return
        self._output = output

    def _take_result(self) -> None:
        """Read the output of the child that has ended."""
        assert self._child is not None and self._output is not None
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines() or ["it printed nothing"]
        try:
            result = json.loads(lines[-1])
            self._ready_ns, self._warnings = int(result["now_ns"]), list(result["warnings"])
        except (ValueError, KeyError, TypeError):
            log.warning(f"the background refresh failed: {lines[-1][:300]}")
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
