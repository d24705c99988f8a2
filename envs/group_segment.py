"""A segment of groups: the quotes, costs and permissions that its fills meet, and sums over what was played.

Shapes: N = groups, G = symbols of a group, H = horizon.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from envs.config import EnvConfig, GroupConfig
from envs.grid import Grid
from envs.group_account import GroupFill, GroupState
from envs.market import YEAR_NS
from envs.segment import LEAST_VOLUME, TOTALS


@dataclass(frozen=True, eq=False)
class GroupSegment:
    """Everything about a segment that does not react to the accounts.

    Decision h sees bars up to minute h of the segment, and fills at the next minute of the clock. ``fills`` has
    the arguments of ``advance_group`` for all of them, (H, N, G) each.
    """

    fills: dict[str, Tensor]
    may_hold: Tensor  # (H, N, G) bool: has its context, and is neither near the close nor gone at the fill
    is_ready: Tensor  # (H, N, G) bool: has its context
    closes: Tensor  # (H + 1, N, G) newest close at each decision, the last of the bootstrap value
    base_rate: Tensor  # (N, G) fee and slippage

    @property
    def is_decided(self) -> Tensor:
        """(H, N, G) bool: ready, and its order meets a bar."""
        return self.is_ready & self.fills["is_filled"]


def group_segment(
    grid: Grid, config: EnvConfig, symbol: Tensor, minute: Tensor, cost_scale: float, dtype: torch.dtype
) -> GroupSegment:
    """Collect what the segments from these minutes on meet.

    A symbol without a bar at a fill is not filled, and worth its newest close. One whose bars end for longer than
    a hole, or go on after a break, is gone: what it holds is sold at its last close, at the cost of a trade.

    Args:
        grid: of the market.
        config: of the accounts.
        symbol: (N, G) int64.
        minute: (N,) int64, the newest closed one at the first decision.
        cost_scale: fraction of every cost that is charged.
        dtype: of money.
    """
    market, horizon = grid.market, config.horizon
    ahead = torch.arange(horizon + 2, device=minute.device)[:, None]
    at = minute + ahead  # (H + 2, N)
    bar = grid.bars_at(symbol, at[..., None])
    known = bar.clamp(min=0)
    quotes = market.quotes[known].to(dtype)
    time = grid.minutes[at]
    age = time[..., None] - market.open_time[known]
    stretch = grid.stretch_of[known]
    goes_on = (bar[1:] >= 0) & (bar[:-1] >= 0) & (stretch[1:] == stretch[:-1])
    is_gone = (bar[1:] >= 0) & ~(goes_on & (age[1:] <= grid.hole_ns[symbol]))
    has_bar = goes_on & (age[1:] == 0)
    opens, closes = quotes[..., 0], quotes[..., 1]
    price = torch.where(has_bar, opens[1:], closes[:-1])  # (H + 1, N, G)
    base = market.cost_rates(config, dtype)[symbol]
    rate = base + torch.where(has_bar, quotes[1:, ..., 3] * config.range_slippage, 0.0)
    rate = rate.clamp(max=config.max_rate - config.volume_slippage) * cost_scale
    is_perpetual = market.is_perpetual[symbol]
    years = (time[2:] - time[1:-1]).to(dtype) / YEAR_NS
    borrow = years[..., None] * (config.borrow_rate * cost_scale) * ~is_perpetual
    fills = {
        "price": price[:-1],
        "next_price": price[1:],
        "cost_rate": rate[:-1],
        "next_cost_rate": rate[1:],
        "borrow": borrow,
        "is_filled": (has_bar | is_gone)[:-1],
    }
    if config.volume_slippage:
        most = config.volume_slippage * cost_scale
        volume = quotes[1:, ..., 4].clamp(min=LEAST_VOLUME)
        impact = torch.where(has_bar, most * config.account_value / volume, 0.0)
        fills |= {"impact": impact[:-1], "next_impact": impact[1:]}
        fills["impact_limit"] = torch.full_like(borrow, most)
    if market.has_funding:
        fills["funding"] = torch.where(has_bar, quotes[1:, ..., 5], 0.0)[1:]
    if market.has_perpetuals and config.maintenance_margin > 0:
        fills["margin"] = (is_perpetual * config.maintenance_margin).to(dtype).expand_as(borrow)
    is_ready = grid.is_ready(symbol, at[:horizon, :, None])
    may_hold = is_ready & ~is_gone[:-1]
    if config.flat_before_close:
        left = market.minutes_left[known[1:-1]]
        may_hold &= (left > config.flat_before_close) | ~has_bar[:-1]
    return GroupSegment(fills, may_hold, is_ready, closes[:-1], base * cost_scale)


class GroupStatistics:
    """Sums over whole segments, as ``segment.Statistics``; a decision is that of a whole group.

    A position counts for its share of a group: the times in all positions add up to the decisions.
    """

    def __init__(
        self, config: EnvConfig, group: GroupConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._positions, self._size = config.positions, group.size
        self.names = (*TOTALS, "gross_exposure", "net_exposure")
        self.totals = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.time_in = torch.zeros(len(config.positions), dtype=torch.float64, device=device)
        self._number = torch.arange(len(config.positions), device=device)

    def add(
        self, before: GroupState, after: GroupState, fill: GroupFill, choice: Tensor, price: Tensor
    ) -> None:
        """Add a step: ``choice`` (N, G) is what was chosen, ``price`` (N, G) that of the fill."""
        counts, columns = before.alive.double(), torch.zeros_like(self.totals)
        exposure = after.units * price / before.log_equity.exp()[:, None]
        funding = torch.zeros_like(fill.costs) if fill.funding is None else fill.funding
        values = {
            "decisions": counts,
            "rewards": fill.log_return,
            "costs": fill.costs,
            "borrow_costs": fill.borrow_cost,
            "traded": fill.traded,
            "funding": funding,
            "gross_exposure": exposure.abs().sum(-1),
            # Else groups that are long and groups that are short would add up to nothing.
            "net_exposure": exposure.sum(-1).abs(),
        }
        for name, value in values.items():
            columns[self.names.index(name)] = value.sum(dtype=torch.float64)
        self.totals.add_(columns)
        held = (choice[..., None] == self._number) & before.alive[:, None, None]
        self.time_in.add_(held.sum((0, 1)) / self._size)

    def end(self, account: GroupState, has_played: Tensor, over: Tensor) -> None:
        """Count the episodes that end with a segment, (N,) bool; only those that have played in it."""
        ended = (over & has_played).double()
        for name, value in {
            "episodes": torch.ones_like(ended),
            "episode_log_returns": account.log_equity.double(),
            "ruins": (~account.alive).double(),
        }.items():
            self.totals[self.names.index(name)] += (value * ended).sum()

    def take(self) -> dict[str, Tensor]:
        """Return the sums by name, and reset them."""
        totals = dict(zip(self.names, self.totals.clone().unbind(), strict=True))
        names = [f"in_position_{position:g}" for position in self._positions]
        totals |= dict(zip(names, self.time_in.clone().unbind(), strict=True))
        self.totals.zero_()
        self.time_in.zero_()
        return totals
