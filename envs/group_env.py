"""GroupEnv: accounts that trade several symbols of one shared market each, stepped at once on the device.

Shapes: N = groups, G = symbols of a group, M = N x G slots, group after group, C = context bars, H = horizon,
F = bar features, A = account features, K = target positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from envs.compiled import Decide
from envs.config import EQUITY_FLOOR, EnvConfig
from envs.grid import Grid
from envs.group_account import (
    GroupFill,
    GroupState,
    advance_group,
    project,
    weights_of_every_position,
)
from envs.group_segment import GroupStatistics, group_segment
from envs.market import Market
from envs.segment import require_between, require_lengths, require_played


class GroupTrajectory(NamedTuple):
    """One segment as played, decision by decision."""

    observations: Tensor  # (H, M, A)
    held: Tensor  # (H, N, G) int64, target positions before the fill
    chosen: Tensor  # (H, N, G) int64, those that were asked for: cash where nothing may be held
    alive: Tensor  # (H, N) bool, before the decision
    log_equity: Tensor  # (H, N) at the fill, before it
    rewards: Tensor  # (H, N)
    terminated: Tensor  # (H, N) bool
    outputs: tuple[Tensor, ...]  # (H, M, ...) each, of `decide`; the first are the actions
    fills: list[GroupFill]  # H
    weights: Tensor  # (H, N, G) of the positions after the fill, as fractions of equity there


class GroupEnv:
    """N accounts, each over G symbols of one market that does not react to them, aligned by the minute.

    It is used as :class:`TradingEnv`, and differs from it in what follows; ``config.num_envs`` counts slots, one
    per account and symbol, and ``config.group`` has the size of a group and the caps. Symbols that share an
    account are of one kind: stocks, or coins and their perpetual futures.

    ## Action

    ``(M,)`` int64: for each slot the index of a target in ``positions``. The weight that it asks for is that
    target times ``gross`` / G of the account's equity; ``group_account.project`` brings the weights of a group
    within the caps. A weight that stays the same trades nothing: units are held, and drift with the price.

    ## Observation

    The market, ``(M, C + H + 1, F)`` from ``begin_segment()``: token C + h of a slot is the symbol's newest bar up
    to minute h of the segment, the same minute for all slots of a group; a minute without a bar of the symbol
    repeats its newest one, and before its first one tokens are 0.

    The account, ``(M, A)`` float32, marked at the newest closes:

    | Num   | Observation                                                     | Min | Max |
    |-------|-----------------------------------------------------------------|-----|-----|
    | 0..K-1| 1 at the target position of the slot, else 0                    | 0   | 1   |
    | K     | exposure of the slot, in shares of ``gross`` / G                | -8  | 8   |
    | K + 1 | longs less shorts of the group, in ``gross``                    | -8  | 8   |
    | K + 2 | longs and shorts of the group together, in ``gross``            | 0   | 8   |
    | K + 3 | 10 x log of equity over its peak at earlier fills               | -8  | 8   |
    | K + 4 | 10 x log of equity over the episode's start                     | -8  | 8   |
    | K + 5 | fraction of the episode that is left                            | 0   | 1   |
    | K + 6 | 1,000 x cost rate of a trade (fee + slippage) on this symbol    | 0   | 8   |

    ## Reward

    The log growth of the group's equity from fill to fill, as of a single account.

    ## Fills

    Decision h sees bars up to minute h, all closed, and fills at the next minute in which any symbol of that kind
    of market has a bar, by ``group_account.advance_group``. Weights are set at the decision, so nobody's order
    depends on who trades next. A symbol without a bar at the fill is not filled: it keeps its units, is worth its
    newest close, and is decided on again. The caps hold after a fill of all symbols.

    A symbol without C bars in a row, or without a bar for as long as a hole lasts (market.py), may not be held.
    What is held of one that ends, is halted for as long, or whose prices break, is sold at its last close at the
    usual cost, once that is known. Near the close nothing of stocks is held, as in :class:`TradingEnv`.

    ## Start and end

    Windows of time are drawn with the group, see ``Grid.draw_groups``; holes of a whole market end an episode,
    those of one symbol do not. Ruin is the group's: all of it is closed, and it stays in cash until the segment
    ends.
    """

    compiled = False

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        seed: int,
        dtype: torch.dtype = torch.float64,
        grid: Grid | None = None,
    ) -> None:
        """``grid``: of the market, where it is known."""
        assert config.group is not None
        self.config, self.group = config, config.group
        self.device, self.dtype = torch.device(device), dtype
        if config.num_envs % self.group.size:
            raise ValueError(f"{config.num_envs} slots must be whole groups of {self.group.size}")
        self.num_groups = config.num_envs // self.group.size
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._targets = torch.tensor(config.positions, dtype=dtype, device=self.device)
        self.cash_index = config.positions.index(0.0)
        self.net: float | Tensor = self.group.net  # (N, 1) where each has its own
        n, size = self.num_groups, self.group.size
        self._account = self._new_accounts()
        self._symbol = torch.zeros(n, size, dtype=torch.int64, device=self.device)
        self._minute = torch.zeros(n, dtype=torch.int64, device=self.device)  # when the segment began
        number = torch.arange(n, device=self.device)
        self._played = (number % (config.episode_bars // config.horizon) * config.horizon).to(dtype)
        self._played_before = self._played.clone()
        self._begun = False
        self._over = torch.ones(n, dtype=torch.bool, device=self.device)
        self.cost_scale = 1.0
        self._step = config.horizon  # of this segment
        self.statistics = GroupStatistics(config, self.group, dtype, self.device)
        self._attach(market, grid)

    def _new_accounts(self) -> GroupState:
        return GroupState.fresh(self.num_groups, self.group.size, self.cash_index, self.dtype, self.device)

    def _fresh(self) -> GroupState:
        # The accounts with which new episodes begin.
        return self._new_accounts()

    def _attach(self, market: Market, grid: Grid | None = None) -> None:
        require_lengths(market, self.config)
        self.market, self.grid = market, grid or Grid.of(market, self.group.size)

    @property
    def num_account_features(self) -> int:
        """A."""
        return self.config.num_account_features

    @property
    def account(self) -> GroupState:
        """The accounts as they are now."""
        return self._account

    @property
    def symbols(self) -> Tensor:
        """(N, G) int64: the symbols of each group."""
        return self._symbol

    @property
    def minute(self) -> Tensor:
        """(N,) int64: the newest closed minute of each group in the grid."""
        return self._minute if self._step == self.config.horizon else self._minute + self._step

    @property
    def cursor(self) -> Tensor:
        """(M,) int64: each slot's newest closed bar in the market."""
        return self.grid.bars_at(self._symbol, self.minute[:, None]).clamp(min=0).flatten()

    @property
    def scale(self) -> Tensor:
        """(N,) float32: typical log growth of a group's equity when one bar moves one position of 1."""
        volatility = self.market.volatility[self._symbol].square().mean(1).sqrt()
        return volatility * self.group.share

    def begin_segment(self) -> Tensor:
        """Return the bars of the next segment, (M, C + H + 1, F) float32; see ``TradingEnv.begin_segment``.

        Raises:
            RuntimeError: the previous segment was not played to its end.
        """
        self._begin()
        context = self.config.context_bars
        steps = torch.arange(-context, self.config.horizon + 1, device=self.device)
        at = (self._minute[:, None] + steps)[:, None]
        bars = self.grid.bars_at(self._symbol[..., None], at).flatten(0, 1)
        return self.grid.tokens(bars)

    def begin_segment_unread(self) -> None:
        """Begin the next segment, where its bars are known."""
        self._begin()

    def _begin(self) -> None:
        require_played(self._step, self.config.horizon)
        symbol, minute = self._places()
        over, fresh = self._over, self._fresh().named()
        for name, now in self._account.named().items():
            where = over.view(-1, *[1] * (now.dim() - 1))
            setattr(self._account, name, torch.where(where, fresh[name], now))
        if self._begun:
            self._played = self._played.masked_fill(over, 0)
        self._begun = True
        self._symbol = torch.where(over[:, None], symbol, self._symbol)
        self._minute = torch.where(over, minute, self._minute)
        self._over = torch.zeros_like(over)
        self.segment = group_segment(
            self.grid, self.config, self._symbol, self._minute, self.cost_scale, self.dtype
        )
        self._played_before, self._step = self._played.clone(), 0

    def _places(self) -> tuple[Tensor, Tensor]:
        # Symbols (N, G) and first minute (N,) for each group whose episode is over; the others' are ignored.
        return self.grid.draw_groups(self.num_groups, self.group.size, self.generator)

    def account_observations(self) -> Tensor:
        """Return the account part of the observation at the current decision, (M, A) float32."""
        account, group = self._account, self.group
        value = account.units * self.segment.closes[self._step]
        equity = (account.cash + value.sum(-1)).clamp(min=EQUITY_FLOOR)
        exposure, log_equity = value / equity[:, None], equity.log()
        ones = torch.ones_like(exposure)
        left = 1 - self._played / self.config.episode_bars
        columns = (
            exposure / group.share,
            (exposure.sum(-1) / group.gross)[:, None] * ones,
            (exposure.abs().sum(-1) / group.gross)[:, None] * ones,
            (10 * (log_equity - account.log_peak))[:, None] * ones,
            (10 * (log_equity - self._log_start()))[:, None] * ones,
            left[:, None] * ones,
            1e3 * self.segment.base_rate,
        )
        held = account.choice[..., None] == torch.arange(len(self._targets), device=self.device)
        rest = torch.stack(columns, dim=-1).clamp(-8, 8)
        return torch.cat((held.float(), rest.float()), dim=-1).flatten(0, 1)

    def weights_of_every_position(self, index: Tensor) -> Tensor:
        """Return the weights of the groups for every position of each slot: (T, n, G) -> (T, n, G, K, G)."""
        net = self.net[..., None, None] if isinstance(self.net, Tensor) else self.net
        return weights_of_every_position(index, self._targets * self.group.share, self.group.gross, net)

    def _log_start(self) -> Tensor | float:
        return 0.0  # log equity at the start of the episode

    @torch.no_grad()
    def play(self, decide: Decide, *inputs: Tensor) -> GroupTrajectory:
        """Play the segment that has begun to its end; see ``TradingEnv.play``."""
        if self._step:
            raise RuntimeError(f"{self._step} steps of the segment are taken: call begin_segment()")
        rows, fills = [], []
        for t in range(self.config.horizon):
            account, observed = self._account, self.account_observations()
            decision = decide(observed, *(values[t] for values in inputs))
            reward, ruined, _ = self.step(decision[0])
            fills.append(self.last_fill)
            now = self._account
            value = now.units * self.segment.fills["price"][t]
            # Of a ruined account, that of the positions it had is gone: it holds nothing.
            weights = value / (now.cash + value.sum(-1)).clamp(min=EQUITY_FLOOR)[:, None]
            before = account.choice, self.last_choice, account.alive, account.log_equity
            rows.append((observed, *before, reward, ruined, weights, *decision))
        observed, held, chosen, alive, log_equity, rewards, ruined, weights, *outputs = (
            torch.stack(column) for column in zip(*rows, strict=True)
        )
        return GroupTrajectory(
            observed, held, chosen, alive, log_equity, rewards, ruined, tuple(outputs), fills, weights
        )

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill one decision per slot and move to the next minute.

        Args:
            actions: (M,) int64, index of the wanted target position.

        Returns:
            rewards: (N,) float32; terminated: (N,) bool, ruined by this decision; truncated: (N,) bool, the
            episode ends by age or lack of bars, only at the last step of a segment.

        Raises:
            RuntimeError: the segment is over.
        """
        h, account = self._step, self._account
        if h >= self.config.horizon:
            raise RuntimeError(f"all {h} steps of the segment are taken: call begin_segment()")
        self._step += 1
        self._played = self._played + account.alive
        may_hold = self.segment.may_hold[h] & account.alive[:, None]
        self.last_choice = torch.where(may_hold, actions.view_as(may_hold), self.cash_index)
        weight = self._weights(may_hold)
        fills = {name: values[h] for name, values in self.segment.fills.items()}
        self._account, self.last_fill = advance_group(
            account, weight, self.last_choice, ruin_equity=self.config.ruin_fraction, **fills
        )
        self.statistics.add(account, self._account, self.last_fill, self.last_choice, fills["price"])
        truncated = torch.zeros_like(account.alive)
        if self._step == self.config.horizon:
            truncated = self._end_segment()
        return self.last_fill.log_return.float(), self.last_fill.ruined, truncated

    def _weights(self, may_hold: Tensor) -> Tensor:
        # What the last choices ask for, within the caps, (N, G).
        return project(self._targets[self.last_choice] * self.group.share, self.group.gross, self.net)

    def _end_segment(self) -> Tensor:
        # Decides which episodes end here, adds up their statistics, and returns which are truncated.
        self._minute = self._minute + self.config.horizon
        alive = self._account.alive
        truncated = alive & self._cut()
        self._over = truncated | ~alive
        self.statistics.end(self._account, self._played > self._played_before, self._over)
        return truncated

    def _cut(self) -> Tensor:
        return (self._played + self.config.horizon > self.config.episode_bars) | self._does_not_fit()

    def _does_not_fit(self) -> Tensor:
        span = torch.searchsorted(self.grid.span_first, self._minute, right=True) - 1
        return self._minute + self.config.horizon + 1 > self.grid.span_last[span]

    def episode_statistics(self) -> dict[str, Tensor]:
        """Return sums since the last call, and reset them; see ``TradingEnv.episode_statistics``.

        A decision is that of a group. Beside those of single accounts: the ``gross_exposure`` and ``net_exposure``
        after each fill, as fractions of equity.
        """
        return self.statistics.take()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next segment depends on, as plain types and CPU tensors.

        Raises:
            RuntimeError: a segment is in the middle.
        """
        require_between(self._step, self.config.horizon)
        names = self.market.symbols
        bar = self.grid.bars_at(self._symbol, self._minute[:, None]).clamp(min=0)
        return {
            "positions": list(self.config.positions),
            "groups": [[names[number] for number in row] for row in self._symbol.tolist()],
            "open_time": self.grid.minutes[self._minute].cpu(),
            # A split changes past prices; `_place` rescales the units so that they are worth the same.
            "close": self.market.quotes[bar, 1].cpu(),
            "account": {name: tensor.cpu().clone() for name, tensor in self._account.named().items()},
            "played": self._played.cpu().clone(),
            "over": self._over.cpu().clone(),
            "begun": self._begun,
            "totals": self.statistics.totals.cpu().clone(),
            "time_in": self.statistics.time_in.cpu().clone(),
            "generator": self.generator.get_state().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state_dict`` was taken; accounts whose minute or a symbol of which is gone start again.

        So do those beyond the state's number of accounts. The generator resumes only on the same kind of device.
        """
        self._place(state)
        self._begun = state["begun"]
        self.statistics.totals.copy_(state["totals"])
        self.statistics.time_in.copy_(state["time_in"])
        if len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"].cpu())

    def use(self, market: Market) -> None:
        """Switch to a refreshed market with the same accounts; see ``load_state_dict``."""
        state = self.state_dict()
        self._attach(market)
        self._place(state)

    def _place(self, state: Mapping[str, Any]) -> None:
        # Takes over the accounts alone. Runs between segments, so it may wait for the device.
        grid, n = self.grid, min(self.num_groups, len(state["groups"]))
        number_of = {name: number for number, name in enumerate(self.market.symbols)}
        size = self.group.size
        rows = [[number_of.get(name, -1) for name in row] for row in state["groups"][:n]]
        symbol = torch.tensor(rows, dtype=torch.int64, device=self.device).view(n, -1)
        found = torch.full((n,), symbol.shape[1] == size, device=self.device)
        if not found.all():
            symbol = symbol.new_zeros(n, size)
        found &= (symbol >= 0).all(1) & (grid.clock_of[symbol] >= 0).all(1)
        clock = grid.clock_of[symbol[:, 0]].clamp(min=0)
        minute = torch.zeros(n, dtype=torch.int64, device=self.device)
        for number in range(len(grid.starts)):
            first, last = self._bounds(number)
            times = grid.minutes[first:last]
            place = torch.searchsorted(times, state["open_time"][:n].to(self.device))
            place = place.clamp(max=len(times) - 1)
            here = (clock == number) & (times[place] == state["open_time"][:n].to(self.device))
            minute = torch.where(clock == number, place + first, minute)
            found &= here | (clock != number)
        symbol = torch.where(found[:, None], symbol, 0)
        minute = torch.where(found, minute, 0)
        bar = grid.bars_at(symbol, minute[:, None]).clamp(min=0)
        self._account = self._new_accounts()
        if found.any():
            ratio = state["close"][:n].to(self.device) / self.market.quotes[bar, 1]
            for name, ours in self._account.named().items():
                value = state["account"][name][:n].to(self.device)
                value = value * ratio if name == "units" else value
                ours[:n] = torch.where(
                    found.view(-1, *[1] * (ours.dim() - 1)), value.to(ours.dtype), ours[:n]
                )
        self._symbol[:n], self._symbol[n:] = symbol, 0
        self._minute[:n], self._minute[n:] = minute, 0
        self._played[:n] = state["played"][:n].to(self.device)
        self._over.fill_(True)
        self._over[:n] = state["over"][:n].to(self.device) | ~found
        self._over |= self._does_not_fit()
        self._step = self.config.horizon

    def _bounds(self, clock: int) -> tuple[int, int]:
        mine = (self.grid.span_clock == clock).nonzero().flatten()
        return int(self.grid.span_first[mine[0]]), int(self.grid.span_last[mine[-1]]) + 1
