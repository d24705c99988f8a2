"""Features of bars that did not change, taken over from a former table: the same bits as computed from all bars.

A built-in feature looks back over LOOKBACK_BARS bars of its symbol at most, those of the panel over as many of
every symbol, but for ``volume_for_the_time_of_day``, which has a number of bars of the same half hour. So rows are
computed where bars are new, or other ones, from a little more history than they look at; and where history now
begins, since windows are shorter there. Features of one's own may look back over anything: they are computed from
all bars. ``tests/envs/test_feature_reuse.py`` compares the bits.

Shapes: B = bars of a symbol, F = features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import FLOW_COLUMNS, Bars
from envs.features import (
    BUILT_IN,
    GROUPS,
    SAME_TIME_BARS,
    FeatureFunction,
    FeatureStatistics,
    compute,
    panel_of,
)
from envs.history import MINUTES_PER_DAY, local_minutes
from envs.panel import MOST_AGE_NS, Panel

LOOKBACK_BARS = 2_048  # the longest: a beta of 1,440 returns, limited by the volatility of 240 bars
COMPARED_ROWS = 64  # computed although they are known: the two must agree
NUM_HALF_HOURS = 48
NEVER_NS = 1 << 62
_CHUNK_BARS = 1 << 16  # compared at once: fits in a cache


class TableDiffersError(Exception):
    """A former table has other values than are computed from the same bars: damaged, or of another program."""


@dataclass(frozen=True)
class FormerTable:
    """What was computed before, with the same features and statistics."""

    bars: Mapping[str, Bars]  # by symbol
    rows: Mapping[str, Tensor]  # (B, F) float16 each


@dataclass(frozen=True)
class _Overlap:
    """The longest run of bars that both have, from the first one that could be the same."""

    first: int
    first_before: int
    length: int
    changed_ns: int | None  # open time of the first bar after it in either; None: both end with it


@dataclass(frozen=True)
class _Plan:
    """Rows of one symbol: ``kept`` ones are taken over; those before and after them are computed."""

    kept: slice
    first_before: int  # the former row of the first one that is kept
    head_end: int  # rows before the kept ones are computed from the bars before this one,
    tail_begin: int  # and those after them from the bars from this one on


def table_parts(
    bars: Sequence[Bars],
    functions: Mapping[str, FeatureFunction],
    statistics: FeatureStatistics,
    device: torch.device,
    former: FormerTable | None = None,
    panel: Panel | None = None,
) -> Iterator[Tensor]:
    """Yield the normalised features of all bars, symbol by symbol, in parts (n, F) float16 on the CPU.

    Args:
        bars: one series per symbol.
        functions: name -> feature.
        statistics: their scale.
        device: to compute on.
        former: what is known; None: everything is computed.
        panel: of all these bars; None: made here.

    Raises:
        TableDiffersError: rows that are known are not what is computed now.
        FeatureError: see ``compute``.
    """

    def rows_of(series: Bars, names: Sequence[str], panel: Panel) -> Tensor:
        chosen = {name: functions[name] for name in names}
        return statistics.of(names).normalise(compute(series, device, chosen, panel)).cpu()

    whole = panel_of(bars, device, functions) if panel is None else panel
    plans = _plans(bars, former, sees_others=any(name in functions for name in GROUPS["panel"]))
    if former is None or plans is None:
        for series in bars:
            yield rows_of(series, list(functions), whole)
        return
    columns = [place for place, name in enumerate(functions) if name in BUILT_IN]
    built_in = [name for name in functions if name in BUILT_IN]
    own = [name for name in functions if name not in BUILT_IN]
    heads = [series.rows(0, plan.head_end) for series, plan in zip(bars, plans, strict=True)]
    tails = [series.rows(plan.tail_begin, len(series)) for series, plan in zip(bars, plans, strict=True)]
    head_panel, tail_panel = (panel_of(parts, device, functions) for parts in (heads, tails))
    for series, head, tail, plan in zip(bars, heads, tails, plans, strict=True):
        parts = []
        if begin := plan.kept.start:
            parts.append(rows_of(head, built_in, head_panel)[:begin])
        if num_kept := plan.kept.stop - begin:
            kept = former.rows[series.symbol][plan.first_before : plan.first_before + num_kept]
            parts.append(kept[:, columns] if own else kept)
        if plan.kept.stop < len(series):
            rows = rows_of(tail, built_in, tail_panel)[plan.kept.stop - COMPARED_ROWS - plan.tail_begin :]
            if not torch.equal(rows[:COMPARED_ROWS], parts[-1][-COMPARED_ROWS:]):
                raise TableDiffersError(f"the known features of {series.symbol} are not what is computed now")
            parts.append(rows[COMPARED_ROWS:])
        if own:  # in the order of the functions: built-in features come first
            parts = [torch.cat([torch.cat(parts), rows_of(series, own, whole)], dim=1)]
        yield from parts


def _plans(bars: Sequence[Bars], former: FormerTable | None, sees_others: bool) -> list[_Plan] | None:
    """Return a plan for every symbol; None where nothing can be kept."""
    if former is None:
        return None
    overlaps = [_overlap(series, former.bars.get(series.symbol)) for series in bars]
    half_hours = [_half_hours(series) for series in bars]
    starts = [_settled(*given) for given in zip(half_hours, overlaps, strict=True)]
    ends = [overlap.first + overlap.length for overlap in overlaps]
    if not sees_others:
        return [_plan(*given) for given in zip(half_hours, overlaps, starts, ends, strict=True)]
    if _kinds(bars) != _kinds(former.bars.values()):
        return None  # another symbol may lead, and each counts from its first bar on
    settled_ns = max(
        (
            int(series.open_time[min(start, len(series) - 1)]) + MOST_AGE_NS
            for series, start in zip(bars, starts, strict=True)
            if start
        ),
        default=0,
    )
    changed_ns = min((o.changed_ns for o in overlaps if o.changed_ns is not None), default=NEVER_NS)
    for number, series in enumerate(bars):
        settled, changed = np.searchsorted(series.open_time, (settled_ns, changed_ns)).tolist()
        if settled:
            starts[number] = max(starts[number], settled + LOOKBACK_BARS)
        ends[number] = min(ends[number], changed)
    plans = [_plan(*given) for given in zip(half_hours, overlaps, starts, ends, strict=True)]
    return _widened(bars, plans)


def _widened(bars: Sequence[Bars], plans: Sequence[_Plan]) -> list[_Plan]:
    """Let heads and tails have the bars of all symbols that a computed row of any symbol looks at."""
    given = list(zip(bars, plans, strict=True))
    until_ns = max((int(s.open_time[p.head_end - 1]) for s, p in given if p.head_end), default=0)
    tails = (int(s.open_time[p.tail_begin]) for s, p in given if p.tail_begin < len(s))
    since_ns = min(tails, default=NEVER_NS) - MOST_AGE_NS
    widened = []
    for series, plan in given:
        head_end, since = np.searchsorted(series.open_time, (until_ns + 1, since_ns)).tolist()
        # One bar at least: a leader without any would give way to another.
        tail_begin = max(0, min(since - LOOKBACK_BARS, plan.tail_begin, len(series) - 1))
        widened.append(replace(plan, head_end=max(head_end, 1), tail_begin=tail_begin))
    return widened


def _plan(half_hours: NDArray[np.int64], overlap: _Overlap, begin: int, end: int) -> _Plan:
    """Keep the rows from ``begin`` to ``end`` if they are many enough to be compared, else none."""
    num_bars = len(half_hours)
    if end - begin <= COMPARED_ROWS:
        return _Plan(slice(num_bars, num_bars), 0, num_bars, num_bars)
    tail_begin = num_bars if end == num_bars else _tail_begin(half_hours, end - COMPARED_ROWS)
    return _Plan(slice(begin, end), overlap.first_before + begin - overlap.first, begin, tail_begin)


def _kinds(bars: Iterable[Bars]) -> dict[str, str]:
    return {series.symbol: series.asset_class for series in bars}


def _half_hours(series: Bars) -> NDArray[np.int64]:
    """Return the half hour of the day of every bar on its market's clock, 0 to 47, (B,)."""
    return local_minutes(series.open_time, series.asset_class) % MINUTES_PER_DAY // 30


def _tail_begin(half_hours: NDArray[np.int64], first: int) -> int:
    """Return a bar from which on all that rows from ``first`` on look at is there."""
    is_there = np.bincount(half_hours[first:], minlength=NUM_HALF_HOURS) > 0
    back = LOOKBACK_BARS
    while back < first:
        before = np.bincount(half_hours[first - back : first], minlength=NUM_HALF_HOURS)
        if (before[is_there] >= SAME_TIME_BARS).all():
            return first - back
        back *= 2
    return 0


def _settled(half_hours: NDArray[np.int64], overlap: _Overlap) -> int:
    """Return the first row of an overlap from which on none looks at bars before it; its end if there is none."""
    if overlap.first == overlap.first_before == 0:
        return 0  # before it there is nothing
    first, end = overlap.first, overlap.first + overlap.length
    all_rows = np.bincount(half_hours[first:end], minlength=NUM_HALF_HOURS)
    ahead = LOOKBACK_BARS
    while first + ahead < end:
        before = np.bincount(half_hours[first : first + ahead], minlength=NUM_HALF_HOURS)
        if (before[all_rows > before] >= SAME_TIME_BARS).all():
            return first + ahead
        ahead *= 2
    return end


def _overlap(now: Bars, before: Bars | None) -> _Overlap:
    if before is None or not len(now) or not len(before) or now.asset_class != before.asset_class:
        return _Overlap(0, 0, 0, int(now.open_time[0]) if len(now) else None)
    begin_ns = max(now.open_time[0], before.open_time[0])
    first = int(np.searchsorted(now.open_time, begin_ns))
    first_before = int(np.searchsorted(before.open_time, begin_ns))
    most = min(len(now) - first, len(before) - first_before)
    length = _equal_bars(now.rows(first, first + most), before.rows(first_before, first_before + most))
    following = [
        int(series.open_time[place + length])
        for series, place in ((now, first), (before, first_before))
        if place + length < len(series)
    ]
    return _Overlap(first, first_before, length, min(following, default=None))


def _equal_bars(one: Bars, other: Bars) -> int:
    """Return how many bars from the first on are the same to the bit; of the flow None is as good as NaN."""
    names = [name for name in (*one.columns, *other.columns) if name not in FLOW_COLUMNS]
    for begin in range(0, len(one), _CHUNK_BARS):
        chunk = slice(begin, begin + _CHUNK_BARS)
        equal = np.ones(len(one.open_time[chunk]), np.bool_)
        for name in dict.fromkeys(names):
            equal &= getattr(one, name)[chunk].view(np.int64) == getattr(other, name)[chunk].view(np.int64)
        for name in FLOW_COLUMNS:
            mine, its = getattr(one, name), getattr(other, name)
            if mine is not None and its is not None:
                equal &= mine[chunk].view(np.int64) == its[chunk].view(np.int64)
            elif mine is not None or its is not None:
                equal &= np.isnan((mine if its is None else its)[chunk])
        if not equal.all():
            return begin + int(np.argmin(equal))
    return len(one)
