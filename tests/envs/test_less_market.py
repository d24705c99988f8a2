"""The reward less the market's: what the others of the asset class moved by is no merit of a position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS, Bars
from envs.market import Market
from envs.trading_env import TradingEnv
from tests.envs.account_reference import ReferenceAccount, cost_in_bar
from tests.envs.markets import MONDAY, env_of, market_of, walk
from tests.envs.panel_reference import growth_of_others
from tests.training.rollouts import policy_for
from training.hindsight import hindsight_advantages
from training.rollout import Rollout, collect

POSITIONS = (-1.0, 0.0, 0.5, 2.0)


def mixed_bars() -> list[Bars]:
    """Coins with gaps, of which one comes late and one goes; stocks with a night; one perpetual future."""
    late = walk("LATE", 100, seed=3)
    return [
        walk("AAA", 200, seed=1),
        walk("BBB", 200, seed=2, sigma=5e-3, gaps={40: 2, 41: 7, 130: 30}),
        replace(late, open_time=late.open_time + 70 * MINUTE_NS),
        walk("GONE", 90, seed=4),
        walk("STOCK", 200, seed=5, asset_class="stock", gaps={100: 1_050}),
        walk("SPY", 200, seed=6, asset_class="stock", gaps={100: 1_050, 101: 3}),
        walk("ONE.P", 200, seed=7, asset_class="perpetual"),
    ]


def neutral_market(bars: list[Bars]) -> Market:
    return market_of(*bars, with_others=True)


def rollout_of(env: TradingEnv, less: bool) -> Rollout:
    generator = torch.Generator().manual_seed(7)
    return collect(env, policy_for(env), generator, 16, hindsight=True, less_market=less)


def test_the_growth_of_the_others_is_that_of_a_plain_computation() -> None:
    bars = mixed_bars()
    market = neutral_market(bars)
    assert market.others_growth is not None
    for number, series in enumerate(bars):
        actual = market.others_growth[market.offsets[number] : market.offsets[number + 1]]
        expected = growth_of_others(bars, series)
        assert np.abs(actual.numpy() - expected).max() < 1e-7, series.symbol
        assert (actual != 0).any() == (series.symbol != "ONE.P")


def test_a_minute_without_a_bar_shifts_nothing() -> None:
    # A jump of the others while a symbol has no bar belongs to the position that was held meanwhile.
    still = [walk(name, 100, seed=seed, sigma=1e-9) for seed, name in enumerate("ABC")]
    jump = np.where(np.arange(100) < 50, 1.0, 1.1)
    jumped = [
        replace(series, **{name: getattr(series, name) * jump for name in ("open", "high", "low", "close")})
        for series in still[1:]
    ]
    halted = _without(still[0], [49, 50, 51])
    growth = market_of(halted, *jumped, with_others=True).others_growth
    assert growth is not None
    own = growth[: len(halted)]
    assert int(own.argmax()) == 48  # opens before the jump, and the next one opens after it
    assert float(own.max()) == pytest.approx(np.log(1.1), rel=1e-5)
    assert float(own.abs().sum()) == pytest.approx(np.log(1.1), rel=1e-5)


def _without(bars: Bars, rows: list[int]) -> Bars:
    keep = np.delete(np.arange(len(bars)), rows)
    columns = ("open_time", "open", "high", "low", "close", "volume")
    return replace(bars, **{name: getattr(bars, name)[keep] for name in columns})


def test_no_bar_after_the_next_open_is_in_it() -> None:
    bars = mixed_bars()
    cut_ns = MONDAY + 85 * MINUTE_NS
    changed = []
    for series in bars:
        factor = np.where(series.open_time < cut_ns, 1.0, 1.03)
        prices = {name: getattr(series, name) * factor for name in ("open", "high", "low", "close")}
        changed.append(replace(series, **prices))
    for one, other, series in zip(*map(_by_symbol, (bars, changed)), bars, strict=True):
        known = np.append(series.open_time[1:], series.open_time[-1]) <= cut_ns  # the next open
        assert torch.equal(one[known], other[known])
        assert torch.equal(one, other) == (series.symbol == "ONE.P")


def _by_symbol(bars: list[Bars]) -> list[torch.Tensor]:
    market = neutral_market(bars)
    assert market.others_growth is not None
    return list(market.others_growth.split([len(series) for series in bars]))


def test_rewards_are_those_of_a_ledger_of_plain_floats_less_the_markets() -> None:
    bars = {series.symbol: series for series in mixed_bars()}
    market = neutral_market(list(bars.values()))
    changes = {"positions": POSITIONS, "flat_before_close": 30, "ruin_fraction": 0.9, "crypto_fee_bps": 90.0}
    env = env_of(market, num_envs=32, borrow_rate=0.0, **changes)
    rollout = rollout_of(env, less=True)
    volatility, state = env.volatility, env.state_dict()
    growth_of = {symbol: growth_of_others(list(bars.values()), series) for symbol, series in bars.items()}
    assert not rollout.valid.all()  # some are ruined
    minutes_left = market.minutes_left.numpy()
    for n, symbol in enumerate(state["symbols"]):
        series = bars[symbol]
        first = int(np.searchsorted(series.open_time, int(state["open_time"][n]))) - env.config.horizon
        offset = int(market.offsets[market.symbols.index(symbol)])
        margin = 0.01 if series.asset_class == "perpetual" else 0.0
        growth, account = growth_of[symbol], ReferenceAccount(0.9, held=0.0, margin=margin)
        for t, action in enumerate(rollout.actions[n].tolist()):
            fill = first + 1 + t
            target = POSITIONS[action] if minutes_left[offset + fill] > 30 else 0.0
            costs = [cost_in_bar(series, bar, env.config) for bar in (fill, fill + 1)]
            prices = [float(np.float32(series.open[bar])) for bar in (fill, fill + 1)]
            expected = account.fill_less_market(growth[fill], target, *prices, costs[0], 0.0, costs[1])
            assert float(rollout.rewards[n, t] * volatility[n]) == pytest.approx(expected, abs=2e-6)


def test_every_choice_is_valued_less_the_markets() -> None:
    market = neutral_market(mixed_bars())
    plain, neutral = (rollout_of(env_of(market, positions=POSITIONS), less) for less in (False, True))
    env = env_of(market, positions=POSITIONS)
    rollout_of(env, less=False)
    assert plain.hindsight and neutral.hindsight and env.segment.others_growth is not None
    others = env.segment.others_growth.t() / env.volatility[:, None]
    expected = plain.hindsight.growth - others[..., None, None] * torch.tensor(POSITIONS)
    torch.testing.assert_close(neutral.hindsight.growth, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.hindsight.ends, neutral.hindsight.ends)  # ruin is a matter of money
    assert torch.equal(plain.actions, neutral.actions)
    # The market's own growth, whatever the position, would change no advantage.
    shifted = replace(plain.hindsight, growth=plain.hindsight.growth - others[..., None, None].float())
    valid = torch.ones_like(plain.valid)
    advantages = [hindsight_advantages(each, valid, 0.9, 0.8)[0] for each in (plain.hindsight, shifted)]
    torch.testing.assert_close(*advantages, rtol=1e-3, atol=1e-4)


def test_money_is_judged_as_before() -> None:
    market = neutral_market(mixed_bars())
    alone = replace(market, others_growth=None)
    for name in ("rewards", "actions", "accounts"):
        rollouts = [rollout_of(env_of(each), less=False) for each in (market, alone)]
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts))
    envs = [env_of(each) for each in (market, alone)]
    for env in envs:
        rollout_of(env, less=env is envs[0])
    less, money = (env.episode_statistics() for env in envs)
    assert float(less["market_rewards"]) != 0 == float(money["market_rewards"])
    assert torch.equal(less["rewards"], money["rewards"])


def test_a_market_without_its_others_is_refused() -> None:
    with pytest.raises(ValueError, match="with_others=True"):
        rollout_of(env_of(market_of(walk())), less=True)


def test_a_symbol_alone_has_no_market() -> None:
    market = market_of(walk(), with_others=True)
    less, plain = (rollout_of(env_of(market), less) for less in (True, False))
    assert torch.equal(less.rewards, plain.rewards) and less.rewards.dtype == torch.float32
    assert less.hindsight and plain.hindsight
    assert torch.equal(less.hindsight.growth, plain.hindsight.growth)
