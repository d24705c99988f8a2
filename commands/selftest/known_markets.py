"""Markets whose best policy is known, for proving that the learner finds it: see ``selftest.py``.

Returns are drawn with a hidden expectation; a Bayesian filter of the true model says at each bar what the next
one can be expected to do, and the best threshold rule on it says what that is worth net of costs.
Shapes: S = symbols, T = bars. Everything is in units of sigma, the noise of one bar.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import MINUTE_NS, Bars

Array = NDArray[np.floating[Any]]
SIGMA = 1e-3  # noise of one bar, as a log return
FIRST_OPEN_NS = 1_577_836_800 * 10**9  # 2020-01-01
Rule = tuple[float, float]


@dataclass(frozen=True)
class KnownMarket:
    """How returns are drawn, and the filter that knows it.

    ``draw(random, S, T)`` gives the expectation of every bar's return and the noise around it; ``foresee`` the
    expectation of the next bar's return given the returns up to each bar.
    """

    draw: Callable[[np.random.Generator, int, int], tuple[Array, Array]]
    foresee: Callable[[Array], Array]


@dataclass(frozen=True)
class Paths:
    """Drawn paths (S, T) as bars, with what is hidden in them."""

    bars: list[Bars]
    returns: Array
    noise: Array  # the part of the returns that nobody could expect

    @property
    def expectation(self) -> Array:
        """What a bar's return could be expected to be by someone who knows the hidden state."""
        return self.returns - self.noise


def draw(market: KnownMarket, num_symbols: int, num_bars: int, seed: int) -> Paths:
    """Draw paths; another seed gives fresh ones of the same market."""
    random = np.random.default_rng(seed)
    expectation, noise = market.draw(random, num_symbols, num_bars)
    returns = expectation + noise
    open_time = FIRST_OPEN_NS + np.arange(num_bars, dtype=np.int64) * MINUTE_NS
    bars = []
    for number, row in enumerate(returns):
        close = 100.0 * np.exp(SIGMA * np.cumsum(row))
        opens = np.append(100.0, close[:-1])
        up, down = np.exp(0.3 * SIGMA * random.standard_exponential((2, num_bars)))
        volume = 100.0 * np.exp(0.5 * random.standard_normal(num_bars))
        high, low = np.maximum(opens, close) * up, np.minimum(opens, close) / down
        bars.append(Bars(f"SELF{number:03d}", "crypto", open_time.copy(), opens, high, low, close, volume))
    return Paths(bars, returns, noise)


def persistent_sign(strength: float, persistence: float) -> KnownMarket:
    """Return a market whose drift is +strength or -strength and keeps its sign with ``persistence``."""

    def drawn(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        flips = random.random((num_symbols, num_bars)) > persistence
        flips[:, 0] = random.random(num_symbols) > 0.5
        sign = 1.0 - 2.0 * (np.cumsum(flips, axis=1) % 2)
        return strength * sign, random.standard_normal((num_symbols, num_bars))

    def foreseen(returns: Array) -> Array:
        # Hamilton 1989, in log odds of the sign being positive.
        result = np.empty_like(returns)
        chance = np.full(len(returns), 0.5)
        for t, row in enumerate(returns.T):
            odds = chance / (1.0 - chance) * np.exp(2.0 * strength * row)
            chance = odds / (1.0 + odds)
            chance = persistence * chance + (1.0 - persistence) * (1.0 - chance)
            result[:, t] = strength * (2.0 * chance - 1.0)
        return result

    return KnownMarket(drawn, foreseen)


def mean_reversion(spread: float, persistence: float) -> KnownMarket:
    """Return a market around a wandering fair price, from which it strays and to which it comes back.

    The distance has deviation ``spread`` and keeps the share ``persistence`` of itself per bar; the fair price
    is hidden, so that only the price's own past tells how far it has strayed.
    """
    shock = spread * np.sqrt(1.0 - persistence**2)  # moves the distance
    fair = np.sqrt(1.0 - shock**2)  # moves the fair price; together 1

    def drawn(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        shocks = shock * random.standard_normal((num_symbols, num_bars))
        distance = np.empty((num_symbols, num_bars + 1))
        distance[:, 0] = spread * random.standard_normal(num_symbols)
        for t in range(num_bars):
            distance[:, t + 1] = persistence * distance[:, t] + shocks[:, t]
        noise = shocks + fair * random.standard_normal((num_symbols, num_bars))
        return (persistence - 1.0) * distance[:, :-1], noise

    def foreseen(returns: Array) -> Array:
        # Kalman 1960: the state is the distance; a return shows its change, blurred by the fair price's.
        result = np.empty_like(returns)
        mean, variance = np.zeros(len(returns)), spread**2
        back = persistence - 1.0
        for t, row in enumerate(returns.T):
            total = back**2 * variance + 1.0
            gain = (persistence * back * variance + shock**2) / total
            mean = persistence * mean + gain * (row - back * mean)
            variance = persistence**2 * variance + shock**2 - gain**2 * total
            result[:, t] = back * mean
        return result

    return KnownMarket(drawn, foreseen)


def pure_noise() -> KnownMarket:
    """Return a market in which there is nothing to find."""

    def drawn(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        return np.zeros((num_symbols, num_bars)), random.standard_normal((num_symbols, num_bars))

    return KnownMarket(drawn, np.zeros_like)


def positions_of(rule: Rule, signal: Array) -> NDArray[np.int8]:
    """Trade a signal (S, T) by thresholds: -1, 0 or 1 at every bar.

    Args:
        rule: (enter, leave). Beyond ``enter`` the position follows the signal; a position is held while the
            signal on its side is above ``leave``, which may be negative, else it is closed.
        signal: what the next bar can be expected to do.
    """
    enter, leave = rule
    result = np.empty(signal.shape, np.int8)
    position = np.zeros(len(signal), np.int8)
    for t, now in enumerate(signal.T):
        position = np.where(position * now > leave, position, 0).astype(np.int8)
        position[now > enter] = 1
        position[now < -enter] = -1
        result[:, t] = position
    return result


def worth(positions: NDArray[np.int8], expectation: Array, cost: float) -> float:
    """Return what positions (S, T) earn per bar net of ``cost`` per unit traded, noise left out."""
    held = positions[:, :-1].astype(np.float64)
    traded = np.abs(np.diff(held, axis=1, prepend=0.0))
    return float((held * expectation[:, 1:]).mean() - cost * traded.mean())


def best_rule(market: KnownMarket, cost: float, seed: int = 1, num_symbols: int = 64) -> Rule:
    """Search the threshold rule that earns most on paths of its own."""
    paths = draw(market, num_symbols, 5_000, seed)
    signal = market.foresee(paths.returns)
    scale = float(np.abs(signal).max())
    if scale == 0.0:
        return np.inf, 0.0
    grid = np.linspace(0.0, 0.6, 13), np.linspace(-0.6, 0.6, 13)
    rules = [(scale * enter, scale * leave) for enter, leave in itertools.product(*grid) if leave <= enter]
    return max(rules, key=lambda rule: worth(positions_of(rule, signal), paths.expectation, cost))
