"""Tables of bars for the tests of the lake: a random walk on whole minutes, and ways to break it."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_sources.bars import COLUMNS, DAY_NS, FLOW_COLUMNS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.lake.parts import Part, parse_part, write_part
from data_sources.lake.quality import SCHEMA, bar_table
from data_sources.progress import NullProgress, Progress
from data_sources.sources import DataRequest, RefreshJob
from data_sources.splits import SplitLedger

__all__ = ["DAY_NS", "as_format_1", "flat", "job_for", "ns", "read", "table", "walk", "with_values"]


def ns(text: str) -> int:
    """Return the instant "2026-11-20 14:30" (UTC) as int64 ns."""
    moment = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
    return int(moment.timestamp()) * 1_000_000_000


def walk(symbol: str, start_ns: int, num_bars: int, *, seed: int = 0, price: float = 100.0) -> pa.Table:
    """Draw ``num_bars`` valid bars from ``start_ns`` on, one a minute, with steps of 0.1 %."""
    random = np.random.default_rng(seed)
    close = price * np.exp(np.cumsum(random.normal(0, 1e-3, num_bars)))
    opened = np.append(price, close)[:-1]
    return table(
        symbol,
        start_ns + np.arange(num_bars) * MINUTE_NS,
        opened,
        np.maximum(opened, close) * 1.0005,
        np.minimum(opened, close) * 0.9995,
        close,
        random.uniform(1, 100, num_bars),
    )


def table(symbol, open_time, opened, high, low, close, volume) -> pa.Table:
    """Return columns as a table; ``symbol`` is one name for all rows or one per row."""
    names = [symbol] * len(open_time) if isinstance(symbol, str) else symbol
    columns = [np.asarray(open_time, np.int64)]
    columns += [np.asarray(values, np.float64) for values in (opened, high, low, close, volume)]
    return pa.table(
        [pa.array(names, pa.string()), *columns],
        names=["symbol", "open_time", "open", "high", "low", "close", "volume"],
    )


def with_values(given: pa.Table, rows, **columns) -> pa.Table:
    """Return the table with other values in ``rows`` of the named columns."""
    for name, value in columns.items():
        values = given[name].to_numpy().copy()
        values[rows] = value
        given = given.set_column(given.column_names.index(name), name, pa.array(values))
    return given


def flat(prices, start_ns: int, symbol: str = "AAA", volume: float = 10.0) -> pa.Table:
    """Return bars whose open, high, low and close are one price."""
    prices = np.asarray(prices, np.float64)
    time = start_ns + np.arange(len(prices)) * MINUTE_NS
    return table(symbol, time, prices, prices, prices, prices, np.full(len(prices), volume))


def read(
    lake: Lake, source: str, dataset: str, symbols: list[str] | None, start_ns: int, end_ns: int
) -> pa.Table:
    """Return the lake's bars that open in [start_ns, end_ns), sorted by symbol and open_time; null: no flow."""
    tables = [SCHEMA.empty_table()]
    for symbol, columns in lake.columns(source, dataset, symbols, start_ns, end_ns).items():
        flow = {name: columns[name] for name in FLOW_COLUMNS if name in columns}
        tables.append(bar_table(symbol, [columns[name] for name in COLUMNS], **flow))
    return pa.concat_tables(tables, promote_options="default")


def as_format_1(lake: Lake, source: str, dataset: str) -> None:
    """Turn the parts of a dataset into what they were before there was order flow."""
    for unit, part in lake.parts(source, dataset).items():
        path = lake.root / source / dataset / f"{unit}.parquet"
        former = replace(part, format=1, flow={}, flow_content="", flow_rejected={})
        rewrite(path, parse_part(path).select(SCHEMA.names), former)


def rewrite(path: Path, table: pa.Table, part: Part) -> None:
    """Replace a part's file by another whole one."""
    buffer = io.BytesIO()
    write_part(buffer, table.set_column(0, "symbol", table["symbol"].cast(pa.string())), part)
    path.write_bytes(buffer.getvalue())


@contextmanager
def job_for(
    lake: Lake,
    symbols: Mapping[str, Sequence[str]],
    start_ns: int,
    end_ns: int,
    now_ns: int,
    progress: Progress | None = None,
) -> Iterator[RefreshJob]:
    """A job for one source, with the lake locked as ``refresh`` does it."""
    request = DataRequest((), symbols, start_ns, end_ns)
    with lake.writing():
        yield RefreshJob(lake, request, now_ns, progress or NullProgress(), SplitLedger(lake.root))
