"""Small markets, configurations and environments for tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from data_sources.bars import MINUTE_NS, AssetClass, Bars
from envs.config import EnvConfig
from envs.market import Market
from envs.trading_env import TradingEnv

MONDAY = 26_297_280 * MINUTE_NS  # 2020-01-01 00:00 UTC
NEVER = 2**62  # a holdout that does not begin
CONTEXT, HORIZON = 8, 16


def walk(
    symbol: str = "AAA",
    num_bars: int = 600,
    asset_class: AssetClass = "crypto",
    seed: int = 0,
    sigma: float = 1e-3,
    gaps: dict[int, int] | None = None,
) -> Bars:
    """A random walk; ``gaps`` maps a bar to the extra minutes in front of it."""
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, sigma, num_bars)))
    opens = np.concatenate([[100.0], close[:-1]]) * np.exp(random.normal(0, sigma / 4, num_bars))
    high = np.maximum(opens, close) * np.exp(np.abs(random.normal(0, sigma / 2, num_bars)))
    low = np.minimum(opens, close) * np.exp(-np.abs(random.normal(0, sigma / 2, num_bars)))
    steps = np.ones(num_bars, dtype=np.int64)
    for bar, minutes in (gaps or {}).items():
        steps[bar] += minutes
    open_time = MONDAY + np.cumsum(steps) * MINUTE_NS
    return Bars(symbol, asset_class, open_time, opens, high, low, close, random.lognormal(3, 1, num_bars))


def constant(symbol: str = "AAA", num_bars: int = 600, asset_class: AssetClass = "crypto") -> Bars:
    """Bars whose price never moves."""
    bars = walk(symbol, num_bars, asset_class)
    price = np.full(num_bars, 50.0)
    return replace(bars, open=price, high=price, low=price, close=price)


def funded(bars: Bars, every: int = 5) -> Bars:
    """The same bars with funding of either sign at every fifth."""
    rates = np.where(np.arange(len(bars)) % every, 0.0, np.random.default_rng(9).normal(0, 1e-3, len(bars)))
    return bars.with_funding(rates)


def market_of(*bars: Bars, holdout_start_ns: int = NEVER, **given: object) -> Market:
    given = {"context_bars": CONTEXT, "horizon": HORIZON, **given}
    return Market.from_bars(bars, device="cpu", holdout_start_ns=holdout_start_ns, **given)


def moved(market: Market, device: torch.device | str) -> Market:
    """A market made on the CPU, on another device."""
    values = {field.name: getattr(market, field.name) for field in fields(market)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(market, **tensors)


@contextmanager
def without_syncs() -> Iterator[None]:
    """Raise where the host waits for the GPU inside."""
    with warnings.catch_warnings():
        # That torch does not detect all of them; tests/nullgpu does.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def config_of(**changes: Any) -> EnvConfig:
    settings = {
        "num_envs": 16,
        "context_bars": CONTEXT,
        "horizon": HORIZON,
        "episode_bars": 4 * HORIZON,
        "positions": (-1.0, 0.0, 1.0),
        "stock_fee_bps": 0.5,
        "crypto_fee_bps": 5.0,
        "perpetual_fee_bps": 4.5,
        "maintenance_margin": 0.01,
        "slippage_bps": 1.0,
        "borrow_rate": 0.05,
        "ruin_fraction": 0.2,
        "range_slippage": 0.0,
        "volume_slippage": 0.0,
        "account_value": 10_000.0,
        "flat_before_close": 0,
    }
    return EnvConfig(**(settings | changes))


def env_of(market: Market, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> TradingEnv:
    return TradingEnv(market, config_of(**changes), "cpu", seed, dtype)


FEES = {"stock_fee_bps": 0.0, "crypto_fee_bps": 0.0, "perpetual_fee_bps": 0.0}
FREE = FEES | {"slippage_bps": 0.0, "borrow_rate": 0.0}


def play_segment(env, actions=None, seed=0):
    """Play one segment; return bars, observations (H + 1, N, A), rewards, terminated, truncated (H, N)."""
    bars = env.begin_segment()
    n, h = env.config.num_envs, env.config.horizon
    if actions is None:
        generator = torch.Generator().manual_seed(seed)
        actions = torch.randint(0, len(env.config.positions), (h, n), generator=generator)
    observations, outcomes = [], []
    for action in actions:
        observations.append(env.account_observations())
        outcomes.append(env.step(action))
    observations.append(env.account_observations())
    rewards, terminated, truncated = map(torch.stack, zip(*outcomes, strict=True))
    return bars, torch.stack(observations), rewards, terminated, truncated


def mixed_market(perpetuals=False, **given):
    coin = funded(walk("AAA", asset_class="perpetual")) if perpetuals else walk("AAA")
    return market_of(coin, walk("BBB", 500, "stock", seed=1, gaps={250: 1050}), **given)
