"""TradingEnv: N accounts that trade one shared market, stepped at once on the device.

Shapes: N = environments, C = context bars, H = horizon, F = bar features, A = account features,
K = target positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from envs.account import AccountState, advance, flows_of, observation_constants, observe
from envs.compiled import CompiledSteps, Decide
from envs.config import EnvConfig
from envs.market import Market
from envs.segment import (
    Fills,
    Segment,
    Statistics,
    Trajectory,
    require_between,
    require_lengths,
    require_played,
)


class TradingEnv:
    """N accounts, each on its own symbol and time of one shared market that does not react to them.

    An epoch is one segment: ``bars = env.begin_segment()``, then H times ``env.account_observations()`` and
    ``env.step(actions)``, or ``env.play(decide)`` once. None of these waits for the device, all shapes are fixed
    and memory is reused. Sizes and rates are fields of :class:`EnvConfig`; ``seed`` decides all symbols and
    starts, so the same seed gives the same numbers on a device. With ``compiled``, ``play`` runs by
    torch.compile, faster on a CPU after some ten seconds of compiling.

    ``segment`` holds everything that does not react to the accounts, see :class:`Segment`. ``last_fill``, (4 or 5,
    N), holds log_return, traded, costs, borrow_cost and, if the market has any, funding of the last ``step``, in
    start equities. ``account`` has the rest, and changes in place where ``play`` is compiled.

    ## Action

    ``(N,)`` int64: the index of the wanted target in ``positions``. A target is a fraction of equity, negative
    to be short, beyond 1 to borrow money. The same target as before trades nothing: units are held, and the
    exposure drifts with the price, until the target changes.

    ## Observation

    The market, ``(N, C + H + 1, F)`` float32 from ``begin_segment()``: token C + h is the newest closed bar at
    decision h, see ``docs/features.md``. The policy may use tokens 0 to C + h at decision h.

    The account, ``(N, A)`` float32 from ``account_observations()``, marked at that bar's close:

    | Num   | Observation                                                           | Min | Max |
    |-------|-----------------------------------------------------------------------|-----|-----|
    | 0..K-1| 1 at the target that is held, else 0; all 0 before the first trade    |     |     |
    |       | where 0 is not among the targets                                      | 0   | 1   |
    | K     | 10 x (exposure less its target)                                       | -8  | 8   |
    | K + 1 | 50 x log return of equity since the last trade, its cost included     | -8  | 8   |
    | K + 2 | 10 x log of equity over its peak at earlier fills                     | -8  | 8   |
    | K + 3 | 10 x log of equity over the episode's start                           | -8  | 8   |
    | K + 4 | fraction of the episode that is left                                  | 0   | 1   |
    | K + 5 | 1,000 x cost rate of a trade (fee + slippage) on this symbol          | 0   | 8   |

    ## Reward

    ``log(E(t+2) / E(t+1))``: equity at the open of bar t + 2 before the next trade, over equity at the open of bar
    t + 1 before this one. So rewards of an episode add up to the log of its final over its first equity. Where the
    setting ``reward`` is ``less market``, ``Segment.market_rewards`` are taken off in what is learnt, not here.

    ## Costs

    Of the value traded at the open, a trade costs the sum of

    - the fee of its asset class, such as ``stock_fee_bps``, and ``slippage_bps``;
    - ``range_slippage`` times the range, (high - low) / open, of the bar in which it fills;
    - ``volume_slippage`` times the order over the bar's traded value, at most 1. The order is the wanted less the
      held position at the open, before costs, of an account that began with ``account_value``.

    Fee, slippage and range together are limited to ``max_rate`` less ``volume_slippage``. After the trade the
    position is worth exactly ``target`` times the equity that is left. Borrowed shares (short) and borrowed money
    (targets over 1) cost ``borrow_rate`` a year for the time between opens, so a weekend costs more than a minute;
    a perpetual future borrows nothing. All of them, limits included, are multiplied by ``cost_scale``, 1 unless a
    curriculum sets it between segments.

    ## Funding

    At the funding times of a perpetual future a long position pays the rate times its value, and a short one
    receives it; below 0 the other way round. The position held *into* that time pays, since a fill at the open of
    that minute comes after it. The exchange values it at a mark price, which bars lack: here it is the open of the
    first bar from then on, the next trade, at which equity is counted too. ``cost_scale`` does not change it: it
    is no cost of trading, and received as often as paid.

    ## Timing

    Decision t sees bars up to t, all closed, fills at the open of bar t + 1, and holds until the open of bar
    t + 2, where the next decision fills. Nothing that decision t sees depends on a later bar, with one exception:
    an account that is alive is known not to be ruined at the open of t + 1.

    After a missing minute, a halt or a night, an order fills at the next bar that exists, and a position is
    carried until then, at its borrowing cost. With ``flat_before_close`` m, orders of stocks that fill within m
    minutes of the scheduled close (half days known), or outside the regular session, fill as the order to be in
    cash, whatever the action. The calendar decides this, not the bars that exist.

    ## Start

    Equity 1, in cash. The first episodes begin at all ages, so that later ones do not end together. The symbol is
    drawn with weight sqrt(valid starts), the start uniformly within it: a bar t0 with bars t0 - C to t0 + H + 1
    in one stretch, free of holes and before the holdout.

    ## End

    1. Termination: equity at or below ``ruin_fraction`` at the open of t + 2, or of a perpetual future at or below
       ``maintenance_margin`` of its value. It is closed there, at the costs of that bar. Until the segment
       ends the account stays in cash, rewards are 0 and ``alive`` is False. Equity is never below 1e-6.
    2. Truncation, at the last step of a segment only: ``episode_bars`` are played, or the next segment
       does not fit into the stretch. Bootstrap from the value at token C + H.

    An account whose episode ended starts a new one with the next segment; the others continue one bar after the
    last.
    """

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        seed: int,
        dtype: torch.dtype = torch.float64,
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.compiled = compiled
        self.records_fills = False  # in the trajectories of `play`
        self._observed: Tensor | None = None  # at the next decision, where `play` has computed it
        self.device = torch.device(device)
        self.dtype = dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)
        n, positions = config.num_envs, config.positions
        self._targets = torch.tensor([*positions, 0.0], dtype=dtype, device=self.device)
        # The index of cash; without 0 among the targets, the index after them: nothing is held yet.
        cash_index = positions.index(0.0) if 0.0 in positions else len(positions)
        self._in_cash = torch.full((n,), cash_index, device=self.device)
        self._constants = observation_constants(positions, config.episode_bars, dtype, self.device)

        *amounts, alive = AccountState.fresh(n, dtype, self.device).tensors()
        self._amounts = torch.stack(amounts)
        self._kept = self._account = AccountState.of(self._amounts, alive)
        self._fresh = AccountState.fresh(1, dtype, self.device)
        number = torch.arange(n, device=self.device)
        self._log_start: Tensor | None = None  # (N,) log equity at the start of the episode; None for 0
        self._symbol = torch.zeros_like(number)
        self._cursor = torch.zeros_like(number)  # newest closed bar when the segment began
        # Decisions of this episode while alive. The first episodes begin at all ages, so that later ones do not
        # end together.
        self._played = (number % (config.episode_bars // config.horizon) * config.horizon).to(dtype)
        self._begun = False
        self._over = torch.ones(n, dtype=torch.bool, device=self.device)  # a new episode at the next segment
        self._cost_rate = torch.zeros(n, dtype=dtype, device=self.device)  # fee and slippage
        self.cost_scale = 1.0  # fraction of all costs that is charged; set between segments by a curriculum
        self.last_fill = torch.zeros(4, 1, dtype=dtype, device=self.device)
        self._none = torch.zeros(n, dtype=torch.bool, device=self.device)  # truncated, within a segment
        self._step = config.horizon  # of this segment

        self.statistics = Statistics(positions, cash_index, n, dtype, self.device)
        self._terms: dict[str, bool] = {}
        self._attach(market)

    @property
    def num_account_features(self) -> int:
        """A."""
        return self.config.num_account_features

    @property
    def account(self) -> AccountState:
        """The accounts as they are now."""
        return self._account

    @property
    def alive(self) -> Tensor:
        """(N,) bool: not ruined earlier in this segment."""
        return self._account.alive

    @property
    def cursor(self) -> Tensor:
        """(N,) int64: each account's newest closed bar in the market."""
        return self._cursor if self._step == self.config.horizon else self._cursor + self._step

    @property
    def volatility(self) -> Tensor:
        """(N,) float32: typical log return of one bar of each account's symbol."""
        return self.market.volatility.index_select(0, self._symbol)

    def _prepare(self, terms: dict[str, bool]) -> None:
        # What knows of funding and margin: a market without them has no column and no kernel for them.
        if terms == self._terms:
            return
        self._terms, self.segment = terms, Segment(self.config, self.dtype, self.device, **terms)
        self.statistics.flows = flows = self._amounts.new_zeros(
            4 + terms["has_funding"], self.config.num_envs
        )
        shared = (self._in_cash, self._targets, self._played, flows, self._cost_rate, *self._constants)
        self._compiled_steps = CompiledSteps(self._amounts, self._kept.alive, self.segment, shared)

    def _attach(self, market: Market) -> None:
        require_lengths(market, self.config)
        has_margin = market.has_perpetuals and self.config.maintenance_margin > 0
        terms = {"has_funding": market.has_funding, "has_others": market.others_growth is not None}
        self._prepare(terms | {"has_margin": has_margin})
        self.market = market
        self._cost_rate_of = market.cost_rates(self.config, self.dtype)

    def begin_segment(self) -> Tensor:
        """Return the bars of the next segment, (N, C + H + 1, F) float32.

        Token C + h is the newest closed bar at decision h; token C + H is for the bootstrap value.
        An environment whose episode ended draws a new one; the others continue with the same account.

        Raises:
            RuntimeError: the previous segment was not played to its end.
        """
        self._begin()
        return self.market.windows(
            self._cursor - self.config.context_bars, self.config.context_bars + self.config.horizon + 1
        )

    def restart(self, seed: int | None = None) -> None:
        """End every episode: the next segment draws new ones, from ``seed`` if it is given."""
        self._over.fill_(True)
        self._begun, self._step = True, self.config.horizon
        if seed is not None:
            self.generator.manual_seed(seed)

    def _begin(self) -> None:
        require_played(self._step, self.config.horizon)
        symbol, start = self._places()
        over = self._over
        for kept, fresh in zip(self._kept.tensors(), self._fresh.tensors(), strict=True):
            kept.copy_(torch.where(over, fresh, kept))
        if self._begun:
            self._played.masked_fill_(over, 0)
        self._begun = True
        self._symbol.copy_(torch.where(over, symbol, self._symbol))
        self._cursor.copy_(torch.where(over, start, self._cursor))
        over.zero_()
        cost_rate = self._cost_rate_of.index_select(0, self._symbol)
        self.segment.fill(self.market, self._cursor, cost_rate, self.cost_scale)
        if self.segment.margin is not None:
            is_perpetual = self.market.is_perpetual.index_select(0, self._symbol)
            self.segment.margin.copy_(is_perpetual).mul_(self.config.maintenance_margin)
        torch.mul(cost_rate, self.cost_scale, out=self._cost_rate)
        self.statistics.begin(self.account, self._played)
        self._observed, self._step = None, 0

    def _places(self) -> tuple[Tensor, Tensor]:
        # Symbol and first bar for each account whose episode is over, (N,) int64; the others' are ignored.
        return self.market.draw_starts(self.config.num_envs, self.generator)

    def account_observations(self) -> Tensor:
        """Return the account part of the observation at the current decision, (N, A) float32."""
        if self._observed is not None:
            return self._observed
        close = self.segment.closes[self._step]
        return observe(self.account, close, self._played, self._cost_rate, self._constants, self._log_start)

    @torch.no_grad()
    def play(self, decide: Decide, *inputs: Tensor) -> Trajectory:
        """Play the segment that has begun to its end; in few calls, where it is compiled.

        Args:
            decide: a function of the account observations, (N, A), and of this step's inputs; the first tensor
                that it returns is the actions, (N,) int64. Where ``play`` is compiled, it is too: see ``Decide``.
            inputs: (H, ...) each.

        Raises:
            RuntimeError: no segment has just begun.
        """
        if self._step:
            raise RuntimeError(f"{self._step} steps of the segment are taken: call begin_segment()")
        recorded = 2 + len(self.statistics.flows) if self.records_fills else 0
        if self.compiled:
            played, observed = self._played.clone(), self.account_observations()
            terms = decide, inputs, observed, self._log_start, self.records_fills
            self._observed, columns = self._compiled_steps.play(*terms)
            by_account, log_equity, rewards, *rest = columns
            alive, terminated, truncated = self._finish_compiled(rest[recorded], played)
            observations = by_account.transpose(1, 2)
        else:
            rows = []
            for t in range(self.config.horizon):
                account, observed = self.account, self.account_observations()
                before = observed, self.alive.clone(), account.log_equity.clone()
                held = (account.units.clone(), account.target.clone()) if recorded else ()
                decision = decide(observed, *(values[t] for values in inputs))
                reward, ruined, truncated = self.step(decision[0])
                fill = (*held, *self.last_fill) if recorded else ()
                rows.append((*before, reward, ruined, *fill, *decision))
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            observations, alive, log_equity, rewards, terminated, *rest = columns
        fills, outputs = Fills(*rest[:recorded]) if recorded else None, tuple(rest[recorded:])
        return Trajectory(observations, alive, log_equity, rewards, terminated, truncated, outputs, fills)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill one decision per environment and move to the next bar.

        Args:
            actions: (N,) int64, index of the wanted target position.

        Returns:
            rewards: (N,) float32; terminated: (N,) bool, ruined by this decision; truncated: (N,) bool, the
            episode ends by age or lack of bars, only at the last step of a segment.

        Raises:
            RuntimeError: the segment is over.
        """
        h = self._step
        if h >= self.config.horizon:
            raise RuntimeError(f"all {h} steps of the segment are taken: call begin_segment()")
        self._step += 1
        account, segment = self._account, self.segment
        self._played.add_(account.alive)
        actions = torch.where(account.alive, actions, self._in_cash)
        if segment.allowed is not None:
            actions = torch.where(segment.allowed[h], actions, self._in_cash)
        self._account, fill = advance(
            account,
            self._targets.index_select(0, actions),
            ruin_equity=self.config.ruin_fraction,
            **segment.fills[h],
        )
        segment.helds[h].copy_(actions)
        self.last_fill = flows_of(fill)
        self.statistics.flows.add_(self.last_fill)
        truncated = self._end_segment() if self._step == self.config.horizon else self._none
        return fill.log_return.float(), fill.ruined, truncated

    def _finish_compiled(self, actions: Tensor, played: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Who was alive at each decision and ruined by it, (H, N), follows from how many decisions counted.
        decision = torch.arange(len(actions), device=self.device, dtype=self.dtype)[:, None]
        alive = decision < self._played - played
        terminated = alive & ~torch.cat((alive[1:], self._kept.alive[None]))
        counts = alive if self.segment.allowed is None else alive & self.segment.allowed
        cash = self.statistics.cash_index
        # Cash where an action does not count. Bytes wrap around; a masked fill of them takes twenty times as long.
        self.segment.held.copy_(actions).sub_(cash).mul_(counts).add_(cash)
        self._step = self.config.horizon
        return alive, terminated, self._end_segment()

    def _end_segment(self) -> Tensor:
        # Decides which episodes end here, adds up their statistics, and returns which are truncated.
        # The state moves back to the memory of the segment's begin, which compiled steps use.
        if self._account is not self._kept:
            self._kept.copy_(self._account)
        self._account = account = self._kept
        self._cursor.add_(self.config.horizon)
        truncated = account.alive & self._cut()
        self._over.copy_(truncated | ~account.alive)
        self.statistics.end(account, self._played, self._over, self.segment)
        return truncated

    def _cut(self) -> Tensor:
        # Which episodes end with this segment, by age or for lack of bars.
        return (self._played + self.config.horizon > self.config.episode_bars) | self._does_not_fit()

    def _does_not_fit(self) -> Tensor:
        return self._cursor + self.config.horizon + 1 > self.market.last_bar(self._cursor)

    def episode_statistics(self) -> dict[str, Tensor]:
        """Return sums over whole segments since the last call, float64 scalars on the device, and reset them.

        Sums, so that ranks can be added before dividing: ``decisions`` by living accounts and their ``rewards``;
        of the ``episodes`` that ended, the ``episode_log_returns`` and ``ruins``; ``costs`` (fees and slippage),
        ``borrow_costs``, value ``traded`` and ``funding`` paid less received, in start equities; the sum of
        ``market_rewards``; and the decisions spent ``in_position_<target>``.
        """
        return self.statistics.take()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next segment depends on, as plain types and CPU tensors.

        Bars are stored by symbol and time, so the state fits a refreshed market.

        Raises:
            RuntimeError: a segment is in the middle.
        """
        require_between(self._step, self.config.horizon)
        return {
            "positions": list(self.config.positions),
            "symbols": [self.market.symbols[number] for number in self._symbol.tolist()],
            "open_time": self.market.open_time[self._cursor].cpu(),
            # A split changes past prices; `_place` rescales the units so that they are worth the same.
            "next_open": self.market.quotes[self._cursor + 1, 0].cpu(),
            "account": {f.name: getattr(self.account, f.name).cpu().clone() for f in fields(self.account)},
            "played": self._played.cpu().clone(),
            "over": self._over.cpu().clone(),
            "begun": self._begun,
            "totals": self.statistics.totals.cpu().clone(),
            "time_in": self.statistics.time_in.cpu().clone(),
            "generator": self.generator.get_state().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state_dict`` was taken.

        An environment whose symbol or bar is gone, or that has too few bars left for a segment, starts a new
        episode, as does one beyond the state's number of environments, if that was smaller. The generator resumes
        only on the same kind of device.
        """
        self._place(state)
        self._begun = state["begun"]
        self.statistics.totals[: len(state["totals"])] = state["totals"]  # before there was funding: fewer
        if list(state["positions"]) == list(self.config.positions):
            self.statistics.time_in.copy_(state["time_in"])
        if len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"].cpu())

    def use(self, market: Market) -> None:
        """Switch to a refreshed market with the same accounts; those whose bar is gone start a new episode."""
        state = self.state_dict()
        self._attach(market)
        self._place(state)

    def _place(self, state: Mapping[str, Any]) -> None:
        # Takes over the accounts alone. Runs between segments, so it may wait for the device.
        n, market = min(self.config.num_envs, len(state["symbols"])), self.market
        symbol, cursor, found = market.find(state["symbols"][:n], state["open_time"][:n])
        ratio = state["next_open"][:n].to(self.device) / market.quotes[cursor + 1, 0]
        for field in fields(self.account):
            value, ours = state["account"][field.name][:n].to(self.device), getattr(self.account, field.name)
            if field.name == "units":
                value = value * ratio
            if field.name == "target":
                # Targets are compared by value, so take this environment's own bits, whatever its precision.
                nearest = self._targets[(value[:, None] - self._targets).abs().argmin(1)]
                value = torch.where((nearest - value).abs() < 1e-6, nearest, value.to(self.dtype))
            ours[:n] = value.to(ours.dtype)
        self._symbol[:n], self._cursor[:n] = symbol, cursor
        self._played[:n] = state["played"][:n].to(self.device)
        # Beyond the state, any bar will do until the next draw.
        self._symbol[n:], self._cursor[n:] = 0, 0
        self._over.fill_(True)
        self._over[:n] = state["over"][:n].to(self.device) | ~found
        self._over |= self._does_not_fit()
        self._step = self.config.horizon
