"""Markets in which a symbol can only be forecast by the others, for the self-test.

Who looks at one symbol sees noise: exactly so beside leaders, and behind a market factor all but. The forecasts
are exact, and AR(1) processes, so that the best policies are, too: best_policy.py.
Shapes: S = symbols, T = bars. Everything is in units of sigma, the noise of one bar.
"""

from __future__ import annotations

import numpy as np

from commands.selftest.known_markets import Array, KnownMarket

LEADERS = ("BTCUSDT", "ETHUSDT")  # as the features of the panel know them
WEIGHTS = (0.8, 0.6)  # of their moves in those of the others; the squares add up to 1


def leaders(strength: float) -> KnownMarket:
    """Return a market in which two symbols lead: their moves are in the next bar of all others.

    A follower's return is ``strength`` times the leaders' last ones, weighted, and its own noise; each variance is
    1. So each symbol alone is white noise, and the forecast, which has no memory, has deviation ``strength``.
    """

    def draw(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        noise = random.standard_normal((num_symbols, num_bars))
        noise[2:] *= np.sqrt(1.0 - strength**2)
        expectation = np.zeros_like(noise)
        expectation[2:, 1:] = strength * (np.array(WEIGHTS) @ noise[:2, :-1])
        return expectation, noise

    def forecast(returns: Array) -> Array:
        result = np.zeros_like(returns)
        result[2:] = strength * (np.array(WEIGHTS) @ returns[:2])
        return result

    return KnownMarket(draw, forecast, LEADERS, lambda _: (0.0, strength), np.zeros_like, (0.0, 0.0))


def hidden_edge(persistence: float, factor: float) -> KnownMarket:
    """Return a market whose symbols move together, and each of them also by itself, which can be forecast.

    A return is that of a market factor, white noise of deviation ``factor`` below 1, and a residual: an AR(1)
    process with the coefficient ``persistence``, which reverts where that is below 0. Factor and innovation of the
    residual have variance 1 together. The factor cannot be forecast, and it hides the residual from a policy that
    sees one symbol.
    """
    own = 1.0 - factor**2  # variance of the innovations

    def draw(random: np.random.Generator, num_symbols: int, num_bars: int) -> tuple[Array, Array]:
        innovation = np.sqrt(own) * random.standard_normal((num_symbols, num_bars))
        residual = innovation.copy()
        residual[:, 0] /= np.sqrt(1.0 - persistence**2)
        for t in range(1, num_bars):
            residual[:, t] += persistence * residual[:, t - 1]
        expectation = np.zeros_like(residual)
        expectation[:, 1:] = persistence * residual[:, :-1]
        return expectation, residual - expectation + factor * random.standard_normal(num_bars)

    def forecast(returns: Array) -> Array:
        # Differences from the mean have no factor in them; the mean is the factor and the residuals' mean.
        mean = returns.mean(0, keepdims=True)
        return persistence * (returns - mean) + forecast_alone(mean, own / len(returns))

    def forecast_alone(returns: Array, innovation: float) -> Array:
        # Kalman 1960: the state is the residual, or a mean of such; a return is it, plus the factor.
        result, estimate = np.empty_like(returns), np.zeros(len(returns))
        variance = innovation / (1.0 - persistence**2)
        for t, row in enumerate(returns.T):
            gain = variance / (variance + factor**2)
            estimate = estimate + gain * (row - estimate)
            variance = persistence**2 * (1.0 - gain) * variance + innovation
            estimate = persistence * estimate
            result[:, t] = estimate
        return result

    def deviation(innovation: float, noise: float) -> float:
        # Of the forecast in the steady state, from that of the Riccati equation (its positive root).
        gap = noise**2 * (1.0 - persistence**2) - innovation
        variance = (np.sqrt(gap**2 + 4.0 * innovation * noise**2) - gap) / 2.0
        known = innovation / (1.0 - persistence**2) - variance * noise**2 / (variance + noise**2)
        return float(abs(persistence) * np.sqrt(known))

    def process(num_symbols: int) -> tuple[float, float]:
        of_mean = own / num_symbols
        return persistence, float(np.hypot(deviation(own - of_mean, 0.0), deviation(of_mean, factor)))

    alone = persistence, deviation(own, factor)
    return KnownMarket(draw, forecast, (), process, lambda returns: forecast_alone(returns, own), alone)
