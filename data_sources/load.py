"""From the lake to one series per symbol: merged, split-adjusted, cut to the session, and accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, AssetClass, Bars
from data_sources.calendar import DAY_NS, in_regular_session, new_york_time
from data_sources.coverage import SOURCES, Extent, Series, SymbolRow, extent_of, row_of
from data_sources.lake.lake import FETCHED, Lake
from data_sources.lake.quality import bad_ticks
from data_sources.simulated import simulated_bars
from data_sources.splits import COMMON_RATIOS, SplitLedger, suspected
from data_sources.universe import Interval, members, named, top_of

POLYGON_STOCKS, POLYGON_CRYPTO = "us_stocks_sip", "global_crypto"
SYMBOLS_AT_ONCE = 48  # of a dataset that holds many: bounds what is in memory beside the result
MIN_COMMON_BARS = 30  # of two sources, to compare their levels
SOURCES_DIFFER = 0.001  # median relative difference of closes that is worth a flag
THIN_DAY = 0.8  # of the other source's bars on a day; with fewer the better source is the worse one

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class DataRequest:
    """Which bars are wanted: symbols per source, the interval [start_ns, end_ns), and what makes a symbol usable.

    ``stocks`` are asked of Polygon and Yahoo; the same name serves both. Among ``stocks`` and ``polygon_crypto``
    there may be a rule such as "top:500" (universe.py), for Polygon alone. ``min_bars`` counts after cleaning.
    Without ``extended_hours`` stocks keep 09:30-16:00 New York.

    Raises:
        ValueError: a source is not known, or a rule is none.
    """

    sources: Sequence[str]
    stocks: Sequence[str]
    binance_pairs: Sequence[str]
    polygon_crypto: Sequence[str]
    start_ns: int
    end_ns: int
    min_bars: int = 2000
    extended_hours: bool = False
    simulated_symbols: int = 32
    simulated_bars: int = 60_000
    simulated_seed: int = 0

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown:
            raise ValueError(f"sources must be among {', '.join(SOURCES)}; {', '.join(unknown)} is not")
        top_of((*self.stocks, *self.polygon_crypto))
        if top_of(self.binance_pairs):
            raise ValueError(
                "binance_pairs must be names: a rule such as top:50 is for stocks and polygon_crypto"
            )

    @property
    def needs_lake(self) -> bool:
        """Whether anything but the simulated market is asked for."""
        return bool(set(self.sources) - {"simulated"})


@dataclass(frozen=True)
class LoadedData:
    """What there is to train on; ``bars`` may be empty, which the caller judges.

    ``rows`` has every symbol that was asked for, also those in ``dropped`` (symbol -> reason).
    """

    bars: list[Bars]
    dropped: dict[str, str]
    rows: list[SymbolRow]
    fingerprint: str


def load(lake: Lake, request: DataRequest) -> LoadedData:
    """Read what the request names from the lake, symbol by symbol; no network, no lock.

    The lake's folder need not exist when only "simulated" is asked for.

    Raises:
        LakeError: the folder cannot be read. Damaged parts are no error: they are set aside with a warning.
    """
    result = LoadedData([], {}, [], "")
    for bars, row in each_symbol(lake, request):
        result.rows.append(row)
        if row.dropped:
            result.dropped[row.symbol] = row.dropped
        else:
            result.bars.append(bars)
    # After reading, so that a part set aside on the way counts as absent.
    return dataclasses.replace(result, fingerprint=fingerprint(lake, request))


def each_symbol(lake: Lake, request: DataRequest) -> Iterator[tuple[Bars, SymbolRow]]:
    """Yield the series and the account of each symbol in a fixed order, also of those that are dropped.

    Raises:
        LakeError: as for ``load``.
    """
    groups: list[Iterator[Series]] = []
    if request.needs_lake:
        groups += [_stocks(lake, SplitLedger(lake.root), request), _crypto(lake, request)]
    if "simulated" in request.sources:
        groups.append(_simulated(request))
    for series in (each for group in groups for each in group):
        reason = ""
        if len(series.bars) < max(1, request.min_bars):
            reason = f"{len(series.bars):,} bars, fewer than {request.min_bars:,}"
            reason = reason if len(series.bars) else "no bars"
        yield series.bars, row_of(series, reason)


def fingerprint(lake: Lake, request: DataRequest) -> str:
    """Return 16 hex digits that name what ``load`` would read: the lake's contents, splits included.

    Raises:
        LakeError: the folder cannot be read.
    """
    digest = hashlib.sha256()
    if request.needs_lake:
        digest.update(lake.fingerprint().encode())
        digest.update(json.dumps(SplitLedger(lake.root).as_dict(), sort_keys=True).encode())
    if "simulated" in request.sources:
        parameters = (request.simulated_symbols, request.simulated_bars, request.simulated_seed)
        digest.update(repr((*parameters, request.end_ns // DAY_NS)).encode())
    return digest.hexdigest()[:16]


def _stocks(lake: Lake, ledger: SplitLedger, request: DataRequest) -> Iterator[Series]:
    interval = (request.start_ns, request.end_ns)
    chosen = _chosen(lake, POLYGON_STOCKS, request.stocks, request)
    stocks = sorted({*named(request.stocks), *chosen}) if {"polygon", "yahoo"} & set(request.sources) else []
    rejected = _rejected(lake, "polygon", POLYGON_STOCKS, request) if "polygon" in request.sources else {}
    for at in range(0, len(stocks), SYMBOLS_AT_ONCE):
        batch = stocks[at : at + SYMBOLS_AT_ONCE]
        polygon: dict[str, Columns | None] = {}
        if "polygon" in request.sources:
            polygon.update(lake.columns("polygon", POLYGON_STOCKS, batch, *interval))
        for symbol in batch:
            yahoo: Columns | None = None
            counts = {"polygon": Counter(rejected.get(symbol, {}))}
            if symbol in chosen:
                polygon[symbol] = _within_any(polygon.get(symbol), chosen[symbol])
            elif "yahoo" in request.sources:
                yahoo = lake.columns("yahoo", symbol, [symbol], *interval).get(symbol)
                counts["yahoo"] = Counter(_rejected(lake, "yahoo", symbol, request).get(symbol, {}))
            series = _merged_stock(symbol, polygon.pop(symbol, None), yahoo, ledger, request)
            series.rejected = counts
            yield _without_bad_ticks(series)


def _chosen(
    lake: Lake, dataset: str, names: Sequence[str], request: DataRequest
) -> dict[str, list[Interval]]:
    """Return what a rule among ``names`` chooses and when, beside what is named."""
    num_largest = top_of(names) if "polygon" in request.sources else 0
    if not num_largest:
        return {}
    found = members(lake, "polygon", dataset, num_largest, request.start_ns, request.end_ns)
    return {symbol: intervals for symbol, intervals in found.items() if symbol not in named(names)}


def _within_any(columns: Columns | None, intervals: Sequence[Interval]) -> Columns | None:
    """Keep the bars that open in one of the intervals, which are in order."""
    if columns is None:
        return None
    edges = np.array(intervals, np.int64).reshape(-1)
    keep = np.searchsorted(edges, columns["open_time"], side="right") % 2 == 1
    return {name: array[keep] for name, array in columns.items()}


def _merged_stock(
    symbol: str, polygon: Columns | None, yahoo: Columns | None, ledger: SplitLedger, request: DataRequest
) -> Series:
    """Polygon's bars on every day that it has, Yahoo's on the others and on those of which Polygon has a piece."""
    until = request.end_ns
    first = ledger.adjust(_bars(symbol, "stock", polygon, request), until_ns=until)
    fetched = _cut(yahoo, request)[FETCHED] if yahoo else None
    second = ledger.adjust(_bars(symbol, "stock", yahoo, request), fetched_ns=fetched, until_ns=until)
    difference, flags = _compared(first, second)
    keeps, fills, num_thin = _better_days(first, second)
    if num_thin:
        flags.append(f"days on which Yahoo stands in, since Polygon has only a piece: {num_thin}")
    time = np.concatenate([first.open_time[keeps], second.open_time[fills]])
    order = np.argsort(time, kind="stable")
    columns = {
        name: np.concatenate([getattr(first, name)[keeps], getattr(second, name)[fills]])[order]
        for name in COLUMNS
    }
    source = np.repeat(
        np.array([SOURCES.index("polygon"), SOURCES.index("yahoo")], np.int8),
        [int(keeps.sum()), int(fills.sum())],
    )[order]
    bars = Bars(symbol, "stock", **columns)
    for jump in suspected(bars):
        day = np.datetime64(jump.open_time, "ns").astype("datetime64[D]")
        flags.append(f"a split of about {jump.ratio:g} on {day} is not in the ledger")
    splits = [split for split in ledger.splits(symbol) if len(bars) and _within(split.executed_ns, bars)]
    extents: dict[str, Extent] = {}
    if len(first) and len(second):  # otherwise the series itself is the only one
        extents = {"polygon": extent_of(first), "yahoo": extent_of(second)}
    return Series(bars, source, extents, {}, len(splits), flags, difference)


def _better_days(first: Bars, second: Bars) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """Choose a source per day of New York: the first one, unless it has far fewer bars of the session.

    Returns:
        Which bars of each to take, and how many days the second one won from the first.
    """
    days = [new_york_time(bars.open_time) // DAY_NS for bars in (first, second)]
    regular = [in_regular_session(bars.open_time) for bars in (first, second)]
    all_days, places = np.unique(np.concatenate(days), return_inverse=True)
    split = len(first)
    counts = [
        np.bincount(place[mask], minlength=len(all_days))
        for place, mask in zip((places[:split], places[split:]), regular, strict=True)
    ]
    is_held = np.isin(all_days, days[0])
    is_thin = is_held & (counts[0] < THIN_DAY * counts[1])
    first_wins = is_held & ~is_thin
    return first_wins[places[:split]], ~first_wins[places[split:]], int(is_thin.sum())


def _crypto(lake: Lake, request: DataRequest) -> Iterator[Series]:
    interval = (request.start_ns, request.end_ns)
    wanted: list[tuple[str, str, list[str]]]
    wanted = [("binance", pair, [pair]) for pair in sorted(set(request.binance_pairs))]
    chosen = _chosen(lake, POLYGON_CRYPTO, request.polygon_crypto, request)
    coins = sorted({*named(request.polygon_crypto), *chosen})
    wanted += [
        ("polygon", POLYGON_CRYPTO, coins[at : at + SYMBOLS_AT_ONCE])
        for at in range(0, len(coins), SYMBOLS_AT_ONCE)
    ]
    for source, dataset, symbols in wanted:
        if source not in request.sources:
            continue
        rejected = _rejected(lake, source, dataset, request)
        found = lake.columns(source, dataset, symbols, *interval)
        for symbol in symbols:
            columns = found.pop(symbol, None)
            if source == "polygon" and symbol in chosen:
                columns = _within_any(columns, chosen[symbol])
            bars = _bars(symbol, "crypto", columns, request)
            index = np.full(len(bars), SOURCES.index(source), np.int8)
            counts = {source: Counter(rejected.get(symbol, {}))}
            yield _without_bad_ticks(Series(bars, index, rejected=counts))


def _simulated(request: DataRequest) -> Iterator[Series]:
    for bars in simulated_bars(
        request.simulated_symbols, request.simulated_bars, request.simulated_seed, request.end_ns
    ):
        yield Series(bars, np.full(len(bars), SOURCES.index("simulated"), np.int8))


def _cut(columns: Columns, request: DataRequest) -> Columns:
    if request.extended_hours:
        return columns
    keep = in_regular_session(columns["open_time"])
    return {name: array[keep] for name, array in columns.items()}


def _bars(symbol: str, asset_class: AssetClass, columns: Columns | None, request: DataRequest) -> Bars:
    if columns is None:
        empty = np.empty(0)
        return Bars(symbol, asset_class, np.empty(0, np.int64), empty, empty, empty, empty, empty)
    if asset_class == "stock":
        columns = _cut(columns, request)
    return Bars(symbol, asset_class, *(columns[name] for name in COLUMNS))


def _without_bad_ticks(series: Series) -> Series:
    """Ask again with both neighbours known: a part's first and last bars could not be judged alone."""
    bars = series.bars
    bad = bad_ticks(bars.open_time, bars.open, bars.close)
    if not bad.any():
        return series
    kept = Bars(bars.symbol, bars.asset_class, *(getattr(bars, name)[~bad] for name in COLUMNS))
    for index, count in enumerate(np.bincount(series.source[bad], minlength=len(SOURCES)).tolist()):
        if count:
            series.rejected.setdefault(SOURCES[index], Counter())["bad_tick"] += count
    return dataclasses.replace(series, bars=kept, source=series.source[~bad])


def _rejected(lake: Lake, source: str, dataset: str, request: DataRequest) -> dict[str, Counter[str]]:
    """Sum what the checks kept out of the parts of the interval; unfinished minutes are no fault."""
    counts: dict[str, Counter[str]] = {}
    for part in lake.parts(source, dataset).values():
        if part.start_ns < request.end_ns and request.start_ns < part.end_ns:
            for symbol, reasons in part.rejected_by_symbol.items():
                counts.setdefault(symbol, Counter()).update(reasons)
    for reasons in counts.values():
        reasons.pop("not_closed", None)
    return counts


def _compared(first: Bars, second: Bars) -> tuple[float | None, list[str]]:
    """Compare Polygon's and Yahoo's closes where both have a minute: (median difference, flags)."""
    _, ours, theirs = np.intersect1d(
        first.open_time, second.open_time, assume_unique=True, return_indices=True
    )
    if len(ours) < MIN_COMMON_BARS:
        return None, []
    ratio = float(np.median(first.close[ours] / second.close[theirs]))
    differs = float(np.median(np.abs(first.close[ours] / second.close[theirs] - 1)))
    for k in COMMON_RATIOS:
        for common in (float(k), 1 / k):
            if abs(ratio / common - 1) < 0.02:
                flag = f"Polygon's prices are {common:g} times Yahoo's: a split is missing in the ledger"
                return differs, [flag]
    if differs > SOURCES_DIFFER:
        return differs, [f"Polygon and Yahoo differ by {100 * differs:.2f} % (median)"]
    return differs, []


def _within(moment_ns: int, bars: Bars) -> bool:
    return bool(bars.open_time[0] < moment_ns <= bars.open_time[-1])
