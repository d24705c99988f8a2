"""Which rows of a vendor's answer are bars: ordered checks, each counted; no row is dropped without a reason.

The order: place (symbol, time), values, duplicates. Values come before duplicates so that of two rows for one
minute a broken one never wins over a good one. All of that is decided by the rows of one minute alone.
Order flow is judged last, and by itself: a bar stays without what cannot be its flow. See docs/data.md.
``bad_ticks``, which needs the bars before a row, runs when a series is loaded: parts may begin anywhere. No check
looks at a later row, so that what was a bar when it was new stays one.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, DAY_NS, FIRST_DATE, FLOW_COLUMNS, HOUR_NS, MINUTE_NS
from data_sources.errors import BadAnswer

SCHEMA = pa.schema(
    [("symbol", pa.string()), ("open_time", pa.int64())] + [(name, pa.float64()) for name in COLUMNS[1:]]
)
# With order flow: one column of it or both, null where the vendor does not have it.
FLOW_SCHEMA = pa.schema([*SCHEMA, *((name, pa.float64()) for name in FLOW_COLUMNS)])
EARLIEST_NS = (FIRST_DATE - datetime.date(1970, 1, 1)).days * DAY_NS  # an older stamp is in another unit
CLOSING_GRACE_NS = 5_000_000_000  # vendors still change a bar for a moment after its minute
OUTSIDE_TOLERANCE_NS = DAY_NS // 2  # a US session ends after midnight UTC, so a day's file may reach over
OHLC_TOLERANCE = 1e-6  # relative; rounding at the vendor, clamped
# Prices per unit in any currency: a coin of 1e-9 bitcoin, a share of a million dollars, an index in rupiah.
LEAST_PRICE, LARGEST_PRICE = 1e-12, 1e12
LARGEST_VOLUME = 1e18
MOST_TRADES = 1e9  # in one minute
LARGEST_RANGE = 100.0  # high / low of one minute; exchanges bust such trades
# Of the taker's part above the volume: relative, and the last of the 8 decimals that crypto exchanges give.
TAKER_TOLERANCE, TAKER_DECIMAL = 1e-6, 1e-8
BAD_TICK = "bad_tick"
TICK_FACTOR = 2.0
TICK_LEVEL_BARS = 30  # earlier bars, whose opens and closes are the level
TICK_CONFIRMED_BY = 3  # rows in a row at a new level, before the one that is a bar again
TICK_GAP_NS = HOUR_NS  # prices before a longer gap prove nothing
REVISED = (BAD_TICK, "out_of_range")  # earlier versions set more rows aside for these
# Counted but not kept aside: an early row comes again as a whole bar, an equal row adds nothing.
NOT_QUARANTINED = ("not_closed", "duplicate")


@dataclass(frozen=True)
class Cleaned:
    """A table's bars, and its other rows.

    ``table`` has SCHEMA and those columns of the flow that have a value, sorted by (symbol, open_time), unique;
    ``quarantined`` has the rejected rows as they came plus ``reason``, and the bars that lost their flow alone,
    which ``flow_rejected`` counts by symbol. ``repaired`` counts rows that stayed after a silent repair.
    """

    table: pa.Table
    rejected: dict[str, int]
    quarantined: pa.Table
    rejected_by_symbol: dict[str, dict[str, int]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    flow_rejected: dict[str, dict[str, int]] = field(default_factory=dict)


def bar_table(symbol: str, columns: Sequence[NDArray[Any]], **flow: NDArray[Any]) -> pa.Table:
    """Return one symbol's columns, in the order of COLUMNS, as a table of SCHEMA.

    ``flow`` may add trades and taker_buy_volume, NaN where they are not known: null in the table.
    """
    symbols = pa.repeat(pa.scalar(symbol, pa.string()), len(columns[0]))
    table = pa.table([symbols, *columns], schema=SCHEMA)
    for name, values in flow.items():
        table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
    return table


def flow_of(table: pa.Table) -> list[str]:
    """Return the columns of the flow that a table has."""
    return [name for name in FLOW_COLUMNS if name in table.column_names]


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
        table: symbol, open_time (int64 ns) and float columns open high low close volume, perhaps trades and
            taker_buy_volume, in any order, with any values in them; other columns are ignored. Null flow is not
            known, NaN is a broken value.
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
    counts = good.select(
        volume_missing=(pl.col("volume").is_null() | pl.col("volume").is_nan()).sum(),
        ohlc_clamped=_out_of_order(0.0).sum(),
    )
    repaired = _nonzero(**counts.row(0, named=True))
    good = good.with_columns(
        pl.col("volume").fill_nan(0.0).fill_null(0.0),
        pl.max_horizontal("open", "high", "low", "close").alias("high"),
        pl.min_horizontal("open", "high", "low", "close").alias("low"),
    ).sort("symbol", "open_time", "volume", "row")

    late_reasons = _duplicates(good)
    kept = good.filter(late_reasons.is_null())
    # As a rule no row is rejected: every step costs a small answer half a millisecond.
    rejected = aside = frame.clear().select("row", "symbol", "reason")
    by_symbol: dict[str, dict[str, int]] = {}
    if len(kept) < len(frame):
        rejects = [good.with_columns(late_reasons.alias("reason")).filter(late_reasons.is_not_null())]
        rejects.append(frame.filter(pl.col("reason").is_not_null()))
        rejected = pl.concat([part.select("row", "symbol", "reason") for part in rejects]).sort("row")
        for symbol, reason, count in _counted(rejected):
            by_symbol.setdefault(symbol or "", {})[reason] = count
        aside = rejected.filter(~pl.col("reason").is_in(NOT_QUARANTINED))
    names = flow_of(table)
    flow_rejected: dict[str, dict[str, int]] = {}
    if names:
        kept, lost, clamped = _clean_flow(kept, names, good if len(kept) < len(good) else None)
        repaired |= _nonzero(taker_clamped=clamped)
        if lost is not None:
            for symbol, reason, count in _counted(lost):
                flow_rejected.setdefault(symbol, {})[reason] = count
            aside = pl.concat([aside, lost]).sort("row")
    quarantined = table.select([*SCHEMA.names, *names]).take(pa.array(aside["row"].to_numpy()))
    quarantined = quarantined.append_column("reason", pa.array(aside["reason"].to_list(), pa.string()))
    names = [name for name in names if kept[name].null_count() < len(kept)]
    schema = pa.schema([FLOW_SCHEMA.field(name) for name in (*SCHEMA.names, *names)])
    return Cleaned(
        kept.select(schema.names).to_arrow().cast(schema),
        dict(sorted(Counter(rejected["reason"].to_list()).items())),
        quarantined,
        by_symbol,
        repaired,
        flow_rejected,
    )


def _clean_flow(
    kept: pl.DataFrame, names: Sequence[str], rivals: pl.DataFrame | None
) -> tuple[pl.DataFrame, pl.DataFrame | None, int]:
    """Take from bars the flow that cannot be theirs, all of it: one wrong figure says that the row is mixed up.

    Args:
        kept: the bars.
        names: of the flow's columns.
        rivals: the bars with the rows that lost their minutes to them; None: no row did.

    Returns:
        The bars; (row, symbol, reason) of those that lost their flow, None if none did; how many takers' parts
        were rounded down.
    """
    if rivals is not None:  # equal bars with different flow: which is right?
        keys = ["symbol", "open_time"]
        same = pl.all_horizontal(pl.col(name) == pl.col(name).last().over(keys) for name in COLUMNS[1:])
        differs = pl.any_horizontal(pl.col(name) != pl.col(name).last().over(keys) for name in names)
        mixed = rivals.filter((same & differs).fill_null(False)).select(keys).unique()
        kept = kept.join(mixed.with_columns(pl.lit(True).alias("mixed")), keys, "left", maintain_order="left")
    kept = kept.with_columns(_flow_reasons(tuple(names), rivals is not None).alias("reason"))
    is_sound, taker, volume = pl.col("reason").is_null(), pl.col("taker_buy_volume"), pl.col("volume")
    is_above = taker > volume if "taker_buy_volume" in names else pl.lit(False)
    num_lost, clamped = kept.select(lost=(~is_sound).sum(), clamped=(is_sound & is_above).sum()).row(0)
    lost = None
    if num_lost:
        lost = kept.filter(~is_sound).select("row", "symbol", "reason")
        kept = kept.with_columns(pl.when(is_sound).then(pl.col(name)).alias(name) for name in names)
    if clamped:
        kept = kept.with_columns(pl.when(is_above).then(volume).otherwise(taker).alias("taker_buy_volume"))
    return kept, lost, clamped


@lru_cache  # half a millisecond, and every answer asks for the same
def _flow_reasons(names: tuple[str, ...], has_rivals: bool) -> pl.Expr:
    """Return the first reason why a bar's flow is not its own, null where it is."""
    taker, volume = pl.col("taker_buy_volume"), pl.col("volume")
    checks = [("flow_not_finite", ~pl.col(name).is_finite()) for name in names]
    checks += [("flow_negative", pl.col(name) < 0) for name in names]
    if "trades" in names:
        trades = pl.col("trades")
        checks.append(("trades_not_whole", trades != trades.floor()))
        checks.append(("trades_absurd", trades > MOST_TRADES))
        checks.append(("trades_without_volume", (trades > 0) & (volume == 0)))
        checks.append(("volume_without_trades", (trades == 0) & (volume > 0)))
    if "taker_buy_volume" in names:
        highest = volume * (1 + TAKER_TOLERANCE) + TAKER_DECIMAL
        checks.append(("taker_above_volume", taker > pl.when(volume > 0).then(highest).otherwise(0.0)))
    if has_rivals:
        checks.append(("flow_conflicting", pl.col("mixed")))
    return pl.coalesce(pl.when(broken).then(pl.lit(reason)) for reason, broken in checks)


def bad_ticks(
    open_time: NDArray[np.int64], open_price: NDArray[np.float64], close: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Mark rows of one symbol that open where nothing was traded lately: orders would fill at that price.

    A row is marked if its open is under half or over double of all opens and closes of the 30 bars before it, the
    newest of which is at most an hour old. If three rows before it were marked and opened within that factor of
    each other and of it, the level is confirmed and the row is a bar. So a crash that trades down is never marked
    (prices move within bars: each opens where the last closed), an isolated print always is, and after a jump that
    stays three rows are lost.

    Whether a row is marked depends on rows up to it alone: marks never change when later rows arrive.

    Args:
        open_time: (num_rows,) int64 ns, ascending.
        open_price: (num_rows,) above zero.
        close: (num_rows,) above zero.
    """
    marked = np.zeros(len(close), np.bool_)
    low, high = np.minimum(open_price, close), np.maximum(open_price, close)
    # Until a row is marked, the bars before a row are the rows before it.
    suspects = np.flatnonzero(
        (open_price * TICK_FACTOR < _of_rows_before(low, np.minimum))
        | (open_price > _of_rows_before(high, np.maximum) * TICK_FACTOR)
    ).tolist()
    done = 0
    for suspect in suspects:  # rare; all else is vectorised
        if suspect < done:
            continue
        level = list(range(max(0, suspect - TICK_LEVEL_BARS), suspect))  # the bars to compare with
        waiting: list[int] = []  # marked rows in a row, at one level
        i, last_marked = suspect, suspect
        while i < len(close) and i - last_marked <= TICK_LEVEL_BARS:
            price = open_price[i]
            is_recent = bool(level) and open_time[i] - open_time[level[-1]] <= TICK_GAP_NS
            if is_recent and not _is_near(price, low[level], high[level]):
                if waiting and not _is_near(price, open_price[waiting], open_price[waiting]):
                    waiting.clear()
                if len(waiting) < TICK_CONFIRMED_BY:
                    waiting.append(i)
                    marked[i], last_marked = True, i
                    i += 1
                    continue
            waiting.clear()
            level = [*level[1 - TICK_LEVEL_BARS :], i]
            i += 1
        done = i
    return marked


def _of_rows_before(values: NDArray[np.float64], best: np.ufunc) -> NDArray[np.float64]:
    """Return the least or largest of the TICK_LEVEL_BARS values before each one; the first one's is itself."""
    result = np.append(values[:1], values[:-1])
    width = 1
    while width < TICK_LEVEL_BARS:
        step = min(width, TICK_LEVEL_BARS - width)
        result[step:] = best(result[step:], result[:-step])
        width += step
    return result


def _is_near(price: float, low: NDArray[np.float64], high: NDArray[np.float64]) -> bool:
    return bool(low.min() <= price * TICK_FACTOR and price <= high.max() * TICK_FACTOR)


def _frame(table: pa.Table) -> pl.DataFrame:
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise BadAnswer(
            f"expected columns {', '.join(SCHEMA.names)}; {', '.join(missing)} missing, "
            f"got {', '.join(table.column_names) or 'none'}; these are not minute bars"
        )
    numbers = (*COLUMNS[1:], *flow_of(table))
    types = {"symbol": pl.String, "open_time": pl.Int64} | dict.fromkeys(numbers, pl.Float64)
    try:
        frame = pl.DataFrame(pl.from_arrow(table.select(list(types))))
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
    checks = list(_row_checks())
    checks[3:3] = [("future", time > now_ns), ("not_closed", time + MINUTE_NS > now_ns - CLOSING_GRACE_NS)]
    if start_ns is not None and end_ns is not None:
        inside = (time >= start_ns - OUTSIDE_TOLERANCE_NS) & (time < end_ns + OUTSIDE_TOLERANCE_NS)
        checks.insert(5, ("outside_interval", ~inside))
    if symbols is not None:
        checks.insert(1, ("wrong_symbol", ~pl.col("symbol").is_in(list(symbols))))
    return pl.coalesce(pl.when(broken).then(pl.lit(reason)) for reason, broken in checks)


@lru_cache  # they are the same for every answer
def _row_checks() -> tuple[tuple[str, pl.Expr], ...]:
    """Return the checks of a row that need neither the time nor what was asked for, in their order."""
    time = pl.col("open_time")
    prices = [pl.col(name) for name in COLUMNS[1:5]]
    return (
        ("no_symbol", pl.col("symbol").is_null() | (pl.col("symbol") == "")),
        ("no_time", time.is_null()),
        ("out_of_range", time < EARLIEST_NS),
        ("misaligned", time % MINUTE_NS != 0),
        ("not_finite", pl.any_horizontal(~price.is_finite().fill_null(False) for price in prices)),
        ("not_finite", pl.col("volume").is_infinite().fill_null(False)),
        ("not_positive", pl.any_horizontal(price <= 0 for price in prices)),
        ("negative_volume", pl.col("volume").fill_nan(0.0).fill_null(0.0) < 0),
        ("absurd", pl.any_horizontal(~price.is_between(LEAST_PRICE, LARGEST_PRICE) for price in prices)),
        ("absurd", pl.col("volume").fill_nan(0.0).fill_null(0.0) > LARGEST_VOLUME),
        ("ohlc_broken", _out_of_order(OHLC_TOLERANCE)),
        ("absurd", pl.col("high") > LARGEST_RANGE * pl.col("low")),
    )


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


def _counted(rows: pl.DataFrame) -> list[tuple[Any, ...]]:
    """Return (symbol, reason, number of rows), sorted."""
    return rows.group_by("symbol", "reason").len().sort("symbol", "reason").rows()


def _nonzero(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
