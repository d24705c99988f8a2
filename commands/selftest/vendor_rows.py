"""Rows on their whole way to bars: checked, written to a lake in a temporary folder, loaded and merged."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_sources.bars import COLUMNS, DAY_NS, Bars
from data_sources.lake.lake import Lake
from data_sources.lake.quality import bar_table
from data_sources.load import load
from data_sources.sources import DataRequest

# Of the preferred source's rows, which the other one has: in the first part, and in the second.
MISSING = (0.1, 0.6)


def load_through_a_lake(rows: Sequence[tuple[Bars, int]], extended_hours: bool) -> dict[str, Bars]:
    """Return the bars that a training would load of these rows, by symbol.

    Args:
        rows: one series per symbol, and the row with which its second part begins. Stocks go to two sources, with
            different prices; the preferred one lacks rows, many of them in the second part.
        extended_hours: as in the settings.

    Raises:
        LakeError: the temporary folder cannot be written.
    """
    start_ns = min(int(series.open_time[0]) for series, _ in rows)
    end_ns = max(int(series.open_time[-1]) for series, _ in rows) + DAY_NS
    stocks, crypto = (
        [(series, split) for series, split in rows if series.asset_class == kind]
        for kind in ("stock", "crypto")
    )
    names = {
        setting: tuple(series.symbol for series, _ in kind)
        for setting, kind in (("stocks", stocks), ("polygon_crypto", crypto))
    }
    request = DataRequest(
        ("polygon", "yahoo"),
        names,
        start_ns,
        end_ns,
        min_bars=1,
        extended_hours=extended_hours,
        keep_pegged=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(Path(folder))

        def write(source: str, dataset: str, unit: str, tables: list[pa.Table]) -> None:
            table = pa.concat_tables(tables)
            symbols = table["symbol"].unique().to_pylist()
            lake.write(
                source, dataset, unit, table, key="", version="", start_ns=start_ns, end_ns=end_ns,
                symbols=symbols, now_ns=end_ns,
            )  # fmt: skip

        for dataset, kind in (("us_stocks_sip", stocks), ("global_crypto", crypto)):
            if kind:
                write("polygon", dataset, "a", [_table(series, slice(0, split), 0) for series, split in kind])
                write(
                    "polygon", dataset, "b", [_table(series, slice(split, None), 1) for series, split in kind]
                )
        for series, _ in stocks:
            close = np.minimum(series.close * 1.0003, series.high)
            write("yahoo", series.symbol, "a", [_table(replace(series, close=close), slice(None))])
        return {series.symbol: series for series in load(lake, request).bars}


def _table(bars: Bars, rows: slice, part: int | None = None) -> pa.Table:
    columns = [getattr(bars, name)[rows] for name in COLUMNS]
    if part is not None and bars.asset_class == "stock":
        is_there = np.random.default_rng(part).random(len(columns[0])) >= MISSING[part]
        columns = [column[is_there] for column in columns]
    return bar_table(bars.symbol, columns)
