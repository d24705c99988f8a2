"""The ledger of a group a second time: one account over symbols in plain Python floats, written to be read.

It follows the docstrings of ``GroupEnv`` and ``group_account``. The two have no code in common; tests hold them
together within 1e-9.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_sources.bars import Bars
from envs.config import EnvConfig
from tests.envs.account_reference import Cost, cost_in_bar

YEAR_NS = 365.25 * 24 * 3600 * 1e9
HOLE_NS = {"crypto": 3600 * 10**9, "perpetual": 3600 * 10**9, "stock": 100 * 3600 * 10**9}


def within_caps(wanted: Mapping[str, float], gross: float, net: float) -> dict[str, float]:
    """Scale down the heavier side until it leads by ``net``, then all until they add up to ``gross``."""
    longs = sum(weight for weight in wanted.values() if weight > 0)
    shorts = -sum(weight for weight in wanted.values() if weight < 0)
    factor = {True: 1.0, False: 1.0}
    if longs > shorts + net:
        factor[True] = (shorts + net) / longs
    if shorts > longs + net:
        factor[False] = (longs + net) / shorts
    total = longs * factor[True] + shorts * factor[False]
    rest = min(1.0, gross / total) if total else 1.0
    return {name: weight * factor[weight > 0] * rest for name, weight in wanted.items()}


@dataclass
class Meeting:
    """What a symbol meets at a fill."""

    price: float
    cost: Cost
    is_filled: bool = True
    borrow: float = 0.0  # of borrowed value until the next fill
    funding: float = 0.0  # of the rates that are due here
    margin: float = 0.0


@dataclass
class ReferenceGroup:
    """One account, from equity 1 in cash."""

    ruin_equity: float
    cash: float = 1.0
    debt: float = 0.0
    ruined: bool = False
    units: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    costs: float = 0.0
    borrow_costs: float = 0.0
    funding: float = 0.0
    traded: float = 0.0

    def equity(self, prices: Mapping[str, float]) -> float:
        """Return what it is worth at these prices, before the costs of selling."""
        return self.cash - self.debt + sum(units * prices[name] for name, units in self.units.items())

    def fill(
        self, weights: Mapping[str, float], here: Mapping[str, Meeting], there: Mapping[str, Meeting]
    ) -> float:
        """Fill all orders ``here``, hold until ``there``; return the log change of equity."""
        if self.ruined:
            return 0.0
        prices = {name: meeting.price for name, meeting in here.items()}
        before = self.equity(prices)
        self.cash, self.debt = self.cash - self.debt, 0.0
        orders = {
            name: weight
            for name, weight in weights.items()
            if here[name].is_filled and abs(weight - self.weights.get(name, 0.0)) > 1e-9
        }
        self._trade(orders, before, here)
        self._borrow(here)
        for name, units in self.units.items():
            self.debt += units * there[name].price * there[name].funding
            self.funding += units * there[name].price * there[name].funding
        prices = {name: meeting.price for name, meeting in there.items()}
        needed = sum(there[n].margin * abs(units) * prices[n] for n, units in self.units.items())
        after = self.equity(prices)
        has_margin = any(meeting.margin for meeting in there.values())
        if after <= self.ruin_equity or (has_margin and after <= needed):
            self._close(there)
            after = self.cash
        return math.log(after / before)

    def _trade(self, orders: Mapping[str, float], equity: float, here: Mapping[str, Meeting]) -> None:
        value = {name: self.units.get(name, 0.0) * here[name].price for name in orders}
        rates = {name: _rate(here[name].cost, orders[name] * equity - value[name]) for name in orders}
        left = equity
        for _ in range(40):  # each comes closer by the rates, which are far below 1
            left = equity - sum(rates[name] * abs(orders[name] * left - value[name]) for name in orders)
        for name, weight in orders.items():
            bought = weight * left - value[name]
            paid = rates[name] * abs(bought)
            self.units[name] = self.units.get(name, 0.0) + bought / here[name].price
            self.weights[name] = weight
            self.cash -= bought + paid
            self.costs += paid
            self.traded += abs(bought)

    def _borrow(self, here: Mapping[str, Meeting]) -> None:
        owned = {name: units * here[name].price for name, units in self.units.items()}
        equity = self.cash + sum(owned.values())
        debt = sum(-value * here[name].borrow for name, value in owned.items() if value < 0)
        bought = sum(value for name, value in owned.items() if value > 0 and here[name].borrow > 0)
        debt += max(0.0, bought - equity) * max(meeting.borrow for meeting in here.values())
        self.debt += debt
        self.borrow_costs += debt

    def _close(self, there: Mapping[str, Meeting]) -> None:
        prices = {name: meeting.price for name, meeting in there.items()}
        self.cash, self.debt = self.equity(prices), 0.0
        for name, units in self.units.items():
            value = abs(units * prices[name])
            self.cash -= _rate(there[name].cost, value) * value
            self.costs += _rate(there[name].cost, value) * value
            self.traded += value
        self.cash = max(self.cash, 1e-6)
        self.units, self.weights, self.ruined = {}, {}, True


def _rate(cost: Cost, order: float) -> float:
    return float(cost(order) if callable(cost) else cost)


class GroupWalk:
    """Reads bars as ``GroupEnv`` says that a group meets them, minute by minute."""

    def __init__(self, bars: Sequence[Bars], config: EnvConfig, clock: Sequence[int]) -> None:
        self.bars = {series.symbol: series for series in bars}
        self.config, self.clock = config, clock
        self.times = {name: series.open_time.tolist() for name, series in self.bars.items()}

    def newest(self, name: str, minute: int) -> int:
        """Return the newest bar up to a minute of the clock, -1 for none."""
        return bisect_right(self.times[name], self.clock[minute]) - 1

    def is_gone(self, name: str, minute: int) -> bool:
        """Whether it has had no bar for as long as a hole lasts, or goes on here after one."""
        bar, before = self.newest(name, minute), self.newest(name, minute - 1)
        hole = HOLE_NS[self.bars[name].asset_class]
        if self.clock[minute] - self.times[name][bar] > hole:
            return True
        return bar != before and self.times[name][bar] - self.times[name][before] > hole

    def is_ready(self, name: str, minute: int) -> bool:
        """Whether it has its context in a row, and a fresh bar."""
        bar, hole = self.newest(name, minute), HOLE_NS[self.bars[name].asset_class]
        first = bar - self.config.context_bars
        if first < 0 or self.clock[minute] - self.times[name][bar] > hole:
            return False
        steps = [
            later - time
            for time, later in zip(
                self.times[name][first:bar], self.times[name][first + 1 : bar + 1], strict=True
            )
        ]
        return max(steps) <= hole

    def meet(self, name: str, minute: int) -> Meeting:
        """Return what a symbol meets at the fill of a minute."""
        config, series = self.config, self.bars[name]
        bar, gone = self.newest(name, minute), self.is_gone(name, minute)
        here = self.times[name][bar] == self.clock[minute] and not gone
        is_perpetual = series.asset_class == "perpetual"
        following = self.clock[min(minute + 1, len(self.clock) - 1)]
        usual = {
            "stock": config.stock_fee_bps,
            "crypto": config.crypto_fee_bps,
            "perpetual": config.perpetual_fee_bps,
        }
        return Meeting(
            price=float(series.open[bar] if here else series.close[self.newest(name, minute - 1)]),
            cost=cost_in_bar(series, bar, config)
            if here
            else (usual[series.asset_class] + config.slippage_bps) / 1e4,
            is_filled=here or gone,
            borrow=0.0 if is_perpetual else config.borrow_rate * (following - self.clock[minute]) / YEAR_NS,
            funding=float(series.funding[bar]) if here and series.funding is not None else 0.0,
            margin=config.maintenance_margin if is_perpetual else 0.0,
        )
