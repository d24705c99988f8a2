"""Curves for pictures and tables: as many points as can be seen, and where costs eat up what is earned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
POINTS = 700  # about one per pixel of a page


def stretches(length: int, most: int = POINTS) -> NDArray[np.int64]:
    """Return the first index of each of at most ``most`` stretches of nearly equal length, without the end."""
    return np.unique(np.linspace(0, length, min(most, length) + 1).round().astype(np.int64))[:-1]


def lasts(values: NDArray, most: int = POINTS) -> NDArray:
    """Return the first value, then the last one of each stretch of (T,) values."""
    ends = np.append(stretches(len(values), most)[1:], len(values)) - 1
    return values[np.concatenate([[0], ends])]


def lowests(values: Array, most: int = POINTS) -> Array:
    """Return the first value, then the lowest one of each stretch of (T,) values."""
    return np.concatenate([values[:1], np.minimum.reduceat(values, stretches(len(values), most))])


def means(values: Array, most: int = POINTS) -> Array:
    """Return the mean of each stretch of (T,) values."""
    first = stretches(len(values), most)
    return np.add.reduceat(values, first) / np.diff(np.append(first, len(values)))


def drawdown(equity: Array) -> Array:
    """Return how far a curve is below its highest value so far, (T,), 0 or less."""
    return equity / np.maximum.accumulate(equity) - 1.0


def break_even(costs_bps: Sequence[float], returns: Sequence[float]) -> tuple[float | None, str]:
    """Find the cost of traded value, in basis points, above which nothing is earned any more.

    Args:
        costs_bps: of the ladder, ascending.
        returns: net, at each.

    Returns:
        The cost, by a straight line between two rungs, None where the return does not fall to 0 on the ladder; and
        in words.
    """
    if returns[0] <= 0:
        return None, "none: it earns nothing even without costs" if costs_bps[0] == 0 else (
            f"below {costs_bps[0]:g} bps"
        )
    rungs = list(zip(costs_bps, returns, strict=True))
    for (cost, earned), (next_cost, next_earned) in pairwise(rungs):
        if next_earned <= 0:
            value = cost + (next_cost - cost) * earned / (earned - next_earned)
            return value, f"{value:.2f} bps"
    return None, f"above {costs_bps[-1]:g} bps"
