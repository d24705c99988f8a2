"""A market of hourly bars, small enough to be walked in seconds, with an edge of any size or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from data_sources.bars import DAY_NS, Bars
from data_sources.simulated import draw_regimes
from data_sources.sources import DataRequest, Source
from data_sources.vendors import SOURCES

ORIGIN = 20_400  # the first day, since 1970
PER_DAY = 24
SIGMA, PERSISTENCE = 0.005, 0.98


class Hourly(Source):
    """Takes the place of the simulated source, with as few bars as can be; a drift mostly lasts a day."""

    name, label = "simulated", "Hourly market"
    is_computed = True

    def __init__(
        self, strength: float, seed: int = 0, first_day: int = ORIGIN, changes_on: int = 10**6
    ) -> None:
        """Bars begin on ``first_day``; from the day ``changes_on`` on, since 1970, they are others."""
        self.strength, self.seed, self.first_day, self.changes_on = strength, seed, first_day, changes_on

    def compute(self, request: DataRequest) -> Iterator[Bars]:
        """Draw every day from its own seed, so that later bars change no earlier one."""
        days = np.arange(self.first_day, request.end_ns // DAY_NS)
        for number in range(request.simulated_symbols):
            seeds = [self.seed + 1_000 * (day >= self.changes_on) for day in days]
            draws = [
                np.random.default_rng((seed, number, int(day))) for seed, day in zip(seeds, days, strict=True)
            ]
            moves = np.concatenate([self._day(draw) for draw in draws])
            close = 100 * np.exp(SIGMA * np.cumsum(moves))
            opens = np.append(100.0, close[:-1])
            time = (days[:, None] * DAY_NS + np.arange(PER_DAY) * (DAY_NS // PER_DAY)).flatten()
            edges = np.maximum(opens, close), np.minimum(opens, close)
            yield Bars(f"SIM{number}", "crypto", time, opens, *edges, close, np.full(len(time), 100.0))

    def parameters(self, request: DataRequest) -> tuple[int, ...]:
        """What its bars depend on."""
        return (request.simulated_symbols, request.end_ns // DAY_NS, self.seed)

    def _day(self, draw: np.random.Generator) -> np.ndarray:
        drift, noise = draw_regimes(draw, (PER_DAY,), self.strength, PERSISTENCE)
        return np.asarray(drift + noise)


def plant(patch: pytest.MonkeyPatch | None = None, **given: Any) -> None:
    """Let the simulated source draw this market, in a test or in a process of its own."""
    (patch or pytest.MonkeyPatch()).setitem(SOURCES, "simulated", Hourly(**given))


# Tiny; days that are walked end on 2026-01-31.
SIZES = {
    "sources": ("simulated",),
    "simulated_symbols": 2,
    "simulated_bars": 60 * 1440,
    "end_date": "2026-01-31",
    "min_bars": 50,
    "holdout_days": 10,
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "feature_encoding": "linear",  # what little is learnt of so few bars is learnt sooner
    "context_bars": 4,
    "horizon": 8,
    "episode_bars": 16,
    "envs_per_gpu": 8,
    "batch_size": 32,
    "micro_batch_segments": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "epochs": 4,
    "checkpoint_every": 2,
    "crypto_fee_bps": 1.0,
}
# Enough to learn a drift of 0.35 deviations within a window or two.
LEARNABLE = SIZES | {
    "simulated_symbols": 8,
    "simulated_bars": 400 * 1440,
    "holdout_days": 14,
    "context_bars": 24,
    "horizon": 24,
    "episode_bars": 240,
    "envs_per_gpu": 64,
    "batch_size": 384,
    "micro_batch_segments": 32,
    "learning_rate": 3e-3,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "entropy_coef": 0.003,
    "epochs": 20,
    "checkpoint_every": 20,
}
