"""Figures as people read them: times, ages, sizes, and the course of a figure in one line."""

from __future__ import annotations

from collections.abc import Sequence


def sparkline(values: Sequence[float | None], width: int, levels: str) -> str:
    """Draw values as one line of at most ``width`` characters; means where there are more; gaps stay empty."""
    if width < 1 or not values:
        return ""
    groups = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    if len(values) <= width:
        groups = [[value] for value in values]
    means: list[float | None] = []
    for group in groups:
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


def clock(seconds: float | None) -> str:
    """Tell seconds as 0:07, 12:30, 5:01:02 or 3 d 04:05."""
    if seconds is None:
        return "?"
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(seconds: float) -> str:
    """Tell how old something is, in one unit."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < most:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def size(num_bytes: float) -> str:
    """Tell bytes in a unit that leaves up to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1_000
    return f"{num_bytes:,.3g} TB"
