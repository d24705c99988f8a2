"""Constant and pegged series: recognised by their prices, whatever slips, and left out before training."""

from __future__ import annotations

import datetime as dt
import math
from statistics import median

import numpy as np
import polars as pl
import pytest
from bar_tables import DAY_NS, flat, ns

from data_sources.bars import COLUMNS, HOUR_NS, MINUTE_NS, Bars
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.pegged import PEGGED, hourly_medians, ranges_of, stands_still
from data_sources.sources import DataRequest
from data_sources.universe import members
from data_sources.vendors.polygon import GLOBAL_CRYPTO, US_STOCKS
from data_sources.vendors.polygon_days import read_day
from tests.data_sources.vendors.s3_server import day_file

START = ns("2026-09-01 00:00")
NUM_BARS = 16 * 1440
RANDOM = np.random.default_rng(5)


def walk(sigma: float, num_bars: int = NUM_BARS) -> np.ndarray:
    return 100 * np.exp(np.cumsum(RANDOM.normal(0, sigma, num_bars)))


def then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.concatenate([first, first[-1] / second[0] * second])


def with_slip(prices: np.ndarray) -> np.ndarray:
    slip = np.concatenate([np.linspace(0, 0.1, 45), np.linspace(0.1, 0, 600)])
    place = 6 * 1440
    return np.concatenate([prices[:place], prices[place : place + 645] - slip, prices[place + 645 :]])


def with_print(prices: np.ndarray, factor: float) -> np.ndarray:
    return np.where(np.arange(len(prices)) == 5000, factor * prices, prices)


def steps_of(size: float) -> np.ndarray:
    """Return a price near 1 that changes by ``size`` now and then."""
    return 1 + size * np.repeat(RANDOM.integers(-1, 2, NUM_BARS // 96), 96)


PEGS = {
    "constant": np.full(NUM_BARS, 7.75),
    "constant but for one print": with_print(np.full(NUM_BARS, 7.75), 10.0),
    "in steps": steps_of(1e-4),
    "with a slip of a day": with_slip(steps_of(1e-4)),
    "with jitter": 1 + RANDOM.uniform(-3e-3, 3e-3, NUM_BARS),
    "between two levels": 1 + 4e-3 * (RANDOM.random(NUM_BARS) < 0.2),
    "crawling": 1 + 2e-4 * np.arange(NUM_BARS) / 1440,
    "constant, and moving on the last day": then(np.full(15 * 1440, 3.0), walk(6e-4, 1440)),
}
MOVING = {
    "a coin": walk(6e-4),
    "a currency": walk(0.0045 / math.sqrt(1440)),
    "the calmest stock": walk(0.003 / math.sqrt(1440)),
    "one print away": with_print(walk(6e-4), 10.0),
    "fifty times as volatile": walk(0.03),
    "in coarse ticks": np.round(walk(1e-3) / 4) * 4,
    "frozen for most of its time": then(np.full(11 * 1440, 3.0), walk(6e-4, 5 * 1440)),
    "with a constant tail": then(walk(6e-4, 7 * 1440), np.full(9 * 1440, 3.0)),
}


def bars_of(prices: np.ndarray, symbol: str = "XUSDT") -> Bars:
    time = START + np.arange(len(prices)) * MINUTE_NS
    return Bars(symbol, "crypto", time, prices, prices, prices, prices, np.ones(len(prices)))


@pytest.mark.parametrize("name", PEGS)
def test_a_pegged_series_is_recognised(name: str) -> None:
    assert stands_still(bars_of(PEGS[name])).startswith(PEGGED)


@pytest.mark.parametrize("name", MOVING)
def test_a_series_that_moves_is_none(name: str) -> None:
    assert stands_still(bars_of(MOVING[name])) == ""


def test_the_ranges_are_those_of_a_plain_reference() -> None:
    for prices in (*PEGS.values(), *MOVING.values()):
        bars = bars_of(prices)
        keep = np.flatnonzero(RANDOM.random(len(prices)) < 0.01)  # with holes, too
        for series in (bars, Bars("X", "crypto", *(getattr(bars, c)[keep] for c in COLUMNS))):
            by_hour: dict[int, list[float]] = {}
            for time, close in zip(series.open_time.tolist(), series.close.tolist(), strict=True):
                by_hour.setdefault(time // HOUR_NS, []).append(close)
            expected: dict[int, float] = {}
            for span in {hour // 168 for hour in by_hour}:
                hours = [hour for hour in by_hour if hour // 168 == span]
                if len({hour // 24 for hour in hours}) >= 5 and len(hours) >= 4:
                    low, high = np.quantile([median(by_hour[hour]) for hour in hours], (0.1, 0.9))
                    expected[span] = math.log(high / low)
            hours = hourly_medians(pl.DataFrame({"open_time": series.open_time, "close": series.close}))
            found = dict(ranges_of(hours, 7, 5).select("span", "range").iter_rows())
            assert found == pytest.approx(expected, abs=1e-12)


def test_too_few_hours_prove_nothing() -> None:
    assert stands_still(bars_of(np.full(23 * 60, 1.0))) == ""
    assert stands_still(bars_of(np.full(24 * 60, 1.0))) == f"{PEGGED}: one price throughout"
    assert stands_still(bars_of(np.empty(0))) == ""


def test_a_pegged_symbol_is_dropped_with_the_figures_and_the_others_stay(lake: Lake) -> None:
    end = START + NUM_BARS * MINUTE_NS
    for symbol, prices in (
        ("SSSUSDT", with_slip(steps_of(1e-4))),
        ("AAAUSDT", MOVING["a coin"]),
        ("KKKUSDT", np.ones(999)),
    ):
        table = flat(prices, START, symbol)
        lake.write(
            "binance", symbol, "u", table, key="u", version="", start_ns=START, end_ns=end, symbols=[symbol],
            now_ns=end + DAY_NS,
        )  # fmt: skip
    pairs = {"binance_pairs": ("AAAUSDT", "SSSUSDT", "KKKUSDT")}
    data = load(lake, DataRequest(("binance",), pairs, START, end))
    assert [bars.symbol for bars in data.bars] == ["AAAUSDT"]
    assert data.dropped == {
        "SSSUSDT": "pegged or constant: within 0.1 % in 15 of 16 days",
        "KKKUSDT": "999 bars, fewer than 2,000",
    }
    kept = load(lake, DataRequest(("binance",), pairs, START, end, keep_pegged=True))
    assert [bars.symbol for bars in kept.bars] == ["AAAUSDT", "SSSUSDT"]
    assert kept.fingerprint == data.fingerprint


# --------------------------------------------------------------------------- top:N


def lines_of(ticker: str, day: dt.date, prices: np.ndarray, volume: float) -> list[str]:
    start_ns = int(dt.datetime.combine(day, dt.time(14), dt.UTC).timestamp()) * 10**9
    return [
        f"{ticker},{volume},{price},{price},{price},{price},{start_ns + minute * MINUTE_NS},5"
        for minute, price in enumerate(prices.tolist())
    ]


def ranking(day: dt.date, slip: bool = False, minutes: int = 300) -> tuple[dict[str, int], set[str]]:
    """Return what each of the day's 3 largest coins traded, and the symbols whose rows are kept."""
    at_par = np.round(1 + 1e-4 * RANDOM.integers(-1, 2, minutes), 4)
    walks = {"X:BTC-USD": (900 * walk(6e-4, minutes), 2.0), "X:ETH-USD": (30 * walk(6e-4, minutes), 40.0)}
    usdt = at_par - 0.1 * np.abs(np.sin(np.arange(minutes) / 60)) if slip else at_par
    coins = walks | {
        "X:USDT-USD": (usdt, 9e5),
        "X:USDC-USD": (at_par, 7e5),
        "X:OLD-USD": (walk(1e-3, 20), 1.0),
    }
    coins["X:DUST-USD"] = (np.full(minutes, 3.0), 0.1)  # still, but not large
    lines = [line for coin, (prices, volume) in coins.items() for line in lines_of(coin, day, prices, volume)]
    span = GLOBAL_CRYPTO.interval(day)
    table, dollars = read_day(day_file(lines), "key", [], *span, num_largest=3, ending=GLOBAL_CRYPTO.ending)
    return dollars, set(table["symbol"].to_pylist())


@pytest.mark.parametrize("minutes", [120, 300])
def test_what_stands_still_is_not_among_the_largest_of_a_day(minutes: int) -> None:
    dollars, kept = ranking(dt.date(2026, 3, 4), minutes=minutes)
    assert list(dollars) == ["X:BTC-USD", "X:ETH-USD", "X:OLD-USD", "X:USDT-USD", "X:USDC-USD"]
    assert [amount > 0 for amount in dollars.values()] == [True] * 3 + [False] * 2
    assert kept == set(dollars)  # so that a member whose day was still has its bars


def test_still_stocks_are_not_chosen_and_quiet_minutes_of_others_prove_nothing() -> None:
    day = dt.date(2026, 3, 4)
    lines = lines_of("BILL", day, np.full(300, 91.5), 9e5) + lines_of("AAPL", day, 2 * walk(5e-4, 300), 100)
    lines += lines_of("HALT", day, np.full(30, 50.0), 9e5)
    _, dollars = read_day(day_file(lines), "key", [], *US_STOCKS.interval(day), num_largest=2)
    assert list(dollars) == ["HALT", "AAPL", "BILL"] and dollars["BILL"] < 0 < dollars["AAPL"]


def test_members_move_on_most_days_even_if_a_slip_made_them_the_largest(lake: Lake) -> None:
    days = [dt.date(2026, 3, 3) + dt.timedelta(days=age) for age in range(8)]
    for day in days:
        dollars, _ = ranking(day, slip=day.day in (5, 6))
        start_ns, end_ns = GLOBAL_CRYPTO.interval(day)
        lake.write(
            "polygon", "global_crypto", str(day), flat([], START), key="", version="", start_ns=start_ns,
            end_ns=end_ns, symbols=[*dollars, "top:3"], now_ns=end_ns + DAY_NS, dollar_volume=dollars,
        )  # fmt: skip
    start_ns, end_ns = ns("2026-04-01 00:00"), ns("2026-05-01 00:00")
    assert list(members(lake, "polygon", "global_crypto", 3, start_ns, end_ns)) == [
        "X:BTC-USD", "X:ETH-USD", "X:OLD-USD",
    ]  # fmt: skip
    assert ranking(days[2], slip=True)[0]["X:USDT-USD"] > 0 > ranking(days[0])[0]["X:USDT-USD"]
