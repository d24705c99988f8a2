"""``top:500`` instead of names: the largest symbols by dollar volume as known at each date, delisted ones too.

A symbol is a member for a calendar month if it was among the N largest of the 30 days before that month, without
those that stood still on most of these days, such as stablecoins (pegged.py). Nothing later counts, so a symbol
that is gone by now is a member as long as it was large. The lake keeps of each day the bars of the day's 3 N
largest, and how much each of them traded, so that the rule never downloads a day twice; the amount is negative
where the price stood still. In parts of earlier versions none is: what they choose is judged when it is loaded.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from data_sources.bars import DAY_NS
from data_sources.calendar import to_ns, utc

if TYPE_CHECKING:
    from data_sources.lake.lake import Lake  # which imports pyarrow and polars

KEPT_FOLD = 3
LOOK_BACK_DAYS = 30
_RULE = re.compile(r"top:([1-9]\d{0,4})")

Interval = tuple[int, int]  # [start_ns, end_ns)


def top_of(names: Iterable[str]) -> int:
    """Return the N of the rule among ``names``, the largest of several; 0 if there is none.

    Raises:
        ValueError: a malformed rule.
    """
    largest = 0
    for name in names:
        if name.startswith("top:"):
            match = _RULE.fullmatch(name)
            if not match:
                raise ValueError(f"{name} must be top: and how many of the largest, such as top:500")
            largest = max(largest, int(match[1]))
    return largest


def plain_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that are not rules, each once."""
    return tuple(dict.fromkeys(name for name in names if not name.startswith("top:")))


def kept_rule(num_kept: int) -> tuple[str, ...]:
    """Return what a part with the day's ``num_kept`` largest lists among its symbols."""
    return (f"top:{num_kept}",) if num_kept else ()


def look_back(start_ns: int) -> int:
    """Return the first instant that a rule needs to choose members from ``start_ns`` on."""
    return _ns(utc(start_ns).date().replace(day=1)) - LOOK_BACK_DAYS * DAY_NS


def members(
    lake: Lake, source: str, dataset: str, num_largest: int, start_ns: int, end_ns: int
) -> dict[str, list[Interval]]:
    """Return the months of [start_ns, end_ns) in which each symbol is a member, merged where they touch.

    A month without any known day before it has no members.

    Raises:
        LakeError: the folder cannot be read.
    """
    days = {
        dt.date.fromisoformat(unit): part.dollar_volume
        for unit, part in lake.parts(source, dataset).items()
        if part.dollar_volume
    }
    found: dict[str, list[Interval]] = {}
    for first, following in _months(start_ns, end_ns):
        interval = (_ns(first), _ns(following))
        for symbol in _largest(days, first, num_largest):
            intervals = found.setdefault(symbol, [])
            if intervals and intervals[-1][1] == interval[0]:
                intervals[-1] = (intervals[-1][0], interval[1])
            else:
                intervals.append(interval)
    return found


def _largest(days: Mapping[dt.date, Mapping[str, int]], month: dt.date, count: int) -> Sequence[str]:
    """Rank what moves by dollar volume in the days before ``month``; equal ones by name."""
    from data_sources.pegged import STILL_SHARE  # which imports polars

    traded: Counter[str] = Counter()
    num_days: Counter[str] = Counter()
    num_still: Counter[str] = Counter()
    for age in range(1, LOOK_BACK_DAYS + 1):
        for symbol, amount in days.get(month - dt.timedelta(days=age), {}).items():
            traded[symbol] += abs(amount)
            num_days[symbol] += 1
            num_still[symbol] += amount < 0
    moving = [symbol for symbol in traded if num_still[symbol] < STILL_SHARE * num_days[symbol]]
    return sorted(moving, key=lambda symbol: (-traded[symbol], symbol))[:count]


def _months(start_ns: int, end_ns: int) -> Iterable[tuple[dt.date, dt.date]]:
    month = utc(start_ns).date().replace(day=1)
    while _ns(month) < end_ns:
        following = (month + dt.timedelta(days=31)).replace(day=1)
        yield month, following
        month = following


def _ns(day: dt.date) -> int:
    """Midnight UTC: no US stock trades then on the first of a month, extended hours begin at 8 or 9."""
    return to_ns(dt.datetime.combine(day, dt.time(), dt.UTC))
