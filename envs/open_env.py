"""OpenEnv: accounts that go on for as long as bars come; between two walks they are plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.account import AccountState, advance
from envs.config import EnvConfig
from envs.late_funding import Charges, HeldUnits, SymbolFunding, add_charges, settle
from envs.market import Market
from envs.walk_env import ExamEnv


@dataclass(frozen=True)
class OpenAccount:
    """One account between two decisions, all of it: money as in ``AccountState``."""

    next_ns: int  # open time of the bar at whose close it decides next
    close: float  # of that bar
    mark_ns: int  # open time of a later bar, the next one when it stood there
    price: float  # open of that one, at which its equity was counted
    cash: float
    units: float
    owed: float
    log_equity: float
    log_peak: float
    log_at_trade: float
    target: float
    alive: bool
    played: float  # decisions in this episode
    log_start: float  # log equity at the start of the episode
    charges: Charges = ()  # funding that it was charged of late; older programs kept none


class Trades(NamedTuple):
    """What one decision traded, (N, G) each; where ``traded`` is 0, nothing."""

    price: Tensor  # at which it filled
    before: Tensor  # value held before the fill, as a fraction of equity before it
    after: Tensor  # and after it, of equity after it
    traded: Tensor  # value bought or sold, as a fraction of equity before the fill
    costs: Tensor  # fee and slippage, likewise


HOLD = -1  # the action of an account that keeps what it holds
SAME = 1e-6  # ratios of prices in float32 that agree so well are one
AMOUNTS = tuple(field.name for field in fields(AccountState) if field.name != "alive")


class LastStates:
    """What accounts were when their walks ended, while others walk on."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []

    def keep(self, over: Tensor, now: Sequence[Tensor]) -> list[Tensor]:
        """Take ``now``, (N, ...) each, of accounts that were not ``over`` before, (N,) bool; return all states."""
        if not self._states:
            self._done, self._states = torch.zeros_like(over), [tensor.clone() for tensor in now]
        for kept, current in zip(self._states, now, strict=True):
            done = self._done.view(-1, *[1] * (current.dim() - 1))
            kept.copy_(torch.where(done, kept, current))
        self._done |= over
        return self._states


class OpenEnv(ExamEnv):
    """An ``ExamEnv`` of one decision at a time, whose accounts begin where earlier ones stood.

        env = OpenEnv(market, config, device, [("AAPL", start_ns)], [None])
        while ...: env.begin_segment_unread(); env.play(decide)
        (account,) = env.accounts()      # and, with the bars of another day, OpenEnv(..., [account])

    Fills, costs and observations are those of an exam of the same bars; but every bar is decided upon whose
    outcome is known, that is with two more bars after it, so none is left over at the end of a stretch. An
    account goes on with the bar ``next_ns``, with its position; where that bar is no more, or ends a stretch, it
    goes on in cash, as after any hole. Prices may have been rescaled since, by a split: its units then are, too,
    so that it is worth the same. Where a bar came in before ``mark_ns`` since, or that one went, interest is due
    and funding up to the bar that is the next one now. What older bars have of funding by now and had not
    then, as a row came late, is paid at the first fill.

    The action ``HOLD`` is the position that the account holds. ``places`` have the first bar of accounts that are
    new, and are ignored by the others.
    """

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        places: Sequence[tuple[str, int]],
        accounts: Sequence[OpenAccount | None],
        dtype: torch.dtype = torch.float64,
        flat_cost_bps: Sequence[float | None] | None = None,
    ) -> None:
        places = [
            (symbol, account.next_ns if account else start_ns)
            for (symbol, start_ns), account in zip(places, accounts, strict=True)
        ]
        market, config = replace(market, horizon=1), replace(config, horizon=1)
        super().__init__(market, config, device, places, dtype, flat_cost_bps)
        self._given = list(accounts)
        self._last = LastStates()
        self._late = torch.zeros_like(self._kept.owed)  # funding of bars that were booked without it
        self._funding_of = {number: SymbolFunding(market, number) for number in set(self._symbols.tolist())}
        self._pays_funding = any(each.is_due for each in self._funding_of.values())
        self._held = HeldUnits(self.num_segments if self._pays_funding else 0, self._kept.units)
        self._charges: list[Charges] = [()] * len(places)
        first = self._schedule[0]
        known = [number for number, account in enumerate(accounts) if account]
        if not known:
            return
        where = torch.tensor(known, device=self.device)
        held = [account for account in accounts if account]

        def values(name: str, kind: torch.dtype) -> Tensor:
            return torch.tensor([getattr(account, name) for account in held], dtype=kind, device=self.device)

        for name in AMOUNTS:
            getattr(self._kept, name)[where] = values(name, dtype)
        self._kept.alive[where] = values("alive", torch.bool)
        self._played[where], self._began_at[where] = values("played", dtype), values("log_start", dtype)
        self._symbol.copy_(self._symbols)
        bar = first[where].clamp(min=0)
        goes_on = (first[where] >= 0) & (market.open_time[bar] == values("next_ns", torch.int64))
        self._cursor[where] = torch.where(goes_on, bar, -1)
        self._kept.units[where] *= torch.where(goes_on, self._rescaled(where, bar, values), 1.0)
        after = (bar + 1).clamp(max=len(market.open_time) - 1)
        is_other = goes_on & (market.open_time[after] != values("mark_ns", torch.int64))
        self._kept.owed[where] = torch.where(is_other, self._owed(where, bar, after), self._kept.owed[where])
        for number, account, is_paid_anew in zip(known, held, is_other.tolist(), strict=True):
            until_ns = account.next_ns if is_paid_anew else account.mark_ns
            funding = self._funding_of[int(self._symbols[number])]
            due, self._charges[number] = settle(account.charges, funding, until_ns)
            self._late[number] = due if account.alive else 0.0

    def begin_segment_unread(self) -> None:
        """Begin the next decision, where the bars that it sees are known."""
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        # Also of an account that a hole has put in cash since.
        self._kept.owed += self._late
        self._late.zero_()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill one decision per account as ``TradingEnv.step``, (N,) int64."""
        held = (self.account.target[:, None] == self._targets[: len(self.config.positions)]).byte().argmax(-1)
        before, decision = self._kept.units.clone(), self._round - 1
        result = super().step(torch.where(actions == HOLD, held, actions))
        if self._pays_funding:
            self._held.put(decision, self._schedule[decision] >= 0, before, self._kept.units)
        return result

    def _rescaled(self, where: Tensor, bar: Tensor, values: Callable[[str, torch.dtype], Tensor]) -> Tensor:
        """Return the factor of a split since then: two prices agree on it, those of a revised bar do not."""
        market, offsets = self.market, self.market.offsets
        numbers, marked = self._symbols[where], values("mark_ns", torch.int64)
        later = [
            first + int(torch.searchsorted(market.open_time[first:last], time))
            for first, last, time in zip(
                offsets[numbers].tolist(), offsets[numbers + 1].tolist(), marked, strict=True
            )
        ]
        mark = torch.tensor(later, device=self.device).clamp_(max=len(market.open_time) - 1)
        is_there = market.open_time[mark] == marked
        ratio = values("price", self.dtype) / market.quotes[mark, 0].to(self.dtype)
        other = values("close", self.dtype) / market.quotes[bar, 1].to(self.dtype)
        return torch.where(is_there & ((ratio / other - 1).abs() < SAME), ratio, 1.0)

    def _owed(self, where: Tensor, bar: Tensor, after: Tensor) -> Tensor:
        """Return what accounts owe that hold their units from the open of ``bar`` to that of ``after``."""
        quotes, following = (self.market.quotes[bars].to(self.dtype).T for bars in (bar, after))
        held = AccountState(*(tensor[where] for tensor in self._kept.tensors()))
        free = torch.zeros_like(held.owed)
        now, _ = advance(
            replace(held, owed=free),
            held.target,
            price=quotes[0],
            next_price=following[0],
            cost_rate=free,
            next_cost_rate=free,
            borrow=quotes[2] * self.config.borrow_rate,
            ruin_equity=-math.inf,
            funding=following[5] if self.market.has_funding else None,
        )
        return now.owed

    def _places(self) -> tuple[Tensor, Tensor]:
        if self._round:
            self._keep(self._schedule[self._round] < 0)
        return super()._places()

    def _keep(self, over: Tensor) -> list[Tensor]:
        # An ``ExamEnv`` puts accounts in cash whose walk is over, while the others walk on.
        cursor = self._schedule[self._round - 1] + 1
        return self._last.keep(over, (*self._kept.tensors(), self._played, self._began_at, cursor))

    def accounts(self) -> list[OpenAccount | None]:
        """Return every account as it is now; those without a bar to walk are as they were given."""
        if not self._round:
            return self._given
        *tensors, cursor = self._keep(torch.zeros_like(self._over))
        columns = dict(
            zip((*(f.name for f in fields(AccountState)), "played", "log_start"), tensors, strict=True)
        )
        columns["next_ns"] = self.market.open_time[cursor]
        columns["close"] = self.market.quotes[cursor, 1].double()
        after = (cursor + 1).clamp_(max=len(self.market.quotes) - 1)
        columns["mark_ns"] = self.market.open_time[after]
        columns["price"] = self.market.quotes[after, 0].double()
        charges = self._all_charges()
        has_walked = (self._schedule[0] >= 0).tolist()
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            OpenAccount(**dict(zip(columns, row, strict=True)), charges=own) if walked else given
            for row, own, walked, given in zip(rows, charges, has_walked, self._given, strict=True)
        ]

    def _all_charges(self) -> list[Charges]:
        """Return the charges of every account, those of this walk among them."""
        if not self._pays_funding:
            return self._charges
        schedule = self._schedule[: self._round].cpu()
        result = []
        for number, charges in enumerate(self._charges):
            decisions, held = self._held.newest(number, int((schedule[:, number] >= 0).sum()))
            filled = schedule[decisions, number].numpy() + 1
            # Funding is due at the bar of a fill, of what was held before it, and at the next one.
            bars = np.stack((filled, filled + 1), axis=1)
            funding = self._funding_of[int(self._symbols[number])]
            result.append(add_charges(charges, funding, bars.ravel(), held.ravel()))
        return result
