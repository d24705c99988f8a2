"""Markets whose best policy is known, for the self-test.

Returns are drawn around a hidden expectation. A Bayesian filter of the true model forecasts the next bar's return,
and the best threshold rule on that forecast is the reference for what can be earned net of costs.
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
from data_sources.simulated import draw_regimes

Array = NDArray[np.floating[Any]]
SIGMA = 1e-3  # noise of one bar, as a log return
FIRST_OPEN_NS = 1_577_836_800 * 10**9  # 2020-01-01
Rule = tuple[float, float]  # enter, leave: see apply_rule


@dataclass(frozen=True)
class KnownMarket:
    """A model of returns, and the filter that knows the model.

    ``draw(random, S, T)`` returns the expectation of every bar's return and the noise around it, both (S, T);
    ``forecast`` turns returns (S, T) into the expectation of the next bar's return, given those up to each bar.
    ``process(S)`` has persistence and deviation of that forecast, where it is an AR(1) process. Where symbols
    tell of each other, ``forecast_alone`` and ``process_alone`` are the same for who sees one symbol only, and
    ``names`` are those of the first symbols.
    """

    draw: Callable[[np.random.Generator, int, int], tuple[Array, Array]]
    forecast: Callable[[Array], Array]
    names: tuple[str, ...] = ()
    process: Callable[[int], tuple[float, float]] | None = None
    forecast_alone: Callable[[Array], Array] | None = None
    process_alone: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Paths:
    """Simulated paths (S, T) as bars, with their hidden parts."""

    bars: list[Bars]
    returns: Array
    noise: Array  # the unpredictable part of the returns

    @property
    def expectation(self) -> Array:
        """The predictable part of the returns, given the hidden state."""
        return self.returns - self.noise


def draw_paths(market: KnownMarket, num_symbols: int, num_bars: int, seed: int) -> Paths:
    """Draw paths; another seed gives fresh paths of the same market."""
    random = np.random.default_rng(seed)
    expectation, noise = market.draw(random, num_symbols, num_bars)
    returns = expectation + noise
    open_time = FIRST_OPEN_NS + np.arange(num_bars, dtype=np.int64) * MINUTE_NS
    bars = []
    names = [*market.names, *(f"SELF{number:03d}" for number in range(len(market.names), num_symbols))]
    for name, row in zip(names, returns, strict=True):
        close = 100.0 * np.exp(SIGMA * np.cumsum(row))
        opens = np.append(100.0, close[:-1])
        up, down = np.exp(0.3 * SIGMA * random.standard_exponential((2, num_bars)))
        volume = 100.0 * np.exp(0.5 * random.standard_normal(num_bars))
        high, low = np.maximum(opens, close) * up, np.minimum(opens, close) / down
        bars.append(Bars(name, "crypto", open_time.copy(), opens, high, low, close, volume))
    return Paths(bars, returns, noise)


def persistent_sign(strength: float, persistence: float) -> KnownMarket:
    """Return the simulated market: a drift of +strength or -strength that keeps its sign with ``persistence``."""

    def draw(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        return draw_regimes(random, (num_symbols, num_bars), strength, persistence)

    def forecast(returns: Array) -> Array:
        # Hamilton 1989, in log odds of the sign being positive.
        result = np.empty_like(returns)
        chance = np.full(len(returns), 0.5)
        for t, row in enumerate(returns.T):
            odds = chance / (1.0 - chance) * np.exp(2.0 * strength * row)
            chance = odds / (1.0 + odds)
            chance = persistence * chance + (1.0 - persistence) * (1.0 - chance)
            result[:, t] = strength * (2.0 * chance - 1.0)
        return result

    return KnownMarket(draw, forecast)


def mean_reversion(spread: float, persistence: float) -> KnownMarket:
    """Return a market whose price strays from a wandering fair price and comes back to it.

    The log distance between the two is an AR(1) process with standard deviation ``spread`` and coefficient
    ``persistence``. The fair price is hidden: the distance can only be inferred from past prices.
    """
    shock = spread * np.sqrt(1.0 - persistence**2)  # moves the distance
    fair = np.sqrt(1.0 - shock**2)  # moves the fair price; the total variance is 1

    def draw(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        shocks = shock * random.standard_normal((num_symbols, num_bars))
        distance = np.empty((num_symbols, num_bars + 1))
        distance[:, 0] = spread * random.standard_normal(num_symbols)
        for t in range(num_bars):
            distance[:, t + 1] = persistence * distance[:, t] + shocks[:, t]
        noise = shocks + fair * random.standard_normal((num_symbols, num_bars))
        return (persistence - 1.0) * distance[:, :-1], noise

    def forecast(returns: Array) -> Array:
        # Kalman 1960: the state is the distance; a return observes its change, plus the fair price's move.
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

    return KnownMarket(draw, forecast)


def pure_noise() -> KnownMarket:
    """Return a market with nothing to predict."""

    def draw(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        return np.zeros((num_symbols, num_bars)), random.standard_normal((num_symbols, num_bars))

    return KnownMarket(draw, np.zeros_like)


def apply_rule(rule: Rule, forecast: Array) -> NDArray[np.int8]:
    """Turn a forecast (S, T) of the next bar's return into positions (S, T): -1, 0 or 1.

    Args:
        rule: (enter, leave). Beyond ``enter`` the position follows the forecast. It is held as long as the
            forecast in its direction stays above ``leave``, which may be negative, and closed otherwise.
        forecast: of the next bar's return, in sigma.
    """
    enter, leave = rule
    result = np.empty(forecast.shape, np.int8)
    position = np.zeros(len(forecast), np.int8)
    for t, now in enumerate(forecast.T):
        position = np.where(position * now > leave, position, 0).astype(np.int8)
        position[now > enter] = 1
        position[now < -enter] = -1
        result[:, t] = position
    return result


def expected_profit(positions: NDArray[np.int8], expectation: Array, cost: float) -> float:
    """Return what positions (S, T) earn per bar, net of ``cost`` per unit traded and without the noise."""
    held = positions[:, :-1].astype(np.float64)
    traded = np.abs(np.diff(held, axis=1, prepend=0.0))
    return float((held * expectation[:, 1:]).mean() - cost * traded.mean())


def find_best_rule(market: KnownMarket, cost: float, seed: int = 1, num_symbols: int = 64) -> Rule:
    """Grid-search the threshold rule that earns most, on paths of its own."""
    paths = draw_paths(market, num_symbols, 5_000, seed)
    forecast = market.forecast(paths.returns)
    scale = float(np.abs(forecast).max())
    if scale == 0.0:
        return np.inf, 0.0
    grid = np.linspace(0.0, 0.6, 13), np.linspace(-0.6, 0.6, 13)
    rules = [(scale * enter, scale * leave) for enter, leave in itertools.product(*grid) if leave <= enter]
    return max(rules, key=lambda rule: expected_profit(apply_rule(rule, forecast), paths.expectation, cost))
