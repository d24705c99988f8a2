"""What paper accounts have come to since they began: counts, returns, and the account over all symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_sources.bars import MINUTE_NS
from envs.config import EnvConfig
from evaluation.exam import POLICY
from evaluation.paper import Minute
from evaluation.portfolio import Portfolio

MARK_MINUTES = 15  # between two points of the page's curve
PORTFOLIO = "portfolio"


@dataclass
class Totals:
    """What is counted since the start, beside the accounts."""

    began_ns: int
    portfolio: Portfolio | None
    trades: int = 0
    costs: float = 0.0  # mean over symbols, each in shares of equity at that time
    late: int = 0
    marked_ns: int = 0

    @staticmethod
    def begin(now_ns: int, gross: float | None, num_symbols: int) -> Totals:
        """Return those of a new folder."""
        return Totals(now_ns, Portfolio(gross, num_symbols) if gross is not None else None)

    @staticmethod
    def of(kept: Mapping[str, Any]) -> Totals | None:
        """Return those of a folder; None where it is new."""
        if not kept:
            return None
        portfolio = kept["portfolio"]
        return Totals(**{**kept, "portfolio": Portfolio(**portfolio) if portfolio else None})

    def add(self, done: Minute, config: EnvConfig) -> list[dict[str, Any]]:
        """Count a minute; return the portfolio's trades."""
        walks = done.booked[POLICY]
        self.trades += len(done.trades)
        self.costs += sum(float(walk.costs.sum()) for walk in walks) / max(
            1, len(done.state.accounts[POLICY])
        )
        self.late += sum(map(len, done.late.values()))
        if self.portfolio is None:
            return []
        return [
            {"kind": "portfolio", **trade}
            for trade in self.portfolio.follow(done.fills, config, done.late_funding)
        ]

    def mark_is_due(self, done: Minute) -> bool:
        """Whether it is time for a point of the curve; then the next one is due later."""
        is_due = done.state.minute_ns - self.marked_ns >= MARK_MINUTES * MINUTE_NS and any(
            done.state.accounts[POLICY]
        )
        if is_due:
            self.marked_ns = done.state.minute_ns
        return is_due

    def returns(self, done: Minute) -> dict[str, float]:
        """Return what each contestant has earned by now, as fractions: the mean of its accounts."""
        result = {}
        for name, accounts in done.state.accounts.items():
            worth = [math.exp(account.log_equity) for account in accounts.values()]
            result[name] = sum(worth) / len(worth) - 1 if worth else 0.0
        if self.portfolio is not None:
            result[PORTFOLIO] = self.portfolio.equity - 1
        return result
