"""When the windows of a walk begin and end: by the bars that are stored, and what settings need around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from commands.options import parse_day_ns
from data_sources.bars import DAY_NS, FIRST_DATE
from data_sources.calendar import date_ns
from data_sources.lake.lake import Lake
from data_sources.load import each_symbol
from evaluation.provenance import day_of
from evaluation.uncertainty import LEAST_DAYS
from runtime.control import EXIT_NO_DATA, ExitProgram
from runtime.wording import count_of
from training.data_feed import data_request

if TYPE_CHECKING:
    from continuous_training import Settings

LONGEST_DAYS = 364  # that are walked unless others are asked for


@dataclass(frozen=True)
class Window:
    """Trained, examined and crowned on bars up to ``start_ns``, then traded on until ``end_ns``."""

    number: int  # from 1 on
    start_ns: int
    end_ns: int

    def __str__(self) -> str:
        return f"{day_of(self.start_ns)} to {day_of(self.end_ns - 1)}"


def stored_days(lake: Lake, settings: Settings, now_ns: int) -> NDArray[np.int64]:
    """Return the UTC days of which any symbol has bars, ascending, as days since 1970.

    Raises:
        LakeError: the lake cannot be read.
    """
    request = data_request(settings, now_ns)
    if not settings.start_date:
        request = replace(request, start_ns=date_ns(FIRST_DATE.isoformat()))
    days: set[int] = set()
    for bars, row in each_symbol(lake, request):
        if not row.dropped:
            days.update(np.unique(bars.open_time // DAY_NS).tolist())
    return np.array(sorted(days), dtype=np.int64)


def choose_windows(
    days: NDArray[np.int64], settings: Settings, step: int, first_day: str, last_day: str
) -> list[Window]:
    """Cut the days to walk into windows of ``step`` days; those without a bar are left out.

    Args:
        days: of which there are bars, ascending, since 1970.
        settings: of the training.
        step: days from one training to the next.
        first_day: YYYY-MM-DD; "": the middle of the days, but the newest ``LONGEST_DAYS`` at most.
        last_day: likewise; "": the newest.

    Raises:
        ExitProgram: there are no bars.
        ValueError: a day is invalid, or there are too few before or after it; the message names what would do.
    """
    holdout = settings.holdout_days
    if step > holdout:
        raise ValueError(
            f"--step {step} must be at most holdout_days={holdout}: the next window's exam would lie within days "
            "that this one has traded on"
        )
    if holdout < LEAST_DAYS:
        raise ValueError(
            f"holdout_days={holdout} must be at least {LEAST_DAYS}: no exam of fewer days crowns a champion"
        )
    if not len(days):
        raise ExitProgram(
            EXIT_NO_DATA,
            f"No symbol has {settings.min_bars:,} bars: fetch them with python continuous_training.py data, or "
            "try it on a simulated market with --demo",
        )
    oldest, newest = int(days[0]), int(days[-1])
    needed = holdout + 1  # before the first window: the exam's, and a day to train on
    end = min(newest, parse_day_ns("--to", last_day) // DAY_NS) + 1 if last_day else newest + 1
    default = max(oldest + needed, int(days[len(days) // 2]), end - LONGEST_DAYS)
    start = (
        parse_day_ns("--from", first_day) // DAY_NS
        if first_day
        else min(default, max(oldest + needed, end - step))
    )
    if start < oldest + needed:
        raise ValueError(
            f"--from {_text(start)} must be {_text(oldest + needed)} or later: the bars begin on {_text(oldest)}, "
            f"and before the first window must lie the {holdout} days of an exam, and days to train on"
        )
    if end - start < step:
        raise ValueError(
            f"too few bars for one window: {count_of(max(0, end - start), 'day')} from {_text(start)} to "
            f"{_text(end - 1)}, --step {step} needs {step} after {count_of(needed, 'day')} of bars; fetch more, "
            "or lower --step or holdout_days"
        )
    edges = np.arange(start, end - step + 1, step)
    has_bars = np.searchsorted(days, edges + step) > np.searchsorted(days, edges)
    return [
        Window(number, int(first) * DAY_NS, int(first + step) * DAY_NS)
        for number, first in enumerate(edges[has_bars], 1)
    ]


def _text(day: int) -> str:
    return day_of(day * DAY_NS)


def windows_of(starts: Sequence[Sequence[int]]) -> list[Window]:
    """Return windows as a walk's folder lists them."""
    return [Window(number, int(start), int(end)) for number, (start, end) in enumerate(starts, 1)]
