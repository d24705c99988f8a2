"""Which weeks of a stock to ask Yahoo for, and how an answer is merged with the bars that are kept.

Yahoo has minutes of the last 30 days, at most 8 days per request: one trading week fits a request, and
older bars exist in the lake alone. So a part is one week, named by its Monday; it is fetched again until the
week is over and settled, and a new answer never removes a kept bar.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS, Bars
from data_sources.calendar import (
    expected_minutes,
    in_regular_session,
    new_york_midnight_ns,
    new_york_time,
)
from data_sources.lake.parts import Part
from data_sources.lake.quality import NOT_QUARANTINED, bar_table, clean, closed_before
from data_sources.sources import RefreshJob
from data_sources.splits import Split

SOURCE = "yahoo"
REACH_NS = 29 * DAY_NS  # Yahoo's 30, less one for clocks that differ and for slow refreshes
SETTLE_NS = 30 * MINUTE_NS  # bars younger than this may still come or change (delayed quotes, late volume)
COMPLETE_SHARE = 0.95  # of a session's minutes; Yahoo lacks some of even the busiest stocks
TIMES_TO_ASK = 3  # for a week that stays incomplete; then once a day
INCOMPLETE = re.compile(r"#incomplete-(\d+)$")


@dataclass(frozen=True)
class Week:
    """Monday to Friday in New York, named by the Monday."""

    name: str
    start_ns: int
    end_ns: int


def weeks(start_ns: int, end_ns: int) -> Iterator[Week]:
    """Yield the weeks that touch [start_ns, end_ns), oldest first."""
    local_ns = int(new_york_time(np.array([start_ns]))[0])
    date = datetime.date(1970, 1, 1) + datetime.timedelta(days=local_ns // DAY_NS)
    monday = date - datetime.timedelta(days=date.weekday())
    while (week_start_ns := new_york_midnight_ns(monday)) < end_ns:
        # Midnights, not multiples of 24 hours: the clocks change between Mondays.
        week_end_ns = new_york_midnight_ns(monday + datetime.timedelta(days=5))
        if week_end_ns > start_ns:
            yield Week(monday.isoformat(), week_start_ns, week_end_ns)
        monday += datetime.timedelta(days=7)


@dataclass(frozen=True)
class Want:
    """A week to fetch: [start_ns, end_ns) of it is available now; ``minutes`` should have a bar each."""

    week: Week
    start_ns: int
    end_ns: int
    minutes: NDArray[np.int64]
    kept: Part | None

    @property
    def times_incomplete(self) -> int:
        """How often the week was incomplete so far."""
        found = INCOMPLETE.search(self.kept.key) if self.kept else None
        return int(found[1]) if found else 0


class Plan:
    """The weeks of a span that Yahoo has at ``now_ns``."""

    def __init__(self, start_ns: int, end_ns: int, now_ns: int) -> None:
        self.now_ns = now_ns
        self._reach_ns = -(-(now_ns - REACH_NS) // MINUTE_NS) * MINUTE_NS
        self._closed_ns = closed_before(now_ns)
        self._weeks = list(weeks(max(start_ns, self._reach_ns), min(end_ns, self._closed_ns)))
        self._minutes = _minutes(self._reach_ns, self._closed_ns)

    def wants(self, parts: dict[str, Part], splits: list[Split], changed_ns: int) -> list[Want]:
        """Return the weeks of one stock to fetch, oldest first.

        Args:
            parts: the stock's parts in the lake, by the week's name.
            splits: the known ones. Bars before a split are fetched again until a day after it, since Yahoo
                adjusts them some time that day.
            changed_ns: when the latest of the newly learned splits was executed, 0 for none: older weeks are
                fetched again, whenever they were fetched last.
        """
        executed = [new_york_midnight_ns(split.execution_date) for split in splits]
        executed = [moment for moment in executed if moment <= self.now_ns]
        found = []
        for week in self._weeks:
            start_ns, end_ns = max(week.start_ns, self._reach_ns), min(week.end_ns, self._closed_ns)
            first, last = np.searchsorted(self._minutes, (start_ns, end_ns))
            want = Want(week, start_ns, end_ns, self._minutes[first:last], parts.get(week.name))
            if len(want.minutes) and self._has_news(want, executed, changed_ns):
                found.append(want)
        return found

    def _has_news(self, want: Want, executed: list[int], changed_ns: int) -> bool:
        kept = want.kept
        if kept is None or int(want.minutes[-1]) >= min(kept.end_ns, kept.fetched_ns - SETTLE_NS):
            return True
        if want.start_ns < changed_ns:
            return True
        if any(want.start_ns < moment and kept.fetched_ns < moment + DAY_NS for moment in executed):
            return True
        is_exhausted = want.times_incomplete >= TIMES_TO_ASK and self.now_ns < kept.fetched_ns + DAY_NS
        return want.times_incomplete > 0 and not is_exhausted


def _minutes(start_ns: int, end_ns: int) -> NDArray[np.int64]:
    """Return the regular minutes of [start_ns, end_ns), of all weekdays where the calendar does not reach."""
    known = expected_minutes(start_ns, end_ns)
    if known is not None:
        return known
    minutes = np.arange(start_ns, end_ns, MINUTE_NS, dtype=np.int64)
    weekday = (new_york_time(minutes) // DAY_NS + 3) % 7  # 1970-01-01 was a Thursday
    return minutes[in_regular_session(minutes) & (weekday < 5)]


@dataclass(frozen=True)
class Stored:
    """A week after an answer: its bars of those that should have settled, and the rows that were rejected."""

    held: int
    expected: int
    rejected: dict[str, int]
    is_complete: bool


def store(job: RefreshJob, symbol: str, want: Want, fresh: pa.Table, vendor_key: str) -> Stored:
    """Write one week's part: the bars of the answer ``fresh``, and the kept ones where it has none.

    Kept bars are brought to the answer's scale: splits executed since they were fetched are applied.

    Raises:
        BadAnswer, LakeError: as lake.write.
    """
    now_ns = job.now_ns
    time = fresh["open_time"].to_numpy()
    inside = (time >= want.start_ns) & (time < want.end_ns)
    table = fresh.filter(pa.array(inside))
    cleaned = clean(table, now_ns=now_ns, symbols=(symbol,))
    good = cleaned.table["open_time"].to_numpy()
    start_ns = want.start_ns
    if want.kept is not None:
        start_ns = min(start_ns, want.kept.start_ns)
        kept = _kept(job, symbol, want.week)
        if kept is not None:
            # Yahoo fills volumes in late; one that goes back to zero is an error.
            traded = good[cleaned.table["volume"].to_numpy() > 0]
            stays = ~np.isin(kept.open_time, good) | ((kept.volume > 0) & ~np.isin(kept.open_time, traded))
            filler = bar_table(symbol, [getattr(kept, name)[stays] for name in COLUMNS])
            # A worse new row must not compete with the kept one for the minute.
            competes = np.isin(table["open_time"].to_numpy(), kept.open_time[stays])
            table = pa.concat_tables([table.filter(pa.array(~competes)), filler])
            good = np.concatenate([good, kept.open_time[stays]])
    settled = want.minutes[want.minutes < now_ns - SETTLE_NS]
    held = np.isin(settled, good)
    rejected = {reason: n for reason, n in cleaned.rejected.items() if reason not in NOT_QUARANTINED}
    if not inside.all():
        rejected["outside_interval"] = int((~inside).sum())
    is_complete = _sessions_complete(settled, held) and (not rejected or bool(held.all()))
    # A broken answer after one that was only short is no evidence that Yahoo has no more.
    newly_broken = bool(rejected) and want.kept is not None and not want.kept.rejected
    times = 1 if newly_broken else want.times_incomplete + 1
    key = vendor_key if is_complete else f"{vendor_key}#incomplete-{times}"
    job.lake.write(
        SOURCE, symbol, want.week.name, table, key=key, version="",
        start_ns=start_ns, end_ns=want.end_ns, symbols=(symbol,), now_ns=now_ns,
    )  # fmt: skip
    return Stored(int(held.sum()), len(settled), rejected, is_complete)


def _kept(job: RefreshJob, symbol: str, week: Week) -> Bars | None:
    """Return the lake's bars of a week, adjusted for every split executed by now."""
    columns = job.lake.columns(SOURCE, symbol, [symbol], week.start_ns, week.end_ns).get(symbol)
    if columns is None:
        return None
    bars = Bars(symbol, "stock", *(columns[name] for name in COLUMNS))
    return job.splits.adjust(bars, fetched_ns=columns["fetched_ns"], until_ns=job.now_ns)


def _sessions_complete(settled: NDArray[np.int64], held: NDArray[np.bool_]) -> bool:
    if not len(settled):
        return True
    _, starts = np.unique(settled // DAY_NS, return_index=True)  # a regular session lies within one UTC day
    shares = np.add.reduceat(held.astype(np.int64), starts) / np.diff(np.append(starts, len(settled)))
    return bool((shares >= COMPLETE_SHARE).all())
