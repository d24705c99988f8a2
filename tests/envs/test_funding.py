"""Funding of perpetual futures: a week by hand, the same in every ledger, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_sources.bars import HOUR_NS, Bars
from envs import compiled
from envs.account import AccountState, advance
from envs.counterfactuals import growth_of_every_choice
from tests.envs.account_reference import ReferenceAccount
from tests.envs.backtester import backtest
from tests.envs.markets import (
    CONTEXT,
    FREE,
    HORIZON,
    env_of,
    funded,
    market_of,
    mixed_market,
    play_segment,
    walk,
)

MONDAY = 1_767_571_200 * 10**9  # 2026-01-05 00:00 UTC
WEEK = 7 * 24  # opens, one an hour; the last decision is held until the next Monday's
THURSDAY, FLIP, LAST = 3 * 24, 2 * 24 + 16, 6 * 24 + 20
SHORT, FLAT, LONG = range(3)


def a_week() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prices and funding (WEEK + 1,), and actions (WEEK,).

    Every 8 hours 0.01 %, from Thursday on every 4 hours 0.005 %, but -0.02 % on Saturday at 12:00. The price is
    100, and 110 from Thursday 12:00 on. Long from Monday 00:00, short from Wednesday 16:00, out on Sunday, 20:00.
    """
    prices, funding = np.full(WEEK + 1, 100.0), np.zeros(WEEK + 1)
    prices[THURSDAY + 12 :] = 110.0
    funding[:THURSDAY:8] = 1e-4
    funding[THURSDAY::4] = 5e-5
    funding[5 * 24 + 12] = -2e-4
    actions = np.full(WEEK, FLAT)
    actions[:FLIP], actions[FLIP:LAST] = LONG, SHORT
    return prices, funding, actions


# 0.01 of it is bought at Monday's first open, after that funding: 8 payments of 0.0001 x 0.01 x 100, the last at
# Wednesday 16:00, before it is sold. So 0.9992 is left, and -0.009992 held. It loses 10 a unit, and receives
# 0.00005 x 100 three times, 0.00005 x 110 twenty times, and pays 0.0002 x 110 once; Sunday 20:00 is the last.
EQUITY_AT_FLIP = 0.9992
RECEIVED = 0.009992 * (3 * 0.005 + 20 * 0.0055 - 0.022)
EQUITY = EQUITY_AT_FLIP - 0.09992 + RECEIVED
PAID = 0.0008 - RECEIVED


def bars_of_the_week() -> Bars:
    """Hourly bars: the context, then the week, then the open at which its last decision ends."""
    prices, funding, _ = a_week()
    before = np.full(CONTEXT + 1, 100.0)
    closes = np.concatenate([before, prices])
    times = MONDAY + HOUR_NS * np.arange(-CONTEXT - 1, WEEK + 1)
    bars = Bars("BTCUSDT", "crypto", times, *(closes.copy() for _ in range(4)), np.ones(len(closes)))
    return bars.with_funding(np.concatenate([0 * before, funding]))


def test_a_week_in_plain_floats() -> None:
    prices, funding, actions = a_week()
    account = ReferenceAccount(0.2, held=0.0)
    for t, action in enumerate(actions):
        if t == FLIP:
            assert account.equity(prices[t]) == pytest.approx(EQUITY_AT_FLIP, abs=1e-12)
        account.fill((-1.0, 0.0, 1.0)[action], prices[t], prices[t + 1], 0.0, 0.0, funding=funding[t + 1])
    assert account.equity(110.0) == pytest.approx(EQUITY, abs=1e-12)
    assert account.funding == pytest.approx(PAID, abs=1e-12)
    assert pytest.approx(0.900309176, abs=1e-12) == EQUITY


@pytest.mark.parametrize("is_played", [False, True])
def test_a_week_in_the_environment(is_played: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda function, device: function)
    actions = torch.from_numpy(a_week()[2])[:, None].expand(WEEK, 4)
    market = market_of(bars_of_the_week(), horizon=WEEK)
    env = env_of(market, num_envs=4, horizon=WEEK, episode_bars=WEEK, **FREE)
    env.compiled, env.cost_scale = is_played, 0.5  # a curriculum does not change what holders pay each other
    env.begin_segment()
    env.play(lambda observations, action: (action,), actions)
    torch.testing.assert_close(env.account.log_equity.exp(), torch.full((4,), EQUITY).double())
    statistics = env.episode_statistics()
    assert float(statistics["funding"]) == pytest.approx(4 * PAID, abs=1e-9)
    assert float(statistics["borrow_costs"]) == pytest.approx(0.0, abs=1e-12)


def test_a_week_in_hindsight() -> None:
    env = env_of(market_of(bars_of_the_week(), horizon=WEEK), horizon=WEEK, episode_bars=WEEK, **FREE)
    env.begin_segment()
    growth = growth_of_every_choice(env.segment.fills_ahead(), env.config.positions, torch.zeros(()))[
        0
    ].double()
    actions = torch.from_numpy(a_week()[2])
    held = torch.cat((torch.tensor([FLAT]), actions[:-1]))
    earned = growth[torch.arange(WEEK), held, actions]
    # Every row begins at exactly the target, so the days before the price moves compare: eight payments of the
    # long, three of the short, and the move with a fourth.
    assert int(earned[: THURSDAY + 12].count_nonzero()) == 8 + 3 + 1
    assert float(earned[:FLIP].sum()) == pytest.approx(np.log(EQUITY_AT_FLIP), abs=1e-6)
    exact = np.log(1 - 0.1 + 5e-5 * 1.1)  # Thursday 12:00: the move, and the funding at the new price
    assert float(earned[THURSDAY + 11]) == pytest.approx(exact, abs=1e-6)
    # The whole week: beside those the short receives 22 times and pays once, each time at exactly the target.
    rest = 22 * np.log1p(5e-5) + np.log1p(-2e-4)
    assert float(earned.sum()) == pytest.approx(np.log(EQUITY_AT_FLIP) + exact + rest, abs=2e-6)


def test_a_week_by_backtesting_py() -> None:
    prices, funding, actions = a_week()
    cash, units, orders = 1e12, 0.0, []
    account = ReferenceAccount(0.2, held=0.0)
    for t, action in enumerate(actions):
        account.fill((-1.0, 0.0, 1.0)[action], prices[t], prices[t + 1], 0.0, 0.0, funding=funding[t + 1])
        orders.append(round((account.units - units) * cash))
        units = account.units
    result = backtest(prices, orders, cash, 0.0, funding, "2026-01-05", "h")
    assert result["Equity Final [$]"] / cash == pytest.approx(EQUITY, rel=1e-9)


def one_bar(funding: float | None, targets: tuple[float, ...] = (-1.0, 0.0, 1.0, 3.0)) -> tuple:
    wanted = torch.tensor(targets, dtype=torch.float64)
    number = torch.tensor
    return advance(
        AccountState.fresh(len(targets), torch.float64, torch.device("cpu")),
        wanted,
        price=number(100.0).double(),
        next_price=number(104.0).double(),
        cost_rate=number(6e-4).double(),
        next_cost_rate=number(6e-4).double(),
        borrow=number(1e-5).double(),
        ruin_equity=0.2,
        funding=None if funding is None else number(funding).double(),
    )


def test_what_longs_pay_shorts_receive() -> None:
    _, fill = one_bar(3e-4)
    paid = fill.funding.tolist()
    # After equal costs both hold as much, and it is worth 1.04 times that at the funding.
    assert paid[0] == -paid[2] == pytest.approx(-3e-4 * 1.04 / 1.0006)
    assert paid[1] == 0
    assert paid[3] == pytest.approx(3 * 3e-4 * 1.04 / 1.0018)
    _, turned = one_bar(-3e-4)
    assert turned.funding.tolist() == [-value for value in paid]


def test_funding_of_zero_changes_no_bit_and_funding_can_ruin() -> None:
    (state, fill), (other, same) = one_bar(None), one_bar(0.0)
    for ours, theirs in zip(state.tensors(), other.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert fill.funding is None and torch.equal(fill.log_return, same.log_return)
    ruined, fill = one_bar(0.3)
    assert fill.ruined.tolist() == [False, False, False, True]
    # Paid before it is closed: nothing is owed any more.
    assert float(ruined.owed[3]) == 0.0 and float(ruined.cash[3]) == pytest.approx(
        float(ruined.log_equity[3].exp())
    )


def test_a_market_without_funding_has_no_column_for_it() -> None:
    plain = mixed_market()
    empty = market_of(walk("AAA").with_funding(np.zeros(600)), walk("BBB", 500, "stock", seed=1))
    assert plain.quotes.shape[1] == empty.quotes.shape[1] == 5
    assert env_of(plain).last_fill.shape[0] == 4
    both = market_of(funded(walk("AAA")), walk("BBB", 500, "stock", seed=1))
    assert both.has_funding and (both.quotes[600:, 5] == 0).all()


def test_accounts_live_on_when_funding_comes_into_their_market_and_goes() -> None:
    bars = walk(num_bars=1_200)
    without, with_it = market_of(bars), market_of(funded(bars))
    env, twin = (env_of(without, num_envs=32, episode_bars=64 * HORIZON) for _ in range(2))
    for number, market in enumerate((without, with_it, without)):
        env.use(market)
        *_, ours, _, _ = play_segment(env, seed=number)
        *_, theirs, _, _ = play_segment(twin, seed=number)
        assert torch.equal(ours, theirs) == (number != 1)
        twin.load_state_dict(env.state_dict())
    assert float(twin.episode_statistics()["funding"]) == float(env.episode_statistics()["funding"]) != 0


def test_a_state_of_before_there_was_funding_loads() -> None:
    env = env_of(mixed_market())
    play_segment(env)
    state = env.state_dict()
    state["totals"] = state["totals"][:-1]
    other = env_of(market_of(funded(walk("AAA")), walk("BBB", 500, "stock", seed=1)))
    other.load_state_dict(state)
    ours, theirs = env.episode_statistics(), other.episode_statistics()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
