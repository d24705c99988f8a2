"""Market: the bars and features of all symbols on the device, and where segments may start.

Shapes: S = symbols, B = bars of all symbols, one symbol after the other, F = features, M = stretches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import DAY_NS, AssetClass, Bars, find_breaks
from data_sources.calendar import minutes_left
from envs.config import EnvConfig
from envs.features import FeatureFunction, FeatureStatistics, chosen_features, compute, panel_of
from envs.panel import Panel
from envs.scales import reward_scales

if TYPE_CHECKING:
    from continuous_training import Settings

NUM_QUOTES = 5  # without funding
HOUR_NS = 3_600_000_000_000
MOST_KEPT_BYTES = 1 << 28  # of float32 features, from measuring to scaling them; more are computed twice
YEAR_NS = 365.25 * 24 * HOUR_NS
# Longer gaps are holes: for a coin an outage; for a stock the longest regular gap is a four-day weekend.
HOLE_NS = {"crypto": HOUR_NS, "stock": 100 * HOUR_NS}


class NoSegment(ValueError):
    """There are nowhere enough bars in a row for a segment."""


@dataclass(frozen=True, eq=False)
class Market:
    """Bars and features, which do not react to the accounts.

    Holes (over 60 minutes for crypto, over 100 hours for stocks) and breaks (see ``find_breaks``) split each
    symbol into stretches, which end before the holdout: a segment's bars t0 - C to t0 + H + 1 lie within one.
    """

    symbols: tuple[str, ...]
    asset_classes: tuple[AssetClass, ...]  # of the symbols
    is_crypto: Tensor  # (S,) bool, no stock: perpetual futures, too
    volatility: Tensor  # (S,) float32, typical log return of one bar in the training range, see scales.py
    offsets: Tensor  # (S + 1,) int64, first bar of each symbol
    breaks: Tensor  # (number of breaks,) int64, bars that no stretch spans
    open_time: Tensor  # (B,) int64, ns UTC
    # (B, 5 or 6) float32: open, close, years until the next bar opens, in which a short position borrows (0 of
    # perpetual futures, which borrow nothing), (high - low) / open, volume in money, and, if any symbol has some,
    # the funding since the bar before, up to and with this one's open
    quotes: Tensor
    minutes_left: Tensor  # (B,) int16, from the bar's open to the scheduled close; see calendar.minutes_left
    features: Tensor  # (B, F) float16; several scales of an ensemble stand side by side
    statistics: FeatureStatistics
    context_bars: int
    horizon: int
    playable: Tensor  # (P,) int64, symbols that have a valid start
    playable_cdf: Tensor  # (P,) float64, cumulative probability of a new episode
    starts_before: Tensor  # (P,) int64, valid starts of the playable symbols before this one
    starts: Tensor  # (P,) int64, valid starts of each playable symbol
    stretch_first: Tensor  # (M,) int64, first bar of each stretch
    stretch_last: Tensor  # (M,) int64, last bar before the next hole or the holdout
    stretch_starts_before: Tensor  # (M,) int64, valid starts in all stretches before this one
    # (B,) float32, mean log growth of the others of its asset class from the bar's open to the next one's; None
    # where nothing is learnt of it
    others_growth: Tensor | None = None

    @staticmethod
    def from_bars(
        bars: Sequence[Bars],
        *,
        device: torch.device | str,
        holdout_start_ns: int,
        context_bars: int,
        horizon: int,
        statistics: FeatureStatistics | None = None,
        features: Mapping[str, FeatureFunction] | None = None,
        panel: Panel | None = None,
        table: Tensor | None = None,
        with_others: bool = False,
    ) -> Market:
        """Move bars to the device and compute their features.

        Args:
            bars: one entry per symbol.
            device: of all tensors.
            holdout_start_ns: no segment touches a bar that opens at or after it.
            context_bars: C.
            horizon: H.
            statistics: from an earlier market of the same training; default: measured on the bars before the
                holdout.
            features: name -> function; default: those of the group "symbol", and one's own.
            panel: has these bars, and perhaps those of more symbols for features to look at; default: these.
            table: their features, normalised with these ``statistics``, (B, F) float16; default: computed here.
            with_others: also compute ``others_growth``.

        Raises:
            NoSegment: no segment fits.
            ValueError: a symbol appears twice, or the statistics are of other features.
        """
        device = torch.device(device)
        functions = chosen_features() if features is None else dict(features)
        symbols = tuple(series.symbol for series in bars)
        if len(set(symbols)) != len(symbols):
            twice = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
            raise ValueError(
                f"each symbol must come once, {', '.join(twice)} came twice: merge its sources first"
            )
        if statistics is not None and statistics.names != tuple(functions):
            raise ValueError(
                f"statistics must be of these features: {', '.join(functions)}; they are of "
                f"{', '.join(statistics.names)}: start a new training, or use the features of the old one"
            )
        offsets = np.concatenate([[0], np.cumsum([len(series) for series in bars])]).astype(np.int64)

        training_bars = bars_before(bars, holdout_start_ns)
        panel = panel_of(bars, device, functions) if panel is None else panel
        if table is None:
            is_kept = statistics is None and 4 * int(offsets[-1]) * len(functions) <= MOST_KEPT_BYTES
            raws: dict[str, Tensor] = {}

            def raw_of(series: Bars) -> Tensor:
                if series.symbol in raws:
                    return raws.pop(series.symbol)
                raw = compute(series, device, functions, panel)
                if is_kept:
                    raws[series.symbol] = raw
                return raw

            if statistics is None:
                statistics = FeatureStatistics.measure(tuple(functions), map(raw_of, bars), training_bars)
            table = torch.empty(int(offsets[-1]), statistics.num_columns, dtype=torch.float16, device=device)
            for first, series in zip(offsets, bars, strict=False):
                table[first : first + len(series)] = statistics.normalise(raw_of(series))
        assert statistics is not None

        is_crypto = np.array([series.asset_class != "stock" for series in bars])

        def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        open_time = np.concatenate([series.open_time for series in bars])
        breaks = np.concatenate(
            [first + find_breaks(series) for first, series in zip(offsets, bars, strict=False)]
        )
        starts = _starts(open_time, offsets, is_crypto, breaks, holdout_start_ns, context_bars, horizon)
        others_growth = None
        if with_others:
            others_growth = torch.cat([panel.growth_between_opens(series) for series in bars])
        return Market(
            symbols=symbols,
            asset_classes=tuple(series.asset_class for series in bars),
            is_crypto=put(is_crypto, torch.bool),
            volatility=put(reward_scales(bars, training_bars), torch.float32),
            offsets=put(offsets, torch.int64),
            breaks=put(breaks, torch.int64),
            open_time=put(open_time, torch.int64),
            quotes=_quotes(bars, device),
            minutes_left=put(np.concatenate([minutes_left(series) for series in bars]), torch.int16),
            features=table.to(device),
            statistics=statistics,
            context_bars=context_bars,
            horizon=horizon,
            **{name: torch.from_numpy(array).to(device) for name, array in starts.items()},
            others_growth=others_growth,
        )

    @staticmethod
    def from_settings(
        bars: Sequence[Bars],
        settings: Settings,
        device: torch.device,
        holdout_start_ns: int,
        statistics: FeatureStatistics | None = None,
        panel: Panel | None = None,
        table: Tensor | None = None,
    ) -> Market:
        """Call ``from_bars`` with the features, the context, the horizon and the reward of the settings."""
        return Market.from_bars(
            bars,
            device=device,
            holdout_start_ns=holdout_start_ns,
            context_bars=settings.context_bars,
            horizon=settings.horizon,
            statistics=statistics,
            features=chosen_features(settings.features),
            panel=panel,
            table=table,
            with_others=settings.reward == "less market",
        )

    def until(self, end_ns: int) -> Market:
        """Return the same market with another holdout: no segment touches a bar that opens at or after ``end_ns``.

        For exams: the market of a training ends before the held-out bars, this one after them. All tensors but
        those of where segments may start are shared, not copied. Waits for the device.

        Raises:
            NoSegment: no segment fits.
        """
        tensors = (self.open_time, self.offsets, self.is_crypto, self.breaks)
        open_time, offsets, is_crypto, breaks = (tensor.cpu().numpy() for tensor in tensors)
        starts = _starts(open_time, offsets, is_crypto, breaks, end_ns, self.context_bars, self.horizon)
        moved: dict[str, Any] = {
            name: torch.from_numpy(array).to(self.device) for name, array in starts.items()
        }
        return replace(self, **moved)

    @property
    def num_bytes(self) -> int:
        """Device memory of all tensors but ``is_perpetual``, which is made when it is first asked for."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    @cached_property
    def is_perpetual(self) -> Tensor:
        """(S,) bool: perpetual futures."""
        return torch.tensor([kind == "perpetual" for kind in self.asset_classes], device=self.device)

    @property
    def has_perpetuals(self) -> bool:
        """Whether any symbol is a perpetual future."""
        return "perpetual" in self.asset_classes

    @property
    def has_funding(self) -> bool:
        """Whether any symbol's holders pay funding."""
        return self.quotes.shape[1] > NUM_QUOTES

    @property
    def num_features(self) -> int:
        """F."""
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.features.device

    def cost_rates(self, config: EnvConfig, dtype: torch.dtype) -> Tensor:
        """Return each symbol's fee and slippage as a fraction of traded value, (S,)."""
        fee_bps = torch.where(self.is_crypto, config.crypto_fee_bps, config.stock_fee_bps)
        fee_bps.masked_fill_(self.is_perpetual, config.perpetual_fee_bps)
        return (fee_bps.to(dtype) + config.slippage_bps) / 1e4

    def windows(self, first: Tensor, length: int) -> Tensor:
        """Return the features of ``length`` bars from each ``first`` bar on, (n, length, F) float32."""
        shape = len(first), length, self.num_features
        bars = torch.empty(shape, device=self.device)
        # In parts: the float16 windows of all of them would take half as much memory again.
        for part, starts in zip(bars.split(256), first.split(256), strict=True):
            part.copy_(_windows(self.features, starts, length))
        return bars

    def quote_windows(self, first: Tensor, length: int) -> Tensor:
        """Return the quotes of ``length`` bars from each ``first`` bar on, (n, length, 5 or 6) float32."""
        return _windows(self.quotes, first, length)

    def others_windows(self, first: Tensor, length: int) -> Tensor:
        """Return ``others_growth`` of ``length`` bars from each ``first`` bar on, (n, length) float32."""
        assert self.others_growth is not None
        return _windows(self.others_growth[:, None], first, length).squeeze(2)

    def draw_starts(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw symbols with weight sqrt(valid starts), and a valid start of each, without a host sync.

        Returns:
            symbol: (count,) int64.
            start: (count,) int64, the bar t0 of the first decision.
        """
        uniform = torch.rand(2, count, generator=generator, device=self.device, dtype=torch.float64)
        place = torch.searchsorted(self.playable_cdf, uniform[0], right=True).clamp_(
            max=len(self.playable) - 1
        )
        starts = self.starts[place]
        within = (uniform[1] * starts).long().clamp_(max=starts - 1)
        number = self.starts_before[place] + within
        stretch = torch.searchsorted(self.stretch_starts_before, number, right=True) - 1
        start = self.stretch_first[stretch] + self.context_bars + number - self.stretch_starts_before[stretch]
        return self.playable[place], start

    def segment_starts(self, number: int, bars: Tensor, horizon: int) -> Tensor:
        """Return where the segments of one symbol's bars begin when they are laid out by the clock, (n,) int64.

        A segment begins every ``horizon`` bars from the first bar of each UTC day on, or of a stretch that has its
        context before it. So exams and live decisions see a bar in the same segment, wherever a walk begins and
        however many older bars are known. A result beyond its bar means that the context is not full yet.

        Args:
            number: of the symbol.
            bars: (n,) int64, bars of this symbol outside the holdout.
            horizon: H.
        """
        first, last = self.offsets[number : number + 2].tolist()
        midnight = self.open_time[bars] // DAY_NS * DAY_NS
        first_of_day = first + torch.searchsorted(self.open_time[first:last], midnight)
        stretch = torch.searchsorted(self.stretch_first, bars, right=True) - 1
        begin = torch.maximum(self.stretch_first[stretch] + self.context_bars, first_of_day)
        return torch.where(begin > bars, begin, bars - (bars - begin) % horizon)

    def last_bar(self, bar: Tensor) -> Tensor:
        """Return the last bar of each bar's stretch, (n,) int64; for a bar in the holdout, one before it."""
        return self.stretch_last[torch.searchsorted(self.stretch_first, bar, right=True) - 1]

    def find(self, symbols: Sequence[str], open_times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up bars by symbol and open time; waits for the device.

        Args:
            symbols: n names.
            open_times: (n,) int64.

        Returns:
            symbol: (n,) int64; 0 where not found.
            bar: (n,) int64, index of the bar; 0 where not found.
            found: (n,) bool, the bar exists, and its stretch has its context before it and a bar after it.
        """
        number_of = {name: number for number, name in enumerate(self.symbols)}
        numbers = torch.tensor([number_of.get(name, -1) for name in symbols], dtype=torch.int64).reshape(-1)
        bar = torch.zeros(len(numbers), dtype=torch.int64, device=self.device)
        found = torch.zeros(len(numbers), dtype=torch.bool, device=self.device)
        numbers, open_times = numbers.to(self.device), open_times.to(self.device)
        bounds = self.offsets.tolist()
        for number in sorted(set(numbers.tolist()) - {-1}):
            times = self.open_time[bounds[number] : bounds[number + 1]]
            place = torch.searchsorted(times, open_times).clamp_(max=len(times) - 1)
            here = (numbers == number) & (times[place] == open_times)
            bar = torch.where(here, place + bounds[number], bar)
            found |= here
        stretch = torch.searchsorted(self.stretch_first, bar, right=True) - 1
        found &= (self.stretch_last[stretch] > bar) & (self.stretch_first[stretch] <= bar - self.context_bars)
        bar = torch.where(found, bar, 0)
        return torch.where(found, numbers, 0), bar, found


def _windows(table: Tensor, first: Tensor, length: int) -> Tensor:
    # Overlapping views of the table: each window is copied as one row, whatever the table's length.
    width = table.shape[1]
    views = table.as_strided((len(table) - length + 1, length * width), (width, 1))
    return views.index_select(0, first).view(len(first), length, width)


def _quotes(bars: Sequence[Bars], device: torch.device) -> Tensor:
    """Return the quotes of all bars, (B, 5 or 6) float32, with float64 of one symbol at a time."""
    has_funding = any(series.funding is not None and series.funding.any() for series in bars)
    quotes = torch.empty(sum(map(len, bars)), NUM_QUOTES + has_funding, device=device)
    for part, series in zip(quotes.split([len(series) for series in bars]), bars, strict=True):
        steps = np.diff(series.open_time, append=series.open_time[-1:]) * (series.asset_class != "perpetual")
        columns = [
            series.open,
            series.close,
            steps / YEAR_NS,
            (series.high - series.low) / series.open,
            series.volume * series.open,
        ]
        if has_funding:
            columns.append(np.zeros(len(series)) if series.funding is None else series.funding)
        values = np.empty((len(series), len(columns)), np.float32)
        for number, column in enumerate(columns):
            values[:, number] = column
        part.copy_(torch.from_numpy(values))
    return quotes


def bars_before(bars: Sequence[Bars], end_ns: int) -> list[int]:
    """Return how many bars of each symbol open before ``end_ns``."""
    return [int(np.searchsorted(series.open_time, end_ns)) for series in bars]


def _starts(
    open_time: np.ndarray,
    offsets: np.ndarray,
    is_crypto: np.ndarray,
    breaks: np.ndarray,
    end_ns: int,
    context_bars: int,
    horizon: int,
) -> dict[str, np.ndarray]:
    # The fields of Market for where a segment may start.
    symbol, first, last = _stretches(open_time, offsets, is_crypto, breaks, end_ns)
    # t0 - C >= first and t0 + H + 1 <= last
    count = np.maximum(0, last - first - context_bars - horizon)
    if not count.sum():
        raise NoSegment(
            f"no symbol has {context_bars + horizon + 2} bars in a row before the holdout: "
            "fetch more bars, or lower context_bars, horizon or holdout_days"
        )
    per_symbol = np.bincount(symbol, weights=count).astype(np.int64)
    playable = np.flatnonzero(per_symbol)
    num_starts = per_symbol[playable]
    weight = np.sqrt(num_starts)
    return {
        "playable": playable,
        "playable_cdf": np.cumsum(weight) / weight.sum(),
        "starts_before": np.cumsum(num_starts) - num_starts,
        "starts": num_starts,
        "stretch_first": first,
        "stretch_last": last,
        "stretch_starts_before": np.cumsum(count) - count,
    }


def _stretches(
    open_time: np.ndarray, offsets: np.ndarray, is_crypto: np.ndarray, breaks: np.ndarray, end_ns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Returns symbol, first and last bar of every stretch, (M,) each, in the order of the bars.
    parts = [np.empty((3, 0), dtype=np.int64)]
    for number, offset in enumerate(offsets[:-1]):
        times = open_time[offset : offsets[number + 1]]
        times = times[: np.searchsorted(times, end_ns)]
        if not len(times):
            continue
        hole_ns = HOLE_NS["crypto" if is_crypto[number] else "stock"]
        own = breaks[(breaks > offset) & (breaks < offset + len(times))] - offset
        first = np.union1d(np.append(0, np.flatnonzero(np.diff(times) > hole_ns) + 1), own)
        last = np.concatenate([first[1:], [len(times)]]) - 1
        parts.append(np.stack([np.full_like(first, number), offset + first, offset + last]))
    symbol, first, last = np.concatenate(parts, axis=1)
    return symbol, first, last
