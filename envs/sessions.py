"""How long each bar's session still goes on, by the calendar: known in advance, whatever bars come later."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import MINUTE_NS, Bars
from data_sources.sessions import (
    CLOSE_MINUTE,
    DAY_NS,
    expected_minutes,
    in_regular_session,
    new_york_time,
)

NEVER_CLOSES = 32_767  # the largest int16


def minutes_left(bars: Bars) -> NDArray[np.int16]:
    """Return the minutes from each bar's open to the scheduled close of its session, (B,).

    0 outside the regular session, such as before 09:30 in New York or on a half day's afternoon;
    NEVER_CLOSES for crypto. Where the NYSE calendar does not reach, every day counts as a whole session.
    """
    if bars.asset_class == "crypto" or not len(bars):
        return np.full(len(bars), NEVER_CLOSES, dtype=np.int16)
    times = bars.open_time
    scheduled = expected_minutes(int(times[0]) - DAY_NS, int(times[-1]) + DAY_NS)
    if scheduled is None:  # the calendar ends about a year ahead
        minute = new_york_time(times) % DAY_NS // MINUTE_NS
        return np.where(in_regular_session(times), CLOSE_MINUTE - minute, 0).astype(np.int16)
    ends = np.flatnonzero(np.diff(scheduled, append=np.iinfo(np.int64).max) > MINUTE_NS)
    closes = scheduled[ends] + MINUTE_NS
    place = np.searchsorted(scheduled, times).clip(max=len(scheduled) - 1)
    inside = scheduled[place] == times
    left = np.zeros(len(bars), dtype=np.int16)
    left[inside] = (closes[np.searchsorted(closes, times[inside], side="right")] - times[inside]) // MINUTE_NS
    return left
