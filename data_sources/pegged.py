"""Series that stand still: constant ones, and those pegged to a price, such as stablecoins.

Nothing is to be earned in them after costs, and a scale that is measured on them turns their one slip into the
largest event of the market. Prices show it, not names: a random walk's range grows with the root of time, and here
hourly prices stay within 0.1 % for a day, 0.26 % for 7 days or 0.53 % for 28 days, three quarters of the time. Of
32 real stocks and coins (2018 to 2025) the calmest had over twice that range in the quietest quarter of its days.
The median of each hour, and the 10 % and 90 % quantiles of a span's hours, disregard slips, and prints that jump
between two levels.
"""

from __future__ import annotations

import math

import polars as pl

from data_sources.bars import DAY_NS, HOUR_NS, Bars

PEGGED = "pegged or constant"  # how every reason begins
STILL_RANGE = 1e-3  # of a day; of n days, the root of n times as much
STILL_SHARE = 0.75  # of the spans
SPANS = {1: 1, 7: 5, 28: 18}  # days of a span: on how many of them there must be bars
LEAST_LONG_SPANS = 2  # a single one may be quiet by chance
LEAST_HOURS_OF_SPAN = 4
LEAST_HOURS = 24  # of a series; fewer prove nothing
AT_PAR = (0.99, 1.01)


def stands_still(bars: Bars) -> str:
    """Return why a series counts as constant or pegged, "" if it does not."""
    hours = hourly_medians(pl.DataFrame({"open_time": bars.open_time, "close": bars.close}))
    if len(hours) < LEAST_HOURS:
        return ""
    if bars.low.min() == bars.high.max():
        return f"{PEGGED}: one price throughout"
    for num_days, least_days in SPANS.items():
        limit = STILL_RANGE * math.sqrt(num_days)
        ranges = ranges_of(hours, num_days, least_days)["range"]
        num_still = int((ranges < limit).sum())
        enough = len(ranges) >= (1 if num_days == 1 else LEAST_LONG_SPANS)
        if enough and num_still >= STILL_SHARE * len(ranges):
            spans = "days" if num_days == 1 else f"spans of {num_days} days"
            return f"{PEGGED}: within {100 * limit:.2g} % in {num_still} of {len(ranges)} {spans}"
    return ""


def still_symbols(day: pl.DataFrame, has_par: bool) -> set[str]:
    """Return the symbols whose price stood still in a day's rows (symbol, open_time, close above zero).

    Few hours prove nothing; except, with ``has_par``, of what is worth one unit of the money that it is quoted in.
    """
    ranges = ranges_of(hourly_medians(day, "symbol"), 1, 1, "symbol")
    still = ranges.group_by("symbol").agg((pl.col("range") < STILL_RANGE).all().alias("is_still"))
    found = set(still.filter("is_still")["symbol"])
    if has_par:
        price = pl.col("close")
        low, high = price.quantile(0.1, "linear"), price.quantile(0.9, "linear")
        is_par = price.median().is_between(*AT_PAR) & ((high / low).log() < STILL_RANGE)
        found.update(day.group_by("symbol").agg(is_par.alias("is_par")).filter("is_par")["symbol"])
    return found


def hourly_medians(frame: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Return the median close of every hour that has one: columns ``by``, hour, close."""
    hour = (pl.col("open_time") // HOUR_NS).alias("hour")
    return frame.group_by(*by, hour).agg(pl.col("close").median())


def ranges_of(hours: pl.DataFrame, num_days: int, least_days: int, *by: str) -> pl.DataFrame:
    """Return the ranges of hourly prices in spans of ``num_days``: columns ``by``, span, range.

    The range is the log of the 90 % over the 10 % quantile. Spans with bars on under ``least_days`` days, or in
    under four hours, are left out.
    """
    per_day, price = DAY_NS // HOUR_NS, pl.col("close")
    spans = hours.group_by(*by, (pl.col("hour") // (per_day * num_days)).alias("span")).agg(
        pl.len().alias("num_hours"),
        (pl.col("hour") // per_day).n_unique().alias("num_days"),
        (price.quantile(0.9, "linear") / price.quantile(0.1, "linear")).log().alias("range"),
    )
    enough = (pl.col("num_hours") >= LEAST_HOURS_OF_SPAN) & (pl.col("num_days") >= least_days)
    return spans.filter(enough).drop("num_hours", "num_days")
