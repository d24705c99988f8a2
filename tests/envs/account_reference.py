"""The account's ledger a second time: one account in plain Python floats, written to be read.

It follows the docstring of ``TradingEnv``. ``account.py`` is the fast one; a test holds it to this one within
1e-9. The two have no code in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_sources.bars import Bars
from envs.config import EnvConfig

# The cost of an order as a fraction of traded value: a number, or a function of the order in start equities.
Cost = float | Callable[[float], float]


def cost_in_bar(bars: Bars, bar: int, config: EnvConfig, cost_scale: float = 1.0) -> Cost:
    """Return the cost of an order that fills at the open of this bar."""
    fee_bps = {
        "stock": config.stock_fee_bps,
        "crypto": config.crypto_fee_bps,
        "perpetual": config.perpetual_fee_bps,
    }[bars.asset_class]
    spread = config.range_slippage * (bars.high[bar] - bars.low[bar]) / bars.open[bar]
    limit = 0.5 / max(abs(position) for position in config.positions) - config.volume_slippage
    whatever_size = min((fee_bps + config.slippage_bps) / 1e4 + spread, limit)
    bar_value = bars.volume[bar] * bars.open[bar]

    def cost(order: float) -> float:
        by_size = config.volume_slippage * min(abs(order) * config.account_value / bar_value, 1.0)
        return cost_scale * (whatever_size + by_size)

    return cost


@dataclass
class ReferenceAccount:
    """One account, from equity 1 in cash to the end of its episode.

    ``held`` is the target that the account holds, None before its first trade where cash is no target.
    """

    ruin_equity: float
    held: float | None = None
    cash: float = 1.0
    units: float = 0.0
    debt: float = 0.0  # borrow cost and funding due at the next open
    ruined: bool = False
    margin: float = 0.0  # the position is liquidated at equity of this part of its value; 0: off
    costs: float = 0.0
    borrow_costs: float = 0.0
    funding: float = 0.0  # paid less received
    traded: float = 0.0

    def equity(self, price: float) -> float:
        """Return the value of the account at this price, before the costs of selling."""
        return self.cash - self.debt + self.units * price

    def fill(
        self,
        target: float,
        price: float,
        next_price: float,
        cost: Cost,
        borrow: float,
        next_cost: Cost | None = None,
        funding: float = 0.0,
    ) -> float:
        """Fill an order at ``price``, hold it until ``next_price``; return the log change of equity.

        The order pays the ``cost`` of the bar that opens at ``price``. A ruined account is closed at
        ``next_price``, so it pays the cost of the bar that opens there; by default the same. The position held
        until then pays ``funding`` of its value at ``next_price``, and receives it if it is short.
        """
        if self.ruined:
            return 0.0
        before = self.equity(price)
        self.cash -= self.debt
        self.debt = 0.0
        if target != self.held:
            self._trade_to(target, price, cost)
        # A short position borrows shares, a position worth more than the equity borrows money.
        if self.units < 0:
            self.debt = -self.units * price * borrow
        elif self.cash < 0:
            self.debt = -self.cash * borrow
        self.borrow_costs += self.debt
        paid = self.units * next_price * funding
        self.debt += paid
        self.funding += paid
        too_little = self.margin * abs(self.units * next_price) if self.margin else -math.inf
        if self.equity(next_price) <= max(self.ruin_equity, too_little):
            self._close(next_price, cost if next_cost is None else next_cost)
        return math.log(self.equity(next_price) / before)

    def fill_less_market(self, others_growth: float, target: float, *terms: Any) -> float:
        """Fill, and return the reward ``less market``: without what the target would have earned in the others."""
        of_market = 0.0 if self.ruined else target * others_growth
        return self.fill(target, *terms) - of_market

    def _trade_to(self, target: float, price: float, cost: Cost) -> None:
        equity = self.cash + self.units * price
        position = self.units * price
        rate = _rate(cost, target * equity - position)
        # Afterwards the position is worth target x (equity - paid), and paid = rate x |position change|.
        if target * equity > position:
            bought = (target * equity - position) / (1 + rate * target)
        else:
            bought = (target * equity - position) / (1 - rate * target)
        paid = rate * abs(bought)
        self.units += bought / price
        self.cash -= bought + paid
        self.costs += paid
        self.traded += abs(bought)
        self.held = target

    def _close(self, price: float, cost: Cost) -> None:
        value = abs(self.units * price)
        paid = _rate(cost, value) * value
        self.traded += value
        self.costs += paid
        self.cash = max(self.equity(price) - paid, 1e-6)
        self.units = self.debt = 0.0
        self.ruined = True


def _rate(cost: Cost, order: float) -> float:
    return float(cost(order) if callable(cost) else cost)  # a float32 would round the rest
