"""Segment: what a segment's bars offer and charge, whatever the accounts do; Played: what the accounts did.

Shapes: N = environments, H = horizon.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from envs.account import AccountState
from envs.config import EnvConfig
from envs.market import Market

# A bar without volume takes orders at the most that an order can cost.
LEAST_VOLUME = 1e-6  # in quote currency


class Played(NamedTuple):
    """What a segment gave, decision by decision; A = account observations."""

    observations: Tensor  # (H, N, A)
    alive: Tensor  # (H, N) bool, before the decision
    log_equity: Tensor  # (H, N) where the decision filled, before it did
    rewards: Tensor  # (H, N)
    terminated: Tensor  # (H, N) bool
    truncated: Tensor  # (N,) bool, at the last decision
    told: tuple[Tensor, ...]  # (H, N, ...) each, by what decided; the first are the actions


class Segment:
    """Prices and rates of every environment's segment; filled anew in the same memory, so views stay valid.

    Lists have one ``(N,)`` view per decision: decision h fills at ``prices[h]`` and is held until
    ``prices[h + 1]``; ``closes[h]`` is the newest close that it knows, ``closes[H]`` that of the bootstrap value.
    Of traded value it pays ``cost_rates[h]``, beside ``impacts[h]`` per start equity of order value; of what is
    borrowed, ``borrows[h]``. ``price`` (H + 1, N), ``cost_rate``, ``borrow`` and ``impact`` (H, N) are whole;
    all are in ``quotes``, (5, H + 2, N): open, close, borrow, cost rate and impact from the newest closed bar on.
    ``allowed``, (H, N), tells where a position may be held. It and impacts are None where their setting is off.
    """

    def __init__(self, config: EnvConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        shape = (5, config.horizon + 2, config.num_envs)
        self.quotes = torch.zeros(shape, dtype=dtype, device=device)
        opens, closes, borrow, cost_rate, impact = self.quotes.unbind()
        self.price, self.cost_rate, self.borrow = opens[1:], cost_rate[1:-1], borrow[1:-1]
        self.impact = impact[1:-1] if config.volume_slippage else None
        self.prices, self.closes = self.price.unbind(), closes[:-1].unbind()
        self.cost_rates, self.borrows = self.cost_rate.unbind(), self.borrow.unbind()
        self.impacts = None if self.impact is None else self.impact.unbind()
        everywhere = torch.ones(shape[1] - 2, shape[2], dtype=torch.bool, device=device)
        self.allowed = everywhere if config.flat_before_close else None
        # Index of the target that counted, decision by decision: of the ruined, cash.
        self.held = torch.zeros(shape[1] - 2, shape[2], dtype=torch.uint8, device=device)
        self.helds = self.held.unbind()
        # What a compiled step takes: the quotes from a close to the next fill in one view, allowed, held.
        allowed = [None] * config.horizon if self.allowed is None else self.allowed.unbind()
        quotes = [self.quotes[:, h : h + 3] for h in range(config.horizon)]
        self.views = list(zip(quotes, allowed, self.helds, strict=True))
        self.impact_limit = torch.zeros((), dtype=dtype, device=device)
        self._ahead = torch.arange(1, config.horizon + 1, device=device)

    def fill(self, market: Market, cursor: Tensor, cost_rate: Tensor, cost_scale: float) -> None:
        """Take over the bars that follow ``cursor``.

        Args:
            market: where they are.
            cursor: (N,) int64, the newest closed bar of each environment.
            cost_rate: (N,) fee and slippage, already scaled.
            cost_scale: share of every cost that is charged.
        """
        config = self.config
        self.quotes.copy_(market.quote_windows(cursor, config.horizon + 2).permute(2, 1, 0))
        self.borrow.mul_(config.borrow_rate * cost_scale)
        # The rate was the bar's range until here.
        self.cost_rate.mul_(config.range_slippage * cost_scale).add_(cost_rate)
        self.cost_rate.clamp_(max=config.max_rate - config.volume_slippage)
        if self.impact is not None:
            most = config.volume_slippage * cost_scale
            self.impact_limit.fill_(most)
            self.impact.clamp_(min=LEAST_VOLUME).reciprocal_().mul_(most * config.account_value)
        if self.allowed is not None:
            left = market.minutes_left[cursor + self._ahead[:, None]]
            torch.gt(left, config.flat_before_close, out=self.allowed)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        allowed = 0 if self.allowed is None else self.allowed.nbytes
        return self.quotes.nbytes + allowed + self.held.nbytes

    def fills_ahead(self) -> dict[str, Tensor]:
        """Return what the H fills will meet, (N, H) each, in the words of ``account.advance``.

        The market does not react, so this is known once the segment has begun; it is for valuing decisions
        afterwards, never for making them.
        """
        fills = {
            "price": self.price[:-1],
            "next_price": self.price[1:],
            "cost_rate": self.cost_rate,
            "borrow": self.borrow,
        }
        if self.impact is not None:
            fills |= {"impact": self.impact, "impact_limit": self.impact_limit.expand_as(self.impact)}
        # Copies: the segment's memory is used again for the next one.
        return {name: values.t().contiguous() for name, values in fills.items()}


TOTALS = (
    "decisions",
    "rewards",
    "episodes",
    "episode_log_returns",
    "ruins",
    "costs",
    "borrow_costs",
    "traded",
)


class Statistics:
    """Sums over whole segments, float64 on the device, so that ranks may be added before anything is divided."""

    def __init__(
        self,
        positions: tuple[float, ...],
        cash_index: int,
        num_envs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.positions, self.cash_index = positions, cash_index
        # Log return, traded value, costs and borrow cost of this segment.
        self.flows = torch.zeros(4, num_envs, dtype=dtype, device=device)
        self.at_begin = torch.zeros(2, num_envs, dtype=dtype, device=device)  # log equity, decisions played
        self.time_in = torch.zeros(len(positions) + 1, dtype=torch.float64, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)

    def begin(self, account: AccountState, played: Tensor) -> None:
        """Remember where a segment began; ``played`` is (N,)."""
        self.at_begin[0] = account.log_equity
        self.at_begin[1] = played

    def end(self, account: AccountState, played: Tensor, over: Tensor, held: Tensor) -> None:
        """Count a segment whose episodes end where ``over``, (N,) bool, and its targets held, (H, N)."""
        # One that has not played in this segment was counted before.
        ended = (over & (played > self.at_begin[1])).to(torch.float64)
        progress = torch.stack((account.log_equity, played)) - self.at_begin
        rewards, decisions = progress.sum(1, dtype=torch.float64)
        # In cash for the rest: held says so of the ruined, too, who decide nothing.
        self.time_in[self.cash_index] += decisions
        for index, spent in enumerate(self.time_in):
            if index != self.cash_index:
                decided = held.numel() - (held ^ index).count_nonzero()  # bytes all the way, which is quicker
                spent.add_(decided)
                self.time_in[self.cash_index] -= decided
        episodes = torch.stack((torch.ones_like(ended), account.log_equity, ~account.alive)).double()
        _, traded, costs, borrow_costs = self.flows.sum(1, dtype=torch.float64)
        flows = torch.stack((costs, borrow_costs, traded))
        self.totals.add_(torch.cat((torch.stack((decisions, rewards)), episodes @ ended, flows)))
        self.flows.zero_()

    def take(self) -> dict[str, Tensor]:
        """Return the sums by name and start anew."""
        totals = dict(zip(TOTALS, self.totals.clone().unbind(), strict=True))
        spent = self.time_in[: len(self.positions)].clone().unbind()
        totals |= {f"in_position_{p:g}": t for p, t in zip(self.positions, spent, strict=True)}
        self.totals.zero_()
        self.time_in.zero_()
        return totals
