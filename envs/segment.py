"""A segment: the quotes and costs that its fills meet, the trajectory played on it, and sums over all of them.

Shapes: N = environments, H = horizon.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from envs.account import AccountState
from envs.config import EnvConfig
from envs.market import Market

# Volume of a bar without any: orders there pay the maximum impact.
LEAST_VOLUME = 1e-6  # in quote currency
TOTALS = (
    "decisions",
    "rewards",
    "episodes",
    "episode_log_returns",
    "ruins",
    "costs",
    "borrow_costs",
    "traded",
    "funding",
    "market_rewards",
)


def require_lengths(market: Market, config: EnvConfig) -> None:
    """Raise a ValueError unless a market was made for the context and the horizon of these accounts."""
    ours, its = (config.context_bars, config.horizon), (market.context_bars, market.horizon)
    if its != ours:
        raise ValueError(f"the market must be made for context_bars and horizon {ours}, was made for {its}")


def require_played(step: int, horizon: int) -> None:
    """Raise a RuntimeError in the middle of a segment, where no other one can begin."""
    if 0 < step < horizon:
        raise RuntimeError(f"a segment must be played to its end, step {step} of {horizon} was the last")


def require_between(step: int, horizon: int) -> None:
    """Raise a RuntimeError in the middle of a segment, where the state cannot be kept."""
    if 0 < step < horizon:
        raise RuntimeError(f"the state can be kept between segments only, this is after step {step}")


class Segment:
    """Everything about a segment that does not react to the accounts; refilled in place, so views stay valid.

    ``fills`` has the arguments of ``account.advance`` for each decision, views of (N,): decision h fills at
    ``price[h]`` and is held until ``price[h + 1]``. It pays ``cost_rate[h]`` of traded value, plus ``impact[h]``
    per start equity of order value, and ``borrow[h]`` of borrowed value; a long position pays ``funding[h]`` of
    its value at ``price[h + 1]``, and it is liquidated at equity of ``margin`` (N,) of that. After a ruin, the
    position is closed at ``cost_rate[h + 1]`` and ``impact[h + 1]``. ``closes[h]`` is the newest close that
    decision h sees, ``closes[H]`` that of the bootstrap value. ``price``, ``cost_rate``, ``impact`` (H + 1, N),
    ``borrow`` and ``funding`` (H, N) are views of ``quotes``, (5 or 6, H + 2, N): open, close, borrow, cost rate,
    impact and funding from the newest closed bar on. ``allowed``, (H, N) bool, is where a position may be held.
    It, the impacts, the funding and the margin are None where their setting is off, or the market has none, and so
    is ``others_growth``, (H, N): of the market from ``price[h]`` to ``price[h + 1]``.
    """

    def __init__(
        self,
        config: EnvConfig,
        dtype: torch.dtype,
        device: torch.device,
        has_funding: bool = False,
        has_margin: bool = False,
        has_others: bool = False,
    ) -> None:
        self.config = config
        self.margin = torch.zeros(config.num_envs, dtype=dtype, device=device) if has_margin else None
        shape = (6 if has_funding else 5, config.horizon + 2, config.num_envs)
        self.quotes = torch.zeros(shape, dtype=dtype, device=device)
        opens, closes, borrow, cost_rate, impact, *funding = self.quotes.unbind()
        self.price, self.cost_rate, self.borrow = opens[1:], cost_rate[1:], borrow[1:-1]
        self.impact = impact[1:] if config.volume_slippage else None
        self.funding = funding[0][2:] if has_funding else None
        self.closes = closes[:-1].unbind()
        everywhere = torch.ones(shape[1] - 2, shape[2], dtype=torch.bool, device=device)
        self.allowed = everywhere if config.flat_before_close else None
        self.others_growth = torch.zeros_like(self.borrow) if has_others else None
        self.targets = torch.tensor([*config.positions, 0.0], dtype=dtype, device=device)  # those of ``held``
        # Index of the target that each decision led to: cash where the account is ruined.
        self.held = torch.zeros(shape[1] - 2, shape[2], dtype=torch.uint8, device=device)
        self.helds = self.held.unbind()
        self.impact_limit = torch.zeros((), dtype=dtype, device=device)
        self.fills = [self._fill(h) for h in range(config.horizon)]
        self._ahead = torch.arange(1, config.horizon + 1, device=device)

    def fill(self, market: Market, cursor: Tensor, cost_rate: Tensor, cost_scale: float) -> None:
        """Copy the quotes that follow ``cursor`` from the market.

        Args:
            market: made for this horizon.
            cursor: (N,) int64, the newest closed bar of each environment.
            cost_rate: (N,) fee and slippage, before ``cost_scale``.
            cost_scale: fraction of every cost that is charged.
        """
        config = self.config
        self.quotes.copy_(market.quote_windows(cursor, config.horizon + 2).permute(2, 1, 0))
        self.borrow.mul_(config.borrow_rate * cost_scale)
        # `cost_rate` holds the bar's range so far.
        self.cost_rate.mul_(config.range_slippage).add_(cost_rate)
        self.cost_rate.clamp_(max=config.max_rate - config.volume_slippage).mul_(cost_scale)
        if self.impact is not None:
            most = config.volume_slippage * cost_scale
            self.impact_limit.fill_(most)
            self.impact.clamp_(min=LEAST_VOLUME).reciprocal_().mul_(most * config.account_value)
        if self.others_growth is not None:
            self.others_growth.copy_(market.others_windows(cursor + 1, config.horizon).t())
        if self.allowed is not None:
            left = market.minutes_left[cursor + self._ahead[:, None]]
            torch.gt(left, config.flat_before_close, out=self.allowed)

    def _fill(self, h: int) -> dict[str, Tensor]:
        fill = {
            "price": self.price[h],
            "next_price": self.price[h + 1],
            "cost_rate": self.cost_rate[h],
            "next_cost_rate": self.cost_rate[h + 1],
            "borrow": self.borrow[h],
        }
        if self.impact is not None:
            limit = {"impact_limit": self.impact_limit}
            fill |= {"impact": self.impact[h], "next_impact": self.impact[h + 1]} | limit
        if self.funding is not None:
            fill["funding"] = self.funding[h]
        if self.margin is not None:
            fill["margin"] = self.margin
        return fill

    def market_rewards(self) -> Tensor | None:
        """Return what the targets held in the segment as played would have earned in the market, (H, N).

        Had they been held in the others of the asset class in equal parts, at no cost. Where the reward is ``less
        market``, it is taken from the rewards. None where the market has no ``others_growth``.
        """
        if self.others_growth is None:
            return None
        return self.targets[self.held.long()] * self.others_growth

    @property
    def nbytes(self) -> int:
        """Memory of ``quotes``, ``allowed``, ``others_growth`` and ``held``."""
        tensors = (self.quotes, self.allowed, self.others_growth, self.held)
        return sum(0 if tensor is None else tensor.nbytes for tensor in tensors)

    def fills_ahead(self) -> dict[str, Tensor]:
        """Return the arguments of ``account.advance`` for the H fills but ``ruin_equity``, (N, H) each.

        They are known once the segment has begun, since the market does not react. Use them only to value
        decisions afterwards, never to make them.
        """
        fills = {
            "price": self.price[:-1],
            "next_price": self.price[1:],
            "cost_rate": self.cost_rate[:-1],
            "borrow": self.borrow,
        }
        if self.impact is not None:
            impact = self.impact[:-1]
            fills |= {"impact": impact, "impact_limit": self.impact_limit.expand_as(impact)}
        if self.funding is not None:
            fills["funding"] = self.funding
        if self.margin is not None:
            fills |= {"margin": self.margin.expand_as(self.borrow), "next_cost_rate": self.cost_rate[1:]}
            fills |= {} if self.impact is None else {"next_impact": self.impact[1:]}
        # Copies: the next segment reuses this memory.
        return {name: values.t().contiguous() for name, values in fills.items()}


class Fills(NamedTuple):
    """The ledger of a segment as played, (H, N) each, in the precision of the accounts."""

    units: Tensor  # held before the fill
    target: Tensor  # the same
    log_return: Tensor
    traded: Tensor  # in start equities, as all that follows
    costs: Tensor
    borrow_cost: Tensor
    funding: Tensor | None = None  # None where the market has none


class Trajectory(NamedTuple):
    """One segment as played, decision by decision; A = account observations."""

    observations: Tensor  # (H, N, A)
    alive: Tensor  # (H, N) bool, before the decision
    log_equity: Tensor  # (H, N) at the fill, before it
    rewards: Tensor  # (H, N)
    terminated: Tensor  # (H, N) bool
    truncated: Tensor  # (N,) bool, at the last decision
    outputs: tuple[Tensor, ...]  # (H, N, ...) each, of `decide`; the first are the actions
    fills: Fills | None = None  # where the environment records them


class Statistics:
    """Sums over whole segments, float64 on the device, so that ranks can be added before dividing."""

    def __init__(
        self,
        positions: tuple[float, ...],
        cash_index: int,
        num_envs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.positions, self.cash_index = positions, cash_index
        # Sums of `TradingEnv.last_fill` over this segment.
        self.flows = torch.zeros(4, num_envs, dtype=dtype, device=device)
        self.at_begin = torch.zeros(2, num_envs, dtype=dtype, device=device)  # log equity, decisions played
        self.time_in = torch.zeros(len(positions) + 1, dtype=torch.float64, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)

    def begin(self, account: AccountState, played: Tensor) -> None:
        """Record the start of a segment; ``played`` is (N,)."""
        self.at_begin[0] = account.log_equity
        self.at_begin[1] = played

    def end(self, account: AccountState, played: Tensor, over: Tensor, segment: Segment) -> None:
        """Add a segment that was played, and its episodes that end, ``over`` (N,) bool."""
        held, market_rewards = segment.held, segment.market_rewards()
        # An account that has not played in this segment was counted before.
        ended = (over & (played > self.at_begin[1])).to(torch.float64)
        progress = torch.stack((account.log_equity, played)) - self.at_begin
        rewards, decisions = progress.sum(1, dtype=torch.float64)
        # Count cash as the rest: `held` is cash for ruined accounts too, which decide nothing.
        self.time_in[self.cash_index] += decisions
        for index, spent in enumerate(self.time_in):
            if index != self.cash_index:
                # On bytes throughout, which is faster.
                decided = held.numel() - (held ^ index).count_nonzero()
                spent.add_(decided)
                self.time_in[self.cash_index] -= decided
        episodes = torch.stack((torch.ones_like(ended), account.log_equity, ~account.alive)).double()
        _, traded, costs, borrow_costs, *funding = self.flows.sum(1, dtype=torch.float64)
        nothing = torch.zeros_like(traded)
        of_market = nothing if market_rewards is None else market_rewards.sum(dtype=torch.float64)
        flows = torch.stack((costs, borrow_costs, traded, *(funding or [nothing]), of_market))
        self.totals.add_(torch.cat((torch.stack((decisions, rewards)), episodes @ ended, flows)))
        self.flows.zero_()

    def take(self) -> dict[str, Tensor]:
        """Return the sums by name, and reset them."""
        totals = dict(zip(TOTALS, self.totals.clone().unbind(), strict=True))
        spent = self.time_in[: len(self.positions)].clone().unbind()
        totals |= {f"in_position_{p:g}": t for p, t in zip(self.positions, spent, strict=True)}
        self.totals.zero_()
        self.time_in.zero_()
        return totals
