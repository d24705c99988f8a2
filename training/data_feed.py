"""The bars of a run: rank 0 refreshes the lake, ahead of time where it can; then every rank maps the same copy."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

import torch

from data_sources import snapshot
from data_sources.bars import Bars
from data_sources.calendar import date_ns
from data_sources.errors import LakeError
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.load import LoadedData, load
from data_sources.progress import Progress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.vendors import SYMBOL_SETTINGS
from envs.features import FeatureStatistics
from envs.market import Market
from runtime import background_process
from runtime.control import (
    EXIT_CRASH,
    EXIT_NO_DATA,
    STOP_AT_EPOCH_END,
    Control,
    ExitProgram,
    heartbeat_while_waiting,
)
from training.distributed import Ranks, agreed_stop
from training.progress import TrainingProgress

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")


def fresh_bars(
    lake: Lake,
    settings: Settings,
    progress: TrainingProgress,
    ranks: Ranks,
    control: Control,
    reporter: Progress,
    prefetch: Prefetch,
) -> LoadedData | None:
    """Refresh the lake on rank 0, then load this run's bars on every rank; None when asked to stop meanwhile.

    If the lake was refreshed while the last run trained, no source is asked. A resumed run keeps the bars that it
    began with, so that its numbers continue as if nothing had happened. A source that fails is reported and
    skipped; the run uses what the lake holds of it.

    Args:
        lake: the downloaded bars.
        settings: which bars to load.
        progress: its ``cutoff_ns`` is set if this run has none yet.
        ranks: all take part.
        control: polled for stop requests.
        reporter: shows the progress of the refresh.
        prefetch: the refresh in the background.

    Raises:
        ExitProgram: the lake cannot be read, or ranks read different bars.
    """
    if progress.cutoff_ns == 0:
        cutoff_ns = prefetch.take() if ranks.is_first else 0
        if ranks.is_first and not cutoff_ns:
            cutoff_ns = time.time_ns()
            interruptible = Interruptible(reporter, lambda: control.stop_level > 0)
            # A stop is agreed on by the ranks below.
            with contextlib.suppress(StopRequested), _exit_without_lake(progress):
                refresh(lake, data_request(settings, cutoff_ns), cutoff_ns, interruptible)
        with heartbeat_while_waiting():
            cutoff_ns = ranks.broadcast(cutoff_ns)
        if agreed_stop(STOP_AT_EPOCH_END, ranks, control):
            return None
        progress.cutoff_ns = cutoff_ns
    request = data_request(settings, progress.cutoff_ns)
    with _exit_without_lake(progress):
        data = _map_copy(lake, request, ranks)
    if len(set(ranks.gather(data.fingerprint))) > 1:
        raise ExitProgram(
            EXIT_CRASH, f"ranks read different bars in {lake.root}: is it one folder for all of them?"
        )
    return data


def make_market(
    settings: Settings, bars: Sequence[Bars], device: torch.device, statistics: FeatureStatistics | None
) -> Market:
    """Put a run's bars on the device, their newest ``holdout_days`` held out.

    Args:
        settings: of the training.
        bars: one series per symbol.
        device: of this rank.
        statistics: scale of the features that training began with; None: computed from these bars.

    Raises:
        ExitProgram: there are no bars, or too few to train on.
    """
    if not bars:
        raise ExitProgram(
            EXIT_NO_DATA,
            f"No symbol has {settings.min_bars:,} bars: set the keys in .env (see .env.example), check the "
            "network, or try it offline with --demo",
        )
    try:
        return Market.from_settings(bars, settings, device, holdout_start_ns(settings, bars), statistics)
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def holdout_start_ns(settings: Settings, bars: Sequence[Bars]) -> int:
    """Return where the newest ``holdout_days`` begin; no bar that opens at or after it is trained on."""
    newest_ns = max(int(series.open_time[-1]) for series in bars)
    return newest_ns - settings.holdout_days * 86_400 * 10**9


def data_request(settings: Settings, now_ns: int) -> DataRequest:
    """Return the request for the bars of these settings at this moment."""
    day_ns = 86_400 * 10**9
    end_ns = now_ns
    if settings.end_date:
        end_ns = min(now_ns, date_ns(settings.end_date) + day_ns)  # the last day is included
    start_ns = end_ns - settings.history_days * day_ns
    if settings.start_date:
        start_ns = date_ns(settings.start_date)
    return DataRequest(
        sources=settings.sources,
        symbols={name: getattr(settings, name) for name in SYMBOL_SETTINGS},
        start_ns=start_ns,
        end_ns=end_ns,
        min_bars=settings.min_bars,
        extended_hours=settings.extended_hours,
        simulated_symbols=settings.simulated_symbols,
        simulated_bars=settings.simulated_bars,
    )


@contextlib.contextmanager
def _exit_without_lake(progress: TrainingProgress) -> Iterator[None]:
    """End the program if the lake cannot be read; one that has trained from it before is restarted soon."""
    try:
        yield
    except LakeError as error:
        code = EXIT_CRASH if progress.transitions else EXIT_NO_DATA
        raise ExitProgram(code, f"{error}: check the disk, or use another --data-dir") from error


def _map_copy(lake: Lake, request: DataRequest, ranks: Ranks) -> LoadedData:
    """Map the shared copy of the run's bars; without disk space for one, every rank reads the lake itself."""
    name = ""
    if ranks.is_first and request.needs_lake:
        try:
            name = snapshot.provide(lake, request).name
        except LakeError as error:
            log.warning(f"every rank and restart reads all of the lake: {error}")
    with heartbeat_while_waiting():
        name = ranks.broadcast(name)
    if not name:
        return load(lake, request)
    try:
        return snapshot.open_snapshot(lake.root / READY_FOLDER / name)
    except LakeError as error:
        return LoadedData([], {}, [], str(error))  # another fingerprint than rank 0's


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
                self._ready_ns = time.time_ns()
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
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its process ended
        # No GPUs, one core, rank 0; a session (on Windows: a group) of its own, out of Ctrl+C's reach.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RANK": "0"}
        new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        low_priority = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)
        try:
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


def refresh_command(settings: Settings, flags: Sequence[str]) -> list[str] | None:
    """Return the command that refreshes the bars of these settings in the background; None if none is needed.

    ``flags`` give the program the same settings.
    """
    if not data_request(settings, time.time_ns()).needs_lake:
        return None
    return [sys.executable, "-P", background_process.__file__, "data", "--background", *flags]


class StopRequested(KeyboardInterrupt):
    """A stop was requested while bars were loading. An interrupt, so that no source takes it for its own error."""


class Interruptible:
    """A Progress that forwards every call, and ends the work when a stop is requested.

    Raises:
        StopRequested: from ``advance`` once ``stop_now`` is true; what has arrived stays in the lake.
    """

    def __init__(self, progress: Progress, stop_now: Callable[[], bool]) -> None:
        self._stop_now = stop_now
        self.start, self.finish, self.warn = progress.start, progress.finish, progress.warn
        self._advance = progress.advance

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Forward the call, unless the work is to end."""
        self._advance(source, units, num_bytes)
        if self._stop_now():
            raise StopRequested
