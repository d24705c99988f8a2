"""What the command ``data`` tells: one row per source and symbol, as a table for people or JSON for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from data_sources import snapshot
from data_sources.coverage import Extent, SymbolRow, minutes_behind
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.progress import WarningCollector
from data_sources.refresh import SourceReport, refresh
from data_sources.sources import DataRequest
from data_sources.vendors import SOURCES
from monitoring.console import Console
from runtime.control import EXIT_NO_DATA

log = logging.getLogger("continuous_training")

STALE_MINUTES = {
    (source.name, group.asset_class): group.stale_minutes
    for source in SOURCES.values()
    for group in source.groups
}
THIN_COVERAGE = {"stock": 0.6, "crypto": 0.9}
COLUMNS = (
    "symbol",
    "source",
    "bars",
    "first",
    "last, UTC",
    "coverage",
    "gaps",
    "rejected",
    "splits",
    "behind",
)


def show(
    lake: Lake,
    request: DataRequest,
    now_ns: int,
    console: Console,
    refreshes: bool,
    verifies: bool,
    as_json: bool,
) -> int:
    """Verify, refresh and read the lake as asked, and tell what it holds.

    Returns:
        The exit code: EXIT_NO_DATA without a symbol to train on, 1 where damage was found and nobody healed it.
    """
    damaged = [*lake.verify(), *snapshot.verify(lake)] if verifies else []  # first: a refresh heals
    reports = refresh(lake, request, now_ns, console) if refreshes else {}
    loaded = load(lake, request)
    told = report(loaded, reports, damaged, request)
    code = EXIT_NO_DATA if not loaded.bars else int(bool(damaged) and not refreshes)
    if as_json:
        console.emit(json.dumps(told, indent=1))
        return code
    title = f"{len(loaded.bars)} symbols, {sum(map(len, loaded.bars)):,} bars, data {loaded.fingerprint}"
    if told["series"]:
        console.table(title, (*COLUMNS, "verdict"), map(_cells, told["series"]))
    console.data_warnings(loaded)
    for name in damaged:
        log.warning(f"damaged and set aside: {name}" + ("" if refreshes else "; a refresh fetches it again"))
    return code


def in_background(lake: Lake, request: DataRequest, now_ns: int) -> str:
    """Refresh and make the copy that the next run will map; return what training/data_feed.py reads, as JSON.

    Raises:
        LakeError: the lake cannot be read, or the copy cannot be written.
    """
    told = WarningCollector()
    refresh(lake, request, now_ns, told)
    snapshot.provide(lake, request)
    return json.dumps({"now_ns": now_ns, "warnings": told.warnings})


def report(
    loaded: LoadedData, reports: Mapping[str, SourceReport], damaged: Sequence[str], request: DataRequest
) -> dict[str, Any]:
    """Return all that is known of the data as plain types.

    ``series`` has one entry per symbol and source, and one more with source "merged" for a symbol of several;
    ``symbols`` has one per symbol, with its stretches. Times are ISO 8601 in UTC, of the first and last minute.
    """
    return {
        "fingerprint": loaded.fingerprint,
        "from": _iso(request.start_ns),
        "to": _iso(request.end_ns),
        "bars": sum(map(len, loaded.bars)),
        "refreshed": {
            source: {"status": each.status, "message": each.message, "seconds": round(each.seconds, 3)}
            for source, each in reports.items()
        },
        "damaged": list(damaged),
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
                        "source": each.source,
                        "first": _iso(each.first_ns),
                        "last": _iso(each.last_ns),
                        "bars": each.num_bars,
                    }
                    for each in row.stretches
                ],
            }
            for row in loaded.rows
        ],
    }


def _entries(row: SymbolRow, request: DataRequest) -> Iterator[dict[str, Any]]:
    extents: list[tuple[str, Extent, Mapping[str, int]]] = [
        (each.source, each, each.rejected) for each in row.by_source
    ]
    if len(extents) != 1:
        extents.append(("merged" if extents else "none", row, row.rejected))
    for source, extent, rejected in extents:
        behind = minutes_behind(extent.last_ns, row.asset_class, request.end_ns)
        names = [each.source for each in row.by_source] if source == "merged" else [source]
        yield {
            "symbol": row.symbol,
            "source": source,
            "bars": extent.num_bars,
            "first": _iso(extent.first_ns),
            "last": _iso(extent.last_ns),
            "coverage": None if extent.coverage is None else round(extent.coverage, 6),
            "gaps": extent.num_gaps,
            "longest_gap_minutes": extent.longest_gap_minutes,
            "rejected": dict(rejected),
            "splits": row.num_splits,
            "behind_minutes": behind,
            "verdict": _verdict(
                row, extent, names, behind, is_series=source == "merged" or len(extents) == 1
            ),
        }


def _verdict(
    row: SymbolRow, extent: Extent, sources: Sequence[str], behind: int | None, *, is_series: bool
) -> str:
    """Say the worst of a series in a word or two; "ok" otherwise."""
    if not extent.num_bars:
        return "no bars"
    if is_series and row.dropped:
        return "too few bars"
    if is_series and any("split" in flag for flag in row.flags):
        return "split missing"
    latest = max(STALE_MINUTES.get((source, row.asset_class), 60) for source in sources)
    if behind is not None and behind > latest:
        return "stale"
    if extent.coverage is not None and extent.coverage < THIN_COVERAGE[row.asset_class]:
        return "thin"
    if is_series and row.flags:
        return "see warning"
    return "ok"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    coverage, behind = entry["coverage"], entry["behind_minutes"]
    return [
        entry["symbol"],
        entry["source"],
        f"{entry['bars']:,}",
        (entry["first"] or "")[:10],
        (entry["last"] or "")[:16].replace("T", " "),
        "" if coverage is None else f"{coverage:.1%}",
        f"{entry['gaps']:,}",
        ", ".join(f"{count} {reason}" for reason, count in entry["rejected"].items()) or "0",
        str(entry["splits"]),
        "" if behind is None else _span(behind),
        entry["verdict"],
    ]


def _span(minutes: int) -> str:
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes / 60:.0f} h" if minutes < 72 * 60 else f"{minutes / 1440:.0f} d"


def _iso(time_ns: int | None) -> str | None:
    if time_ns is None:
        return None
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
