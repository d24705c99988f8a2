"""GroupExamEnv: accounts over groups that walk over given minutes in order, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from envs.config import EQUITY_FLOOR, EnvConfig
from envs.grid import Grid
from envs.group_account import GroupState
from envs.group_env import GroupEnv
from envs.market import Market, NoSegment


class GroupExamEnv(GroupEnv):
    """One account per group, from its first minute to the newest one, in order, once; nothing is random.

    It is to :class:`GroupEnv` what ``ExamEnv`` is to ``TradingEnv``: one account throughout, with orders as large
    as it has grown and final ruin; episodes begin again for the observations alone. After a hole of the whole
    market the account continues in cash. An account that is done is not ``alive``.

    Args:
        market: with the bars of the exam before its holdout.
        config: ``num_envs`` is replaced.
        device: of the market.
        groups: the symbols of each account, of one kind of market each.
        starts: when each of them decides first, ns UTC.
        nets: the cap on the net exposure of each group.
        flat_cost_bps: of each group, in place of fees and slippage of all kinds; None keeps those.
        dtype: of money.
        grid: of the market, where it is known.

    Raises:
        ValueError: a flat cost is out of range.
        NoSegment: no group has a segment to walk; those without one must not be among the groups.
    """

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        groups: Sequence[Sequence[str]],
        starts: Sequence[int],
        nets: Sequence[float],
        flat_cost_bps: Sequence[float | None],
        dtype: torch.dtype = torch.float64,
        grid: Grid | None = None,
    ) -> None:
        assert config.group is not None
        config.require_flat_costs(flat_cost_bps)
        config = replace(config, num_envs=len(groups) * config.group.size)
        super().__init__(market, config, device, seed=0, dtype=dtype, grid=grid)
        numbers = [[market.symbols.index(symbol) for symbol in group] for group in groups]
        self._symbol = self._groups = torch.tensor(numbers, device=self.device)
        self.net = torch.tensor(nets, dtype=dtype, device=self.device)[:, None]
        clocks = self.grid.clock_of[self._groups[:, 0]].tolist()
        places = list(zip(clocks, starts, strict=True))
        walk_of = {place: walk_of_clock(self.grid, *place) for place in set(places)}
        self.num_segments = max((len(walk_of[place]) for place in places), default=0)
        if not all(walk_of.values()) or not places:
            raise NoSegment("no group has the minutes of a segment after the start")
        # First minute of every segment, -1 for none; (segments + 1, N).
        schedule = torch.full((self.num_segments + 1, len(groups)), -1, dtype=torch.int64)
        for number, place in enumerate(places):
            schedule[: len(walk_of[place]), number] = torch.tensor(walk_of[place])
        self._schedule = schedule.to(self.device)
        where = torch.tensor([cost is not None for cost in flat_cost_bps], device=self.device)[:, None]
        rates = torch.tensor([(cost or 0.0) / 1e4 for cost in flat_cost_bps], dtype=dtype, device=self.device)
        self._flat = (where, rates[:, None])
        self._round = 0
        self._minute = torch.full_like(self._minute, -1)  # nowhere yet
        self._played = torch.zeros_like(self._played)
        self._began_at = torch.zeros_like(self._played)

    @property
    def schedule(self) -> Tensor:
        """(segments, N) int64: minute of the grid at each segment's first decision, -1 for no segment."""
        return self._schedule[:-1]

    def _begin(self) -> None:
        super()._begin()
        where, rates = self._flat
        fills = self.segment.fills
        for name in ("cost_rate", "next_cost_rate"):
            fills[name] = torch.where(where, rates * self.cost_scale, fills[name])
        for name in {"impact", "next_impact"} & fills.keys():
            fills[name] = fills[name].masked_fill(where, 0)
        base = torch.where(where, rates * self.cost_scale, self.segment.base_rate)
        self.segment = replace(self.segment, base_rate=base)

    def _fresh(self) -> GroupState:
        return self._account  # after a hole, the same account

    def _log_start(self) -> Tensor:
        return self._began_at

    def _places(self) -> tuple[Tensor, Tensor]:
        if self._round >= self.num_segments:
            raise RuntimeError(f"all {self.num_segments} segments of the exam are played")
        start, account = self._schedule[self._round], self._account
        out = start < 0
        if self._round:
            out = out | ~account.alive
        over = (start != self._minute) & ~out
        in_cash = out | over
        account.alive = account.alive & ~out
        account.cash = torch.where(in_cash, account.log_equity.exp(), account.cash)
        account.owed = account.owed.masked_fill(in_cash, 0)
        for name in ("units", "weight"):
            setattr(account, name, getattr(account, name).masked_fill(in_cash[:, None], 0))
        account.choice = account.choice.masked_fill(in_cash[:, None], self.cash_index)
        new_episode = over | (self._played + self.config.horizon > self.config.episode_bars)
        self._played = self._played.masked_fill(new_episode, 0)
        # An episode begins at the newest close: the open at which this decision fills is still to come.
        bar = self.grid.bars_at(self._groups, torch.where(out, self._schedule[0], start)[:, None])
        value = account.units * self.market.quotes[bar.clamp(min=0), 1].to(self.dtype)
        marked = (account.cash + value.sum(-1)).clamp(min=EQUITY_FLOOR).log()
        begins_at = torch.where(in_cash, account.log_equity, marked)
        self._began_at = torch.where(new_episode, begins_at, self._began_at)
        account.log_peak = torch.where(new_episode, begins_at, account.log_peak)
        # Groups that are out still need a minute that exists; any of their clock will do.
        self._minute = torch.where(out, self._schedule[0], self._minute)
        self._over = over
        self._round += 1
        return self._groups, start

    def _cut(self) -> Tensor:
        return self._schedule[self._round] != self._minute


def walk_of_clock(grid: Grid, clock: int, start_ns: int) -> list[int]:
    """Return the first minute of each segment of a clock from a time on."""
    context, horizon = grid.market.context_bars, grid.market.horizon
    starts: list[int] = []
    spans = zip(grid.span_first.tolist(), grid.span_last.tolist(), grid.span_clock.tolist(), strict=True)
    for first, last, of_clock in spans:
        if of_clock == clock:
            late = int((grid.minutes[first : last + 1] < start_ns).sum())
            starts.extend(range(max(first + context, first + late), last - horizon, horizon))
    return starts
