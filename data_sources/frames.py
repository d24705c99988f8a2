"""Bars from a pandas frame, for programs that have bars of their own."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_sources.bars import COLUMNS, AssetClass, Bars


def bars_of_frame(frame: pd.DataFrame, symbol: str, asset_class: AssetClass) -> Bars:
    """Return a frame's rows as bars.

    Args:
        frame: one row per closed minute, oldest first, with the columns open_time, open, high, low, close and
            volume. ``open_time`` is the start of the minute: times (without a zone: UTC), ISO 8601 text, or int64
            nanoseconds since 1970.
        symbol: its name.
        asset_class: "crypto" for what trades round the clock, "stock" for US stocks.

    Raises:
        ValueError: a column is missing or holds no numbers, or the rows are no valid bars; names which.
    """
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(f"{symbol}: the frame must have {', '.join(COLUMNS)}; it lacks {', '.join(missing)}")
    if asset_class not in ("crypto", "stock"):
        raise ValueError(f"{symbol}: asset_class must be crypto or stock, was {asset_class}")
    times = frame["open_time"]
    form = None if times.dtype.kind in "iM" else "ISO8601"  # text
    try:
        open_time = pd.DatetimeIndex(pd.to_datetime(times, utc=True, format=form)).as_unit("ns").asi8.copy()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{symbol}: open_time must be times such as 2026-11-20 14:30") from error
    columns = []
    for name in COLUMNS[1:]:
        try:
            # A copy: pandas may lend what must not be written, and torch warns of that.
            columns.append(np.array(frame[name], np.float64))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{symbol}: {name} must be numbers") from error
    return Bars(symbol, asset_class, open_time, *columns)
