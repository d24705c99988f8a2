"""From the lake to one series per symbol: merged, split-adjusted, cut to the session, and summed up in a row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from data_sources import renames
from data_sources.bars import DAY_NS, HOUR_NS, AssetClass, Bars, find_breaks, join_columns
from data_sources.calendar import in_regular_session, new_york_time, utc
from data_sources.coverage import Series, SymbolRow, extent_of, row_of
from data_sources.funding import LONGEST_INTERVAL_NS, FundingLedger
from data_sources.lake.lake import Lake
from data_sources.lake.parts import FETCHED
from data_sources.lake.quality import BAD_TICK, bad_ticks
from data_sources.pegged import stands_still
from data_sources.sources import DataRequest, Source, SymbolGroup
from data_sources.splits import SplitLedger, near_split_ratio, suspect_splits
from data_sources.universe import Interval, members, plain_names, top_of
from data_sources.vendors import SOURCES

# Of a dataset with many: bound the memory in use beside the result, some 200 bytes a bar.
SYMBOLS_AT_ONCE, BARS_AT_ONCE = 48, 10_000_000
MIN_COMMON_BARS = 30  # of two sources, to compare their levels
SOURCES_DIFFER = 0.001  # median relative difference of closes that is worth a flag
SILENCE_NS = HOUR_NS  # without a trade, after which a perpetual counts as settled or halted
THIN_DAY = 0.8  # of a day's bars; a source with fewer is flagged
RULES = "3"  # of the checks while loading; another number makes another fingerprint

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LoadedData:
    """The bars to train on, perhaps none.

    ``rows`` has every requested symbol, also those in ``dropped`` (symbol -> reason).
    """

    bars: list[Bars]
    dropped: dict[str, str]
    rows: list[SymbolRow]
    fingerprint: str
    copy: Path | None = None  # the mapped file that the bars are views of


def load(lake: Lake, request: DataRequest, *, keeps_bars: bool = True) -> LoadedData:
    """Read a request's bars from the lake, symbol by symbol; no network, no lock.

    Args:
        lake: its folder need not exist for computed sources alone.
        request: which bars.
        keeps_bars: False for the rows alone, in the memory of a few symbols.

    Raises:
        LakeError: the folder cannot be read. Damaged parts are no error: they are set aside with a warning.
    """
    result = LoadedData([], {}, [], "")
    for bars, row in each_symbol(lake, request):
        result.rows.append(row)
        if row.dropped:
            result.dropped[row.symbol] = row.dropped
        elif keeps_bars:
            result.bars.append(bars)
    # After reading, so that a part set aside meanwhile counts as absent.
    return dataclasses.replace(result, fingerprint=fingerprint(lake, request))


def each_symbol(
    lake: Lake, request: DataRequest, classes: Sequence[AssetClass] = get_args(AssetClass)
) -> Iterator[tuple[Bars, SymbolRow]]:
    """Yield each symbol's series and row in a fixed order, also of those that are dropped, of some asset classes.

    Raises:
        LakeError: as for ``load``.
    """
    known = renames.read(lake.root) if request.needs_lake else ()
    for series in _all_series(lake, request, classes):
        _flag_breaks(series)
        reason = ""
        if not len(series.bars):
            rename = renames.successor(known, series.bars.symbol)
            reason = f"no bars, {rename}" if rename else "no bars"
        elif len(series.bars) < request.min_bars:
            reason = f"{len(series.bars):,} bars, fewer than {request.min_bars:,}"
        elif not request.keep_pegged:
            reason = stands_still(series.bars)
        yield series.bars, row_of(series, reason)


def fingerprint(lake: Lake, request: DataRequest) -> str:
    """Return 16 hex digits that name what ``load`` would read: the lake's contents, splits included.

    Raises:
        LakeError: the folder cannot be read.
    """
    digest = hashlib.sha256()
    if request.needs_lake:
        digest.update(RULES.encode() + lake.fingerprint().encode())
        digest.update(json.dumps(SplitLedger(lake.root).as_dict(), sort_keys=True).encode())
        if joined := _renamed(lake, request):
            digest.update(repr(joined).encode())
        for rates in _funding(lake, request):
            digest.update(rates.tobytes())
    for source in request.chosen:
        if source.is_computed:
            digest.update(repr(source.parameters(request)).encode())
    return digest.hexdigest()[:16]


def _funding(lake: Lake, request: DataRequest) -> Iterator[NDArray[Any]]:
    """Yield the funding of a request's perpetual futures: what ``FundingLedger.apply`` may look at."""
    known, ledger = renames.read(lake.root), FundingLedger(lake.root)
    for source in request.chosen:
        for group in source.groups if not source.is_computed else ():
            if group.asset_class == "perpetual":
                for symbol in sorted(group.symbols_in(lake, request)):
                    times, rates = ledger.rates_of(renames.stretches(known, group.setting, symbol))
                    inside = (times > request.start_ns - LONGEST_INTERVAL_NS) & (times < request.end_ns)
                    yield from (times[inside], rates[inside])


def _renamed(lake: Lake, request: DataRequest) -> list[renames.Stretch]:
    """Return the names that symbols of a request had in its time, if they had others."""
    known = renames.read(lake.root)
    return [
        stretch
        for setting, names in sorted(request.symbols.items())
        for stretch in renames.former(known, setting, plain_names(names), request.start_ns, request.end_ns)
    ]


def _all_series(lake: Lake, request: DataRequest, classes: Sequence[AssetClass]) -> Iterator[Series]:
    preferred_first = [source for source in SOURCES.values() if source in request.chosen]
    if request.needs_lake:
        readers = [
            _Reader(lake, request, source, group)
            for source in preferred_first
            for group in source.groups
            if group.asset_class in classes
        ]
        ledger = SplitLedger(lake.root)
        of_stocks = [reader for reader in readers if reader.group.asset_class == "stock"]
        stocks = sorted({symbol for reader in of_stocks for symbol in reader.symbols})
        for symbol in stocks:
            yield _of_all(of_stocks, symbol, ledger, request)
        of_crypto = [reader for reader in readers if reader.group.asset_class != "stock"]
        done = set(stocks)
        # By the source's name, not by preference: the order of symbols must not change with the registry.
        for reader in sorted(of_crypto, key=lambda reader: reader.source.name):
            for symbol in reader.symbols:
                if symbol not in done:
                    done.add(symbol)
                    yield _of_all(of_crypto, symbol, ledger, request)
    for source in preferred_first:
        if source.is_computed and "crypto" in classes:
            for bars in source.compute(request):
                yield Series(bars, _marks(source, len(bars)))


class _Reader:
    """Reads one source's group of symbols; quickest where it is asked for the symbols in order."""

    def __init__(self, lake: Lake, request: DataRequest, source: Source, group: SymbolGroup) -> None:
        self.source, self.group = source, group
        self.lake, self._request = lake, request
        names = group.symbols_in(lake, request)
        self._dataset = group.dataset_in(request)
        # The symbols that a rule chooses beside the named ones, and when.
        self._chosen: dict[str, list[Interval]] = {}
        if group.dataset and top_of(names):
            span = (request.start_ns, request.end_ns)
            found = members(lake, source.name, group.dataset, top_of(names), *span)
            self._chosen = {symbol: found[symbol] for symbol in found.keys() - set(plain_names(names))}
        self.symbols = sorted({*plain_names(names), *self._chosen})
        self._renames = renames.read(lake.root)
        self.notes: dict[str, list[str]] = {}  # by symbol, on names that it had
        self._rejected: dict[str, dict[str, Counter[str]]] = {}  # by dataset and symbol
        self._batch: dict[str, Columns] = {}
        self._batch_places = range(0)  # in ``symbols``

    def columns(self, symbol: str) -> Columns | None:
        """Return the columns of a symbol, None where the lake has no bar."""
        place = bisect_left(self.symbols, symbol)
        if place not in self._batch_places:
            batch = self.symbols[place : place + self._symbols_at_once()]
            self._batch_places = range(place, place + len(batch))
            span = (self._request.start_ns, self._request.end_ns)
            self._batch = self.lake.columns(self.source.name, self._dataset_of(symbol), batch, *span)
        columns = self._joined(symbol, self._batch.pop(symbol, None))
        if columns is not None and symbol in self._chosen:
            columns = _within_any(columns, self._chosen[symbol])
        if columns is not None and self.group.asset_class == "stock" and not self._request.extended_hours:
            columns = _select(columns, in_regular_session(columns["open_time"]))
        return columns

    def _symbols_at_once(self) -> int:
        """Return how many symbols to read together: every time, all parts of their dataset are read whole."""
        if not self._dataset:
            return 1
        parts = self.lake.parts(self.source.name, self._dataset).values()
        bars_of_one = sum(part.rows / max(1, len(part.symbols)) for part in parts)
        return max(1, min(SYMBOLS_AT_ONCE, int(BARS_AT_ONCE / max(1.0, bars_of_one))))

    def names(self, symbol: str) -> list[renames.Stretch]:
        """Return the names that a symbol had, itself alone as a rule."""
        return renames.stretches(self._renames, self.group.setting, symbol)

    def _joined(self, symbol: str, own: Columns | None) -> Columns | None:
        """Join a symbol's bars with those under its former names, each in its time."""
        request, names = self._request, self.names(symbol)
        start_ns, end_ns = names[-1].start_ns, names[-1].end_ns
        if start_ns <= request.start_ns and request.end_ns <= end_ns:
            return own
        names[-1] = dataclasses.replace(names[-1], end_ns=renames.FOREVER_NS)  # see _of_one_symbol
        pieces = []
        for stretch in names:
            piece = own
            if stretch.name != symbol:
                span = (max(request.start_ns, stretch.start_ns), min(request.end_ns, stretch.end_ns))
                dataset = self._dataset_of(stretch.name)
                found = self.lake.columns(self.source.name, dataset, [stretch.name], *span)
                piece = found.get(stretch.name)
            if piece is not None:
                time = piece["open_time"]
                piece = _select(piece, (time >= stretch.start_ns) & (time < stretch.end_ns))
                pieces.append(_at_ratio(piece, stretch.ratio))
                if stretch.name != symbol and len(piece["open_time"]):
                    until = f"bars of {stretch.name} until {utc(stretch.end_ns).date()} are joined to it"
                    self.notes.setdefault(symbol, []).append(until)
        return join_columns(pieces) if pieces else None

    def count_rejected(self, symbol: str) -> Counter[str]:
        """Count the rows that failed a check in the parts of the interval, also bars that only lost their flow.

        Unfinished minutes do not count.
        """
        dataset = self._dataset_of(symbol)
        if dataset not in self._rejected:
            counts: dict[str, Counter[str]] = {}
            for part in self.lake.parts(self.source.name, dataset).values():
                if part.start_ns < self._request.end_ns and self._request.start_ns < part.end_ns:
                    for found_in in (part.rejected_by_symbol, part.flow_rejected):
                        for name, reasons in found_in.items():
                            counts.setdefault(name, Counter()).update(reasons)
            for found in counts.values():
                found.pop("not_closed", None)
                found.pop(BAD_TICK, None)  # of parts by an earlier version; the lake returns those rows
            self._rejected[dataset] = counts
        return Counter(self._rejected[dataset].get(symbol, {}))

    def _dataset_of(self, symbol: str) -> str:
        return self._dataset or symbol


def _of_all(readers: Sequence[_Reader], symbol: str, ledger: SplitLedger, request: DataRequest) -> Series:
    """Return the series of a symbol, merged where several sources have it."""
    own = [reader for reader in readers if symbol in reader.symbols]
    pieces = [(reader.source, _adjusted_bars(reader, symbol, ledger, request)) for reader in own]
    series = _merge(pieces, ledger)
    series.rejected = {reader.source.name: reader.count_rejected(symbol) for reader in own}
    series.flags += dict.fromkeys(note for reader in own for note in reader.notes.get(symbol, ()))
    names = own[0].names(symbol)
    series = _without_bad_ticks(_of_one_symbol(series, names[-1].end_ns))
    if own[0].group.asset_class == "perpetual":  # last, since it depends on which bars there are
        series = _without_silence(series)
        series.bars, flags = FundingLedger(own[0].lake.root).apply(series.bars, names)
        series.flags += flags
    return series


def _adjusted_bars(reader: _Reader, symbol: str, ledger: SplitLedger, request: DataRequest) -> Bars:
    columns = reader.columns(symbol)
    bars = _bars(symbol, reader.group.asset_class, columns)
    if reader.group.asset_class != "stock":
        return bars
    fetched_ns = columns[FETCHED] if columns is not None and reader.group.adjusts_splits else None
    names = reader.names(symbol)
    return ledger.adjust(bars, fetched_ns=fetched_ns, until_ns=request.end_ns, names=names)


def _merge(pieces: Sequence[tuple[Source, Bars]], ledger: SplitLedger) -> Series:
    """Merge a symbol's bars: the first source's, and where it has a hole the next one's."""
    source, bars = pieces[0]
    result = Series(bars, _marks(source, len(bars)))
    for other, more in pieces[1:]:
        result.difference, flags = _compare(source, result.bars, other, more)
        fills, num_thin = _fill_holes(result.bars, more)
        if num_thin:
            flags.append(f"{other.label} fills in for {source.label} on days with few bars: {num_thin}")
        order = np.argsort(np.concatenate([result.bars.open_time, more.open_time[fills]]), kind="stable")
        both = [_columns_of(result.bars), _select(_columns_of(more), fills)]
        columns = {name: array[order] for name, array in join_columns(both).items()}
        result.source = np.concatenate([result.source, _marks(other, int(fills.sum()))])[order]
        result.bars = Bars.of_columns(bars.symbol, bars.asset_class, columns)
        result.flags += flags
    bars = result.bars
    for jump in suspect_splits(bars) if bars.asset_class == "stock" else ():
        day = np.datetime64(jump.open_time, "ns").astype("datetime64[D]")
        result.flags.append(f"a split of about {jump.ratio:g} on {day} is not in the ledger")
    if len(bars):
        executed = [split.executed_ns for split in ledger.splits(bars.symbol)]
        first, last = int(bars.open_time[0]), int(bars.open_time[-1])
        result.num_splits = sum(first < moment <= last for moment in executed)
    extents = {source.name: extent_of(piece) for source, piece in pieces if len(piece)}
    if len(extents) > 1:  # of a single one the series itself is the extent
        result.by_source = extents
    return result


def _fill_holes(first: Bars, second: Bars) -> tuple[NDArray[np.bool_], int]:
    """Choose the bars of a second source for minutes that the first one lacks.

    It must have seen trades in that minute, else it is only quiet; unless the first has no bar yet of that day, as
    when its file is still to come. No later bar counts, so a choice stays when more arrive.

    Returns:
        Which bars of the second source to take, and on how many days the first has under 80 % of the bars of both.
    """
    day, known_days = (new_york_time(bars.open_time) // DAY_NS for bars in (second, first))
    midnight = second.open_time - new_york_time(second.open_time) % DAY_NS
    so_far = np.searchsorted(first.open_time, second.open_time, side="right")
    is_first_to_come = so_far == np.searchsorted(first.open_time, midnight)
    fills = ~np.isin(second.open_time, first.open_time) & ((second.volume > 0) | is_first_to_come)
    days, counts = np.unique(known_days, return_counts=True)
    filled = np.bincount(np.searchsorted(days, day[fills & np.isin(day, days)]), minlength=len(days))
    return fills, int((counts < THIN_DAY * (counts + filled)).sum())


def _compare(source: Source, bars: Bars, other: Source, more: Bars) -> tuple[float | None, list[str]]:
    """Compare two sources' closes where both have a minute: (median relative difference, flags)."""
    _, ours, theirs = np.intersect1d(bars.open_time, more.open_time, assume_unique=True, return_indices=True)
    if len(ours) < MIN_COMMON_BARS:
        return None, []
    ratios = bars.close[ours] / more.close[theirs]
    ratio, difference = float(np.median(ratios)), float(np.median(np.abs(ratios - 1)))
    common = near_split_ratio(ratio)
    if common is not None:
        prices = f"{source.label}'s prices are {common:g} times {other.label}'s"
        return difference, [f"{prices}: a split is missing in the ledger"]
    if difference > SOURCES_DIFFER:
        return difference, [f"{source.label} and {other.label} differ by {100 * difference:.2f} % (median)"]
    return difference, []


def _bars(symbol: str, asset_class: AssetClass, columns: Columns | None) -> Bars:
    if columns is None:
        empty = np.empty(0)
        return Bars(symbol, asset_class, np.empty(0, np.int64), empty, empty, empty, empty, empty)
    return Bars.of_columns(symbol, asset_class, columns)


def _columns_of(bars: Bars) -> Columns:
    return {name: getattr(bars, name) for name in bars.columns}


def _without_bad_ticks(series: Series) -> Series:
    """Leave out rows at a price that nothing before them confirms; a live series leaves out the same ones."""
    bars = series.bars
    bad = bad_ticks(bars.open_time, bars.open, bars.close)
    if not bad.any():
        return series
    for name, count in zip(SOURCES, np.bincount(series.source[bad], minlength=len(SOURCES)), strict=True):
        if count:
            series.rejected.setdefault(name, Counter())[BAD_TICK] += int(count)
    return dataclasses.replace(series, bars=bars.select(~bad), source=series.source[~bad])


def _without_silence(series: Series) -> Series:
    """Leave out the bars of a perpetual after an hour without a trade: nothing can be filled there.

    Binance repeats the last price after a settlement, for weeks (issues 201 and 500 of binance-public-data). What
    is left out depends on the bars before alone.
    """
    bars = series.bars
    starts = np.append(bars.open_time[:1], bars.open_time[:-1])
    traded = np.append(bars.open_time[:1], np.where(bars.volume[:-1] > 0, bars.open_time[:-1], 0))
    is_silent = (bars.volume == 0) & (starts - np.maximum.accumulate(traded) >= SILENCE_NS)
    if not is_silent.any():
        return series
    first, last = (utc(int(bars.open_time[is_silent][place])) for place in (0, -1))
    span = f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
    text = f"{is_silent.sum():,} bars after an hour without a trade are left out, {span}"
    if is_silent[-1]:
        text += ": settled?"
    flags = [*series.flags, text]
    return dataclasses.replace(
        series, bars=bars.select(~is_silent), source=series.source[~is_silent], flags=flags
    )


def _flag_breaks(series: Series) -> None:
    bars = series.bars
    for place in find_breaks(bars).tolist():
        day = np.datetime64(int(bars.open_time[place]), "ns").astype("datetime64[D]")
        if any("split" in flag and str(day) in flag for flag in series.flags):
            continue  # the better explanation
        ratio = bars.open[place] / bars.close[place - 1]
        moved = f"rise {ratio:.3g}-fold" if ratio > 1 else f"fall to 1/{1 / ratio:.3g}"
        series.flags.append(f"prices {moved} at once on {day}: cut there, as if it were another symbol")


def _of_one_symbol(series: Series, end_ns: int) -> Series:
    """Leave out what the name meant until ``end_ns``, if another symbol has taken it up since."""
    bars = series.bars
    is_new = bars.open_time >= end_ns
    if is_new.all() or not is_new.any():
        return series
    flags = [*series.flags, f"{bars.symbol} before {utc(end_ns).date()} is another symbol, and left out"]
    return dataclasses.replace(series, bars=bars.select(is_new), source=series.source[is_new], flags=flags)


def _marks(source: Source, count: int) -> NDArray[np.int8]:
    return np.full(count, list(SOURCES).index(source.name), np.int8)


def _within_any(columns: Columns, intervals: Sequence[Interval]) -> Columns:
    """Keep the bars that open in one of the intervals, which are in order."""
    edges = np.array(intervals, np.int64).reshape(-1)
    return _select(columns, np.searchsorted(edges, columns["open_time"], side="right") % 2 == 1)


def _select(columns: Columns, mask: NDArray[np.bool_]) -> Columns:
    return {name: array[mask] for name, array in columns.items()}


def _at_ratio(columns: Columns, ratio: float) -> Columns:
    """Return bars in units of which ``ratio`` make an old one."""
    if ratio == 1:
        return columns
    prices = {name: columns[name] / ratio for name in ("open", "high", "low", "close")}
    volumes = {name: columns[name] * ratio for name in ("volume", "taker_buy_volume") if name in columns}
    return columns | prices | volumes
