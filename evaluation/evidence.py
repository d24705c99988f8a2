"""Evidence from days that are looked at again and again: what bets on them would have become.

A bettor stakes money on every day before it is known: a share of it that a usual day of those before would move
by 2, 5, 10 or 25 %. On days without a mean above 0 no such bet gains on average, whenever one stops, so it grows
40-fold in at most one of 40 lives (Ville 1939; "e-process"). No other assumption is made of the days, no number of
looks is agreed on, and the evidence of one champion and of the next one multiply.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BETS = (0.02, 0.05, 0.1, 0.25)  # shares of the money that a usual day moves; each has a fourth of it at first
FIRST_DAYS = 5  # only show what a usual day is
LARGEST_DAY = 4.0  # in usual days, so that the largest bet loses all at most; larger ones count as that
PROVEN = 40.0  # a worthless training gets there in at most 2.5 % of lives
LOST = 20.0  # bets against a champion without a loss get there in at most 5 % of cases


def bets_on(daily: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what 1 has become after each day, (..., days), from returns in their order; 1 in the first days."""
    number = np.arange(1, daily.shape[-1])
    usual = np.full(daily.shape, np.nan)
    usual[..., 1:] = np.sqrt(np.cumsum(daily[..., :-1] ** 2, axis=-1) / number)
    usual[..., :FIRST_DAYS] = np.nan
    moved = np.divide(daily, usual, out=np.zeros(daily.shape), where=usual > 0)
    moved = np.clip(moved, -LARGEST_DAY, LARGEST_DAY)
    return np.mean([np.cumprod(1 + bet * moved, axis=-1) for bet in BETS], axis=0)


def most_of(daily: NDArray[np.float64]) -> float:
    """Return the most that the bets have ever become, which counts: the bettor may stop there."""
    return float(bets_on(daily).max(initial=1.0))
