"""Panel: a market's symbols by the minute, so that a feature may look at all of them at once.

A minute's sums are taken symbol by symbol in the order of their names, and an index of returns is a sum of whole
numbers. So what is known of a minute follows to the bit from the bars up to it: it stays the same when later bars
of any symbol come, change or go, when a symbol is listed later, and when older bars are trimmed.

Shapes: T = minutes with a bar of any member of an asset class, and one before all of them, where nothing is known;
S = its members, B = bars of one symbol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import MINUTE_NS, Bars, find_breaks
from envs.feature_errors import FeatureError, evaluate
from envs.history import LARGEST_RAW, WARM_UP_BARS, History
from envs.rolling import lagged, rolling_means

# A bar that is older says nothing of a minute: quiet minutes have none, a vendor takes seconds, a halt longer.
MOST_AGE_NS = 5 * MINUTE_NS
WEIGHT_BARS = 1_440  # whose mean traded value is the weight of a symbol
STEP = 2.0**-40  # of an index of log returns: whole numbers of it add up without rounding
LARGEST_MOVE = 2.0**10  # in one minute
BEFORE_NS, AFTER_NS = -(2**62), 2**62  # all bars
BETA_BARS = 1_440
OUTLIER = 8.0  # volatilities: larger moves of a bar count as so much in a beta
PRIOR = 0.05  # of the symbol's own variance: what the others must move by so that its beta is known
GRID_VALUES = 1 << 22  # of minutes x symbols at once: bounds the memory of ranks
# By market; the first name that is there counts, in its spellings: BTCUSDT, X:BTC-USD, BTCUSDT.P.
LEADERS = {"stock": ("SPY", "QQQ"), "crypto": ("BTC", "ETH")}
_COIN = r"(?:X:)?{}[-/]?(?:USDT?|USDC|FDUSD|BUSD|EUR)(?:\.P)?"


class Panel:
    """All symbols of a market; nothing is computed before a feature asks for it.

    Args:
        bars: one series per symbol.
        device: of all tensors.
        functions: every feature by name, of which ``Peers`` sums up some.
        members: the symbols that count for others, those of the training; None: all.
    """

    def __init__(
        self,
        bars: Sequence[Bars],
        device: torch.device | str,
        functions: Mapping[str, Callable[[History], Tensor]],
        members: Collection[str] | None = None,
    ) -> None:
        self.is_used = False  # whether a feature has looked at other symbols
        self._device, self._functions = torch.device(device), functions
        counted = [series for series in bars if len(series) and (members is None or series.symbol in members)]
        self._members = sorted(counted, key=lambda series: series.symbol)
        self._classes: dict[str, _Class] = {}
        self._leaders: dict[str, list[_Leader | None]] = {}

    def histories(self, bars: Bars) -> Iterator[tuple[int, int, History]]:
        """Yield the first bar, the end and the history of each part of a symbol between two breaks."""
        symbol = _Symbol(self, bars)
        for first, end in _parts(bars):
            history = History(bars.rows(first, end), self._device)
            history.join(Peers(symbol, history, first))
            yield first, end, history
            history.join(None)  # a circle would keep gigabytes until Python's collector comes

    def growth_between_opens(self, bars: Bars) -> Tensor:
        """Return the mean log growth of the others from each bar's open to the next one's, (B,) float32.

        By bars that have closed at either open. The last bar has none, nor have bars without others that count.
        """
        symbol = _Symbol(self, bars)
        just_before = symbol.members.times(bars) - MINUTE_NS
        return symbol.growth_after(just_before)

    def class_of(self, asset_class: str) -> _Class:
        """Return the members of an asset class."""
        self.is_used = True
        if asset_class not in self._classes:
            members = [series for series in self._members if series.asset_class == asset_class]
            self._classes[asset_class] = _Class(members, self._device, self._functions)
        return self._classes[asset_class]

    def leader(self, asset_class: str, number: int) -> _Leader | None:
        """Return the first or second leader (number 0 or 1) of a class, None where it is not a member.

        Coins and their perpetual futures have the same ones: that of the own class, or else of the other one.
        """
        self.is_used = True
        if asset_class not in self._leaders:
            market = "stock" if asset_class == "stock" else "crypto"
            own_first = sorted(self._members, key=lambda series: series.asset_class != asset_class)
            same = [series for series in own_first if (series.asset_class == "stock") == (market == "stock")]
            found: list[_Leader | None] = []
            for name in LEADERS[market]:
                pattern = re.compile(name if market == "stock" else _COIN.format(name))
                match = next((series for series in same if pattern.fullmatch(series.symbol)), None)
                found.append(_Leader(match, self._device) if match else None)
            self._leaders[asset_class] = found
        return self._leaders[asset_class][number]


class Peers:
    """The other symbols of its asset class, as known when each bar of a symbol has closed; (B,) float32 each.

    A symbol counts for a minute if its newest bar up to then is at most five minutes old and not among the first
    15 of its history; its price counts as unchanged until its next bar. So a bar that is late, missing or halted
    shifts no other symbol. Where no other symbol counts, everything is 0.
    """

    def __init__(self, symbol: _Symbol, history: History, first: int) -> None:
        self._symbol, self._history = symbol, history
        self._rows = slice(first, first + len(history))

    def log_return(self, bars: int, weighted: bool = False) -> Tensor:
        """Mean log return of the others while this symbol had its last ``bars`` bars.

        ``weighted``: by the traded value of their last 1,440 bars.
        """
        return self._change(self._symbol.levels[int(weighted)][self._rows], bars)

    def leader_log_return(self, number: int, bars: int) -> Tensor:
        """Log return of a leader in that time: BTC or SPY (number 0), ETH or QQQ (1); 0 if it is this symbol."""
        bars_of = self._symbol.bars
        leader = self._symbol.panel.leader(bars_of.asset_class, number)
        if leader is None or leader.symbol == bars_of.symbol:
            return torch.zeros_like(self._history.log_range)
        return self._change(self._symbol.levels_of(leader)[self._rows], bars)

    def mean(self, name: str) -> Tensor:
        """Mean of a feature over the others."""
        return self._mean(name, 0, self._own(name))

    def share_up(self, name: str) -> Tensor:
        """Share of the others whose feature is above 0 less the share below: -1 to 1."""
        return self._mean(name, 1, self._own(name).sign())

    def spread(self, name: str) -> Tensor:
        """Return the standard deviation of a feature over all symbols that count, this one included."""
        place = self._symbol.members.fresh_places(self._history.open_time)
        total, _, squares, count = (column[place] for column in self._symbol.members.sums(name))
        mean = total / count.clamp(min=1)
        return (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt().float()

    def rank(self, name: str) -> Tensor:
        """Share of the others with a lower value of a feature less the share with a higher one: -1 to 1."""
        return self._symbol.members.ranks(name, self._symbol.bars)[self._rows].float()

    @property
    def beta(self) -> Tensor:
        """Slope of its returns on those of the others, over 1,440 bars; drawn towards 1 where they hardly move."""
        return self._beta.clone()

    @cached_property
    def _beta(self) -> Tensor:
        limit = OUTLIER * self._history.volatility(240)
        own, others = (
            move.clamp(-limit, limit) for move in (self._history.log_return(1), self.log_return(1))
        )
        common, square = (
            rolling_means(product.double(), [BETA_BARS])[BETA_BARS]
            for product in (own * others, others.square())
        )
        prior = PRIOR * self._history.volatility(BETA_BARS).double().square()
        return ((common + prior) / (square + prior)).float()

    def _own(self, name: str) -> Tensor:
        return self._symbol.members.evaluate(name, self._history).double()

    def _mean(self, name: str, column: int, own: Tensor) -> Tensor:
        sums = self._symbol.members.sums(name)
        place = self._symbol.members.fresh_places(self._history.open_time)
        total, count = sums[column][place], sums[3][place]
        if self._symbol.is_member:
            counts = torch.arange(len(own), device=own.device) >= WARM_UP_BARS
            total, count = total - torch.where(counts, own, 0.0), count - counts.double()
        return torch.where(count > 0, total / count.clamp(min=1), 0.0).float()

    def _change(self, level: Tensor, bars: int) -> Tensor:
        change = (level - lagged(level, bars)).double() * STEP
        change[:bars] = 0.0
        return change.float()


class _Symbol:
    """What the features of one symbol share of the panel."""

    def __init__(self, panel: Panel, bars: Bars) -> None:
        self.panel, self.bars = panel, bars
        self._leader_levels: dict[str, Tensor] = {}

    @property
    def members(self) -> _Class:
        return self.panel.class_of(self.bars.asset_class)

    def levels_of(self, leader: _Leader) -> Tensor:
        """Return a leader's index at its bars, (B,) int64."""
        if leader.symbol not in self._leader_levels:
            self._leader_levels[leader.symbol] = leader.levels_at(self.members.times(self.bars))
        return self._leader_levels[leader.symbol]

    @cached_property
    def is_member(self) -> bool:
        """Whether it counts for others.

        Raises:
            FeatureError: it does, with other bars than these.
        """
        known = self.members.find(self.bars.symbol)
        if known is not None and not np.array_equal(known.open_time, self.bars.open_time):
            raise FeatureError(f"{self.bars.symbol} must have the same bars in the panel as here")
        return known is not None

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """The index of the others, equally weighted and by traded value, at its bars: (B,) int64 each."""
        equal, by_value = self._levels_at(self.members.times(self.bars))
        return equal, by_value

    def growth_after(self, times: Tensor) -> Tensor:
        """Return the change of the equally weighted index from each of these times to the next, (n,) float32."""
        level, _ = self._levels_at(times)
        return (torch.diff(level, append=level[-1:]).double() * STEP).float()

    def _levels_at(self, times: Tensor) -> list[Tensor]:
        members = self.members
        moves, weighted_moves, weights, count = members.moves
        if self.is_member:
            own = members.moves_of(self.bars)
            moves, weighted_moves, weights, count = (
                all_ - mine for all_, mine in zip(members.moves, own, strict=True)
            )
        zero = torch.zeros_like(moves)
        mean = torch.where(count > 0, moves / count.clamp(min=1), zero)
        has_weight = (count > 0) & (weights > 0)
        weighted = torch.where(has_weight, weighted_moves / torch.where(has_weight, weights, 1.0), zero)
        place = members.places(times)
        return [_whole_steps(each).cumsum(0)[place] for each in (mean, weighted)]


class _Class:
    """The members of an asset class by the minute."""

    def __init__(
        self,
        members: Sequence[Bars],
        device: torch.device,
        functions: Mapping[str, Callable[[History], Tensor]],
    ) -> None:
        self._members, self._device, self._functions = members, device, functions
        self._first_ns = min((int(series.open_time[0]) for series in members), default=0)
        last_ns = max((int(series.open_time[-1]) for series in members), default=0)
        has_bar = torch.zeros((last_ns - self._first_ns) // MINUTE_NS + 1, dtype=torch.bool, device=device)
        for series in members:
            has_bar[(self.times(series) - self._first_ns) // MINUTE_NS] = True
        # Every minute from the first bar to the last -> the place of the newest minute with a bar.
        self._place_of = has_bar.cumsum(0, dtype=torch.int32)
        minutes = has_bar.nonzero().squeeze(1) * MINUTE_NS + self._first_ns
        self.minutes = torch.cat([minutes.new_full((1,), BEFORE_NS), minutes])  # (T,) int64, ns
        self._sums: dict[str, tuple[Tensor, ...]] = {}
        self._ranks: dict[str, dict[str, Tensor]] = {}

    def find(self, symbol: str) -> Bars | None:
        """Return the bars of a member, None of another symbol."""
        return next((series for series in self._members if series.symbol == symbol), None)

    def places(self, times: Tensor) -> Tensor:
        """Return the place of the newest minute up to each time, 0 before the first: (n,) int64."""
        minute = (times - self._first_ns) // MINUTE_NS
        place = self._place_of[minute.clamp(0, len(self._place_of) - 1)].long()
        return torch.where(minute < 0, 0, place)

    def fresh_places(self, times: Tensor) -> Tensor:
        """Return the same, 0 where that minute is too old to say anything."""
        place = self.places(times)
        return torch.where(times - self.minutes[place] <= MOST_AGE_NS, place, 0)

    @cached_property
    def moves(self) -> tuple[Tensor, ...]:
        """Sums over all members, (T,) float64 each: see ``moves_of``."""
        return self._add_up(map(self.moves_of, self._members))

    def moves_of(self, series: Bars) -> tuple[Tensor, ...]:
        """Return a member's log return, that times its weight, its weight, and whether it counts; (T,) float64.

        A return stands at the minute of its bar, weight and count also at the minutes after it.
        """
        returns, weights = torch.empty(2, len(series), dtype=torch.float64, device=self._device)
        for first, end in _parts(series):
            history = History(series.rows(first, end), self._device)
            change = history.log_close - lagged(history.log_close, 1)
            change[:WARM_UP_BARS] = 0.0
            returns[first:end] = change
            value = history.volume * history.close
            weights[first:end] = rolling_means(value, [WEIGHT_BARS])[WEIGHT_BARS]
        last, counts = self._newest(series, 0, len(self.minutes))
        place = self.places(self.times(series))
        zero = torch.zeros(len(self.minutes), dtype=torch.float64, device=self._device)
        at_minute = (zero.index_add(0, place, each) for each in (returns, returns * weights))
        weight = torch.where(counts, weights[last], zero)
        return (*at_minute, weight, counts.double())

    def sums(self, name: str) -> tuple[Tensor, ...]:
        """Return the sums of a feature, of its signs, of its squares and of members that count; (T,) float64."""
        if name not in self._sums:
            self._sums[name] = self._add_up(self._sums_of(name, series) for series in self._members)
        return self._sums[name]

    def _sums_of(self, name: str, series: Bars) -> tuple[Tensor, ...]:
        last, counts = self._newest(series, 0, len(self.minutes))
        zero = torch.zeros(len(self.minutes), dtype=torch.float64, device=self._device)
        value = torch.where(counts, self._values(name, series)[last].double(), zero)
        return value, value.sign(), value.square(), counts.double()

    def ranks(self, name: str, bars: Bars) -> Tensor:
        """Return the rank of a symbol's feature at each of its bars, (B,) float16: see ``Peers.rank``."""
        if name not in self._ranks:
            self._ranks[name] = self._rank_members(name)
        if bars.symbol not in self._ranks[name]:
            self._ranks[name] |= self._rank_members(name, bars)
        return self._ranks[name][bars.symbol]

    def _rank_members(self, name: str, other: Bars | None = None) -> dict[str, Tensor]:
        """Rank the members among each other, or ``other``, which is none, among them; minutes in parts."""
        values = [self._values(name, series) for series in self._members]
        ranked = [other] if other else list(self._members)
        own = [self._values(name, other)] if other else values
        result = {
            series.symbol: torch.zeros(len(series), dtype=torch.float16, device=self._device)
            for series in ranked
        }
        step = max(1, GRID_VALUES // max(1, len(values)))
        for first in range(0, len(self.minutes), step):
            end = min(first + step, len(self.minutes))
            grid = torch.full((end - first, len(values)), torch.inf, device=self._device)
            for column, series in enumerate(self._members):
                last, counts = self._newest(series, first, end)
                grid[:, column] = torch.where(counts, values[column][last], torch.inf)
            count = grid.isfinite().sum(1, keepdim=True)
            ordered = grid.sort(1).values
            shares = None if other else _shares(ordered, grid, count, count - 1)
            for column, series in enumerate(ranked):
                begin, stop = self._bars_between(series, first, end)
                row = self.places(self.times(series)[begin:stop]) - first
                if shares is not None:
                    result[series.symbol][begin:stop] = shares[row, column]
                    continue
                is_fresh = self.fresh_places(self.times(series)[begin:stop]) > 0
                value = torch.where(is_fresh, own[column][begin:stop], torch.inf)[:, None]
                share = _shares(ordered[row], value, count[row], count[row])
                result[series.symbol][begin:stop] = share.squeeze(1)
        return result

    def evaluate(self, name: str, history: History) -> Tensor:
        """Return a feature as a column has it, (B,) float32, never NaN or infinite."""
        if name not in self._functions:
            raise FeatureError(f"peers have no feature {name}: name one of docs/features.md or of your own")
        values = evaluate(name, self._functions[name], history, len(history)).float()
        return values.nan_to_num(0.0, 0.0, 0.0).clamp_(-LARGEST_RAW, LARGEST_RAW)

    def _values(self, name: str, series: Bars) -> Tensor:
        values = torch.empty(len(series), device=self._device)
        for first, end in _parts(series):
            values[first:end] = self.evaluate(name, History(series.rows(first, end), self._device))
        return values

    def _newest(self, series: Bars, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return a member's newest bar up to each of the minutes, and whether it counts there; (minutes,) each."""
        begin, stop = self._bars_between(series, first, end)
        times = self.times(series)
        has_bar = torch.zeros(end - first, dtype=torch.int64, device=self._device)
        has_bar[self.places(times[begin:stop]) - first] = 1
        last = has_bar.cumsum(0).add_(begin - 1)
        is_old = torch.zeros(len(series), dtype=torch.bool, device=self._device)
        for start, _ in _parts(series):
            is_old[start : start + WARM_UP_BARS] = True
        known = last.clamp(min=0)
        is_fresh = self.minutes[first:end] - times[known] <= MOST_AGE_NS
        return known, (last >= 0) & is_fresh & ~is_old[known]

    def _bars_between(self, series: Bars, first: int, end: int) -> tuple[int, int]:
        following = int(self.minutes[end]) if end < len(self.minutes) else AFTER_NS
        edges = (int(self.minutes[first]), following)
        begin, stop = np.searchsorted(series.open_time, edges).tolist()
        return begin, stop

    def times(self, series: Bars) -> Tensor:
        """Return the open times of bars on the device, (B,) int64."""
        return torch.from_numpy(np.ascontiguousarray(series.open_time)).to(self._device)

    def _add_up(self, parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        total = torch.zeros(4, len(self.minutes), dtype=torch.float64, device=self._device)
        for part in parts:
            for row, values in zip(total, part, strict=True):
                row += values
        return tuple(total)


class _Leader:
    """A leader's own index of log returns."""

    def __init__(self, bars: Bars, device: torch.device) -> None:
        self.symbol = bars.symbol
        self._times = torch.from_numpy(np.ascontiguousarray(bars.open_time)).to(device)
        moves = torch.zeros(len(bars), dtype=torch.float64, device=device)
        for first, end in _parts(bars):
            log_close = History(bars.rows(first, end), device).log_close
            moves[first + 1 : end] = log_close[1:] - log_close[:-1]
        self._levels = torch.cat([moves.new_zeros(1, dtype=torch.int64), _whole_steps(moves).cumsum(0)])

    def levels_at(self, times: Tensor) -> Tensor:
        """Return the index at its newest bar up to each time, (n,) int64; 0 before the first."""
        return self._levels[torch.searchsorted(self._times, times, right=True)]


def _parts(bars: Bars) -> Iterator[tuple[int, int]]:
    return pairwise([0, *find_breaks(bars).tolist(), len(bars)])


def _whole_steps(moves: Tensor) -> Tensor:
    return moves.clamp(-LARGEST_MOVE, LARGEST_MOVE).div(STEP).round().long()


def _shares(ordered: Tensor, values: Tensor, count: Tensor, others: Tensor) -> Tensor:
    """Return the share of ``others`` below each value less that above; 0 of what does not count, or has none."""
    below = torch.searchsorted(ordered, values.contiguous())
    above = count - torch.searchsorted(ordered, values.contiguous(), right=True)
    shares = (below - above) / others.clamp(min=1)
    return torch.where((others > 0) & values.isfinite(), shares, 0.0).half()
