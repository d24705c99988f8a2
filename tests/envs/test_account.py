"""The tensor ledger against the plain one, a public backtester, and the laws of money."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.account import AccountState, advance
from tests.envs.account_reference import ReferenceAccount
from tests.envs.backtester import backtest

POSITIONS = (-1.0, -0.4, 0.0, 0.5, 1.0, 3.0)
FLAT = POSITIONS.index(0.0)


def play(
    prices,
    actions,
    cost_rate,
    borrow,
    ruin_equity,
    dtype=torch.float64,
    impact=None,
    impact_limit=0.0,
    funding=None,
    margin=None,
):
    """Return log returns, costs, borrow costs, traded values, ruins and funding (T, 6, N), and the last state."""
    prices, actions = torch.as_tensor(prices, dtype=dtype), torch.as_tensor(actions)
    state = AccountState.fresh(actions.shape[1], dtype, torch.device("cpu"))
    targets = torch.tensor(POSITIONS, dtype=dtype)
    rows = []
    for t, wanted in enumerate(actions):
        action = torch.where(state.alive, wanted, FLAT)
        state, fill = advance(
            state,
            targets[action],
            price=prices[t],
            next_price=prices[t + 1],
            cost_rate=torch.as_tensor(cost_rate[t], dtype=dtype),
            next_cost_rate=torch.as_tensor(cost_rate[t + 1], dtype=dtype),
            borrow=torch.as_tensor(borrow[t], dtype=dtype),
            ruin_equity=ruin_equity,
            funding=None if funding is None else torch.as_tensor(funding[t], dtype=dtype),
            margin=None if margin is None else torch.tensor(margin, dtype=dtype),
            impact=None if impact is None else torch.as_tensor(impact[t], dtype=dtype),
            next_impact=None if impact is None else torch.as_tensor(impact[t + 1], dtype=dtype),
            impact_limit=impact_limit,
        )
        paid = torch.zeros_like(fill.costs) if fill.funding is None else fill.funding
        columns = (fill.log_return, fill.costs, fill.borrow_cost, fill.traded, fill.ruined.to(dtype), paid)
        rows.append(torch.stack(columns))
    return torch.stack(rows), state


@st.composite
def paths(draw):
    """Prices with quiet stretches and violent jumps, any orders and costs; borrowing and funding may be high."""
    length = draw(st.integers(1, 40))
    moves = st.one_of(st.just(0.0), st.floats(-0.01, 0.01), st.floats(-1.5, 1.5))
    prices = np.exp(np.cumsum([math.log(draw(st.floats(1e-6, 1e5)))] + [draw(moves) for _ in range(length)]))
    actions = [draw(st.integers(0, len(POSITIONS) - 1)) for _ in range(length)]
    cost_rate = [draw(st.sampled_from([0.0, 1e-4, 0.02, 0.1])) for _ in range(length + 1)]
    borrow = [draw(st.sampled_from([0.0, 1e-7, 1e-3, 0.05])) for _ in range(length)]
    impact = [draw(st.sampled_from([0.0, 1e-3, 0.1, 1e7])) for _ in range(length + 1)]
    limit = draw(st.sampled_from([0.0, 0.01, 0.05]))
    rates = st.sampled_from([0.0, 0.0, 1e-4, -3e-4, 0.03, -0.03])
    funding = draw(st.none() | st.lists(rates, min_size=length, max_size=length))
    ruin_equity = draw(st.sampled_from([1e-6, 0.2, 0.9]))
    margin = draw(st.sampled_from([None, 0.01, 0.2]))
    return prices, actions, cost_rate, borrow, ruin_equity, impact, limit, funding, margin


@settings(max_examples=300, deadline=None)
@given(paths())
def test_the_tensor_ledger_is_the_plain_one_to_a_billionth(path):
    prices, actions, cost_rate, borrow, ruin_equity, impact, limit, funding, margin = path
    rows, state = play(
        prices[:, None],
        np.array(actions)[:, None],
        cost_rate,
        borrow,
        ruin_equity,
        impact=impact,
        impact_limit=limit,
        funding=funding,
        margin=margin,
    )
    account = ReferenceAccount(ruin_equity, held=0.0, margin=margin or 0.0)
    costs = [
        lambda order, rate=rate, by_size=by_size: rate + min(by_size * abs(order), limit)
        for rate, by_size in zip(cost_rate, impact, strict=True)
    ]
    for t, action in enumerate(actions):
        was_ruined = account.ruined
        expected = account.fill(
            POSITIONS[action],
            prices[t],
            prices[t + 1],
            costs[t],
            borrow[t],
            costs[t + 1],
            0.0 if funding is None else funding[t],
        )
        least = max(ruin_equity, account.margin * abs(account.units * prices[t + 1]))
        close_to_ruin = abs(account.equity(prices[t + 1]) - least) < 1e-9 * max(1, account.traded)
        if close_to_ruin and not account.ruined:
            return  # on the edge itself, either outcome is right
        assert rows[t, 0, 0] == pytest.approx(expected, abs=1e-9 / max(account.equity(prices[t + 1]), 1e-6))
        assert bool(rows[t, 4, 0]) == (account.ruined and not was_ruined)
    scale = 1 + account.traded
    assert float(rows[:, 1].sum()) == pytest.approx(account.costs, abs=1e-9 * scale)
    assert float(rows[:, 3].sum()) == pytest.approx(account.traded, abs=1e-9 * scale)
    assert float(rows[:, 5].sum()) == pytest.approx(account.funding, abs=1e-9 * scale)
    assert float(state.units * prices[-1]) == pytest.approx(account.units * prices[-1], abs=1e-9 * scale)


def random_play(num_accounts=64, length=200, cost_rate=6e-4, borrow=1e-7, dtype=torch.float64, seed=0):
    random = np.random.default_rng(seed)
    prices = 100 * np.exp(np.cumsum(random.normal(0, 2e-3, (length + 1, num_accounts)), axis=0))
    actions = random.integers(0, 5, (length, num_accounts))  # without the threefold target
    rows, state = play(prices, actions, [cost_rate] * (length + 1), [borrow] * length, 0.01, dtype)
    return prices, actions, rows, state


def test_float32_stays_within_a_ten_thousandth_over_an_episode():
    _, _, exact, _ = random_play()
    _, _, rough, _ = random_play(dtype=torch.float32)
    assert (exact[:, 0].sum(0) - rough[:, 0].double().sum(0)).abs().max() < 1e-4


def test_with_no_costs_and_a_constant_price_nothing_changes_equity():
    actions = np.random.default_rng(0).integers(0, len(POSITIONS), (100, 32))
    rows, state = play(np.full((101, 32), 73.0), actions, [0.0] * 101, [0.0] * 100, 0.2)
    assert state.log_equity.abs().max() < 1e-13
    assert rows[:, 0].abs().max() < 1e-13


@pytest.mark.parametrize("action", [a for a in range(len(POSITIONS)) if a != FLAT])
def test_a_round_trip_at_a_constant_price_loses_exactly_its_costs(action):
    rate = 0.0006
    rows, state = play(np.full((3, 1), 10.0), np.array([[action], [FLAT]]), [rate] * 3, [0.0] * 2, 0.2)
    # The cost of entry comes off the equity first, the cost of exit off the position.
    target = POSITIONS[action]
    after_entry = 1 / (1 + rate * abs(target))
    expected = after_entry * (1 - rate * abs(target))
    assert float(state.log_equity.exp()) == pytest.approx(expected, rel=1e-13)
    assert float(rows[:, 1].sum()) == pytest.approx(1 - expected, rel=1e-9)


def test_long_and_short_of_the_same_bar_sum_to_minus_the_costs():
    random = np.random.default_rng(1)
    moves = np.exp(random.normal(0, 0.01, 50))
    rate, borrow = 5e-4, 2e-6
    for move in moves:
        prices = np.array([[80.0, 80.0], [80 * move, 80 * move]])
        actions = np.array([[POSITIONS.index(1.0), POSITIONS.index(-1.0)]])
        rows, state = play(prices, actions, [rate] * 2, [borrow], 0.01)
        gain = state.log_equity.exp() - 1
        # Both positions are worth 1 / (1 + rate) after their costs.
        assert float(gain.sum()) == pytest.approx(-float(rows[:, 1:3].sum()), abs=1e-14)


def test_a_position_is_held_until_the_target_changes():
    _, actions, rows, _ = random_play()
    same = np.concatenate([np.zeros((1, 64), bool), actions[1:] == actions[:-1]])
    same[0] = actions[0] == FLAT
    traded = rows[:, 3].numpy()
    assert (traded[same] == 0).all()
    assert (traded[~same] > 0).all()


def test_after_a_trade_the_position_is_the_target_of_what_is_left():
    random = np.random.default_rng(2)
    prices = np.full((3, 36), 20.0)
    prices[1:] *= np.exp(random.normal(0, 0.05, 36))
    first, second = np.divmod(np.arange(36), 6)
    _, state = play(prices, np.stack([first, second]), [0.01] * 3, [0.0] * 2, 1e-6)
    position = state.units * torch.from_numpy(prices[1])
    changed = torch.from_numpy(first != second)
    exposure = position / (state.cash + position)
    torch.testing.assert_close(
        exposure[changed], torch.tensor(POSITIONS, dtype=torch.float64)[second][changed]
    )


def test_a_large_order_pays_by_its_size_up_to_a_limit():
    prices, actions = np.full((2, 3), 20.0), np.array([[POSITIONS.index(p) for p in (0.5, 1.0, 3.0)]])
    rows, _ = play(prices, actions, [0.001] * 2, [0.0], 0.1, impact=[0.01] * 2, impact_limit=0.02)
    paid = rows[0, 1] / rows[0, 3]
    torch.testing.assert_close(paid, torch.tensor([0.006, 0.011, 0.021], dtype=torch.float64))


def test_borrowing_costs_by_the_time_held_and_by_what_is_borrowed():
    actions = np.array([[POSITIONS.index(p) for p in (-1.0, -0.4, 0.0, 1.0, 3.0)]])
    prices = np.full((2, 5), 10.0)
    minute, weekend = 0.05 / 525_960, 0.05 * 3_990 / 525_960
    for span in (minute, weekend):
        rows, _ = play(prices, actions, [0.0] * 2, [span], 0.1)
        expected = torch.tensor([1.0, 0.4, 0.0, 0.0, 2.0], dtype=torch.float64) * span
        torch.testing.assert_close(rows[0, 2], expected)


def test_ruin_closes_the_position_and_freezes_the_account():
    prices = np.array([[10.0], [5.0], [50.0], [1.0]])
    actions = np.full((3, 1), POSITIONS.index(3.0))
    rows, state = play(prices, actions, [0.001] * 4, [0.0] * 3, 0.2)
    assert rows[:, 4, 0].tolist() == [1.0, 0.0, 0.0]
    assert rows[1:, 0].abs().max() == 0
    assert rows[1:, 3].abs().max() == 0
    assert state.units == 0
    assert state.cash.item() == 1e-6
    assert not state.alive
    assert state.target == 0
    assert math.isfinite(rows[0, 0])


def test_ruin_closes_at_the_costs_of_the_bar_of_its_open():
    prices, actions = np.array([[10.0], [5.0]]), np.array([[POSITIONS.index(1.0)]])
    rows, state = play(prices, actions, [0.0, 0.1], [0.0], 0.6, impact=[0.0, 0.08], impact_limit=0.2)
    assert rows[0, 1, 0] == pytest.approx(0.5 * (0.1 + 0.5 * 0.08))
    assert state.cash.item() == pytest.approx(0.5 - rows[0, 1, 0])


def test_shuffling_accounts_shuffles_the_results():
    prices, actions, rows, _ = random_play()
    order = np.random.default_rng(3).permutation(64)
    shuffled, _ = play(prices[:, order], actions[:, order], [6e-4] * 201, [1e-7] * 200, 0.01)
    assert torch.equal(shuffled, rows[:, :, order])


@pytest.mark.parametrize("seed", range(3))
def test_backtesting_py_agrees_on_final_equity(seed):
    rate, length, cash = 7e-4, 120, 1e12
    random = np.random.default_rng(seed)
    prices = 100 * np.exp(np.cumsum(random.normal(0, 3e-3, length + 1)))
    actions = random.integers(0, 5, length)
    orders, states = [], AccountState.fresh(1, torch.float64, torch.device("cpu"))
    for t in range(length):
        before = float(states.units)
        states, _ = advance(
            states,
            torch.tensor([POSITIONS[actions[t]]], dtype=torch.float64),
            price=torch.tensor([prices[t]]),
            next_price=torch.tensor([prices[t + 1]]),
            cost_rate=torch.tensor([rate]),
            next_cost_rate=torch.tensor([rate]),
            borrow=torch.zeros(1, dtype=torch.float64),
            ruin_equity=0.01,
        )
        orders.append(round((float(states.units) - before) * cash))

    result = backtest(prices, orders, cash, rate)
    assert result["Equity Final [$]"] / cash == pytest.approx(float(states.log_equity.exp()), rel=1e-6)
    assert result["# Trades"] > 20
