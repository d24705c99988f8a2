"""The account's ledger a second time: one account in plain Python floats, written to be read.

``account.py`` is the fast one; a test holds it to this one within 1e-9. The two have no code in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class ReferenceAccount:
    """One account, from equity 1 in cash to the end of its episode.

    ``held`` is the target that the account holds, None before its first trade where cash is no target.
    """

    ruin_equity: float
    held: float | None = None
    cash: float = 1.0
    units: float = 0.0
    debt: float = 0.0  # borrow cost due at the next open
    ruined: bool = False
    impact_limit: float = 0.0  # upper limit of a large order's impact
    costs: float = 0.0
    borrow_costs: float = 0.0
    traded: float = 0.0

    def equity(self, price: float) -> float:
        """Return the value of the account at this price, before the costs of selling."""
        return self.cash - self.debt + self.units * price

    def fill(
        self,
        target: float,
        price: float,
        next_price: float,
        cost_rate: float,
        borrow: float,
        impact: float = 0.0,
    ) -> float:
        """Fill an order at ``price``, hold it until ``next_price``; return the log change of equity.

        Traded value pays ``cost_rate`` plus ``impact`` times the order's size.
        """
        if self.ruined:
            return 0.0
        before = self.equity(price)
        self.cash -= self.debt
        self.debt = 0.0
        if target != self.held:
            self._trade_to(target, price, cost_rate, impact)
        # A short position borrows shares, a position worth more than the equity borrows money.
        if self.units < 0:
            self.debt = -self.units * price * borrow
        elif self.cash < 0:
            self.debt = -self.cash * borrow
        self.borrow_costs += self.debt
        if self.equity(next_price) <= self.ruin_equity:
            self._close(next_price, cost_rate, impact)
        return math.log(self.equity(next_price) / before)

    def _rate(self, order: float, cost_rate: float, impact: float) -> float:
        return cost_rate + min(impact * abs(order), self.impact_limit)

    def _trade_to(self, target: float, price: float, cost_rate: float, impact: float) -> None:
        equity = self.cash + self.units * price
        position = self.units * price
        cost_rate = self._rate(target * equity - position, cost_rate, impact)
        # Afterwards the position is worth target x (equity - cost), and cost = cost_rate x |position change|.
        if target * equity > position:
            bought = (target * equity - position) / (1 + cost_rate * target)
        else:
            bought = (target * equity - position) / (1 - cost_rate * target)
        cost = cost_rate * abs(bought)
        self.units += bought / price
        self.cash -= bought + cost
        self.costs += cost
        self.traded += abs(bought)
        self.held = target

    def _close(self, price: float, cost_rate: float, impact: float) -> None:
        value = abs(self.units * price)
        cost_rate = self._rate(value, cost_rate, impact)
        self.traded += value
        self.costs += cost_rate * value
        self.cash = max(self.equity(price) - cost_rate * value, 1e-6)
        self.units = self.debt = 0.0
        self.ruined = True
