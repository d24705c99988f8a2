"""The costs of a trade are those of the bar that it fills in, and their limits scale with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS, Bars
from tests.envs.account_reference import ReferenceAccount, cost_in_bar
from tests.envs.markets import CONTEXT, FREE, HORIZON, constant, env_of, market_of, walk

YEAR_NS = 365.25 * 24 * 60 * MINUTE_NS


def uneven(symbol: str = "AAA", num_bars: int = 900) -> Bars:
    """Bars whose range and volume differ a hundredfold from one to the next, some beyond all limits."""
    bars = walk(symbol, num_bars, sigma=0.02)
    wide = np.random.default_rng(1).lognormal(-3, 2, num_bars).clip(0, 3)
    volume = np.random.default_rng(2).lognormal(3, 3, num_bars)
    bars = replace(bars, high=np.maximum(bars.open, bars.close) * (1 + wide), volume=volume)
    # As a market keeps them.
    return replace(bars, open=bars.open.astype(np.float32).astype(float))


@pytest.mark.parametrize("cost_scale", [1.0, 0.3])
@pytest.mark.parametrize("ruin_fraction", [1e-6, 0.9])
def test_every_fill_pays_what_the_plain_ledger_pays_in_its_bar(cost_scale, ruin_fraction):
    bars = uneven()
    rules = {"range_slippage": 0.3, "volume_slippage": 0.05, "account_value": 2_000.0, "borrow_rate": 5.0}
    env = env_of(
        market_of(bars), num_envs=64, ruin_fraction=ruin_fraction, positions=(-1.0, 0.0, 2.0), **rules
    )
    env.cost_scale = cost_scale
    env.restart()
    env.begin_segment()
    begun, actions = env.cursor.tolist(), np.random.default_rng(0).integers(0, 3, (HORIZON, 64))
    accounts = [ReferenceAccount(ruin_fraction, held=0.0) for _ in begun]
    for h in range(HORIZON):
        rewards, terminated, _ = env.step(torch.from_numpy(actions[h]))
        for n, account in enumerate(accounts):
            bar, next_bar = begun[n] + h + 1, begun[n] + h + 2
            expected = account.fill(
                env.config.positions[actions[h, n]],
                bars.open[bar],
                bars.open[next_bar],
                cost_in_bar(bars, bar, env.config, cost_scale),
                cost_scale * 5.0 * (bars.open_time[next_bar] - bars.open_time[bar]) / YEAR_NS,
                cost_in_bar(bars, next_bar, env.config, cost_scale),
            )
            assert float(rewards[n]) == pytest.approx(expected, rel=1e-5, abs=1e-6), (h, n)
            assert not terminated[n] or account.ruined
    ruined = sum(account.ruined for account in accounts)
    assert ruined > 30 if ruin_fraction == 0.9 else ruined < 30
    paid = env.episode_statistics()["costs"]
    assert float(paid) == pytest.approx(sum(account.costs for account in accounts), rel=1e-5)


def test_a_ruined_position_is_closed_at_the_costs_of_the_bar_that_it_closes_in():
    crash = CONTEXT + 9
    price = np.where(np.arange(600) < crash, 50.0, 5.0)
    bars = replace(constant(), open=price, close=price, low=price, high=price * 1.0, volume=np.full(600, 1e9))
    bars.high[crash] = 5.0 * 1.2  # a range of 20 % in the bar of the crash alone
    bars.volume[crash] = 1.0  # and no volume
    rules = {"range_slippage": 0.5, "volume_slippage": 0.02, "account_value": 1e3, **FREE}
    env = env_of(market_of(bars), num_envs=256, ruin_fraction=0.5, **rules)
    env.begin_segment()
    reached = (env.cursor < crash - 1) & (env.cursor + HORIZON >= crash - 1)
    while env._step < HORIZON:
        env.step(torch.full((256,), 2))
    assert reached.any() and not env.alive[reached].any()
    # A tenth is left, and closing it costs half the range and the whole impact.
    left = env.account.cash[reached]
    torch.testing.assert_close(left, torch.full_like(left, 0.1 * (1 - 0.1 - 0.02)), rtol=1e-5, atol=0)


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
