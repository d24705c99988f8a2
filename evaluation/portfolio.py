"""One account over all symbols, with a cap on its gross exposure: it follows what the symbols' accounts decide.

A symbol's target is a fraction of its share, ``gross`` / number of symbols, of all equity. A trade reaches it as
``envs.account.advance`` does, which this equals for a single symbol; the same target again trades nothing, so
exposures drift with prices. Where they add up to more than ``gross``, all that have a bar then are cut down alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType

from data_sources.bars import HOUR_NS
from envs.config import EnvConfig
from envs.late_funding import KEPT_NS
from envs.segment import LEAST_VOLUME

YEAR_NS = 365.25 * 24 * 3_600_000_000_000
SLACK = 1e-9  # of rounding, above the cap


@dataclass(frozen=True)
class Fill:
    """A symbol's bar at whose open a decision fills."""

    time_ns: int
    symbol: str
    target: float | None  # decided at the bar before; None: nothing was decided
    price: float
    rate: float  # fee, slippage and the share of the bar's range, of traded value
    volume: float  # of the bar, in money
    funding: float  # rates since the symbol's bar before, which a long position pays
    borrows: bool  # a short position of it borrows: no perpetual future


@dataclass
class Portfolio:
    """The account between two fills, as plain values; money is in start equities."""

    gross: float
    num_symbols: int
    cash: float = 1.0
    units: dict[str, float] = field(default_factory=dict)
    prices: dict[str, float] = field(default_factory=dict)  # the newest of each symbol that is held
    lent: dict[str, bool] = field(default_factory=dict)  # whether a short position of it borrows
    targets: dict[str, float] = field(default_factory=dict)
    time_ns: int = 0
    alive: bool = True
    trades: int = 0
    costs: float = 0.0
    borrowing: float = 0.0
    funding: float = 0.0
    # symbol -> time and value held, wherever funding may have been due of late
    charged: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def equity(self) -> float:
        """All that it is worth, at the newest prices."""
        return self.cash + sum(units * self.prices[symbol] for symbol, units in self.units.items())

    @property
    def exposure(self) -> float:
        """Long and short positions together, as a fraction of equity."""
        held = sum(abs(units) * self.prices[symbol] for symbol, units in self.units.items())
        return held / self.equity if self.equity > 0 else math.inf

    def follow(
        self,
        fills: Iterable[Fill],
        config: EnvConfig,
        late_funding: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType({}),
    ) -> list[dict[str, float | str | int]]:
        """Fill what was decided, minute by minute; return the trades.

        Args:
            fills: in any order; of minutes after those that it has followed.
            config: of the costs.
            late_funding: of symbols, the times of bars that had another funding when they filled, and how much
                more it is.
        """
        for symbol, rates in late_funding.items():
            self._pay_late(symbol, rates)
        made = []
        for time_ns, together in groupby(
            sorted(fills, key=lambda fill: fill.time_ns), lambda fill: fill.time_ns
        ):
            made += self._fill_minute(time_ns, {fill.symbol: fill for fill in together}, config)
        return made

    def _fill_minute(
        self, time_ns: int, fills: Mapping[str, Fill], config: EnvConfig
    ) -> list[dict[str, float | str | int]]:
        self._pay(time_ns, fills, config)
        before = dict(self.units)
        for symbol, fill in fills.items():
            self.prices[symbol], self.lent[symbol] = fill.price, fill.borrows
        if self.alive and self.equity <= config.ruin_fraction:
            self.alive = False
        made = []
        for symbol, fill in fills.items():
            target = fill.target if self.alive else 0.0
            if target is None or target == self.targets.get(symbol, 0.0):
                continue
            self.targets[symbol] = target
            made.append(self._trade(fill, target * self.gross / self.num_symbols, config))
        if self.exposure > self.gross * (1 + SLACK) and self.alive:
            made += self._cut_down(fills, config)
        for symbol in [symbol for symbol, units in self.units.items() if not units]:
            del self.units[symbol], self.prices[symbol], self.lent[symbol]
        for symbol in self.prices.keys() - self.units.keys():
            del self.prices[symbol], self.lent[symbol]
        assert before.keys() - self.units.keys() <= fills.keys()  # nothing is sold without a price
        return made

    def _pay(self, time_ns: int, fills: Mapping[str, Fill], config: EnvConfig) -> None:
        """Pay interest since the fills before, and funding at these prices."""
        # A symbol whose source was down comes later, with older minutes.
        years = max(0, time_ns - self.time_ns) / YEAR_NS if self.time_ns else 0.0
        shorts = sum(
            -units * self.prices[symbol]
            for symbol, units in self.units.items()
            if units < 0 and self.lent[symbol]
        )
        interest = (shorts + max(0.0, -self.cash)) * config.borrow_rate * years
        paid = sum(self.units.get(symbol, 0.0) * fill.price * fill.funding for symbol, fill in fills.items())
        self.cash -= interest + paid
        self.borrowing += interest
        self.funding += paid
        self.time_ns = max(self.time_ns, time_ns)

        for symbol, fill in fills.items():
            if not fill.borrows:
                self._remember(fill, self.units.get(symbol, 0.0) * fill.price)

    def _remember(self, fill: Fill, value: float) -> None:
        """Keep what was held at the first bar of each hour, and at others with funding, of the newest days."""
        kept = self.charged.setdefault(fill.symbol, [])
        if fill.funding or not kept or kept[-1][0] // HOUR_NS != fill.time_ns // HOUR_NS:
            kept.append((fill.time_ns, value))
        while kept[0][0] < fill.time_ns - KEPT_NS:
            del kept[0]

    def _pay_late(self, symbol: str, rates: Sequence[tuple[int, float]]) -> None:
        for time_ns, rate in rates:
            # A bar that has not filled here is charged when it does.
            held = [value for at, value in self.charged.get(symbol, []) if at >= time_ns]
            if held and self.alive:
                self.cash -= rate * held[0]
                self.funding += rate * held[0]

    def _trade(self, fill: Fill, weight: float, config: EnvConfig) -> dict[str, float | str | int]:
        """Bring a symbol to ``weight`` of the equity that is left after the costs of that."""
        held = self.units.get(fill.symbol, 0.0)
        excess = held * fill.price - weight * self.equity
        most = config.volume_slippage
        impact = abs(excess) * most * config.account_value / max(fill.volume, LEAST_VOLUME)
        rate = fill.rate + min(impact, most)
        bought = excess / (math.copysign(rate, excess) * weight - 1)
        cost = abs(bought) * rate
        self.cash -= bought + cost
        self.units[fill.symbol] = held + bought / fill.price if weight else 0.0
        self.trades += 1
        self.costs += cost
        return {
            "time_ns": fill.time_ns,
            "symbol": fill.symbol,
            "weight": weight,
            "price": fill.price,
            "bought": bought,
            "cost": cost,
        }

    def _cut_down(self, fills: Mapping[str, Fill], config: EnvConfig) -> list[dict[str, float | str | int]]:
        """Sell of what trades now until the cap holds, or nothing of it is left."""
        made = []
        for _ in range(3):  # what the trades cost makes the exposure of the rest larger
            equity = self.equity
            value = {s: self.units.get(s, 0.0) * fill.price for s, fill in fills.items()}
            here = sum(map(abs, value.values()))
            over = (self.exposure - self.gross) * equity
            if over <= SLACK * equity or not here:
                break
            keep = max(0.0, 1 - over / here)
            made += [
                self._trade(fills[symbol], keep * own / equity, config)
                for symbol, own in value.items()
                if own
            ]
        return made
