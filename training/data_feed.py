"""The bars of a run: rank 0 refreshes the lake where needed; then every rank maps the same copy."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_sources import snapshot
from data_sources.bars import Bars
from data_sources.calendar import date_ns, utc
from data_sources.coverage import SymbolRow
from data_sources.errors import LakeError
from data_sources.flow import missing_flow
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.lake.quality import closed_before
from data_sources.load import LoadedData, load
from data_sources.pegged import PEGGED
from data_sources.progress import Progress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.universe import top_of
from data_sources.vendors import SYMBOL_SETTINGS
from envs.feature_checks import check_own_features
from envs.feature_errors import FeatureError
from envs.features import FeatureStatistics, chosen_features, own_features
from envs.market import Market, bars_before
from runtime import background_process
from runtime.control import (
    EXIT_CRASH,
    EXIT_NO_DATA,
    STOP_AT_EPOCH_END,
    Control,
    ExitProgram,
    heartbeat_thread,
    heartbeat_while_waiting,
)
from runtime.wording import first_of
from training import kept_features
from training.distributed import Ranks, agreed_stop
from training.prefetch import Prefetch
from training.progress import TrainingProgress

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

CHECK_SECONDS = 3_600.0  # a feature that computes for longer counts as hanging
ENOUGH_FLOW = 0.5  # of the bars, to scale features of the order flow by

# Loads the bars of a run that begins or is resumed, on every rank: ``fresh_bars``, or ``stored_bars``.
BarsOfRun = Callable[
    [Lake, "Settings", TrainingProgress, Ranks, Control, Progress, Prefetch], LoadedData | None
]


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
    began with, so that its numbers continue as if nothing had happened; where they are gone, as on another
    machine, they are fetched again. A source that fails is reported and skipped; the run uses what the lake holds
    of it.

    Args:
        lake: the downloaded bars.
        settings: which bars to load.
        progress: its ``cutoff_ns`` is set if this run has none yet, and its ``num_bars``.
        ranks: all take part.
        control: polled for stop requests.
        reporter: shows the progress of the refresh.
        prefetch: the refresh in the background.

    Raises:
        ExitProgram: the lake cannot be read, ranks read different bars, or symbols that the run began with are
            gone and ``missing_symbols`` is "stop".
    """
    cutoff_ns, written_ahead = progress.cutoff_ns, ""
    if ranks.is_first:
        with _exit_without_lake(progress):
            cutoff_ns, written_ahead = _bring_up_to_date(
                lake, settings, progress, control, reporter, prefetch
            )
    with heartbeat_while_waiting():
        cutoff_ns = ranks.broadcast(cutoff_ns)
    if agreed_stop(STOP_AT_EPOCH_END, ranks, control):
        return None
    progress.cutoff_ns = cutoff_ns
    request = data_request(settings, progress.cutoff_ns)
    with _exit_without_lake(progress):
        data = _map_copy(lake, request, progress.num_bars, ranks, written_ahead)
    if len(set(ranks.gather(data.fingerprint))) > 1:
        raise ExitProgram(
            EXIT_CRASH, f"ranks read different bars in {lake.root}: is it one folder for all of them?"
        )
    if request.needs_lake:
        _compare_with_beginning(data, progress, settings, lake)
    if ranks.is_first:
        with _exit_without_lake(progress):
            flow = missing_flow(lake, request, time.time_ns())
        if flow.files:
            log.info(str(flow))
    progress.num_bars = {bars.symbol: len(bars) for bars in data.bars}
    return data


def stored_bars(until_ns: int) -> BarsOfRun:
    """Return a loader of the bars as they were known at a moment: those in the lake, and no source is asked.

    Universe, splits and funding are as of then, too (``data_request``). Its arguments are those of ``fresh_bars``.
    No copy is kept beside the lake, where a training keeps the one that it goes on with.
    """

    def load_stored(
        lake: Lake,
        settings: Settings,
        progress: TrainingProgress,
        ranks: Ranks,
        control: Control,
        reporter: Progress,
        prefetch: Prefetch,
    ) -> LoadedData | None:
        progress.cutoff_ns = until_ns
        request = data_request(settings, until_ns)
        with _exit_without_lake(progress):
            data = load(lake, request)
        if request.needs_lake:
            _compare_with_beginning(data, progress, settings, lake)
        progress.num_bars = {bars.symbol: len(bars) for bars in data.bars}
        return data

    return load_stored


def _bring_up_to_date(
    lake: Lake,
    settings: Settings,
    progress: TrainingProgress,
    control: Control,
    reporter: Progress,
    prefetch: Prefetch,
) -> tuple[int, str]:
    """Ask the sources for what this run lacks, if anything.

    Returns:
        Where the run's bars end, and the fingerprint of its snapshot, if that was written ahead.
    """
    cutoff_ns = progress.cutoff_ns
    if cutoff_ns:
        request = data_request(settings, cutoff_ns)
        if not request.needs_lake or snapshot.find(lake, request, progress.num_bars):
            return cutoff_ns, ""
        log.warning(
            f"{lake.root} has no copy of the bars that run {progress.run} began with: the sources are asked for "
            f"them again, up to {utc(cutoff_ns):%Y-%m-%d %H:%M} UTC"
        )
    else:
        cutoff_ns, written_ahead = prefetch.take()
        if cutoff_ns:
            return cutoff_ns, written_ahead
    now_ns = time.time_ns()
    # Only what has closed: the same request will have the same bars later.
    cutoff_ns = cutoff_ns or closed_before(now_ns)
    interruptible = Interruptible(reporter, lambda: control.stop_level > 0)
    with contextlib.suppress(StopRequested):  # a stop is agreed on by the ranks afterwards
        refresh(lake, data_request(settings, cutoff_ns), now_ns, interruptible)
    return cutoff_ns, ""


def lost_symbols(rows: Iterable[SymbolRow], num_bars: Iterable[str], request: DataRequest) -> dict[str, str]:
    """Return the symbols that a run began with and cannot have now, with the reason.

    Args:
        rows: of what was loaded for ``request``.
        num_bars: the symbols that the run began with.
        request: symbols that it does not name were given up by the settings.
    """
    dropped = {row.symbol: row.dropped for row in rows}
    has_rule = any(map(top_of, request.symbols.values()))  # whose choice depends on the days in the lake
    lost = {symbol: dropped.get(symbol, "no bars") for symbol in num_bars if dropped.get(symbol, has_rule)}
    # An earlier version trained on those that stand still: their bars are there, but no longer wanted.
    return {symbol: reason for symbol, reason in lost.items() if not reason.startswith(PEGGED)}


def _compare_with_beginning(
    data: LoadedData, progress: TrainingProgress, settings: Settings, lake: Lake
) -> None:
    """Compare a resumed run's bars with those that it began with; fewer are reported.

    Raises:
        ExitProgram: symbols are gone, and the settings do not allow that.
    """
    now = {bars.symbol: len(bars) for bars in data.bars}
    lost = lost_symbols(data.rows, progress.num_bars, data_request(settings, progress.cutoff_ns))
    if lost:
        listed = first_of([f"{symbol} ({reason})" for symbol, reason in lost.items()])
        text = (
            f"run {progress.run} began with symbols that {lake.root} and the sources no longer have: {listed}"
        )
        if settings.missing_symbols == "stop":
            raise ExitProgram(
                EXIT_NO_DATA,
                f"{text[0].upper()}{text[1:]}. Copy the data_dir that it began with to {lake.root} (see Moving "
                "house in docs/checkpoints.md), or continue without them: --missing-symbols continue",
            )
        log.warning(f"{text}; it continues without them")
    still = [symbol for symbol in progress.num_bars if data.dropped.get(symbol, "").startswith(PEGGED)]
    if still:
        log.warning(
            f"run {progress.run} continues without {first_of(still)}, whose price stands still; keep_pegged "
            "keeps such symbols"
        )
    gone = {*lost, *still}
    if unnamed := [symbol for symbol in progress.num_bars if symbol not in now and symbol not in gone]:
        log.warning(
            f"run {progress.run} continues without {first_of(unnamed)}, which the settings no longer name"
        )
    fewer = [
        f"{symbol} {now[symbol]:,} of {count:,}"
        for symbol, count in progress.num_bars.items()
        if now.get(symbol, count) < count
    ]
    if fewer:
        log.warning(
            f"run {progress.run} continues with fewer bars than it began with: {first_of(fewer)}; Yahoo has "
            "minutes of 30 days only, older ones are in the data_dir that it began with"
        )


def make_market(
    settings: Settings,
    bars: Sequence[Bars],
    ranks: Ranks,
    statistics: FeatureStatistics | None,
    copy: Path | None = None,
) -> Market:
    """Put a run's bars on the device, their newest ``holdout_days`` held out (all ranks).

    Args:
        settings: of the training.
        bars: one series per symbol.
        ranks: rank 0 checks the features of one's own on these bars first.
        statistics: scale of the features that training began with; None: computed from these bars.
        copy: the file that has the bars, beside which their features are kept; None: they are computed.

    Raises:
        ExitProgram: there are no bars, or too few to train on.
        FeatureError: a feature of one's own looks ahead, or cannot be used.
    """
    if not bars:
        raise ExitProgram(
            EXIT_NO_DATA,
            f"No symbol has {settings.min_bars:,} bars: {_how_to_get_bars(settings)}",
        )
    _check_features(bars, ranks)
    if statistics is None and ranks.is_first:
        _warn_of_missing_flow(settings.features, bars)
    try:
        holdout_ns = holdout_start_ns(settings, bars)
        table = None
        if copy is not None:
            functions, training_bars = chosen_features(settings.features), bars_before(bars, holdout_ns)
            kept = kept_features.provide(copy, bars, training_bars, functions, statistics, ranks)
            statistics, table = kept.statistics, kept.table
        return Market.from_settings(bars, settings, ranks.device, holdout_ns, statistics, table=table)
    except FeatureError:
        raise
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def _how_to_get_bars(settings: Settings) -> str:
    if settings.sources == ("simulated",):
        return "raise simulated_bars, or lower min_bars"
    files = (
        f"put files of bars into {settings.files_dir} (docs/data.md)" if "files" in settings.sources else ""
    )
    if settings.sources == ("files",):
        return f"{files}, lower min_bars, or try it offline with --demo"
    vendors = "set the keys in .env (see .env.example), check the network, or try it offline with --demo"
    return f"{files}, {vendors}" if files else vendors


def _check_features(bars: Sequence[Bars], ranks: Ranks) -> None:
    """Check the features of one's own on rank 0; all ranks raise FeatureError if one must not be used."""
    errors: list[str] = []
    if ranks.is_first and own_features():
        begin = time.monotonic()
        with heartbeat_thread(CHECK_SECONDS):
            report = check_own_features(bars)
        errors = report.errors
        for warning in report.warnings:
            log.warning(warning)
        if not errors:
            seconds = time.monotonic() - begin
            log.info(f"Features of your own: {', '.join(report.names)}; none looks ahead ({seconds:.1f} s)")
    with heartbeat_while_waiting():
        errors = ranks.broadcast(errors)
    if errors:
        raise FeatureError("\n".join(errors))


def _warn_of_missing_flow(groups: Collection[str], bars: Sequence[Bars]) -> None:
    """Warn where few bars have the order flow by which a new training scales its features, for good."""
    takers = [series.taker_buy_volume for series in bars]
    num_known = sum(int(np.isfinite(taker).sum()) for taker in takers if taker is not None)
    share = num_known / sum(map(len, bars))
    reading = [group for group in ("flow", "panel") if group in groups]
    if not num_known:  # no source has it: what the panel shows of it stays 0
        reading = reading[: "flow" in groups]
    if reading and share < ENOUGH_FLOW:
        log.warning(
            f"{share:.0%} of the bars have the order flow that features {' and '.join(reading)} look at, and this "
            "training keeps the scales that it begins with: fetch what Binance has first, by data --flow, or "
            "leave them out of features"
        )


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
        keep_pegged=settings.keep_pegged,
        files_dir=settings.files_dir or "",
        files_timezone=settings.files_timezone,
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


def _map_copy(
    lake: Lake, request: DataRequest, symbols: Collection[str], ranks: Ranks, written_ahead: str
) -> LoadedData:
    """Map the shared copy of the run's bars; without disk space for one, every rank reads the lake itself."""
    name = ""
    if ranks.is_first and request.needs_lake:
        try:
            path = snapshot.provide(lake, request, symbols=symbols, written_ahead=written_ahead)
            name = path.name if path else ""
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
