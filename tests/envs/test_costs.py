"""The costs of a trade are those of the bar that it fills in, and their limits scale with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from data_sources.bars import Bars
from tests.envs.markets import env_of, market_of, walk


def uneven(symbol: str = "AAA", num_bars: int = 900) -> Bars:
    """Bars whose range and volume differ a hundredfold from one to the next, some beyond all limits."""
    bars = walk(symbol, num_bars, sigma=0.02)
    wide = np.random.default_rng(1).lognormal(-3, 2, num_bars).clip(0, 3)
    volume = np.random.default_rng(2).lognormal(3, 3, num_bars)
    bars = replace(bars, high=np.maximum(bars.open, bars.close) * (1 + wide), volume=volume)
    # As a market keeps them.
    return replace(bars, open=bars.open.astype(np.float32).astype(float))


def test_the_limit_of_the_rate_scales_with_the_costs():
    bars = uneven()
    env = env_of(market_of(bars), num_envs=64, range_slippage=50.0)
    env.begin_segment()
    whole = env.segment.cost_rate.clone()
    assert (whole == env.config.max_rate).any() and (whole < env.config.max_rate).any()
    env = env_of(market_of(bars), num_envs=64, range_slippage=50.0)
    env.cost_scale = 0.25
    env.begin_segment()
    torch.testing.assert_close(env.segment.cost_rate, whole / 4, rtol=1e-12, atol=0)
