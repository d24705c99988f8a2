"""Threshold rules on a forecast, and what they earn in the ledger of envs/account.py, for all bars at once.

The ledger here has no loop over bars: between two trades units are held, so equity follows from prices alone.
``tests/evaluation/test_rules.py`` holds it against the environment's accounts, and a rule against a plain loop.
Shapes: n = decisions of all symbols, in order, one symbol after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.config import EQUITY_FLOOR, EnvConfig
from envs.market import NUM_QUOTES, Market
from evaluation.exam import Walk
from evaluation.forecasts import BarTable

# Shares of the bars on which a rule enters, and the share of its threshold at which it leaves: at it, at a change
# of sign, and only for the other side.
ENTERED = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001)
LEAVES = (1.0, 0.0, -1.0)
STANDARD_ERRORS = 2.0  # taken off what a rule earned; the best of so many has about as much by luck
LEAST_TRADED = 100.0  # equities that a rule trades on the days of choice; what it earned with less is luck

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """Long or short beyond ``enter``, held as long as the forecast in its direction stays above ``leave``.

    Both are log moves over ``horizon`` bars; -enter <= leave <= enter.
    """

    horizon: int
    enter: float
    leave: float


def apply_rule(rule: Rule, forecast: NDArray[np.floating], begins: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Turn a forecast (n,) into sides -1, 0 or 1, (n,); where ``begins``, nothing is held before."""
    place = np.arange(len(forecast))
    since = np.maximum.accumulate(np.where(begins, place, 0))
    sides = np.zeros(len(forecast), np.int8)
    for side in (1, -1):
        toward = side * forecast
        entered = np.maximum.accumulate(np.where(toward > rule.enter, place, -1))
        left = np.maximum.accumulate(np.where(toward <= rule.leave, place, -1))
        sides[(entered > left) & (entered >= since)] = side
    return sides


@dataclass(frozen=True)
class Decisions:
    """Bars after which accounts decide, and what they meet, (n,) each; sides are turned into ``positions``."""

    rows: NDArray[np.int64]  # bars of the market
    time: NDArray[np.int64]  # of the fill, ns UTC
    begins: NDArray[np.bool_]  # where an account begins in cash: with a symbol, and after a hole
    price: Floats  # of the fill, over the first one of the account
    next_price: Floats
    borrow: Floats  # of what is borrowed until the next fill
    funding: Floats  # of the value at the next fill, paid by a long position
    allowed: NDArray[np.bool_]  # where something may be held
    positions: tuple[float, float]  # short and long

    @staticmethod
    def at(market: Market, table: BarTable, config: EnvConfig, rows: NDArray[np.int64]) -> Decisions:
        """Gather the fills of decisions after these bars, ascending, each with two more bars in its stretch."""
        stretch = table.stretch_last[rows]
        begins = np.ones(len(rows), np.bool_)
        begins[1:] = (np.diff(rows) != 1) | (np.diff(stretch) != 0)
        first = table.price[rows + 1][np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
        left = market.minutes_left.cpu().numpy()[rows + 1]

        def quote(column: int, bars: NDArray[np.int64]) -> Floats:
            return market.quotes[:, column].double().cpu().numpy()[bars]

        return Decisions(
            rows,
            table.open_time[rows + 1],
            begins,
            table.price[rows + 1] / first,
            table.price[rows + 2] / first,
            quote(2, rows + 1) * config.borrow_rate,
            quote(NUM_QUOTES, rows + 2) if market.has_funding else np.zeros(len(rows)),
            left > config.flat_before_close if config.flat_before_close else np.ones(len(rows), np.bool_),
            (max(-1.0, min(0.0, *config.positions)), min(1.0, max(0.0, *config.positions))),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self, sides: NDArray[np.int8], late: int = 0) -> Floats:
        """Return the positions that follow sides (n,), ``late`` bars late, as fractions of equity."""
        for _ in range(late):
            sides = np.where(self.begins, 0, np.roll(sides, 1)).astype(np.int8)
        short, long = self.positions
        return np.where(sides > 0, long, np.where(sides < 0, short, 0.0)) * self.allowed


@dataclass(frozen=True)
class Played:
    """What a ledger recorded of each decision, (n,): as in ``Walk``, and fractions of equity before the fill."""

    log_returns: Floats
    position: Floats
    costs: Floats
    traded: Floats
    borrowing: Floats
    funding: Floats


def play(decisions: Decisions, targets: Floats, cost_bps: float | Floats) -> Played:
    """Fill targets from -1 to 1 at a flat cost of traded value, one for all or (n,).

    Units are held until the target changes.

    The ledger of ``envs.account.advance``, without ruin, liquidation and costs that depend on size; equity stays
    above its floor.
    """
    price, next_price, begins = decisions.price, decisions.next_price, decisions.begins
    rate, place = cost_bps / 1e4, np.arange(len(targets))
    held_before = np.where(begins, 0.0, np.roll(targets, 1))
    trades = begins | (targets != held_before)
    entry = np.maximum.accumulate(np.where(trades, place, 0))  # the decision that bought what is held
    units = targets / price[entry]  # per equity right after that trade, in which all sums below are
    owed = np.maximum(-units * price, 0.0) * decisions.borrow  # a short position borrows what it sold
    paid = units * next_price * decisions.funding
    due = np.cumsum(owed + paid)
    after = 1.0 + units * (next_price - price[entry]) - (due - (due - owed - paid)[entry])
    after = np.maximum(after, EQUITY_FLOOR)
    before = np.where(trades, 1.0, np.roll(after, 1))
    # What the account held is worth this share of its equity when the trade is made.
    drifted = np.where(begins, 0.0, np.roll(units, 1) * price / np.roll(after, 1))
    change = np.where(targets == held_before, 0.0, targets - drifted)
    # After the cost of it, the position is the target.
    bought = change / (1.0 + rate * targets * np.sign(change))
    left = 1.0 - rate * np.abs(bought)
    return Played(
        np.log(left * after / before),
        units * price / before,
        rate * np.abs(bought) + left * owed / before,
        np.abs(bought),
        left * owed / before,
        left * paid / before,
    )


def walks_of(market: Market, table: BarTable, decisions: Decisions, played: Played) -> list[Walk]:
    """Return what was played as one walk per symbol, as an exam has them."""
    walks = []
    symbols = table.symbol[decisions.rows]
    for number in np.unique(symbols):
        own = slice(*np.searchsorted(symbols, (number, number + 1)))
        fills = decisions.rows[own] + 1
        walks.append(
            Walk(
                market.symbols[number],
                market.asset_classes[number],
                table.open_time[fills].astype("datetime64[ns]"),
                table.price[fills],
                played.position[own],
                played.log_returns[own],
                played.costs[own],
                played.traded[own],
                played.borrowing[own],
                played.funding[own] if market.has_funding else None,
            )
        )
    return walks


def choose_rules(
    decisions: Decisions,
    forecasts: NDArray[np.float32],
    horizons: Sequence[int],
    costs_bps: Sequence[float],
) -> tuple[list[Rule | None], int]:
    """Return for each cost the rule that earned most for sure, None where none did; and the number of trials.

    For sure is the sum over minutes, all symbols together, less two standard errors: the sum alone would choose
    a rule that held what rose in these days.

    Args:
        decisions: to choose on, never those that are judged.
        forecasts: log moves, (n, K).
        horizons: of the columns.
        costs_bps: of traded value.
    """
    move = np.log(decisions.next_price / decisions.price)
    minutes, minute = np.unique(decisions.time, return_inverse=True)
    best: list[tuple[float, Rule | None]] = [(0.0, None)] * len(costs_bps)
    num_trials = 0
    for number, horizon in enumerate(horizons):
        forecast = forecasts[:, number]
        thresholds = np.quantile(np.abs(forecast), 1.0 - np.array(ENTERED))
        for enter, leave in itertools.product(thresholds.tolist(), LEAVES):
            rule = Rule(horizon, enter, leave * enter)
            held = decisions.targets(apply_rule(rule, forecast, decisions.begins))
            change = np.abs(held - np.where(decisions.begins, 0.0, np.roll(held, 1)))
            num_trials += 1
            if change.sum() < LEAST_TRADED:
                continue
            # As in the ledger but for drift and interest, which decide between no two rules.
            earned, traded = (
                np.bincount(minute, values, len(minutes)) for values in (held * move, change * 1e-4)
            )
            for place, bps in enumerate(costs_bps):
                net = earned - bps * traded
                for_sure = float(net.sum() - STANDARD_ERRORS * np.sqrt(net @ net))
                if for_sure > best[place][0]:
                    best[place] = for_sure, rule
    return [rule for _, rule in best], num_trials
