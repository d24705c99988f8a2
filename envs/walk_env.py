"""ExamEnv: accounts that walk over given bars of given symbols in order, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from envs.config import EQUITY_FLOOR, EnvConfig
from envs.market import Market, NoSegment
from envs.trading_env import TradingEnv


class ExamEnv(TradingEnv):
    """One account per place, from its first bar to the newest one, in order, once; nothing is random.

        market = Market.from_bars(bars, device=device, holdout_start_ns=end_of_exam_ns, context_bars=C, horizon=H,
                                  statistics=statistics_of_the_training)
        env = ExamEnv(market, config, device, [("AAPL", start_ns), ("BTCUSDT", start_ns)])
        rollouts = [collect(env, policy, generator, chunk, greedy=True) for _ in range(env.num_segments)]

    It differs from :class:`TradingEnv` as follows:

    - Account n makes its first decision at the first bar of ``places[n]``'s symbol that opens at or after the
      place's time and has C bars before it, which may be older than the time. It continues segment by segment
      while H + 1 more bars follow; up to H bars at the end of a stretch are left over.
    - It is one account throughout: its orders are as large as it has grown, and ruin, a fraction of its first
      equity, is final. Where an episode of ``episode_bars`` ends, only the observations of the episode (its age,
      its gain and its peak) start again, so that the policy sees what it was trained on. Rewards add up to the
      log return of the whole walk.
    - After a hole the account continues in cash, with a new episode. ``truncated`` marks the end of a stretch.
    - An account whose walk is over, or whose symbol has no bar to walk, is not ``alive``: it stays in cash, earns
      0 and counts nowhere.

    ``num_envs`` of the configuration is replaced by the number of places. ``flat_cost_bps`` (one entry per place)
    replaces an account's fees and slippage of all kinds by this cost of traded value; None keeps those of the
    configuration.

    Raises:
        ValueError: a symbol is not in the market, or a flat cost is out of range.
        NoSegment: no place has a segment to walk.
    """

    def __init__(
        self,
        market: Market,
        config: EnvConfig,
        device: torch.device | str,
        places: Sequence[tuple[str, int]],
        dtype: torch.dtype = torch.float64,
        flat_cost_bps: Sequence[float | None] | None = None,
        compiled: bool = False,
    ) -> None:
        config = replace(config, num_envs=max(1, len(places)))
        super().__init__(market, config, device, seed=0, dtype=dtype, compiled=compiled)
        self.records_fills = True
        walk_of = {place: _walk(market, *place) for place in dict.fromkeys(places)}
        self.num_segments = max(map(len, walk_of.values()), default=0)
        if not self.num_segments:
            raise NoSegment(
                f"no place has the {market.horizon + 2} bars of a segment after its start: "
                "take earlier starts, or a market with a shorter horizon"
            )
        # First bar of every segment, -1 for none; (segments + 1, N).
        schedule = torch.full((self.num_segments + 1, len(places)), -1, dtype=torch.int64)
        for number, place in enumerate(places):
            walk = walk_of[place]
            schedule[: len(walk), number] = torch.tensor(walk, dtype=torch.int64)
        self._schedule = schedule.to(self.device)
        numbers = [market.symbols.index(symbol) for symbol, _ in places]
        self._symbols = torch.tensor(numbers, device=self.device)
        config.require_flat_costs(flat_cost_bps or ())
        self._flat: tuple[Tensor, Tensor] | None = None
        if flat_cost_bps is not None:
            where = torch.tensor([cost is not None for cost in flat_cost_bps], device=self.device)
            rates = [(cost or 0.0) / 1e4 for cost in flat_cost_bps]
            self._flat = where, torch.tensor(rates, dtype=dtype, device=self.device)
        self._round = 0
        self._played.zero_()
        self._log_start = self._began_at = torch.zeros_like(self._played)
        self._fresh = self._kept  # after a hole, the same account

    @property
    def schedule(self) -> Tensor:
        """(segments, N) int64: newest closed bar at each segment's first decision, -1 for no segment."""
        return self._schedule[:-1]

    def _begin(self) -> None:
        super()._begin()
        if self._flat is None:
            return
        where, rates = self._flat
        rates = rates * self.cost_scale
        self._cost_rate.copy_(torch.where(where, rates, self._cost_rate))
        self.segment.cost_rate.copy_(torch.where(where, rates, self.segment.cost_rate))
        if self.segment.impact is not None:
            self.segment.impact.masked_fill_(where, 0)

    def _places(self) -> tuple[Tensor, Tensor]:
        if self._round >= self.num_segments:
            raise RuntimeError(f"all {self.num_segments} segments of the exam are played")
        start, account = self._schedule[self._round], self._kept
        out = start < 0
        if self._round:
            out |= ~account.alive
        account.alive.logical_and_(~out)
        over = (start != self._cursor) & ~out
        in_cash = out | over
        account.cash.copy_(torch.where(in_cash, account.log_equity.exp(), account.cash))
        for tensor in (account.units, account.owed, account.target):
            tensor.masked_fill_(in_cash, 0)
        new_episode = over | (self._played + self.config.horizon > self.config.episode_bars)
        self._played.masked_fill_(new_episode, 0)
        # An episode begins at the newest close: the open at which this decision fills is still to come.
        close = self.market.quotes[self._cursor, 1].to(self.dtype)
        marked = (account.cash + account.units * close).clamp_(min=EQUITY_FLOOR).log_()
        begins_at = torch.where(in_cash, account.log_equity, marked)
        for tensor, begins in (
            (self._began_at, new_episode),
            (account.log_peak, new_episode),
            (account.log_at_trade, over),
        ):
            tensor.copy_(torch.where(begins, begins_at, tensor))
        # Accounts that are out still need a bar that exists; any will do.
        self._cursor.masked_fill_(out, self.config.context_bars)
        self._over.copy_(over)
        self._round += 1
        return self._symbols, start

    def _cut(self) -> Tensor:
        return self._schedule[self._round] != self._cursor


def _walk(market: Market, symbol: str, start_ns: int) -> list[int]:
    # First bar of each segment from start_ns on.
    if symbol not in market.symbols:
        raise ValueError(f"{symbol} is not among the {len(market.symbols)} symbols of the market")
    number = market.symbols.index(symbol)
    first, last = market.offsets[number : number + 2].tolist()
    first_bar = first + int((market.open_time[first:last] < start_ns).sum())
    starts: list[int] = []
    for begin, end in zip(market.stretch_first.tolist(), market.stretch_last.tolist(), strict=True):
        if first <= begin < last:
            begin = max(begin + market.context_bars, first_bar)
            starts.extend(range(begin, end - market.horizon, market.horizon))
    return starts
