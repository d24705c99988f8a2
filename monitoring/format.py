"""Formats for people: times, durations, ages, sizes, and a metric over time in one line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


def sparkline(values: Sequence[float | None], width: int, levels: str) -> str:
    """Draw values with ``levels``, low to high, in at most ``width`` characters.

    More values than that are averaged; missing ones are blank.
    """
    width = min(width, len(values))
    means: list[float | None] = []
    for i in range(width):
        group = values[i * len(values) // width : (i + 1) * len(values) // width]
        known = [value for value in group if value is not None]
        means.append(sum(known) / len(known) if known else None)
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(levels) - 1
    return "".join(
        " " if mean is None else levels[round((mean - low) / span * top) if span else 0] for mean in means
    )


def utc_time(time_ns: int, pattern: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format a time, int64 ns UTC."""
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime(pattern)


def iso_time(time_ns: int) -> str:
    """Format a time, int64 ns UTC, as ISO 8601."""
    return utc_time(time_ns, "%Y-%m-%dT%H:%M:%SZ")


def duration(seconds: float | None) -> str:
    """Format seconds as 0:07, 12:30, 5:01:02 or 3 d 04:05."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(seconds: float) -> str:
    """Format an age in one unit."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < limit:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def size(num_bytes: float) -> str:
    """Format bytes in the unit that leaves up to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1_000
    return f"{num_bytes:,.3g} TB"
