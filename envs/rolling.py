"""Causal windows over a series: a value at t depends on values up to t alone, even in its rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def lagged(series: Tensor, bars: int) -> Tensor:
    """Return the series ``bars`` bars earlier; 0 before its start."""
    shifted = torch.zeros_like(series)
    if bars < len(series):
        shifted[bars:] = series[: len(series) - bars]
    return shifted


def rolling_means(series: Tensor, windows: Iterable[int]) -> dict[int, Tensor]:
    """Return the mean of the last w values, this one included, for each window w; of each column of a table.

    Each is put together from sums of 2, 4, 8... values, so no rounding comes from outside its window.
    """
    sums = {window: torch.zeros_like(series) for window in windows}
    covered = dict.fromkeys(sums, 0)
    longest = max(sums, default=0)
    power, width = series, 1
    while width <= longest:
        for window in sums:
            if window & width:
                sums[window] += lagged(power, covered[window])
                covered[window] += width
        if 2 * width <= longest:
            power = power + lagged(power, width)
        width *= 2
    count = torch.arange(1, len(series) + 1, device=series.device, dtype=series.dtype)
    count = count.view(-1, *[1] * (series.dim() - 1))
    return {window: total.div_(count.clamp(max=window)) for window, total in sums.items()}


def rolling_max(series: Tensor, window: int) -> Tensor:
    """Return the largest of the last ``window`` values, this one included."""
    best, width = series, 1
    while width < window:
        step = min(width, window - width)
        if step < len(best):
            best = torch.cat([best[:step], torch.maximum(best[step:], best[:-step])])
        else:
            best = best.cummax(0).values
        width += step
    return best


def running(series: Tensor, age: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine each value with all earlier ones of its span, by doubling, such as with ``torch.add``.

    Args:
        series: (B,).
        age: (B,) int64, how many earlier values the span has.
        combine: of two tensors, element by element; associative.
    """
    longest, width = int(age.max()) if len(age) else 0, 1
    while width <= longest:
        series = torch.where(age >= width, combine(series, lagged(series, width)), series)
        width *= 2
    return series


def log_ratio(value: Tensor, usual: Tensor) -> Tensor:
    """Return the log of value / usual value, 0 where the usual one is 0.

    A twentieth of the usual value is added, so that the log is finite.
    """
    ratio = (value + 0.05 * usual) / (1.05 * usual)
    return torch.where(usual > 0, ratio.log(), torch.zeros_like(usual))
