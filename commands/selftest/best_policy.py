"""The best policy where the forecast of the next return is an AR(1) process: dynamic programming, no search.

The state is the forecast and the position held; a choice earns the forecast in its direction, less what the change
of position costs. Its values solve Bellman's equation for the mean reward (Puterman 1994, chapter 8).
Everything is in sigma, the noise of one bar. Shapes: S = symbols, T = bars, G = cells of the forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
POSITIONS = np.array([-1.0, 0.0, 1.0])
CELLS, DEVIATIONS = 301, 5.0  # of the grid, and how far it reaches
TOLERANCE = 1e-9  # of the mean reward
MOST_ITERATIONS = 20_000


@dataclass(frozen=True)
class BestPolicy:
    """A table of the best position for every position held and every cell of the forecast."""

    edges: Array  # (G - 1,) between the cells
    choice: NDArray[np.int8]  # (3, G): the index of the best position
    profit: float  # mean reward per bar, net of costs

    def apply(self, forecast: Array) -> NDArray[np.int8]:
        """Turn a forecast (S, T) of the next bar's return into positions (S, T): -1, 0 or 1, from cash on."""
        cell = np.searchsorted(self.edges, forecast)
        held, result = np.ones(len(forecast), np.int8), np.empty(forecast.shape, np.int8)
        for t in range(forecast.shape[1]):
            held = self.choice[held, cell[:, t]]
            result[:, t] = held - 1
        return result


def solve(persistence: float, deviation: float, cost: float) -> BestPolicy:
    """Find the best policy of an AR(1) forecast.

    Args:
        persistence: correlation of the forecast with the one of the bar before.
        deviation: standard deviation of the forecast; 0: there is nothing to forecast.
        cost: per unit of equity traded.
    """
    if deviation == 0.0:
        return BestPolicy(np.empty(0), np.ones((3, 1), np.int8), 0.0)
    values = deviation * np.linspace(-DEVIATIONS, DEVIATIONS, CELLS)
    edges = (values[1:] + values[:-1]) / 2
    distance = (edges - persistence * values[:, None]) / (deviation * np.sqrt(1.0 - persistence**2))
    below = torch.special.ndtr(torch.from_numpy(distance)).numpy()
    chances = np.diff(below, axis=1, prepend=0.0, append=1.0)
    choice, profit = solve_chain(values, chances, cost)
    return BestPolicy(edges, choice, profit)


def solve_chain(values: Array, chances: Array, cost: float) -> tuple[NDArray[np.int8], float]:
    """Find the best policy of a forecast that is a Markov chain, by relative value iteration.

    Args:
        values: (G,) of the forecast.
        chances: (G, G) of the next value, given this one.
        cost: per unit of equity traded.

    Returns:
        The index of the best position for every position held and every value, (3, G), and the mean reward.
    """
    traded = np.abs(POSITIONS[:, None] - POSITIONS)
    reward = values[:, None] * POSITIONS - cost * traded[:, None]  # (held, value, choice)
    value = np.zeros((3, len(values)))
    for _ in range(MOST_ITERATIONS):
        ahead = (value @ chances.T).T  # (value, choice)
        new = (reward + ahead).max(2)
        change = new - value
        value = new - new[1, len(values) // 2]
        if np.ptp(change) < TOLERANCE:
            break
    return (reward + ahead).argmax(2).astype(np.int8), float(change.mean())
