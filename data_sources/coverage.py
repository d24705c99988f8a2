"""A series of bars summed up: extent, gaps, sources, stretches, and what was noticed while loading."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, MINUTE_NS, AssetClass, Bars
from data_sources.calendar import expected_minutes
from data_sources.vendors import SOURCES

STALE_BARS = 60
LOW_COVERAGE = 0.6
# Of trade; bars that end longer before the end of a request are stale.
STALE_MINUTES = {
    (source.name, group.asset_class): group.stale_minutes
    for source in SOURCES.values()
    for group in source.groups
}
DAY_MINUTES = {"stock": 390}  # of trade; 1440 for everything else


@dataclass(frozen=True)
class Extent:
    """Where bars begin and end, and what is missing in between. ``first_ns``, ``last_ns``: open_times.

    ``num_gaps`` counts runs of missing minutes between the first and the last bar (stocks: of regular sessions by
    the NYSE calendar; crypto: of all), ``coverage`` is the fraction of those minutes that have a bar, None where
    no calendar knows. ``flow`` counts the bars with a value by column of the order flow, without columns of none.
    """

    num_bars: int
    first_ns: int | None
    last_ns: int | None
    num_gaps: int
    longest_gap_minutes: int
    coverage: float | None
    flow: dict[str, int] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class SourceRow(Extent):
    """What one source has of one symbol, used or not. ``rejected`` counts rows by failed check."""

    source: str
    rejected: dict[str, int]


@dataclass(frozen=True)
class Stretch:
    """Consecutive bars of one series that came from one source."""

    source: str
    first_ns: int
    last_ns: int
    num_bars: int


@dataclass(frozen=True)
class SymbolRow(Extent):
    """One symbol's merged series as a table shows it; ``dropped`` is the reason not to use it, "" for none.

    ``difference`` is the median relative difference of the closes of two sources, None without two.
    """

    symbol: str
    asset_class: AssetClass
    by_source: tuple[SourceRow, ...]
    stretches: tuple[Stretch, ...]
    rejected: dict[str, int]
    num_splits: int
    flags: tuple[str, ...]
    dropped: str
    difference: float | None = None
    has_funding: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources with a bar in the series, sorted."""
        return tuple(sorted({stretch.source for stretch in self.stretches}))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SymbolRow:
        """Return the row whose dataclasses.asdict is given, also one that was JSON meanwhile."""
        parts = {
            "by_source": tuple(SourceRow(**row) for row in values["by_source"]),
            "stretches": tuple(Stretch(**stretch) for stretch in values["stretches"]),
            "flags": tuple(values["flags"]),
        }
        return SymbolRow(**(values | parts))


@dataclass
class Series:
    """One symbol while it is loaded: bars, the source of each, and what was noticed."""

    bars: Bars
    source: NDArray[np.int8]  # (num_bars,) place in SOURCES
    by_source: dict[str, Extent] = field(default_factory=dict)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)  # by source
    num_splits: int = 0
    flags: list[str] = field(default_factory=list)
    difference: float | None = None


def row_of(series: Series, dropped: str) -> SymbolRow:
    """Sum up a series; ``dropped`` is the reason not to use it."""
    bars, flags = series.bars, list(series.flags)
    stretches = _stretches(series)
    extents = dict(series.by_source)
    used = {stretch.source for stretch in stretches}
    extent = extent_of(bars)
    if len(used) == 1 and not extents:
        extents = {next(iter(used)): extent}
    if bars.asset_class == "stock" and extent.coverage is not None and extent.coverage < LOW_COVERAGE:
        flags.append(f"only {100 * extent.coverage:.0f} % of its sessions' minutes have a bar")
    if stale := _longest_stale(bars):
        flags.append(f"{stale} bars in a row at one price without volume")
    rejected: Counter[str] = Counter()
    for counts in series.rejected.values():
        rejected.update(counts)
    nothing = Extent(0, None, None, 0, 0, None)
    return SymbolRow(
        **vars(extent),
        symbol=bars.symbol,
        asset_class=bars.asset_class,
        by_source=tuple(
            SourceRow(
                **vars(extents.get(source, nothing)),
                source=source,
                rejected=dict(sorted(series.rejected.get(source, {}).items())),
            )
            for source in SOURCES
            if source in extents or series.rejected.get(source)
        ),
        stretches=stretches,
        rejected=dict(sorted(rejected.items())),
        num_splits=series.num_splits,
        flags=tuple(flags),
        dropped=dropped,
        difference=series.difference,
        has_funding=bars.funding is not None,
    )


def extent_of(bars: Bars) -> Extent:
    """Measure a series of bars."""
    if not len(bars):
        return Extent(0, None, None, 0, 0, None)
    counts = {name: int(np.isfinite(getattr(bars, name)).sum()) for name in bars.columns[len(COLUMNS) :]}
    flow = {name: count for name, count in counts.items() if count}
    return Extent(len(bars), int(bars.open_time[0]), int(bars.open_time[-1]), *_gaps(bars), flow=flow)


def _stretches(series: Series) -> tuple[Stretch, ...]:
    if not len(series.bars):
        return ()
    time, names = series.bars.open_time, tuple(SOURCES)
    starts = np.append(0, np.flatnonzero(np.diff(series.source)) + 1).tolist()
    ends = [*starts[1:], len(time)]
    return tuple(
        Stretch(names[series.source[start]], int(time[start]), int(time[end - 1]), end - start)
        for start, end in zip(starts, ends, strict=True)
    )


def _gaps(bars: Bars) -> tuple[int, int, float | None]:
    """Return (gaps, minutes of the longest, coverage) between the first and the last bar."""
    if bars.asset_class != "stock":
        place = (bars.open_time - bars.open_time[0]) // MINUTE_NS
        num_expected = int(place[-1]) + 1
    else:
        expected = expected_minutes(int(bars.open_time[0]), int(bars.open_time[-1]) + 1)
        if expected is None or not len(expected):
            return 0, 0, None
        place = np.searchsorted(expected, bars.open_time)
        hit = expected[np.minimum(place, len(expected) - 1)] == bars.open_time
        place, num_expected = place[hit], len(expected)
        place = np.concatenate([[-1], place, [num_expected]])
    missing = np.diff(place) - 1
    num_missing = int(missing.sum())
    return int(np.count_nonzero(missing)), int(missing.max(initial=0)), 1 - num_missing / num_expected


def _longest_stale(bars: Bars) -> int:
    """Return the longest run of bars at one close without volume, 0 up to STALE_BARS."""
    still = (bars.close[1:] == bars.close[:-1]) & (bars.volume[1:] == 0)
    if np.count_nonzero(still) <= STALE_BARS:
        return 0
    moves = np.flatnonzero(np.concatenate([[True], ~still, [True]]))
    longest = int(np.diff(moves).max()) - 1
    return longest if longest > STALE_BARS else 0


def days_late(rows: Sequence[SymbolRow], end_ns: int) -> dict[str, float]:
    """Return, by source, for how many days of trade its newest bar has been stale at ``end_ns``; 0: not stale.

    What is computed ends where it was asked to, and is never late.
    """
    newest: dict[tuple[str, AssetClass], int] = {}
    for row in rows:
        for extent in row.by_source:
            if extent.last_ns is not None:
                key = extent.source, row.asset_class
                newest[key] = max(newest.get(key, 0), extent.last_ns)
    late: dict[str, float] = {}
    for (source, asset_class), last_ns in newest.items():
        behind = minutes_behind(last_ns, asset_class, end_ns) or 0
        stale = behind - STALE_MINUTES.get((source, asset_class), math.inf)
        days = max(0.0, stale / DAY_MINUTES.get(asset_class, 1440))
        late[source] = min(late.get(source, math.inf), days)  # one class that comes shows that it lives
    return late


def minutes_behind(last_ns: int | None, asset_class: str, end_ns: int) -> int | None:
    """Count the minutes of trade between the newest bar and the requested end."""
    if last_ns is None:
        return None
    start_ns = last_ns + MINUTE_NS
    if asset_class == "stock":
        expected = expected_minutes(start_ns, end_ns)
        if expected is not None:
            return int(np.count_nonzero(expected + MINUTE_NS <= end_ns))
    return max(0, (end_ns - start_ns) // MINUTE_NS)
