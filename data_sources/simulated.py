"""A simulated market with something to learn: minute bars whose drift follows a hidden, persistent regime.

One bar's log return is sigma * (strength * regime + noise), where the regime is +1 or -1 and stays with
probability ``persistence`` from bar to bar. Every UTC day of a symbol is drawn from its own seed, so that a
bar has the same numbers (up to the symbol's price scale) in every window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS, MINUTE_NS, Bars
from data_sources.sources import DataRequest, Source

BARS_PER_DAY = DAY_NS // MINUTE_NS
START_PRICE = 100.0
_WICK = 0.3  # mean length of a wick, in sigma
_LOG_VOLUME_SIGMA = 0.5


class _Simulated(Source):
    name, label = "simulated", "Simulated market"
    is_computed = True

    def compute(self, request: DataRequest) -> Iterator[Bars]:
        yield from simulated_bars(
            request.simulated_symbols, request.simulated_bars, request.simulated_seed, request.end_ns
        )

    def parameters(self, request: DataRequest) -> tuple[int, ...]:
        sizes = (request.simulated_symbols, request.simulated_bars, request.simulated_seed)
        return (*sizes, request.end_ns // DAY_NS)


SOURCE = _Simulated()


def simulated_bars(
    num_symbols: int,
    num_bars: int,
    seed: int,
    end_ns: int,
    *,
    sigma: float = 0.001,
    strength: float = 0.2,
    persistence: float = 0.98,
) -> list[Bars]:
    """Draw the bars of "SIM000", "SIM001", ..., the same for the same arguments on every machine.

    Args:
        num_symbols: symbols, independent of each other; more symbols leave the first ones as they are.
        num_bars: bars per symbol, one a minute without gaps.
        seed: another seed is another market.
        end_ns: the bars end at this instant floored to the UTC day, so that a restart on the same day
            sees the same market.
        sigma: standard deviation of a bar's noise, as a log return.
        strength: drift of the regime in units of sigma; 0 leaves nothing to learn.
        persistence: probability that the regime stays for the next bar.
    """
    end_day = end_ns // DAY_NS
    num_days = -(-num_bars // BARS_PER_DAY)
    open_time = (end_day * BARS_PER_DAY - np.arange(num_bars, 0, -1)) * MINUTE_NS
    result = []
    for index in range(num_symbols):
        days = [
            _draw_day(seed, index, day, sigma, strength, persistence)
            for day in range(end_day - num_days, end_day)
        ]
        log_return, up_wick, down_wick, volume = np.concatenate(days, axis=1)[:, -num_bars:]
        close = START_PRICE * np.exp(np.cumsum(log_return))
        open_price = np.append(START_PRICE, close[:-1])
        result.append(
            Bars(
                f"SIM{index:03d}",
                "crypto",  # trades round the clock
                open_time.copy(),
                open_price,
                np.maximum(open_price, close) * np.exp(up_wick),
                np.minimum(open_price, close) * np.exp(-down_wick),
                close,
                volume.copy(),
            )
        )
    return result


def draw_regimes(
    generator: np.random.Generator, shape: tuple[int, ...], strength: float, persistence: float
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Return the drift and the noise of bars, both of ``shape`` (..., T) and in sigma.

    The drift is +strength or -strength with equal chance, and keeps its sign with ``persistence`` from bar to bar.
    """
    flips = generator.random(shape) > persistence
    flips[..., 0] = generator.random(shape[:-1]) > 0.5  # the first bar has either sign
    regime = 1.0 - 2.0 * (np.cumsum(flips, axis=-1) % 2)
    return strength * regime, generator.standard_normal(shape)


def _draw_day(
    seed: int, index: int, day: int, sigma: float, strength: float, persistence: float
) -> NDArray[np.float64]:
    """Return (4, 1440): log returns, upper and lower wicks as log distances, volumes."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, day))))
    drift, noise = draw_regimes(generator, (BARS_PER_DAY,), strength, persistence)
    wicks = _WICK * sigma * generator.standard_exponential((2, BARS_PER_DAY))
    volume = 100.0 * np.exp(_LOG_VOLUME_SIGMA * generator.standard_normal(BARS_PER_DAY))
    return np.stack([sigma * (drift + noise), *wicks, volume])
