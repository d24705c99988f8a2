"""TradingEnv: N accounts that trade one shared market, stepped at once on the device.

Shapes: N = environments, C = context bars, H = horizon, F = bar features, A = account features,
K = target positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from envs import env_state
from envs.account import AccountState, advance, observation_constants, observe
from envs.compiled import CompiledSteps, Decide
from envs.config import EnvConfig
from envs.market import Market
from envs.segment import Played, Segment, Statistics


class TradingEnv:
    """N accounts, each on its own symbol and time of one shared market that does not react to them.

    An epoch is one segment: ``bars = env.begin_segment()``, then H times ``env.account_observations()`` and
    ``env.step(actions)``, or ``env.play(decide)`` once. None of these waits for the device, all shapes are fixed
    and memory is used again. ``env.replay(actions)`` is a whole segment in one call. Sizes and rates are fields of
    :class:`EnvConfig`; ``seed`` decides all places, so the same seed gives the same numbers on a device.
    ``compiled`` steps by torch.compile, quicker on a CPU after some ten seconds of compiling.

    ``segment`` holds everything that does not react to the accounts, see :class:`Segment`. ``last_fill``, (4, N),
    holds log_return, traded, costs and borrow_cost of the last ``step``, in start equities. ``account`` has the
    rest, and changes in place where steps are compiled.

    ## Action

    ``(N,)`` int64: the index of the wanted target in ``positions``. A target is a fraction of equity, negative
    to be short, beyond 1 to borrow money. The same target as before trades nothing: units are held, and the
    exposure drifts with the price, until the target changes.

    ## Observation

    The market, ``(N, C + H + 1, F)`` float32 from ``begin_segment()``: token C + h is the bar of decision h, the
    newest one that has closed; see ``docs/features.md``. The policy may use tokens 0 to C + h at decision h.

    The account, ``(N, A)`` float32 from ``account_observations()``, marked at that bar's close:

    | Num   | Observation                                                           | Min | Max |
    |-------|-----------------------------------------------------------------------|-----|-----|
    | 0..K-1| 1 at the target that is held, else 0; all 0 before the first trade    |     |     |
    |       | where 0 is not among the targets                                      | 0   | 1   |
    | K     | 10 x (exposure less its target)                                       | -8  | 8   |
    | K + 1 | 50 x log return of equity since the last trade, its cost included     | -8  | 8   |
    | K + 2 | 10 x log of equity over its peak at earlier fills                     | -8  | 8   |
    | K + 3 | 10 x log of equity over the episode's start                           | -8  | 8   |
    | K + 4 | share of the episode that is left                                     | 0   | 1   |
    | K + 5 | 1,000 x cost rate of a trade (fee + slippage) on this symbol          | 0   | 8   |

    ## Reward

    ``log(E(t+2) / E(t+1))``: equity at the open of bar t + 2 before the next trade, over equity at the open of bar
    t + 1 before this one. So rewards of an episode add up to the log of its final over its first equity.

    ## Costs

    Of the value traded at the open, a trade costs the sum of

    - the fee of its asset class, ``stock_fee_bps`` or ``crypto_fee_bps``, and ``slippage_bps``;
    - ``range_slippage`` times the range, (high - low) / open, of the bar that it fills in;
    - ``volume_slippage`` times the order over the bar's traded value, at most 1. The order is the wanted less the
      held position at the open, before costs, of an account that began with ``account_value``.

    Fee, slippage and range together are limited to ``max_rate`` less ``volume_slippage``. After the trade the
    position is worth exactly ``target`` times the equity that is left. Borrowed shares (short) and borrowed money
    (targets over 1) cost ``borrow_rate`` a year for the time between opens, so a weekend costs more than a minute.
    All of them are multiplied by ``cost_scale``, 1 unless a curriculum sets it between segments.

    ## Timing

    Decision t sees bars up to t, which have closed, fills at the open of bar t + 1, and holds until the open of
    bar t + 2, where the next decision fills. Nothing that decision t sees depends on a later bar, but for
    one thing: that the account is not ruined at the open of t + 1 is known by its being alive.

    Bars are what came: after a missing minute, a halt or a night, the next bar there is fills, and a position is
    carried until then, at its borrowing cost. With ``flat_before_close`` m, orders of stocks that fill within m
    minutes of the scheduled close (half days known), or outside the regular session, fill as the order to
    be in cash, whatever the action; the calendar decides, never which bars came.

    ## Start

    Equity 1, in cash. The first episodes are of all ages, so that later ones do not end together. The symbol is
    drawn with weight sqrt(valid starts), the start uniformly within it: a bar t0 with bars t0 - C to t0 + H + 1
    in one stretch, free of holes and before the holdout.

    ## End

    1. Termination: equity at or below ``ruin_fraction`` at the open of t + 2. The position is closed there, at the
       usual cost. Until the segment ends the account stays in cash, rewards are 0 and ``alive`` is False.
       Equity is never below 1e-6, so rewards are finite.
    2. Truncation, at the last step of a segment only: ``episode_bars`` are played, or the next segment
       does not fit into the stretch. The value at token C + H is the one to bootstrap from.

    Whoever ended starts anew with the next segment; everyone else goes on, one bar after the last.
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
        self._observed: Tensor | None = None  # of the next decision, where the step has computed it
        self.device = torch.device(device)
        self.dtype = dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)
        n, positions = config.num_envs, config.positions
        self._targets = torch.tensor([*positions, 0.0], dtype=dtype, device=self.device)
        # The index of cash; without 0 among the targets one more index stands for "nothing yet".
        cash_index = positions.index(0.0) if 0.0 in positions else len(positions)
        self._in_cash = torch.full((n,), cash_index, device=self.device)
        self._constants = observation_constants(positions, config.episode_bars, dtype, self.device)

        *amounts, alive = AccountState.fresh(n, dtype, self.device).tensors()
        self._amounts = torch.stack(amounts)
        self._kept = self._account = AccountState.of(self._amounts, alive)
        self._fresh = AccountState.fresh(1, dtype, self.device)
        number = torch.arange(n, device=self.device)
        self._symbol = torch.zeros_like(number)
        self._cursor = torch.zeros_like(number)  # newest closed bar when the segment began
        # Decisions of the living in this episode. The first episodes are of all ages, so that later ones do
        # not all end at once.
        self._played = (number % (config.episode_bars // config.horizon) * config.horizon).to(dtype)
        self._begun = False
        self._over = torch.ones(n, dtype=torch.bool, device=self.device)  # draws anew at the next segment
        self._cost_rate = torch.zeros(n, dtype=dtype, device=self.device)  # fee and slippage
        self.cost_scale = 1.0  # share of all costs that is charged; set between segments by a curriculum
        self.segment = Segment(config, dtype, self.device)
        self.last_fill = torch.zeros(4, 1, dtype=dtype, device=self.device)
        self._none = torch.zeros(n, dtype=torch.bool, device=self.device)  # truncated, within a segment
        self._step = config.horizon  # of this segment

        self.statistics = Statistics(positions, cash_index, n, dtype, self.device)
        counted = (self._played, self.statistics.flows, self._cost_rate)
        shared = (self._in_cash, self._targets, *counted, *self._constants)
        rules = {
            "ruin_equity": config.ruin_fraction,
            "with_impact": self.segment.impact is not None,
            "impact_limit": self.segment.impact_limit,
        }
        self._compiled_steps = CompiledSteps(self._amounts, alive, self.segment, shared, rules)
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
        """(N,) float32: typical log return of a bar of the symbol that each account trades."""
        return self.market.volatility.index_select(0, self._symbol)

    def _attach(self, market: Market) -> None:
        ours = (self.config.context_bars, self.config.horizon)
        if (market.context_bars, market.horizon) != ours:
            raise ValueError(
                f"the market must be made for context_bars and horizon {ours}, "
                f"was made for {(market.context_bars, market.horizon)}"
            )
        self.market = market
        stock, crypto = self.config.stock_fee_bps, self.config.crypto_fee_bps
        bps = torch.where(market.is_crypto, crypto, stock).to(self.dtype) + self.config.slippage_bps
        self._cost_rate_of = bps / 1e4

    def begin_segment(self) -> Tensor:
        """Return the bars of the next segment, (N, C + H + 1, F) float32.

        Token C + h is the newest closed bar at decision h; token C + H serves the bootstrap value.
        An environment whose episode ended draws a new one; the others go on with the same account.

        Raises:
            RuntimeError: the segment before was left in the middle.
        """
        self._begin()
        return self.market.windows(
            self._cursor - self.config.context_bars, self.config.context_bars + self.config.horizon + 1
        )

    def restart(self, seed: int | None = None) -> None:
        """Leave every episode: the next segment draws all of them anew, from ``seed`` where it is given."""
        self._over.fill_(True)
        self._begun, self._step = True, self.config.horizon
        if seed is not None:
            self.generator.manual_seed(seed)

    def _begin(self) -> None:
        if 0 < self._step < self.config.horizon:
            raise RuntimeError(
                f"a segment must be played to its end, step {self._step} of {self.config.horizon} was the last"
            )
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
        torch.mul(self._cost_rate_of.index_select(0, self._symbol), self.cost_scale, out=self._cost_rate)
        self.segment.fill(self.market, self._cursor, self._cost_rate, self.cost_scale)
        self.statistics.begin(self.account, self._played)
        self._observed, self._step = None, 0

    def _places(self) -> tuple[Tensor, Tensor]:
        # Symbol and first bar of each account whose episode is over, (N,) int64; the others' do not count.
        return self.market.draw_starts(self.config.num_envs, self.generator)

    def account_observations(self) -> Tensor:
        """Return what each account knows of itself at the current decision, (N, A) float32."""
        if self._observed is not None:
            return self._observed
        close = self.segment.closes[self._step]
        return observe(self.account, close, self._played, self._cost_rate, self._constants)

    @torch.no_grad()
    def play(self, decide: Decide, *given: Tensor) -> Played:
        """Play the segment that has begun to its end; in few calls, where steps are compiled.

        Args:
            decide: a function of the account observations, (N, A), and of what is given at that step, (N, ...);
                the first tensor that it returns are the actions, (N,) int64. Where steps are compiled it is, too:
                tensor operations alone, no numbers that change from call to call, and no look at this object.
            given: (H, N, ...) each.

        Raises:
            RuntimeError: no segment has just begun.
        """
        if self._step:
            raise RuntimeError(f"{self._step} steps of the segment are taken: call begin_segment()")
        if self.compiled:
            before = self._played.clone()
            self._observed, columns = self._compiled_steps.play(decide, given, self.account_observations())
            by_account, log_equity, rewards, *told = columns
            alive, terminated, truncated = self._played_to_the_end(told[0], before)
            known = by_account.transpose(1, 2), alive, log_equity
            return Played(*known, rewards, terminated, truncated, tuple(told))
        rows = []
        for t in range(self.config.horizon):
            known = self.account_observations(), self.alive.clone(), self.account.log_equity.clone()
            decided = decide(known[0], *(each[t] for each in given))
            rewards, terminated, truncated = self.step(decided[0])
            rows.append((*known, rewards, terminated, *decided))
        played = [torch.stack(column) for column in zip(*rows, strict=True)]
        observations, alive, log_equity, rewards, terminated, *told = played
        return Played(observations, alive, log_equity, rewards, terminated, truncated, tuple(told))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill one decision per environment and go to the next bar.

        Args:
            actions: (N,) int64, index of the wanted target position.

        Returns:
            rewards: (N,) float32.
            terminated: (N,) bool, ruined by this decision.
            truncated: (N,) bool, the episode ends here for want of bars; only at the last step of a segment.

        Raises:
            RuntimeError: the segment is over.
        """
        h = self._step
        if h >= self.config.horizon:
            raise RuntimeError(f"all {h} steps of the segment are taken: call begin_segment()")
        self._step += 1
        if self.compiled:
            self.last_fill, ruined, rewards, self._observed = self._compiled_steps.step(actions, h)
        else:
            ruined, rewards = self._fill(actions, h)
        truncated = self._end_segment() if self._step == self.config.horizon else self._none
        return rewards, ruined, truncated

    def _fill(self, actions: Tensor, h: int) -> tuple[Tensor, Tensor]:
        # Returns who is ruined, and the rewards.
        account, segment = self._account, self.segment
        self._played.add_(account.alive)
        actions = torch.where(account.alive, actions, self._in_cash)
        if segment.allowed is not None:
            actions = torch.where(segment.allowed[h], actions, self._in_cash)
        self._account, fill = advance(
            account,
            self._targets.index_select(0, actions),
            price=segment.prices[h],
            next_price=segment.prices[h + 1],
            cost_rate=segment.cost_rates[h],
            borrow=segment.borrows[h],
            ruin_equity=self.config.ruin_fraction,
            impact=None if segment.impacts is None else segment.impacts[h],
            impact_limit=segment.impact_limit,
        )
        segment.helds[h].copy_(actions)
        self.last_fill = torch.stack((fill.log_return, fill.traded, fill.costs, self._account.owed))
        self.statistics.flows.add_(self.last_fill)
        return fill.ruined, fill.log_return.float()

    def replay(self, actions: Tensor, by_compiler: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Play the next segment with given actions in one call; the same as stepping through it.

        Args:
            actions: (H, N) int64.
            by_compiler: with torch.compile, which takes 15 seconds the first time and needs a C++ compiler
                on CPUs; else step by step.

        Returns:
            rewards: (H, N) float32.
            terminated: (H, N) bool.
            truncated: (N,) bool, at the last step.

        Raises:
            ValueError: the actions have another shape.
        """
        shape = (self.config.horizon, self.config.num_envs)
        if actions.shape != shape:
            raise ValueError(
                f"actions must have shape {shape} (horizon, num_envs), was {tuple(actions.shape)}"
            )
        self._begin()
        before = self._played.clone()
        targets = self._targets.index_select(0, actions.reshape(-1)).view(shape)
        if self.segment.allowed is not None:
            targets.masked_fill_(~self.segment.allowed, 0.0)
        rewards = self._compiled_steps.replay(targets, by_compiler)
        _, terminated, truncated = self._played_to_the_end(actions, before)
        return rewards, terminated, truncated

    def _played_to_the_end(self, actions: Tensor, played: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Who was alive at which decision and ruined by which, (H, N), follows from how many decisions counted.
        decision = torch.arange(len(actions), device=self.device, dtype=self.dtype)[:, None]
        alive = decision < self._played - played
        terminated = alive & ~torch.cat((alive[1:], self._kept.alive[None]))
        counts = alive if self.segment.allowed is None else alive & self.segment.allowed
        cash = self.statistics.cash_index
        # Cash where it does not count; bytes wrap around, and a masked fill of them takes twenty times as long.
        self.segment.held.copy_(actions).sub_(cash).mul_(counts).add_(cash)
        self._step = self.config.horizon
        return alive, terminated, self._end_segment()

    def _end_segment(self) -> Tensor:
        # Decides which episodes end here, adds up their statistics, and returns which ones were truncated.
        # The state moves back to where it was at the segment's begin, where compiled steps find it.
        if self._account is not self._kept:
            self._kept.become(self._account)
        self._account = account = self._kept
        config = self.config
        self._cursor.add_(config.horizon)
        truncated = account.alive & self._cut()
        self._over.copy_(truncated | ~account.alive)
        self.statistics.end(account, self._played, self._over, self.segment.held)
        return truncated

    def _cut(self) -> Tensor:
        # Which episodes end with this segment, for age or for want of bars.
        return (self._played + self.config.horizon > self.config.episode_bars) | self._does_not_fit()

    def _does_not_fit(self) -> Tensor:
        return self._cursor + self.config.horizon + 1 > self.market.last_bar(self._cursor)

    def episode_statistics(self) -> dict[str, Tensor]:
        """Return sums over whole segments since the last call, float64 scalars on the device, and start anew.

        Sums, so that ranks may be added before anything is divided: ``decisions`` by living accounts and
        their ``rewards``; of the ``episodes`` that ended, the ``episode_log_returns`` and ``ruins``; ``costs``
        (fees and slippage), ``borrow_costs`` and value ``traded``, in start equities; and the decisions
        spent ``in_position_<target>``.
        """
        return self.statistics.take()

    def bytes_per_environment(self) -> tuple[float, float]:
        """Return what an environment keeps, and what the bars of the segment that it plays take beside it."""
        counted = self.statistics
        kept = [*vars(self).values(), *self._kept.tensors(), *vars(counted).values()]
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in kept
            if torch.is_tensor(tensor) and self.config.num_envs in tensor.shape
        }
        return sum(sizes.values()) / self.config.num_envs, self.segment.nbytes / self.config.num_envs

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next segment depends on, as plain types and CPU tensors.

        Places are told by symbol and time, so the state fits a market that was refreshed since.

        Raises:
            RuntimeError: a segment is in the middle.
        """
        if 0 < self._step < self.config.horizon:
            raise RuntimeError(
                f"the state can be kept between segments only, this is after step {self._step}"
            )
        return env_state.capture(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        An environment whose symbol or bar is gone, or that has no bars left for a segment, starts a new
        episode. So does one beyond the state's number of environments, if that was smaller. A generator's
        state goes on only on the same kind of device.
        """
        env_state.restore(self, state)

    def use(self, market: Market) -> None:
        """Go over to a refreshed market with the same accounts; what is gone from it starts anew."""
        state = self.state_dict()
        self._attach(market)
        env_state.place(self, state)
