"""The tables beside a report, as CSV for other programs: daily returns, equity, and every trade.

Numbers have all their digits: the net of all trades is the change of equity.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.exam import Contestants
from evaluation.measures import equity_curve
from evaluation.tear_sheet import TearSheet
from evaluation.trades import Trades

MOST_FILLS = 100_000  # rows of equity; of more fills, the last of every hour is kept
TRADE_COLUMNS: tuple[str, ...] = (
    "symbol",
    "side",
    "entry",
    "exit",
    "minutes",
    "entry_price",
    "exit_price",
    "size",
)
TRADE_COLUMNS += ("gross", "costs", "funding", "net", "gain", "ended_by")


def csv_files(walks: Contestants, tear: TearSheet) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every table; contestants are columns."""
    names = list(walks)
    daily = zip(tear.dates, *(tear.returns[name] for name in names), strict=True)
    yield "returns.csv", _table(["date", *names], ([str(day), *values] for day, *values in daily))
    yield "equity.csv", _table(["time", *names], _equity(walks))
    yield "trades.csv", _table(TRADE_COLUMNS, _trades(tear.trades))


def _equity(walks: Contestants) -> Iterator[list[Any]]:
    """Yield the time of each fill, UTC, and every pool's equity up to the next open; first the start, 1."""
    curves = [equity_curve(own) for own in walks.values()]
    time = curves[0][0]
    rows = np.arange(len(time))
    if len(rows) > MOST_FILLS:
        hours = time.astype("datetime64[h]")
        rows = rows[np.append(hours[1:] != hours[:-1], True) | (rows == 0)]
    columns = [np.asarray(curve)[rows].tolist() for _, curve in curves]
    for at, *values in zip(_times(time[rows]), *columns, strict=True):
        yield [at, *values]


def _trades(trades: Trades) -> Iterator[list[Any]]:
    columns = {
        "symbol": trades.symbol.tolist(),
        "side": ["long" if side > 0 else "short" for side in trades.side],
        "entry": _times(trades.entry),
        "exit": _times(trades.exit),
        "ended_by": trades.ended_by.tolist(),
        "minutes": [f"{minutes:g}" for minutes in trades.minutes],
    }
    numbers = {name: getattr(trades, name).tolist() for name in TRADE_COLUMNS if name not in columns}
    columns |= numbers
    yield from map(list, zip(*(columns[name] for name in TRADE_COLUMNS), strict=True))


def _times(time: Any) -> list[str]:
    return [f"{text}Z" for text in np.datetime_as_string(time, unit="s")]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()
