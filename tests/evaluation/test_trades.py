"""Trades are what the account did, and their money is the account's, to the last digit."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from evaluation.csv_files import csv_files
from evaluation.exam import POLICY, Walk
from evaluation.measures import equity_curve
from evaluation.tear_sheet import TearSheet
from evaluation.trades import HOLE, MINUTE, OPEN, RUIN, trades_of
from tests.envs.account_reference import ReferenceAccount
from tests.evaluation.test_exam import exam

RATE, BORROW = 6e-4, 2e-6


def played(
    targets: list[float], prices: np.ndarray, funding: np.ndarray | None = None, ruin: float = 1e-6
) -> tuple[Walk, list[dict[str, float]]]:
    """A walk of the plain ledger, and by hand what each of its fills paid; ``prices`` has one more."""
    account = ReferenceAccount(ruin, held=0.0)
    due = np.zeros(len(prices)) if funding is None else funding
    rows, columns = [], []
    for at, target in enumerate(targets):
        before = account.equity(prices[at])
        was = (account.costs, account.traded, account.borrow_costs, account.funding)
        earned = account.fill(target, prices[at], prices[at + 1], RATE, BORROW, funding=due[at + 1])
        now = (account.costs, account.traded, account.borrow_costs, account.funding)
        paid, traded, borrowing, received = (new - old for new, old in zip(now, was, strict=True))
        held = account.units * prices[at] / (account.cash + account.units * prices[at])
        columns.append(
            [
                held,
                earned,
                (paid + borrowing) / before,
                traded / before,
                borrowing / before,
                received / before,
            ]
        )
        rows.append({"before": before, "paid": paid, "units": account.units})
    time = np.datetime64("2026-01-05T00:00", "ns") + np.arange(len(prices)) * MINUTE
    position, returns, costs, traded_, borrowed, funded = np.array(columns).T
    walk = Walk(
        "AAA", "perpetual", time[:-1], prices[:-1], position, returns, costs, traded_, borrowed, funded
    )
    return replace(walk, next_time=time[1:], next_price=prices[1:]), rows


def prices_of(length: int, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    return 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, scale, length)))


def test_a_round_trip_by_hand() -> None:
    prices = np.array([100.0, 101.0, 102.0, 103.0, 90.0])
    walk, _ = played([0.0, 1.0, 1.0, 0.0], prices)
    trades = trades_of([walk])
    assert len(trades) == 1
    units = 1 / (101 * (1 + RATE))
    assert (trades.side[0], trades.minutes[0], trades.ended_by[0]) == (1, 2.0, "decision")
    assert (trades.entry_price[0], trades.exit_price[0]) == (101.0, 103.0)
    assert trades.gross[0] == pytest.approx(units * (103 - 101), abs=1e-12)
    assert trades.costs[0] == pytest.approx(units * RATE * (101 + 103), abs=1e-12)
    assert trades.net[0] == pytest.approx(trades.gross[0] - trades.costs[0], abs=1e-15)
    assert trades.gain[0] == trades.net[0]
    assert trades.size[0] == pytest.approx(1.0)


def test_an_order_that_turns_a_position_round_pays_for_both_sides() -> None:
    prices = np.array([100.0, 110.0, 99.0, 99.0])
    walk, rows = played([1.0, -1.0, 0.0], prices)
    long, short = (trades_of([walk]).where(np.array([side])) for side in (0, 1))
    units = rows[0]["units"]
    assert long.side[0] == 1 and short.side[0] == -1
    assert long.exit[0] == short.entry[0]
    assert long.gross[0] == pytest.approx(units * 10, abs=1e-12)
    assert long.costs[0] == pytest.approx(units * RATE * (100 + 110), abs=1e-12)
    assert short.gross[0] == pytest.approx(rows[1]["units"] * (99 - 110), abs=1e-12)
    borrowed = -rows[1]["units"] * 110 * BORROW
    assert short.costs[0] == pytest.approx(-rows[1]["units"] * RATE * (110 + 99) + borrowed, abs=1e-12)


def plain_twin(walk: Walk, rows: list[dict[str, float]]) -> list[list[float]]:
    """Net and costs of every trade, from a loop over the ledger's units and prices."""
    trades: list[list[float]] = []
    units = 0.0
    for at, row in enumerate(rows):
        wanted, price = row["units"], walk.price[at]
        closed = units if units * wanted <= 0 else 0.0
        traded = abs(wanted - units) * price
        fee_to_close = row["paid"] * (abs(closed) * price / traded if traded else 0.0)
        if closed:
            trades[-1][0] -= fee_to_close
            trades[-1][1] += fee_to_close
        if wanted and units * wanted <= 0:
            trades.append([0.0, 0.0])
        if wanted:
            earned = row["before"] * np.expm1(walk.log_returns[at]) + fee_to_close
            trades[-1][0] += earned
            borrowed = walk.borrowing[at] * row["before"]
            trades[-1][1] += row["paid"] - fee_to_close + borrowed
        units = wanted
    return trades


@pytest.mark.parametrize("positions", [(-1.0, 0.0, 1.0), (-2.0, -0.5, 0.0, 0.5, 1.0), (0.0, 1.0)])
def test_every_trade_is_that_of_a_loop_over_the_ledger(positions: tuple[float, ...]) -> None:
    draw = np.random.default_rng(len(positions))
    targets = np.repeat(draw.choice(positions, 60), draw.integers(1, 5, 60)).tolist()
    funding = np.where(draw.random(len(targets) + 1) < 0.1, draw.normal(0, 1e-3, len(targets) + 1), 0.0)
    walk, rows = played(targets, prices_of(len(targets) + 1, seed=3), funding)
    trades, expected = trades_of([walk]), plain_twin(walk, rows)
    assert len(trades) == len(expected) > 5
    np.testing.assert_allclose(trades.net, [net for net, _ in expected], atol=1e-12)
    np.testing.assert_allclose(trades.costs, [costs for _, costs in expected], atol=1e-12)
    np.testing.assert_allclose(trades.gross, trades.net + trades.costs + trades.funding, atol=1e-15)
    assert trades.net.sum() == pytest.approx(np.expm1(walk.log_returns.sum()), abs=1e-12)


@pytest.mark.parametrize("targets", [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0]])
def test_a_ruin_ends_a_trade(targets: list[float]) -> None:
    prices = np.array([100.0, 100.0, 40.0, 40.0, 50.0])[: len(targets) + 1]
    walk, _ = played(targets, prices, ruin=0.5)
    trades = trades_of([walk])
    assert [*trades.ended_by] == [RUIN] and trades.side[0] == 1
    assert trades.exit_price[0] == 40.0 and trades.minutes[0] == 1.0 + targets[0]
    assert trades.net.sum() == pytest.approx(np.expm1(walk.log_returns.sum()), abs=1e-12)


@pytest.fixture(scope="module")
def walked() -> dict[str, list[Walk]]:
    """An exam of two symbols with a hole in one of them: policies of the environment's own ledger."""
    return exam()


@pytest.mark.parametrize("name", [POLICY, "buy and hold", "momentum"])
def test_the_trades_of_an_exam_add_up_to_its_equity(walked: dict[str, list[Walk]], name: str) -> None:
    walks = walked[name]
    trades = trades_of(walks)
    assert trades.net.sum() == pytest.approx(equity_curve(walks)[1][-1] - 1.0, abs=1e-9)
    costs = np.mean([(walk.costs * walk.equity_before).sum() for walk in walks])
    assert trades.costs.sum() == pytest.approx(costs, abs=1e-9)
    for walk in walks:
        own = trades.where(trades.symbol == walk.symbol)
        assert own.net.sum() * len(walks) == pytest.approx(np.expm1(walk.log_returns.sum()), abs=1e-9)
        assert (own.exit > own.entry).all() and (own.entry[1:] >= own.exit[:-1]).all()


def test_a_hole_ends_a_trade_and_the_end_leaves_one_open(walked: dict[str, list[Walk]]) -> None:
    held = trades_of(walked["buy and hold"])
    coin = held.where(held.symbol == "AAA")
    assert [*coin.ended_by] == [HOLE, OPEN]
    walk = next(walk for walk in walked["buy and hold"] if walk.symbol == "AAA")
    assert coin.entry[1] - coin.exit[0] >= 200 * MINUTE
    assert walk.next_time is not None and coin.exit[1] == walk.next_time[-1]


def test_nothing_held_is_no_trade(walked: dict[str, list[Walk]]) -> None:
    assert len(trades_of(walked["always flat"])) == 0
    tear = TearSheet.of(walked | {POLICY: walked["always flat"]})
    assert tear.sides[0]["trades"] == 0 and tear.sides[0]["win_rate"] is None


def test_the_tables_reconcile(walked: dict[str, list[Walk]]) -> None:
    files = dict(csv_files(walked, TearSheet.of(walked)))
    assert set(files) == {"returns.csv", "equity.csv", "trades.csv"}
    tables = {name: [*csv.DictReader(io.StringIO(text.decode()))] for name, text in files.items()}
    net = sum(float(row["net"]) for row in tables["trades.csv"])
    end = float(tables["equity.csv"][-1][POLICY])
    assert net == pytest.approx(end - 1.0, abs=1e-9)
    daily = np.prod([1.0 + float(row[POLICY]) for row in tables["returns.csv"]])
    assert daily == pytest.approx(end, abs=1e-9)
    assert list(tables["returns.csv"][0])[1:] == list(walked)
    assert tables["trades.csv"][0]["entry"].endswith("Z") and float(tables["equity.csv"][0][POLICY]) == 1.0
