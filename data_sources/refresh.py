"""Bring the lake up to date from every source, each in isolation; then ``load`` reads what there is."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from data_sources.errors import DataError, LakeError, MissingCredentials
from data_sources.lake.lake import Lake
from data_sources.load import DataRequest, LoadedData, load
from data_sources.progress import Progress
from data_sources.splits import SplitLedger
from data_sources.universe import named, top_of

__all__ = ["DataRequest", "LoadedData", "SourceReport", "load", "refresh"]

Adapter = Callable[[Lake, DataRequest, int, Progress, SplitLedger], None]
LABELS = {"polygon": "Polygon", "binance": "Binance", "yahoo": "Yahoo", "simulated": "Simulated market"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceReport:
    """How one source fared. ``message`` is one line that can be shown as it is and begins with its name.

    ``rows`` and ``newest_ns`` (end of the newest interval, None without one) say what the lake holds of it now.
    """

    status: Literal["ok", "skipped", "failed"]
    message: str
    seconds: float
    rows: int = 0
    newest_ns: int | None = None


def refresh(
    lake: Lake,
    request: DataRequest,
    now_ns: int,
    progress: Progress,
    *,
    adapters: Mapping[str, Adapter] | None = None,
) -> dict[str, SourceReport]:
    """Ask every source of the request for what the lake lacks, one after another.

    Whatever a source does, the others are asked and what arrived stays. Sources that were skipped or failed are
    told through ``progress.warn`` as well. Nothing but an interrupt leaves this function.

    Args:
        lake: is locked against other writers for as long as this takes.
        request: symbols and interval.
        now_ns: the present; later minutes, and those not closed for 5 seconds, are not asked for.
        progress: is told by the adapters.
        adapters: how to refresh each source, in place of the real ones.

    Returns:
        A report per source, in the order of ``request.sources``.
    """
    adapters = adapters or {"polygon": _polygon, "binance": _binance, "yahoo": _yahoo}
    wanted = list(dict.fromkeys(request.sources))
    reports: dict[str, SourceReport] = {}
    if "simulated" in wanted:
        reports["simulated"] = SourceReport("ok", f"{LABELS['simulated']} ok: needs no download", 0.0)
    sources = [source for source in wanted if source != "simulated"]
    if sources:
        started = time.monotonic()
        try:
            with lake.writing():
                ledger = SplitLedger(lake.root)
                for source in sources:
                    reports[source] = _one(lake, request, now_ns, progress, source, adapters[source], ledger)
        except (DataError, OSError) as error:  # no source could be asked: the lake itself is at fault
            for source in sources:
                if source not in reports:
                    reports[source] = _failed(lake, source, error, time.monotonic() - started)
    for source in sources:
        if reports[source].status != "ok":
            progress.warn(source, reports[source].message)
    return {source: reports[source] for source in wanted}


def _one(
    lake: Lake,
    request: DataRequest,
    now_ns: int,
    progress: Progress,
    source: str,
    adapter: Adapter,
    ledger: SplitLedger,
) -> SourceReport:
    started = time.monotonic()
    try:
        adapter(lake, request, now_ns, progress, ledger)
        rows, newest_ns, kept = _kept(lake, source)
    except MissingCredentials as error:
        seconds = time.monotonic() - started
        return SourceReport("skipped", f"{LABELS[source]} skipped: {error}", seconds)
    except (DataError, OSError, ImportError) as error:
        return _failed(lake, source, error, time.monotonic() - started)
    except Exception as error:
        # A fault of ours, not of the world: told with its traceback, and still no reason to stop training.
        logger.exception("the %s adapter broke", source)
        return _failed(lake, source, error, time.monotonic() - started)
    return SourceReport("ok", f"{LABELS[source]} ok: {kept}", time.monotonic() - started, rows, newest_ns)


def _failed(lake: Lake, source: str, error: Exception, seconds: float) -> SourceReport:
    reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    try:
        rows, newest_ns, kept = _kept(lake, source)
    except DataError:
        rows, newest_ns, kept = 0, None, "what the lake holds cannot be read"
    return SourceReport("failed", f"{LABELS[source]} failed: {reason}; {kept}", seconds, rows, newest_ns)


def _kept(lake: Lake, source: str) -> tuple[int, int | None, str]:
    """Return (rows, end of the newest interval, both in words) of what the lake holds, from footers alone."""
    parts = [part for dataset in lake.datasets(source) for part in lake.parts(source, dataset).values()]
    if not parts:
        return 0, None, "nothing is kept of it yet"
    rows, newest_ns = sum(part.rows for part in parts), max(part.end_ns for part in parts)
    newest = datetime.datetime.fromtimestamp(newest_ns // 1_000_000_000, datetime.UTC)
    return rows, newest_ns, f"{rows:,} bars up to {newest:%Y-%m-%d %H:%M} UTC are kept"


# Imported by name when asked for: a vendor's library takes a second, and its absence costs only that source.


def _polygon(lake: Lake, request: DataRequest, now_ns: int, progress: Progress, splits: SplitLedger) -> None:
    from data_sources.vendors.polygon import Polygon

    end_ns = min(request.end_ns, now_ns)
    if request.stocks:
        _polygon_splits(request, now_ns, progress, splits)
    polygon = Polygon.from_environment()
    polygon.refresh(lake, request.stocks, request.polygon_crypto, request.start_ns, end_ns, now_ns, progress)


def _polygon_splits(request: DataRequest, now_ns: int, progress: Progress, splits: SplitLedger) -> None:
    """Ask for splits where a key is given; Yahoo's, and those that were learned before, are there without."""
    from data_sources.vendors.polygon_splits import PolygonSplits

    try:
        source = PolygonSplits.from_environment()
        if source is not None:
            stocks = None if top_of(request.stocks) else request.stocks
            _, num_bad = source.update(splits, stocks, request.start_ns, now_ns)
            if num_bad:
                progress.warn("polygon", f"splits: {num_bad} entries cannot be read")
        elif top_of(request.stocks):
            progress.warn(
                "polygon", "splits of stocks that are not named need POLYGON_API_KEY, see .env.example"
            )
    except LakeError:
        raise
    except DataError as error:
        progress.warn("polygon", f"splits: {error}")


def _binance(lake: Lake, request: DataRequest, now_ns: int, progress: Progress, splits: SplitLedger) -> None:
    from data_sources.vendors.binance import Binance

    end_ns = min(request.end_ns, now_ns)
    Binance.from_environment().refresh(
        lake, request.binance_pairs, request.start_ns, end_ns, now_ns, progress
    )


def _yahoo(lake: Lake, request: DataRequest, now_ns: int, progress: Progress, splits: SplitLedger) -> None:
    from data_sources.vendors.yahoo import Yahoo

    end_ns = min(request.end_ns, now_ns)
    stocks = named(request.stocks)
    Yahoo.from_environment().refresh(lake, stocks, request.start_ns, end_ns, now_ns, progress, splits)
