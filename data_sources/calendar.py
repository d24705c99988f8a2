"""Days, New York's clock and the exchange's calendar, vectorised. The calendar only advises: it drops no bar."""

from __future__ import annotations

import datetime
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS, MINUTE_NS, Bars

if TYPE_CHECKING:
    import exchange_calendars

OPEN_MINUTE, CLOSE_MINUTE = 9 * 60 + 30, 16 * 60  # of the day in New York, regular session
NEVER_CLOSES = 32_767  # minutes; the largest int16
_NEW_YORK = ZoneInfo("America/New_York")
_EPOCH = datetime.date(1970, 1, 1)


def utc(time_ns: int) -> datetime.datetime:
    """Return an instant as a datetime of whole seconds, UTC."""
    return datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC)


def to_ns(moment: datetime.datetime) -> int:
    """Return a datetime of whole seconds as int64 ns UTC."""
    return int(moment.timestamp()) * 10**9


def parse_day(text: str) -> datetime.datetime:
    """Return the start of a day, UTC.

    Raises:
        ValueError: the text is not a date.
    """
    return datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)


def date_ns(text: str) -> int:
    """Return the start of a day, UTC, as int64 ns; raises as ``parse_day``."""
    return to_ns(parse_day(text))


# --- New York's clock ---------------------------------------------------------------------------------------


def new_york_time(open_time: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return New York's wall-clock time as int64 ns: // DAY_NS is its date, % DAY_NS its time of day.

    The offset is that of noon UTC of each UTC day: the clocks change on Sunday at 06:00 or 07:00 UTC, when no
    US stock trades, so it is right for every bar of a session, also extended.
    """
    days, place = np.unique(open_time // DAY_NS, return_inverse=True)
    offsets = np.fromiter((_offset_ns(day) for day in days.tolist()), np.int64, len(days))
    return open_time + offsets[place]


@lru_cache(maxsize=4096)
def _offset_ns(utc_day: int) -> int:
    noon = datetime.datetime.combine(
        _EPOCH + datetime.timedelta(days=utc_day), datetime.time(12), datetime.UTC
    )
    offset = noon.astimezone(_NEW_YORK).utcoffset() or datetime.timedelta()
    return int(offset.total_seconds()) * 1_000_000_000


def in_regular_session(open_time: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the minutes from 09:30 to before 16:00 in New York, whatever the date."""
    minute = new_york_time(open_time) % DAY_NS // MINUTE_NS
    return (minute >= OPEN_MINUTE) & (minute < CLOSE_MINUTE)


def new_york_midnight_ns(date: datetime.date) -> int:
    """Return when ``date`` begins in New York, as int64 ns UTC."""
    midnight = datetime.datetime.combine(date, datetime.time(), _NEW_YORK)
    return to_ns(midnight)


# --- the exchange -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _calendar(start_year: int) -> exchange_calendars.ExchangeCalendar:
    import exchange_calendars  # half a second, and only summaries need it

    with warnings.catch_warnings():
        # exchange_calendars 4.13 under pandas 3.1: Pandas4Warning, about an attribute that it reads
        warnings.simplefilter("ignore", DeprecationWarning)
        return exchange_calendars.get_calendar("XNYS", start=f"{start_year}-01-01")


@lru_cache(maxsize=8)
def _all_sessions(start_year: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return when every session of a calendar opens and closes, int64 ns UTC."""
    schedule = _calendar(start_year).schedule
    opens, closes = (schedule[name].dt.as_unit("ns").astype("int64").to_numpy() for name in ("open", "close"))
    return opens, closes


def _sessions(start_ns: int, end_ns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return when the sessions within an interval open and close; None where the calendar does not reach."""
    first, last = utc(start_ns).date(), utc(end_ns).date()
    calendar = _calendar(first.year - 1)
    if first < calendar.first_session.date() or last > calendar.last_session.date():
        return None
    opens, closes = _all_sessions(first.year - 1)
    within = slice(np.searchsorted(closes, start_ns, side="right"), np.searchsorted(opens, end_ns))
    return opens[within], closes[within]


def expected_minutes(start_ns: int, end_ns: int) -> NDArray[np.int64] | None:
    """Return the open_time of every regular minute in [start_ns, end_ns) by the NYSE calendar.

    None where the calendar does not reach (it ends about a year ahead): "unknown", not "closed".
    """
    sessions = _sessions(start_ns, end_ns)
    if sessions is None:
        return None
    opens, closes = sessions
    lengths = (closes - opens) // MINUTE_NS
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    minutes = np.repeat(opens, lengths) + within * MINUTE_NS
    first, end = np.searchsorted(minutes, (start_ns, end_ns))
    return minutes[first:end]


def minutes_left(bars: Bars) -> NDArray[np.int16]:
    """Return the minutes from each bar's open to the scheduled close of its session, (B,).

    0 outside the regular session, such as before 09:30 in New York or on a half day's afternoon;
    NEVER_CLOSES for what is no stock. Where the NYSE calendar does not reach, every day counts as a full session.
    """
    if bars.asset_class != "stock" or not len(bars):
        return np.full(len(bars), NEVER_CLOSES, dtype=np.int16)
    times = bars.open_time
    sessions = _sessions(int(times[0]) - DAY_NS, int(times[-1]) + DAY_NS)
    if sessions is None:  # the calendar ends about a year ahead
        minute = new_york_time(times) % DAY_NS // MINUTE_NS
        return np.where(in_regular_session(times), CLOSE_MINUTE - minute, 0).astype(np.int16)
    opens, closes = sessions
    if not len(opens):  # a few days between two sessions
        return np.zeros(len(bars), np.int16)
    place = np.searchsorted(closes, times, side="right").clip(max=len(closes) - 1)  # of the session to come
    is_inside = (opens[place] <= times) & (times < closes[place])
    return np.where(is_inside, (closes[place] - times) // MINUTE_NS, 0).astype(np.int16)
