"""Formats for people: times, durations, ages, sizes, an epoch in one line, and a metric over time in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def sparkline(values: Sequence[float | None], width: int, levels: str) -> str:
    """Draw values with ``levels``, low to high, in at most ``width`` characters.

    More values than that are averaged; missing ones are blank.
    """
    means = thinned(values, width)
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(levels) - 1
    return "".join(
        " " if mean is None else levels[round((mean - low) / span * top) if span else 0] for mean in means
    )


def thinned(values: Sequence[float | None], count: int) -> list[float | None]:
    """Return the means of at most ``count`` groups of values in a row; None counts as missing."""
    count = min(count, len(values))
    means: list[float | None] = []
    for i in range(count):
        group = values[i * len(values) // count : (i + 1) * len(values) // count]
        known = [value for value in group if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


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


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Format an epoch's metrics; a run has ``epochs``."""
    parts = [
        f"run {metrics['run']} epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}",
        f"reward {metrics['rollout/reward_bps']:+.3f} bp/bar",
        *([f"costs {scale:.0%}"] if (scale := metrics.get("rollout/cost_scale", 1.0)) < 1 else []),
        f"return {metrics['rollout/episode_return_percent']:+.2f}%",
        f"loss {metrics['loss/policy']:+.4f}/{metrics['loss/value']:.4f}",
        f"kl {metrics['ppo/approx_kl']:.4f}",
        f"clip {metrics['ppo/clip_fraction']:.2f}",
        f"entropy {metrics['loss/entropy']:.3f}",
        f"ev {metrics['ppo/explained_variance']:+.2f}",
        f"{metrics['perf/transitions_per_second']:,.0f} transitions/s",
        f"{metrics['perf/episodes_per_second']:.1f} episodes/s",
        f"mfu {metrics['perf/mfu']:.0%}",
    ]
    if "gpu/utilization_percent" in metrics:
        parts.append(f"gpu {metrics['gpu/utilization_percent']:.0f}% {metrics['gpu/memory_gb']:.1f} GB")
    return "  ".join(parts)


def short(value: Any) -> str:
    """Format a metric in four digits."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def printable(text: str) -> str:
    """Return a text on one line, without control characters."""
    return "".join(char if char.isprintable() else " " for char in text.strip())


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` columns; a longer word stays whole."""
    lines = [""]
    for word in printable(text).split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > max(1, width):
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def shortened(text: str, width: int) -> str:
    """Return a text on one line of at most ``width`` columns, its end left out where it is longer."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: max(0, width - 4)].rstrip()} ..."
