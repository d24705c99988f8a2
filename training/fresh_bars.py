"""A run's bars: rank 0 brings the lake up to date, then every rank maps the same copy of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from data_sources import ready_copy
from data_sources.errors import LakeError
from data_sources.lake import READY_FOLDER, Lake
from data_sources.refresh import DataRequest, LoadedData, load, refresh
from training import validation
from training.cli import Leave
from training.clock import Clock
from training.console import Console, Interruptible, StopRequested
from training.control import EXIT_CRASH, EXIT_NO_DATA, STOP_AT_EPOCH_END, Control
from training.distributed import Ranks
from training.prefetch import Prefetch


def fresh_bars(
    lake: Lake,
    settings: Any,
    clock: Clock,
    ranks: Ranks,
    control: Control,
    console: Console,
    prefetch: Prefetch,
) -> LoadedData | None:
    """Refresh the lake on rank 0, then load this run's bars on every rank; None when asked to stop meanwhile.

    Where the lake was refreshed while the last run trained, its bars are taken without asking anybody. A run
    that is resumed keeps the bars that it began with, so that its numbers go on as if nothing had happened. A
    source that fails is told and left out; the run goes on with what the lake holds.

    Args:
        lake: the downloaded bars.
        settings: which bars are wanted.
        clock: its ``cutoff_ns`` is set where this run has none yet.
        ranks: all take part.
        control: where a stop is asked for.
        console: where sources tell how it goes.
        prefetch: what was refreshed in the background.

    Raises:
        Leave: there are no bars at all, or ranks read different ones.
    """
    if clock.cutoff_ns == 0:
        cutoff_ns = prefetch.take() if ranks.is_first else 0
        if ranks.is_first and not cutoff_ns:
            cutoff_ns = time.time_ns()
            progress = Interruptible(console, lambda: control.stop_level > 0)
            # A stop is agreed on by the ranks below.
            with contextlib.suppress(StopRequested), _leaving_without_lake(clock):
                refresh(lake, data_request(settings, cutoff_ns), cutoff_ns, progress)
        with control.waiting():
            cutoff_ns = ranks.from_first(cutoff_ns)
        if agreed_stop(STOP_AT_EPOCH_END, ranks, control):
            return None
        clock.cutoff_ns = cutoff_ns
    request = data_request(settings, clock.cutoff_ns)
    with _leaving_without_lake(clock):
        data = _shared(lake, request, ranks, console, control)
    if len(set(ranks.gather(data.fingerprint))) > 1:
        raise Leave(
            EXIT_CRASH, f"ranks read different bars in {lake.root}: is it one folder for all of them?"
        )
    console.data(data)
    if not data.bars:
        raise Leave(
            EXIT_NO_DATA,
            f"No symbol has {request.min_bars:,} bars: set the keys in .env (see .env.example), check the "
            "network, or try it offline with --demo",
        )
    return data


def data_request(settings: Any, now_ns: int) -> DataRequest:
    """Say which bars the settings ask for at this moment."""
    day_ns = 86_400 * 10**9
    end_ns = now_ns
    if settings.end_date:
        end_ns = min(now_ns, validation.date_ns(settings.end_date) + day_ns)  # the last day is included
    start_ns = end_ns - settings.history_days * day_ns
    if settings.start_date:
        start_ns = validation.date_ns(settings.start_date)
    return DataRequest(
        sources=settings.sources,
        stocks=settings.stocks,
        binance_pairs=settings.binance_pairs,
        polygon_crypto=settings.polygon_crypto,
        start_ns=start_ns,
        end_ns=end_ns,
        min_bars=settings.min_bars,
        extended_hours=settings.extended_hours,
        simulated_symbols=settings.simulated_symbols,
        simulated_bars=settings.simulated_bars,
    )


@contextlib.contextmanager
def _leaving_without_lake(clock: Clock) -> Iterator[None]:
    """End the program where the lake cannot be read; one that has trained from it before tries again soon."""
    try:
        yield
    except LakeError as error:
        code = EXIT_CRASH if clock.transitions else EXIT_NO_DATA
        raise Leave(code, f"{error}: look at the disk, or use another --data-dir") from error


def _shared(lake: Lake, request: DataRequest, ranks: Ranks, console: Console, control: Control) -> LoadedData:
    """Map the one copy of the run's bars; without room for a copy every rank reads the lake for itself."""
    name = ""
    if ranks.is_first and request.needs_lake:
        try:
            name = ready_copy.provide(lake, request).name
        except LakeError as error:
            console.warning(f"every rank and restart reads all of the lake: {error}")
    with control.waiting():
        name = ranks.from_first(name)
    if not name:
        return load(lake, request)
    try:
        return ready_copy.open_copy(lake.root / READY_FOLDER / name)
    except LakeError as error:
        return LoadedData([], {}, [], str(error))  # another fingerprint than rank 0's


def agreed_stop(level: int, ranks: Ranks, control: Control) -> bool:
    """Tell whether any rank is asked to stop at ``level`` or more urgently (all ranks take part)."""
    control.beat()
    return ranks.any(control.stop_level >= level)
