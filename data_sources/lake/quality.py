"""Which rows of a vendor's answer are bars: ordered checks, each counted; no row is dropped without a reason.

The order: place (symbol, time), values, duplicates, bad ticks. Values come before duplicates so that of two
rows for one minute a broken one never wins over a good one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS
from data_sources.errors import BadAnswer

SCHEMA = pa.schema(
    [("symbol", pa.string()), ("open_time", pa.int64())] + [(name, pa.float64()) for name in COLUMNS[1:]]
)
EARLIEST_NS = 1_420_070_400_000_000_000  # 2015-01-01; an older stamp is in another unit
CLOSING_GRACE_NS = 5_000_000_000  # vendors still change a bar for a moment after its minute
OUTSIDE_TOLERANCE_NS = DAY_NS // 2  # a US session ends after midnight UTC, so a day's file may reach over
OHLC_TOLERANCE = 1e-6  # relative; rounding at the vendor, clamped
TICK_JUMP = 0.20  # log return; smaller moves are never bad ticks
TICK_SIGMAS = 10.0
TICK_MAX_BARS = 3
TICK_LOOK_AHEAD = 5  # bars that must mostly lie at the old level after the tick
_MAD_TO_SIGMA = 1.4826
# Counted but not kept aside: an early row comes again as a whole bar, an equal row adds nothing.
NOT_QUARANTINED = ("not_closed", "duplicate")


@dataclass(frozen=True)
class Cleaned:
    """A table's bars, and its other rows.

    ``table`` has SCHEMA, sorted by (symbol, open_time), unique; ``quarantined`` has the rejected rows as they
    came plus ``reason``. ``repaired`` counts rows that stayed after a silent repair.
    """

    table: pa.Table
    rejected: dict[str, int]
    quarantined: pa.Table
    rejected_by_symbol: dict[str, dict[str, int]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)


def bar_table(symbol: str, columns: Sequence[NDArray[Any]]) -> pa.Table:
    """Return one symbol's columns, in the order of COLUMNS, as a table of SCHEMA."""
    symbols = pa.repeat(pa.scalar(symbol, pa.string()), len(columns[0]))
    return pa.table([symbols, *columns], schema=SCHEMA)


def closed_before(now_ns: int) -> int:
    """Return the time before which every bar that opens has closed."""
    return (now_ns - CLOSING_GRACE_NS) // MINUTE_NS * MINUTE_NS


def clean(
    table: pa.Table,
    *,
    now_ns: int,
    start_ns: int | None = None,
    end_ns: int | None = None,
    symbols: tuple[str, ...] | None = None,
) -> Cleaned:
    """Sort the rows of ``table`` into bars and rejects.

    Args:
        table: symbol, open_time (int64 ns) and float columns open high low close volume, in any order, with
            any values in them; other columns are ignored.
        now_ns: a bar counts as closed from 5 seconds after its minute.
        start_ns: with ``end_ns``, the requested interval; rows over 12 hours outside are rejected.
        end_ns: see ``start_ns``.
        symbols: the requested symbols; rows of others are rejected.

    Raises:
        BadAnswer: a column is missing or has a type that cannot hold such values.
    """
    raw = pl.DataFrame(_frame(table))
    frame = raw.with_columns(_reasons(now_ns, start_ns, end_ns, symbols).alias("reason"))
    frame = frame.with_row_index("row")
    good = frame.filter(pl.col("reason").is_null())
    repaired = _nonzero(
        volume_missing=good.filter(pl.col("volume").is_null() | pl.col("volume").is_nan()).height,
        ohlc_clamped=good.filter(_out_of_order(0.0)).height,
    )
    good = good.with_columns(
        pl.col("volume").fill_nan(0.0).fill_null(0.0),
        pl.max_horizontal("open", "high", "low", "close").alias("high"),
        pl.min_horizontal("open", "high", "low", "close").alias("low"),
    ).sort("symbol", "open_time", "volume", "row")

    late_reasons = _duplicates(good)
    kept = good.filter(late_reasons.is_null())
    rejects = [good.with_columns(late_reasons.alias("reason")).filter(late_reasons.is_not_null())]
    ticks = pl.Series(_bad_ticks_of_all(kept))
    rejects.append(kept.filter(ticks).with_columns(pl.lit("bad_tick").alias("reason")))
    rejects.append(frame.filter(pl.col("reason").is_not_null()))
    bars = kept.filter(~ticks).select(SCHEMA.names)

    rejected = pl.concat([part.select("row", "symbol", "reason") for part in rejects]).sort("row")
    by_symbol: dict[str, dict[str, int]] = {}
    for symbol, reason, count in rejected.group_by("symbol", "reason").len().sort("symbol", "reason").rows():
        by_symbol.setdefault(symbol or "", {})[reason] = count
    aside = rejected.filter(~pl.col("reason").is_in(NOT_QUARANTINED))
    quarantined = table.select(SCHEMA.names).take(pa.array(aside["row"].to_numpy()))
    quarantined = quarantined.append_column("reason", pa.array(aside["reason"].to_list(), pa.string()))
    return Cleaned(
        bars.to_arrow().cast(SCHEMA),
        dict(sorted(Counter(rejected["reason"].to_list()).items())),
        quarantined,
        by_symbol,
        repaired,
    )


def bad_ticks(
    open_time: NDArray[np.int64], open_price: NDArray[np.float64], close: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Mark the bars of one symbol that leave the price level and come back within 3 bars.

    A move is suspect above 20 % and above 10 robust standard deviations of its UTC day's one-bar log returns;
    it is bad only when the level returns (to a quarter of the move) and most of the next 5 bars stay there. A
    move that stays is never marked, nor is the first or last bar, since nothing proves them wrong; a caller
    that knows the neighbouring days can call again with them.
    """
    bad = np.zeros(len(close), np.bool_)
    if len(close) < 3:
        return bad
    log_open, log_close = np.log(open_price), np.log(close)
    moves = np.maximum(np.abs(np.diff(log_close)), np.abs(log_open[1:] - log_close[:-1]))
    suspects = np.flatnonzero(moves > TICK_JUMP) + 1
    day = open_time // DAY_NS
    thresholds: dict[int, float] = {}
    resume, resumed_level = -1, 0.0
    for i in suspects.tolist():  # rare; all else is vectorised
        if i < resume:
            continue
        level = resumed_level if i == resume else log_close[i - 1]
        today = int(day[i])
        if today not in thresholds:
            first, last = np.searchsorted(day, (today, today + 1))
            returns = np.abs(np.diff(log_close[first:last]))
            sigma = _MAD_TO_SIGMA * float(np.median(returns)) if len(returns) else 0.0
            thresholds[today] = max(TICK_JUMP, TICK_SIGMAS * sigma)
        length = _tick_length(i, level, log_open, log_close, thresholds[today])
        if length:
            bad[i : i + length] = True
            resume, resumed_level = i + length, level
    return bad


def _tick_length(
    i: int, level: float, log_open: NDArray[np.float64], log_close: NDArray[np.float64], threshold: float
) -> int:
    """Return how many bars from ``i`` on are one bad tick away from ``level``, 0 for none."""
    away = abs(log_close[i] - level)
    if away <= threshold:  # the close is fine; is the open alone off?
        opened = abs(log_open[i] - level)
        lone = opened > threshold and abs(log_open[i] - log_close[i]) > threshold and away <= opened / 4
        return 1 if lone and _stays(i, level, opened, log_close) else 0
    for length in range(1, TICK_MAX_BARS + 1):
        back = i + length
        if back >= len(log_close):
            return 0
        distance = abs(log_close[back] - level)
        if distance <= away / 4:
            return length if _stays(back, level, away, log_close) else 0
        if distance <= threshold:
            return 0  # neither away nor back: a real, wild move
    return 0


def _stays(back: int, level: float, away: float, log_close: NDArray[np.float64]) -> bool:
    after = np.abs(log_close[back : back + TICK_LOOK_AHEAD] - level)
    return bool(2 * np.count_nonzero(after <= away / 2) > len(after))


def _bad_ticks_of_all(kept: pl.DataFrame) -> NDArray[np.bool_]:
    """Run bad_ticks for each symbol of a frame sorted by (symbol, open_time)."""
    marks = np.zeros(len(kept), np.bool_)
    if not len(kept):
        return marks
    columns = [kept[name].to_numpy() for name in ("open_time", "open", "close")]
    lengths = kept["symbol"].rle().struct.field("len").to_numpy()
    ends = np.cumsum(lengths, dtype=np.int64)
    for first, last in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        marks[first:last] = bad_ticks(*(column[first:last] for column in columns))
    return marks


def _frame(table: pa.Table) -> pl.DataFrame:
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise BadAnswer(
            f"expected columns {', '.join(SCHEMA.names)}; {', '.join(missing)} missing, "
            f"got {', '.join(table.column_names) or 'none'}; these are not minute bars"
        )
    types = {"symbol": pl.String, "open_time": pl.Int64} | dict.fromkeys(COLUMNS[1:], pl.Float64)
    try:
        frame = pl.DataFrame(pl.from_arrow(table.select(SCHEMA.names)))
        return frame.with_columns(pl.col(name).cast(kind, strict=False) for name, kind in types.items())
    except (pl.exceptions.PolarsError, pa.ArrowException) as error:
        kinds = ", ".join(f"{name} {table.schema.field(name).type}" for name in SCHEMA.names)
        raise BadAnswer(f"expected text, int64 and float columns, got {kinds}") from error


def _out_of_order(tolerance: float) -> pl.Expr:
    slack = tolerance * pl.max_horizontal("open", "close")
    above = pl.max_horizontal("open", "close", "low") > pl.col("high") + slack
    return above | (pl.min_horizontal("open", "close") < pl.col("low") - slack)


def _reasons(
    now_ns: int, start_ns: int | None, end_ns: int | None, symbols: tuple[str, ...] | None
) -> pl.Expr:
    """Return the first reason why a row by itself is not a bar, null where it is one."""
    time = pl.col("open_time")
    prices = [pl.col(name) for name in COLUMNS[1:5]]
    checks: list[tuple[str, pl.Expr]] = [
        ("no_symbol", pl.col("symbol").is_null() | (pl.col("symbol") == "")),
        ("no_time", time.is_null()),
        ("out_of_range", time < EARLIEST_NS),
        ("future", time > now_ns),
        ("not_closed", time + MINUTE_NS > now_ns - CLOSING_GRACE_NS),
        ("misaligned", time % MINUTE_NS != 0),
        ("not_finite", pl.any_horizontal(~price.is_finite().fill_null(False) for price in prices)),
        ("not_finite", pl.col("volume").is_infinite().fill_null(False)),
        ("not_positive", pl.any_horizontal(price <= 0 for price in prices)),
        ("negative_volume", pl.col("volume").fill_nan(0.0).fill_null(0.0) < 0),
        ("ohlc_broken", _out_of_order(OHLC_TOLERANCE)),
    ]
    if symbols is not None:
        checks.insert(1, ("wrong_symbol", ~pl.col("symbol").is_in(list(symbols))))
    if start_ns is not None and end_ns is not None:
        inside = (time >= start_ns - OUTSIDE_TOLERANCE_NS) & (time < end_ns + OUTSIDE_TOLERANCE_NS)
        checks.insert(-6, ("outside_interval", ~inside))
    return pl.coalesce(pl.when(broken).then(pl.lit(reason)) for reason, broken in checks)


def _duplicates(good: pl.DataFrame) -> pl.Series:
    """Return why rows lose their minute, null where they keep it: the last in (volume, arrival) order does."""
    if not len(good):
        return pl.Series([], dtype=pl.String)
    key = pl.struct("symbol", "open_time")
    if good.select((key != key.shift(-1)).fill_null(True).all()).item():
        return pl.Series([None] * len(good), dtype=pl.String)
    keys = ["symbol", "open_time"]
    same = pl.all_horizontal(pl.col(name) == pl.col(name).last().over(keys) for name in COLUMNS[1:])
    loses = pl.col("row") != pl.col("row").last().over(keys)
    reason = pl.when(loses & same).then(pl.lit("duplicate")).when(loses).then(pl.lit("conflicting"))
    return good.select(reason.alias("reason")).to_series()


def _nonzero(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
