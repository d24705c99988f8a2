"""Courses: what accounts walk one decision at a time, each its symbol or all the symbols of a group.

A walk that goes on and paper trading are the same for both; what differs is here.
Shapes: P = contestants, K = accounts of each, G = symbols of an account (1, or a group's), R = decisions of the
longest walk, W = width of the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.compiled import Decide
from envs.config import EnvConfig
from envs.market import Market, NoSegment
from envs.open_env import OpenAccount, OpenEnv, Trades
from envs.open_group_env import AnyAccount, OpenGroupAccount, OpenGroupEnv
from evaluation.exam import Reader, Walk, play_segment, walks_of
from evaluation.group_exam import (
    Group,
    grid_of,
    group_walks_of,
    groups_of,
    index_of_prices,
    nets_of,
    play_group_segment,
    read,
    walkable,
)
from models.ensemble import Decider

Accounts = Mapping[str, Mapping[str, AnyAccount]]  # contestant -> symbol or group -> account
Read = Callable[[Tensor, Callable[[], None]], Tensor]


@dataclass(frozen=True)
class Trade:
    """What an account traded of a symbol at one decision; see ``envs.open_env.Trades``."""

    time_ns: int  # when it filled
    key: str  # the symbol, or its group
    symbol: str
    price: float
    before: float
    after: float
    traded: float
    costs: float


@dataclass(frozen=True)
class Entrants:
    """Who walks what; see ``course_of``."""

    market: Market
    config: EnvConfig
    owners: Sequence[Group]
    names: Sequence[str]
    start_of: Callable[[str], int]
    accounts: Accounts
    flat_costs_bps: Sequence[float | None]

    def standing(self, keys: Sequence[str]) -> list[AnyAccount | None]:
        """Return the accounts of these owners as they stand, contestant after contestant."""
        return [self.accounts.get(name, {}).get(key) for name in self.names for key in keys]

    def costs(self, keys: Sequence[str]) -> list[float | None]:
        """Return the flat cost of each of these accounts."""
        return [cost for cost in self.flat_costs_bps for _ in keys]


class Course(ABC):
    """The accounts of all contestants, under way. A place is a bar of a symbol, or a minute of a group."""

    owners: Sequence[Group]  # (K,) symbols, or groups
    keys: Sequence[str]  # (K,) their names
    env: OpenEnv | OpenGroupEnv
    schedule: Tensor  # (R, K) int64, places to decide at, -1 for none
    size: int  # G
    first_bars: Tensor  # (K x G,) int64, each symbol's first bar

    @abstractmethod
    def times(self, places: Tensor) -> Tensor:
        """Return when places (r, K) open, ns UTC; any time where there is none."""

    @abstractmethod
    def bars(self, places: Tensor) -> Tensor:
        """Return the newest bars at places (r, K): (r, K x G)."""

    @abstractmethod
    def reader(self, policy: Decider, chunk_segments: int) -> Read:
        """Return what reads places (r, K), in the order of the walk, for a policy's head: (r, K x G, W)."""

    @abstractmethod
    def play(self, decide: Decide, *inputs: Tensor) -> None:
        """Play the decision that has begun; inputs (1, ...) each."""

    @abstractmethod
    def walks(self, names: Sequence[str]) -> dict[str, list[Walk]]:
        """Return what was played."""

    @abstractmethod
    def _last_trades(self) -> Trades:
        """Return what the last decision traded, (P x K, G) each."""

    def trades(self, row: int) -> list[Trade]:
        """Return what the first contestant traded at the last decision, the one of ``row``."""
        places = self.schedule[row]
        owners = zip(self.owners, places.tolist(), self.times(places + 1).tolist(), strict=True)
        columns = torch.stack(self._last_trades())[:, : len(self.owners)]
        return [
            Trade(time_ns, owner.name, symbol, *values)
            for (owner, place, time_ns), own in zip(owners, columns.permute(1, 2, 0).tolist(), strict=True)
            for symbol, values in zip(owner.symbols, own, strict=True)
            if place >= 0 and values[-2] > 0
        ]

    def accounts(self, names: Sequence[str]) -> dict[str, dict[str, AnyAccount]]:
        """Return the accounts as they stand now."""
        now = iter(self.env.accounts())
        return {name: {key: account for key in self.keys if (account := next(now))} for name in names}


class SymbolCourse(Course):
    """Accounts of one symbol each."""

    env: OpenEnv
    size = 1

    def __init__(self, who: Entrants) -> None:
        self.owners = who.owners
        self.keys = symbols = [each.name for each in who.owners]
        self._horizon, self._market = who.config.horizon, who.market
        market, costs = who.market, who.costs(symbols)
        self.env = OpenEnv(
            market,
            who.config,
            market.device,
            [(symbol, who.start_of(symbol)) for _ in who.names for symbol in symbols],
            [each if isinstance(each, OpenAccount) else None for each in who.standing(symbols)],
            flat_cost_bps=None if set(costs) <= {None} else costs,
        )
        self.schedule = self.env.schedule[:, : len(symbols)].contiguous()
        self._numbers = [market.symbols.index(symbol) for symbol in symbols]
        self.first_bars = market.offsets[torch.tensor(self._numbers, device=market.device)]
        self._played: list[NDArray[np.float64]] = []

    def times(self, places: Tensor) -> Tensor:
        """See ``Course``."""
        return self._market.open_time[places.clamp(min=0)]

    def bars(self, places: Tensor) -> Tensor:
        """See ``Course``."""
        return places.clamp(min=0)

    def reader(self, policy: Decider, chunk_segments: int) -> Read:
        """See ``Course``."""
        own = Reader(policy, self._market, self._numbers, self._horizon, chunk_segments)
        return lambda places, check_stop: own.read(places.T[None], check_stop)[0]

    def play(self, decide: Decide, *inputs: Tensor) -> None:
        """See ``Course``."""
        account = self.env.account
        self._held = account.units * self.env.segment.price[0] / account.log_equity.exp()
        self._played.append(play_segment(self.env, decide, inputs[0], inputs[1:]))

    def _last_trades(self) -> Trades:
        position, _, costs, traded, borrowing = self._played[-1][:5, 0]
        columns = (position, traded, costs - borrowing)
        after = (torch.from_numpy(column).to(self._held.device) for column in columns)
        return Trades(*(column[:, None] for column in (self.env.segment.price[0], self._held, *after)))

    def walks(self, names: Sequence[str]) -> dict[str, list[Walk]]:
        """See ``Course``."""
        columns = list(np.concatenate(self._played, axis=1))
        ahead = torch.arange(1, device=self._market.device)
        schedule = self.schedule[: len(self._played)]
        return walks_of(names, self.keys, self._market, schedule, ahead, columns)


class GroupCourse(Course):
    """Accounts of a group each; those without a minute to walk are left out."""

    env: OpenGroupEnv

    def __init__(self, who: Entrants) -> None:
        market, group = who.market, who.config.group
        assert group is not None
        self.size, self._horizon = group.size, who.config.horizon
        # All contestants walk the same minutes.
        begun = zip(who.owners, who.standing([each.name for each in who.owners]), strict=False)
        begins = [account.next_ns if account else who.start_of(each.name) for each, account in begun]
        grid = grid_of(market, self.size)
        found = walkable(grid, who.owners, begins)
        self.owners = [each for each, _ in found]
        self.keys = [each.name for each in self.owners]
        num_groups = len(self.keys)
        self.env = OpenGroupEnv(
            market,
            who.config,
            market.device,
            [each.symbols for _ in who.names for each in self.owners],
            [start for _ in who.names for _, start in found],
            [each if isinstance(each, OpenGroupAccount) else None for each in who.standing(self.keys)],
            nets_of(group, who.names, num_groups),
            who.costs(self.keys),
            grid=grid,
        )
        self.schedule = self.env.schedule[:, :num_groups].contiguous()
        numbers = [[market.symbols.index(symbol) for symbol in each.symbols] for each in self.owners]
        self._symbols = torch.tensor(numbers, device=market.device)
        self.first_bars = market.offsets[self._symbols.flatten()]
        self._played: list[NDArray[np.float64]] = []
        self._prices: list[NDArray[np.float64]] = []

    def times(self, places: Tensor) -> Tensor:
        """See ``Course``."""
        return self.env.grid.minutes[places.clamp(min=0)]

    def bars(self, places: Tensor) -> Tensor:
        """See ``Course``."""
        # Groups that are done still need a minute that exists.
        minutes = torch.where(places < 0, self.schedule[0], places)
        return self.env.grid.bars_at(self._symbols, minutes[..., None]).clamp(min=0).flatten(1)

    def reader(self, policy: Decider, chunk_segments: int) -> Read:
        """See ``Course``."""
        grid, horizon = self.env.grid, self._horizon
        return lambda places, check_stop: read(
            policy, grid, horizon, self._symbols, places.T[None].contiguous(), chunk_segments, check_stop
        )[0]

    def play(self, decide: Decide, *inputs: Tensor) -> None:
        """See ``Course``."""
        self._played.append(play_group_segment(self.env, decide, inputs[0], inputs[1:]))
        self._prices.append(index_of_prices(self.env, len(self.keys)))

    def _last_trades(self) -> Trades:
        return self.env.last_trades()

    def walks(self, names: Sequence[str]) -> dict[str, list[Walk]]:
        """See ``Course``."""
        columns = list(np.concatenate(self._played, axis=1))
        schedule, prices = self.schedule[: len(self._played)], np.concatenate(self._prices)
        return group_walks_of(names, self.owners, self.env, schedule, columns, prices)


def course_of(
    market: Market,
    config: EnvConfig,
    owners: Sequence[Group],
    names: Sequence[str],
    start_of: Callable[[str], int],
    accounts: Accounts,
    flat_costs_bps: Sequence[float | None] | None = None,
) -> Course:
    """Return the course of these accounts, where they stood.

    Args:
        market: has the bars to walk.
        config: of the accounts, with the horizon of the training.
        owners: of each account; see ``owners_of``.
        names: of the contestants.
        start_of: an owner by this name without an account begins with money 1 at this time, ns UTC.
        accounts: as they stood.
        flat_costs_bps: of each contestant, in place of fees and slippage of all kinds; None keeps those.

    Raises:
        NoSegment: there is nothing to walk.
    """
    kind: type[SymbolCourse] | type[GroupCourse] = GroupCourse if config.group else SymbolCourse
    costs = [None] * len(names) if flat_costs_bps is None else flat_costs_bps
    return kind(Entrants(market, config, owners, names, start_of, accounts, costs))


def owners_of(market: Market, config: EnvConfig, symbols: Sequence[str], accounts: Accounts) -> list[Group]:
    """Return what has an account each: every symbol alone, or groups: those that stand, and of other symbols.

    Raises:
        NoSegment: there are too few symbols for a group.
    """
    if config.group is None:
        return [Group(symbol, (symbol,)) for symbol in symbols]
    standing = {
        key: Group(key, account.symbols)
        for own in accounts.values()
        for key, account in own.items()
        if isinstance(account, OpenGroupAccount)
    }
    try:
        return groups_of(market, config.group.size, symbols, list(standing.values()))
    except ValueError as error:
        raise NoSegment(str(error)) from error


def symbols_of(accounts: Accounts) -> list[str]:
    """Return the symbols of all accounts, each once."""
    found = (
        account.symbols if isinstance(account, OpenGroupAccount) else (key,)
        for own in accounts.values()
        for key, account in own.items()
    )
    return list(dict.fromkeys(symbol for symbols in found for symbol in symbols))
