"""The command ``data``: one row per source and symbol, as a table for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_sources import snapshot
from data_sources.bars import FLOW_COLUMNS
from data_sources.coverage import STALE_MINUTES, Extent, SymbolRow, minutes_behind
from data_sources.flow import FILES_PER_REFRESH, FlowPlan, fetch_flow, missing_flow
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.pegged import PEGGED
from data_sources.progress import WarningCollector
from data_sources.refresh import SourceReport, refresh
from data_sources.sources import DataRequest
from monitoring.console import Console
from monitoring.format import age, iso_time
from runtime.control import EXIT_NO_DATA
from runtime.wording import first_of

log = logging.getLogger("continuous_training")

THIN_COVERAGE = {"stock": 0.6, "crypto": 0.9, "perpetual": 0.9}
COLUMNS = (
    "symbol", "source", "bars", "first", "last, UTC", "coverage", "flow", "gaps", "rejected", "splits", "behind",
    "verdict",
)  # fmt: skip
SPARE = (
    "first",
    "flow",
    "splits",
    "gaps",
    "source",
    "rejected",
    "coverage",
    "behind",
)  # in a narrow terminal


def show(
    lake: Lake,
    request: DataRequest,
    now_ns: int,
    console: Console,
    refreshes: bool,
    verifies: bool,
    fetches_flow: bool,
    as_json: bool,
    has_details: bool = False,
) -> int:
    """Verify, refresh and complete the lake where asked to, and print what it holds, of each symbol or in detail.

    Returns:
        The exit code: EXIT_NO_DATA without a symbol to train on, 1 if damage was found and not repaired.
    """
    damaged = [*lake.verify(), *snapshot.verify(lake)] if verifies else []  # first, as a refresh repairs
    reports = refresh(lake, request, now_ns, console) if refreshes else {}
    if fetches_flow:
        fetch_flow(lake, request, now_ns, console)
    loaded = load(lake, request, keeps_bars=False)
    flow = missing_flow(lake, request, now_ns)
    content = report(loaded, reports, damaged, request, flow)
    used = [row for row in loaded.rows if not row.dropped]
    code = EXIT_NO_DATA if not used else int(bool(damaged) and not refreshes)
    if as_json:
        console.emit(json.dumps(content, indent=1))
        return code
    title = f"{len(used)} symbols, {content['bars']:,} bars, data {loaded.fingerprint}"
    if entries := content["series"]:
        whole = [entry for entry in entries if entry["is_series"]]
        rows = [_cells(entry, in_full=has_details) for entry in (entries if has_details else whole)]
        console.table(title, COLUMNS, rows, SPARE, _summary(whole))
    console.show_data_warnings(loaded)
    if flow.files:
        log.info(f"{flow}; or at once, by data --flow")
    for name in damaged:
        log.warning(f"damaged and set aside: {name}" + ("" if refreshes else "; a refresh fetches it again"))
    return code


def in_background(
    lake: Lake, request: DataRequest, now_ns: int, cutoff_ns: int, emit: Callable[[str], None]
) -> None:
    """Refresh, and write the snapshot that the next run will map; then fetch order flow that former bars lack.

    Args:
        lake: to refresh.
        request: for the bars up to ``cutoff_ns``.
        now_ns: the present.
        cutoff_ns: the end of the last minute that has closed.
        emit: receives JSON for training/prefetch.py.

    Raises:
        LakeError: the lake cannot be read, or the snapshot cannot be written.
    """
    collector = WarningCollector()
    refresh(lake, request, now_ns, collector)
    path = snapshot.provide(lake, request)
    bars = snapshot.content_of(path) if path else ""
    emit(json.dumps({"now_ns": cutoff_ns, "bars": bars, "warnings": collector.warnings}))
    fetch_flow(lake, request, now_ns, _LaterWarnings(emit), FILES_PER_REFRESH)


class _LaterWarnings(WarningCollector):
    """Emits each warning when it comes: this process may be killed at any time."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        super().__init__()
        self._emit = emit

    def warn(self, source: str, message: str) -> None:
        super().warn(source, message)
        self._emit(json.dumps({"later_warning": self.warnings[-1]}))


def report(
    loaded: LoadedData,
    reports: Mapping[str, SourceReport],
    damaged: Sequence[str],
    request: DataRequest,
    flow: FlowPlan,
) -> dict[str, Any]:
    """Return everything known about the data as plain types.

    ``series`` has one entry per symbol and source, and one with source "merged" for a symbol of several;
    ``symbols`` has one per symbol, with its stretches. Times are ISO 8601 in UTC, of the first and last minute.
    """
    return {
        "fingerprint": loaded.fingerprint,
        "from": iso_time(request.start_ns),
        "to": iso_time(request.end_ns),
        "bars": sum(row.num_bars for row in loaded.rows if not row.dropped),
        "refreshed": {
            source: {"status": result.status, "message": result.message, "seconds": round(result.seconds, 3)}
            for source, result in reports.items()
        },
        "damaged": list(damaged),
        "flow_to_fetch": {
            "files": flow.files,
            "bars": flow.bars,
            "download_bytes": flow.downloaded_bytes,
            "disk_bytes": flow.kept_bytes,
        },
        "series": [entry for row in loaded.rows for entry in _entries(row, request)],
        "symbols": [
            {
                "symbol": row.symbol,
                "asset_class": row.asset_class,
                "bars": row.num_bars,
                "used": not row.dropped,
                "dropped": row.dropped,
                "flags": list(row.flags),
                "difference": row.difference,
                "stretches": [
                    {
                        "source": stretch.source,
                        "first": iso_time(stretch.first_ns),
                        "last": iso_time(stretch.last_ns),
                        "bars": stretch.num_bars,
                    }
                    for stretch in row.stretches
                ],
            }
            for row in loaded.rows
        ],
    }


def _entries(row: SymbolRow, request: DataRequest) -> Iterator[dict[str, Any]]:
    extents: list[tuple[str, Extent, Mapping[str, int]]] = [
        (extent.source, extent, extent.rejected) for extent in row.by_source
    ]
    if len(extents) != 1:
        extents.append(("merged" if extents else "none", row, row.rejected))
    for source, extent, rejected in extents:
        behind = minutes_behind(extent.last_ns, row.asset_class, request.end_ns)
        names = [part.source for part in row.by_source] if source == "merged" else [source]
        is_series = source == "merged" or len(extents) == 1  # what training uses of the symbol
        yield {
            "symbol": row.symbol,
            "source": source,
            "bars": extent.num_bars,
            "first": _iso_or_none(extent.first_ns),
            "last": _iso_or_none(extent.last_ns),
            "coverage": None if extent.coverage is None else round(extent.coverage, 6),
            "flow": dict(extent.flow),
            "gaps": extent.num_gaps,
            "longest_gap_minutes": extent.longest_gap_minutes,
            "rejected": dict(rejected),
            "splits": row.num_splits,
            "behind_minutes": behind,
            "verdict": _verdict(row, extent, names, behind, is_series=is_series),
            "is_series": is_series,
        }


def _verdict(
    row: SymbolRow, extent: Extent, sources: Sequence[str], behind: int | None, *, is_series: bool
) -> str:
    """Return the worst problem of a series in a word or two; "ok" without one."""
    if not extent.num_bars:
        return "no bars"
    if is_series and row.dropped:
        return "pegged" if row.dropped.startswith(PEGGED) else "too few bars"
    if is_series and any("split" in flag for flag in row.flags):
        return "split missing"
    # What is computed ends where it was asked to, and is never fetched again.
    latest = max(STALE_MINUTES.get((source, row.asset_class), math.inf) for source in sources)
    if behind is not None and behind > latest:
        return "stale"
    if extent.coverage is not None and extent.coverage < THIN_COVERAGE[row.asset_class]:
        return "thin"
    if is_series and row.flags:
        return "see warning"
    return "ok"


def _summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return how many symbols have which verdict, by name where that is not "ok"."""
    by_verdict: dict[str, list[str]] = {}
    for entry in entries:
        by_verdict.setdefault(entry["verdict"], []).append(entry["symbol"])
    parts = [f"{len(by_verdict.pop('ok', []))} ok"]
    parts += [f"{len(symbols)} {verdict}: {first_of(symbols)}" for verdict, symbols in by_verdict.items()]
    return "; ".join(parts)


def _cells(entry: Mapping[str, Any], in_full: bool) -> list[str]:
    coverage, behind, rejected = entry["coverage"], entry["behind_minutes"], entry["rejected"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items()) if in_full else ""
    return [
        entry["symbol"],
        entry["source"],
        f"{entry['bars']:,}",
        (entry["first"] or "")[:10],
        (entry["last"] or "")[0 if in_full else 5 : 16].replace("T", " "),
        "" if coverage is None else f"{coverage:.1%}",
        _flow(entry),
        f"{entry['gaps']:,}",
        reasons or f"{sum(rejected.values()):,}",
        str(entry["splits"]),
        "" if behind is None else _lag(behind),
        entry["verdict"],
    ]


def _flow(entry: Mapping[str, Any]) -> str:
    """Return which share of the bars has order flow, such as "trades 98%, taker 73%", or "98%" for both."""
    shares = {name.split("_")[0]: f"{count / entry['bars']:.0%}" for name, count in entry["flow"].items()}
    if len(shares) == len(FLOW_COLUMNS) and len(set(shares.values())) == 1:
        return next(iter(shares.values()))
    return ", ".join(f"{name} {share}" for name, share in shares.items())


def _lag(minutes: int) -> str:
    return f"{minutes} min" if minutes < 120 else age(60 * minutes)


def _iso_or_none(time_ns: int | None) -> str | None:
    return None if time_ns is None else iso_time(time_ns)
