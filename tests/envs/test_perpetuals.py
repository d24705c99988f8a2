"""Perpetual futures: their fee, what they do not borrow, and the margin that their positions need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import AssetClass, Bars
from envs.counterfactuals import growth_of_every_choice
from envs.latest import latest_decisions
from tests.envs.account_reference import ReferenceAccount, cost_in_bar
from tests.envs.markets import CONTEXT, FREE, HORIZON, config_of, env_of, market_of, walk
from tests.training.rollouts import policy_for, rollout_of

LEVERAGE = (-10.0, 0.0, 10.0)


def falling(asset_class: AssetClass, fall: float = 0.01) -> Bars:
    """Bars that fall by the same fraction at every open."""
    bars = walk(num_bars=CONTEXT + HORIZON + 2, asset_class=asset_class)
    price = 100 * (1 - fall) ** np.arange(float(len(bars)))
    return replace(bars, open=price, high=price, low=price, close=price)


def only_env(bars: Bars, **changes: object):
    """One account on bars that have room for one segment, which has begun."""
    env = env_of(market_of(bars), num_envs=1, episode_bars=HORIZON, **changes)
    env.begin_segment()
    return env


def test_a_perpetual_pays_its_own_fee_and_borrows_nothing() -> None:
    bars = [
        walk(name, asset_class=kind) for name, kind in (("A", "perpetual"), ("B", "crypto"), ("C", "stock"))
    ]
    market = market_of(*bars)
    rates = market.cost_rates(config_of(slippage_bps=0.0), torch.float64)
    assert rates.tolist() == pytest.approx([4.5e-4, 5e-4, 0.5e-4])
    assert (market.quotes[:600, 2] == 0).all() and (market.quotes[600:1_199, 2] > 0).all()
    assert market.is_crypto.tolist() == [True, True, False]
    decided = latest_decisions(market, config_of())
    # 1,000 x fee and slippage, as the policy sees it.
    assert decided.accounts[:, 0, -1].tolist() == pytest.approx([0.55, 0.6, 0.15])


def test_it_trades_round_the_clock_and_a_missing_hour_is_a_hole() -> None:
    bars = walk(asset_class="perpetual", gaps={100: 61, 200: 59})
    market = market_of(bars)
    assert market.stretch_first.tolist() == [0, 100]
    assert (market.minutes_left == market_of(walk()).minutes_left[0]).all()


@pytest.mark.parametrize("target", [-1.0, 0.0, 3.0])
def test_an_account_of_it_is_the_plain_one(target: float) -> None:
    bars = walk(num_bars=CONTEXT + HORIZON + 2, asset_class="perpetual")
    config = {"positions": (-1.0, 0.0, 3.0), "borrow_rate": 5.0}
    env = only_env(bars, **config)
    opens = bars.open.astype(np.float32).astype(float)
    account = ReferenceAccount(0.2, held=0.0, margin=0.01)
    for t in range(HORIZON):
        bar = CONTEXT + 1 + t
        rewards, *_ = env.step(torch.tensor([config["positions"].index(target)]))
        cost = cost_in_bar(bars, bar, env.config)
        assert float(rewards[0]) == pytest.approx(
            account.fill(target, *opens[bar : bar + 2], cost, 0.0), abs=1e-7
        )


def test_a_perpetual_position_is_liquidated_at_its_margin_and_a_spot_position_is_not() -> None:
    rules = {"positions": LEVERAGE, "ruin_fraction": 0.001, "maintenance_margin": 0.05, **FREE}
    # After n falls of 1 % equity is 1 - 10 x (1 - 0.99^n), and the position is worth 10 x 0.99^n: 0.51 and 9.51
    # after 5, 0.41 and 9.41 after 6, which is below 5 % of it.
    env = only_env(falling("perpetual"), **rules)
    ruined = [bool(env.step(torch.tensor([2]))[1]) for _ in range(HORIZON)]
    assert ruined.index(True) == 5 and sum(ruined) == 1
    equity = 1 - 10 * (1 - 0.99**6)
    assert float(env.account.cash) == pytest.approx(equity, abs=1e-6)
    spot = only_env(falling("crypto"), **rules)
    assert not any(bool(spot.step(torch.tensor([2]))[1]) for _ in range(9))


def test_a_short_that_moves_against_it_is_liquidated_too_and_only_where_the_setting_is_on() -> None:
    rules = {"positions": (-1.0, 0.0, 1.0), "ruin_fraction": 0.001, **FREE}
    rising = falling("perpetual", fall=-0.1)
    # After n rises of 10 % it owes 1.1^n and has 2: 0.052 is left after 7, and 1.949 is owed.
    for margin, expected in ((0.02, 7), (0.03, 6), (0.0, 7)):
        env = only_env(rising, **rules, maintenance_margin=margin)
        assert (env.segment.margin is None) == (margin == 0)
        ruined = [bool(env.step(torch.tensor([0]))[1]) for _ in range(HORIZON)]
        assert ruined.index(True) == expected


def test_hindsight_ends_a_choice_that_the_margin_ends() -> None:
    rules = {"positions": LEVERAGE, "ruin_fraction": 1e-6, "maintenance_margin": 0.095, **FREE}
    market = market_of(falling("perpetual"))
    env = env_of(market, episode_bars=HORIZON, **rules)
    rollout = rollout_of(env, policy_for(env), hindsight=True)
    assert rollout.hindsight is not None
    # A fall of 1 % leaves 0.9 of the equity of a tenfold long, and 9.9 of its value: under 9.5 %.
    assert rollout.hindsight.ends[..., 2].all() and not rollout.hindsight.ends[..., :2].any()
    chosen = rollout.actions[:, 0] == 2
    assert chosen.any() and (rollout.terminated[:, 0] == chosen).all()


def test_it_closes_there_at_the_costs_of_that_bar() -> None:
    rules = {"positions": LEVERAGE, "ruin_fraction": 1e-6, "maintenance_margin": 0.095}
    env = only_env(falling("perpetual"), **rules, volume_slippage=0.001)
    growth = growth_of_every_choice(env.segment.fills_ahead(), LEVERAGE, torch.zeros(()))
    rewards, ruined, _ = env.step(torch.tensor([2]))
    assert ruined.all() and float(growth[0, 0, 1, 2]) == pytest.approx(float(rewards), abs=2e-7)
    assert float(env.last_fill[2]) > 19 * 5.5e-4


def test_a_margin_that_the_largest_position_cannot_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"maintenance_margin=0.2 must be 0.1 or less, the equity of the largest"
    ):
        config_of(positions=LEVERAGE, maintenance_margin=0.2)
