"""OpenGroupEnv: accounts over groups that go on for as long as bars come; between two walks plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.grid import Grid
from envs.group_account import GroupState, advance_group, fill_orders, is_kept, rate_with_impact
from envs.group_segment import group_segment
from envs.group_walk_env import GroupExamEnv
from envs.late_funding import Charge, Charges, HeldUnits, SymbolFunding, add_charges, settle
from envs.market import NUM_QUOTES, Market
from envs.open_env import SAME, LastStates, OpenAccount, Trades


@dataclass(frozen=True)
class OpenGroupAccount:
    """One account over a group between two decisions, all of it: money as in ``GroupState``."""

    symbols: tuple[str, ...]
    next_ns: int  # the minute at whose end it decides next
    mark_ns: int  # the minute of trading after it, when it stood there
    opens: tuple[float, ...]  # of the newest bars at ``next_ns``
    closes: tuple[float, ...]  # of the same
    prices: tuple[float, ...]  # at ``mark_ns``, at which its equity was counted
    cash: float
    units: tuple[float, ...]
    weight: tuple[float, ...]
    choice: tuple[int, ...]
    owed: float
    log_equity: float
    log_peak: float
    alive: bool
    played: float  # decisions in this episode
    log_start: float  # log equity at the start of the episode
    bars_ns: tuple[int, ...] = ()  # open times of the newest bars at ``next_ns``; older programs kept none
    charges: tuple[Charges, ...] = ()  # funding that each symbol was charged of late; likewise


AnyAccount = OpenAccount | OpenGroupAccount


def account_of(values: Mapping[str, Any]) -> AnyAccount:
    """Return the account that ``asdict`` made these values of, also where lists came back for tuples.

    Raises:
        TypeError: they are no account's.
    """
    kept = values.get("charges", ())
    if "symbols" not in values:
        return OpenAccount(**{**values, "charges": _charges(kept)})
    return _group_account({**values, "charges": tuple(map(_charges, kept))})


def _charges(values: Sequence[Sequence[Any]]) -> Charges:
    return tuple(Charge(*each) for each in values)


def _group_account(values: Mapping[str, Any]) -> OpenGroupAccount:
    found: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return OpenGroupAccount(**found)


class OpenGroupEnv(GroupExamEnv):
    """A ``GroupExamEnv`` of one decision at a time, whose accounts begin where earlier ones stood.

    It is to ``GroupExamEnv`` what ``OpenEnv`` is to ``ExamEnv``; a minute of the clock is what a bar is there. An
    account without a position at its side in ``accounts`` is new and begins at its entry in ``starts``, which the
    others ignore. What is due at the next minute follows from the bars as they are now, with the funding of bars
    that came in since for earlier minutes, and what older bars have of it by now and had not then. Where the
    actions of a group are ``HOLD``, it trades nothing but what it may not hold.
    """

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        groups: Sequence[Sequence[str]],
        starts: Sequence[int],
        accounts: Sequence[OpenGroupAccount | None],
        nets: Sequence[float],
        flat_cost_bps: Sequence[float | None],
        dtype: torch.dtype = torch.float64,
        grid: Grid | None = None,
    ) -> None:
        market, config = replace(market, horizon=1), replace(config, horizon=1)
        starts = [
            account.next_ns if account else start for start, account in zip(starts, accounts, strict=True)
        ]
        super().__init__(market, config, device, groups, starts, nets, flat_cost_bps, dtype, grid)
        self._symbols_of = [tuple(group) for group in groups]
        self._last = LastStates()
        numbers = set(self._groups.flatten().tolist())
        self._funding_of = {number: SymbolFunding(market, number) for number in numbers}
        self._pays_funding = any(each.is_due for each in self._funding_of.values())
        self._held = HeldUnits(self.num_segments if self._pays_funding else 0, self._account.units)
        self._late = torch.zeros_like(self._account.owed)  # funding of bars that were booked without it
        self._charges: list[tuple[Charges, ...]] = [((),) * self.group.size for _ in groups]
        self._holds = torch.zeros(self.num_groups, dtype=torch.bool, device=self.device)
        for number, account in enumerate(accounts):
            if account is not None:
                self._place_account(number, account)

    def _place_account(self, number: int, account: OpenGroupAccount) -> None:
        """Put an account where it stood; one whose minute is gone, or begins a span, goes on in cash."""

        def tensor(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=self.dtype, device=self.device)

        for name, ours in self._account.named().items():
            ours[number] = torch.as_tensor(getattr(account, name), dtype=ours.dtype, device=self.device)
        self._played[number], self._began_at[number] = account.played, account.log_start
        minute = self._schedule[0, number]
        if int(self.grid.minutes[minute]) != account.next_ns:
            self._settle(number, account, [account.mark_ns] * self.group.size)
            return
        self._minute[number] = minute
        newest = self.grid.bars_at(self._groups[number], minute).clamp(min=0)
        known = self._known_then(number, newest, account.bars_ns)
        # The factor of a split since then: all prices agree on it, those of a revised bar do not.
        before = torch.stack([tensor(prices) for prices in (account.opens, account.closes, account.prices)])
        opens, closes, prices = self._marks(self._groups[number], known, minute)
        was_there = (before[1] != before[2]) & (self.grid.minutes[minute + 1] == account.mark_ns)
        before[2] = torch.where(was_there, before[2], before[1])
        ratios = before / torch.stack([opens, closes, torch.where(was_there, prices, closes)])
        is_scaled = (ratios / ratios[0] - 1).abs().amax(0) < SAME
        self._account.units[number] *= torch.where(is_scaled, ratios[0], 1.0)
        self._settle(number, account, self.market.open_time[known].tolist())
        self._late[number] += self._funding_since(number, known, newest)
        self._account.owed[number] = self._due_at_next(number, minute)

    def _settle(self, number: int, account: OpenGroupAccount, until_ns: Sequence[int]) -> None:
        """Let an account owe what its charges up to these times, one per symbol, lack by now."""
        symbols = self._groups[number].tolist()
        given = zip(account.charges or self._charges[number], symbols, until_ns, strict=True)
        settled = [settle(charges, self._funding_of[symbol], end) for charges, symbol, end in given]
        self._charges[number] = tuple(charges for _, charges in settled)
        self._late[number] = sum(due for due, _ in settled) if account.alive else 0.0

    def _begin(self) -> None:
        super()._begin()
        # Also of an account that a hole has put in cash since.
        self._account.owed = self._account.owed + self._late
        self._late = torch.zeros_like(self._late)

    def _known_then(self, number: int, newest: Tensor, bars_ns: Sequence[int]) -> Tensor:
        """Return the bars of a group that were its newest ones when it stood there, (G,); now ``newest`` are."""
        known, open_time = newest.clone(), self.market.open_time
        firsts, now_ns = self.market.offsets[self._groups[number]].tolist(), open_time[newest].tolist()
        for place, then_ns in enumerate(bars_ns):
            if now_ns[place] > then_ns:
                own = open_time[firsts[place] : newest[place]]
                bar = firsts[place] + torch.searchsorted(own, then_ns)
                known[place] = torch.where(open_time[bar] == then_ns, bar, newest[place])
        return known

    def _funding_since(self, number: int, known: Tensor, newest: Tensor) -> Tensor:
        """Return the funding of a group's bars after ``known``, (G,), up to ``newest``.

        While they were missing, a later bar had it. What is held now was held at all of them: no order fills
        without a bar.
        """
        due = torch.zeros((), dtype=self.dtype, device=self.device)
        if self.market.has_funding:
            for place in (known < newest).nonzero().flatten().tolist():
                quotes = self.market.quotes[known[place] + 1 : newest[place] + 1].to(self.dtype)
                due += self._account.units[number, place] * (quotes[:, 0] * quotes[:, NUM_QUOTES]).sum()
        return due

    def _due_at_next(self, number: int, minute: Tensor) -> Tensor:
        """Return interest and funding due at the minute after this one, by the bars as they are now."""
        group, one = self._groups[number, None], slice(number, number + 1)
        fills = group_segment(self.grid, self.config, group, minute[None] - 1, 1.0, self.dtype).fills
        met = {name: values[0] for name, values in fills.items() if name != "margin"}
        met["is_filled"] = torch.zeros_like(met["is_filled"])
        held = GroupState(**{name: ours[one] for name, ours in self._account.named().items()})
        held = replace(held, owed=torch.zeros_like(held.owed))
        now, _ = advance_group(held, held.weight, held.choice, ruin_equity=-math.inf, **met)
        return now.owed[0]

    def _marks(self, symbol: Tensor, bar: Tensor, minute: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return opens and closes of bars, and prices at the minutes after these, (..., G) each."""
        after = self.grid.bars_at(symbol, minute[..., None] + 1).clamp(min=0)
        is_new = self.market.open_time[after] == self.grid.minutes[minute + 1][..., None]
        opens, closes = (self.market.quotes[bar, column].to(self.dtype) for column in (0, 1))
        return opens, closes, torch.where(is_new, self.market.quotes[after, 0].to(self.dtype), closes)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill decisions as ``GroupEnv.step``, (M,) int64; a group with a ``HOLD`` keeps what it holds."""
        actions = actions.view_as(self._account.choice)
        self._holds = (actions < 0).any(1)
        before, decision = self._account.units, self._round - 1
        result = super().step(torch.where(self._holds[:, None], self._account.choice, actions).flatten())
        if self._pays_funding:
            self._held.put(decision, self._schedule[decision] >= 0, before, self._account.units)
        return result

    def _weights(self, may_hold: Tensor) -> Tensor:
        kept = self._account.weight.masked_fill(~may_hold, 0)
        weight = torch.where(self._holds[:, None], kept, super()._weights(may_hold))
        self._asked = self._account, weight
        return weight

    def last_trades(self) -> Trades:
        """Return what the last decision traded, (N, G) each; what a ruin closed is among it."""
        (state, weight), met = self._asked, {n: v[self._step - 1] for n, v in self.segment.fills.items()}
        price, limit = met["price"], met.get("impact_limit", 0.0)
        cash, value = state.cash - state.owed, state.units * price
        is_held = is_kept(state, weight, met["is_filled"])
        bought, costs = fill_orders(cash, value, weight, is_held, met["cost_rate"], met.get("impact"), limit)
        equity = (cash + value.sum(-1))[:, None]
        left = equity - costs.sum(-1, keepdim=True)
        closed = (state.units + bought / price) * met["next_price"]
        closed = closed.abs().masked_fill(~self.last_fill.ruined[:, None], 0)
        rate = met["next_cost_rate"]
        if "next_impact" in met:
            rate = rate_with_impact(rate, closed, met["next_impact"], limit)
        paid, traded = costs + closed * rate, bought.abs() + closed
        return Trades(price, value / equity, (value + bought) / left, traded / equity, paid / equity)

    def _places(self) -> tuple[Tensor, Tensor]:
        if self._round:
            self._keep(self._schedule[self._round] < 0)
        return super()._places()

    def _keep(self, over: Tensor) -> list[Tensor]:
        minute = self._schedule[self._round - 1] + 1
        return self._last.keep(over, (*self._account.named().values(), self._played, self._began_at, minute))

    def accounts(self) -> list[OpenGroupAccount]:
        """Return every account as it is now; at least one decision must have been filled."""
        *tensors, minute = self._keep(torch.zeros_like(self._over))
        names = (*GroupState.__dataclass_fields__, "played", "log_start")
        columns = dict(zip(names, tensors, strict=True))
        columns["next_ns"], columns["mark_ns"] = self.grid.minutes[minute], self.grid.minutes[minute + 1]
        newest = self.grid.bars_at(self._groups, minute[:, None]).clamp(min=0)
        marks = self._marks(self._groups, newest, minute)
        columns |= dict(zip(("opens", "closes", "prices"), marks, strict=True))
        columns["bars_ns"] = self.market.open_time[newest]
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        values = [dict(zip(columns, row, strict=True)) for row in rows]
        return [
            _group_account({"symbols": symbols, **own, "charges": charges})
            for symbols, own, charges in zip(self._symbols_of, values, self._all_charges(), strict=True)
        ]

    def _all_charges(self) -> list[tuple[Charges, ...]]:
        """Return the charges of every account, a symbol each, those of this walk among them."""
        if not self._pays_funding:
            return self._charges
        schedule, times = self._schedule[: self._round], self.market.open_time
        counts = (schedule >= 0).sum(0).tolist()
        result = []
        for number, charges in enumerate(self._charges):
            decisions, held = self._held.newest(number, counts[number])  # (R,), (R, 2, G)
            minutes = schedule[torch.from_numpy(decisions).to(self.device), number]
            # Funding is due at the bar of a fill, of what was held before it, and at the next one. Those that came
            # in since are charged at the newest of them.
            at = minutes[:, None] + torch.arange(3, device=self.device)  # (R, 3)
            bars = self.grid.bars_at(self._groups[number][:, None, None], at)
            is_new = times[bars.clamp(min=0)] == self.grid.minutes[at]
            is_new[..., 0] = True
            bars = torch.where(is_new, bars, -1)  # (G, R, 3)
            units = held[:, [0, 0, 1]]  # (R, 3, G)
            own = zip(charges, self._groups[number].tolist(), bars.cpu().numpy(), strict=True)
            result.append(
                tuple(
                    add_charges(before, self._funding_of[symbol], each.ravel(), units[..., place].ravel())
                    for place, (before, symbol, each) in enumerate(own)
                )
            )
        return result
