"""Grid: the bars of all symbols laid out by the minute, so that a window of time has the same minutes in each.

Stocks, and coins with their perpetual futures, have a clock each: the minutes in which any symbol of them has a
bar. A cell is a symbol's newest bar up to a minute of its clock, whether or not that minute brought one. So a bar
that is late or missing moves no other symbol, and what is known at a minute does not depend on what comes after
it.

A clock with fewer symbols than a group has is left out.

Shapes: S = symbols, T = minutes of all clocks, one clock after the other, L = cells, M = spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import DAY_NS
from envs.market import HOLE_NS, Market, NoSegment


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the bars of a market are by the minute. A span is a part of a clock without a hole of all symbols."""

    market: Market
    minutes: Tensor  # (T,) int64, ns UTC
    clock_of: Tensor  # (S,) int64, number of the symbol's clock, -1 where it has none
    clock_first: Tensor  # (S,) int64, first minute of that clock
    row: Tensor  # (S,) int64: cell of minute t is row + t
    cells: Tensor  # (L,) int32, index of a bar; -1 before a symbol's first one
    hole_ns: Tensor  # (S,) int64: a symbol without a bar for longer is gone
    stretch_of: (
        Tensor  # (B,) int32, number of each bar's stretch; of a bar in the holdout, of the last one before it
    )
    clock_cdf: Tensor  # (clocks,) float64, cumulative probability of a new episode
    starts: Tensor  # (clocks,) int64, valid starts of each clock
    starts_before: Tensor  # (clocks,) int64, those of the clocks before it
    span_first: Tensor  # (M,) int64, first minute of each span
    span_last: Tensor  # (M,) int64
    span_clock: Tensor  # (M,) int64
    span_starts_before: Tensor  # (M,) int64, valid starts in all spans before this one

    @staticmethod
    def of(market: Market, size: int) -> Grid:
        """Lay out a market's bars before its holdout, for groups of ``size`` symbols; waits for the device.

        Raises:
            NoSegment: no clock has the minutes of a segment in a row.
            ValueError: no clock has so many symbols.
        """
        offsets, is_crypto, first_of = (
            tensor.cpu().numpy() for tensor in (market.offsets, market.is_crypto, market.stretch_first)
        )
        stretch_of = np.searchsorted(first_of, np.arange(len(market.open_time)), side="right") - 1
        own = _usable_times(market)
        clock_of, clock_first, row = np.full(len(own), -1), *np.zeros((2, len(own)), np.int64)
        minutes, cells, spans, weights = [], [], [], []
        counts: list[np.ndarray] = []  # valid starts of each span, by clock
        num_minutes = num_cells = 0
        for kind, members in _members_of_clocks(market, own).items():
            if len(members) < size:
                continue
            clock = np.unique(np.concatenate([own[number] for number in members]))
            for number in members:
                newest = np.searchsorted(own[number], clock, side="right") - 1
                cells.append(np.where(newest >= 0, newest + offsets[number], -1).astype(np.int32))
                clock_of[number], clock_first[number] = len(counts), num_minutes
                row[number] = num_cells - num_minutes
                num_cells += len(clock)
            holes = np.flatnonzero(np.diff(clock) > HOLE_NS["crypto" if kind else "stock"]) + 1
            edges = np.concatenate([[0], holes, [len(clock)]]) + num_minutes
            spans.append(np.stack([edges[:-1], edges[1:] - 1, np.full(len(edges) - 1, len(counts))]))
            # t0 - C >= first and t0 + H + 1 <= last
            fitting = np.maximum(0, np.diff(edges) - 1 - market.context_bars - market.horizon)
            weights.append(len(members) * np.sqrt(fitting.sum()))
            counts.append(fitting)
            minutes.append(clock)
            num_minutes += len(clock)
        if not counts:
            most = max(map(len, _members_of_clocks(market, own).values()))
            raise ValueError(
                f"a group of {size} symbols must fit into a market, stocks or coins: the largest has {most}; "
                "lower group_size, or ask for more symbols"
            )
        starts = np.array([fitting.sum() for fitting in counts], dtype=np.int64)
        if not starts.sum():
            raise NoSegment(
                f"no market has {market.context_bars + market.horizon + 2} minutes in a row before the holdout: "
                "fetch more bars, or lower context_bars, horizon or holdout_days"
            )
        each, span = np.concatenate(counts), np.concatenate(spans, axis=1)

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(market.device)

        hole_ns = np.where(is_crypto, HOLE_NS["crypto"], HOLE_NS["stock"])
        return Grid(
            market=market,
            minutes=put(np.concatenate(minutes)),
            clock_of=put(clock_of),
            clock_first=put(clock_first),
            row=put(row),
            cells=put(np.concatenate(cells)),
            hole_ns=put(hole_ns.astype(np.int64)),
            stretch_of=put(np.maximum(stretch_of, 0).astype(np.int32)),
            clock_cdf=put(np.cumsum(weights) / np.sum(weights)),
            starts=put(starts),
            starts_before=put(np.cumsum(starts) - starts),
            span_first=put(span[0]),
            span_last=put(span[1]),
            span_clock=put(span[2]),
            span_starts_before=put(np.cumsum(each) - each),
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of what the grid adds to its market."""
        tensors = (value for value in vars(self).values() if isinstance(value, Tensor))
        return sum(tensor.nbytes for tensor in tensors)

    def bars_at(self, symbol: Tensor, minute: Tensor) -> Tensor:
        """Return symbols' newest bars up to minutes of their clock, -1 for none; shapes are broadcast, int64."""
        return self.cells[self.row[symbol] + minute].long()

    def tokens(self, bars: Tensor) -> Tensor:
        """Return the features of bars, (..., F) float32; 0 where there is none, -1."""
        table = self.market.features
        features = torch.empty(*bars.shape, table.shape[1], device=table.device)
        # In parts: the float16 features of all of them would take half as much memory again.
        for part, places in zip(features.split(256), bars.split(256), strict=True):
            part.copy_(table[places.clamp(min=0)]).masked_fill_((places < 0)[..., None], 0)
        return features

    def is_ready(self, symbol: Tensor, minute: Tensor) -> Tensor:
        """Whether symbols can be decided on: C bars in a row up to then, the newest no older than a hole; bool.

        ``minute`` must be of the symbol's clock.
        """
        bar = self.bars_at(symbol, minute)
        known = bar.clamp(min=0)
        first = self.market.stretch_first[self.stretch_of[known].long()]
        is_fresh = self.minutes[minute] - self.market.open_time[known] <= self.hole_ns[symbol]
        return (bar >= 0) & (known - first >= self.market.context_bars) & is_fresh

    def draw_groups(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw windows of time, and a group of symbols for each, without a host sync.

        A clock is drawn with weight (symbols x sqrt(valid starts)), the minute uniformly within it, and the group
        uniformly among the symbols that are ready then; where those are too few, others of the clock fill up.

        Returns:
            symbol: (count, size) int64.
            minute: (count,) int64, of the first decision.
        """
        device = self.market.device
        uniform = torch.rand(2, count, generator=generator, device=device, dtype=torch.float64)
        clock = torch.searchsorted(self.clock_cdf, uniform[0], right=True).clamp_(max=len(self.starts) - 1)
        starts = self.starts[clock]
        number = self.starts_before[clock] + (uniform[1] * starts).long().clamp_(max=starts - 1)
        span = torch.searchsorted(self.span_starts_before, number, right=True) - 1
        minute = self.span_first[span] + self.market.context_bars + number - self.span_starts_before[span]
        lot = torch.rand(count, len(self.row), generator=generator, device=device)
        is_of_clock = self.clock_of == clock[:, None]
        # Any minute of its own clock will do for a symbol of another one.
        symbols = torch.arange(len(self.row), device=device).expand_as(lot)
        own = torch.where(is_of_clock, minute[:, None], self.clock_first)
        is_ready = is_of_clock & self.is_ready(symbols, own)
        lot = lot + is_ready + is_of_clock  # those of another clock last
        return lot.topk(size, dim=1).indices, minute

    def segment_starts(self, minute: Tensor, horizon: int) -> Tensor:
        """Return where the segments of decisions at these minutes begin when laid out by the clock, int64.

        A segment begins every ``horizon`` minutes of the clock from the first one of each UTC day on, or from
        where a span has its context before it.
        """
        span = torch.searchsorted(self.span_first, minute, right=True) - 1
        first = self.span_first[span] + self.market.context_bars
        midnight = self.minutes[minute] // DAY_NS * DAY_NS
        clock_first = self.span_first[torch.searchsorted(self.span_clock, self.span_clock[span])]
        day = _first_at(self.minutes, midnight, clock_first, minute)
        begin = torch.maximum(first, day)
        return minute - (minute - begin) % horizon


def bytes_of_grid(market: Market, size: int) -> int:
    """Return the device memory that a grid of a market will take, but for some numbers per symbol and span."""
    own = _usable_times(market)
    total = 4 * len(market.open_time)
    for members in _members_of_clocks(market, own).values():
        if len(members) >= size:
            clock = np.unique(np.concatenate([own[number] for number in members]))
            total += (8 + 4 * len(members)) * len(clock)
    return total


def _usable_times(market: Market) -> list[np.ndarray]:
    """Return when the bars of each symbol open that lie before the holdout; waits for the device."""
    open_time, offsets, last_of = (
        tensor.cpu().numpy() for tensor in (market.open_time, market.offsets, market.stretch_last)
    )
    # The last bar before the holdout of each symbol, one before its first bar without any.
    ends = np.searchsorted(last_of, offsets[1:], side="left") - 1
    lasts = np.maximum(np.where(ends >= 0, last_of[ends], -1), offsets[:-1] - 1)
    return [open_time[first : last + 1] for first, last in zip(offsets[:-1], lasts, strict=True)]


def _members_of_clocks(market: Market, own: Sequence[np.ndarray]) -> dict[bool, list[int]]:
    """Return the symbols with usable bars by kind: whether they are coins and their futures, or stocks."""
    kinds = market.is_crypto.tolist()
    return {
        kind: [number for number, times in enumerate(own) if len(times) and kinds[number] == kind]
        for kind in (True, False)
    }


def _first_at(minutes: Tensor, time_ns: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the first place in [low, high] whose minute is at or after a time; that of ``high`` is."""
    for _ in range(40):  # halves: more than any clock has
        middle = (low + high) // 2
        is_late = minutes[middle] >= time_ns
        high = torch.where(is_late, middle, high)
        low = torch.where(is_late, low, torch.minimum(middle + 1, high))
    return high
