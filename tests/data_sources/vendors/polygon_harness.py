"""Shared by Polygon's tests: made-up days, a recorded refresh, and the lake's contents."""

from __future__ import annotations

import datetime as dt
import threading

from data_sources.lake.lake import Lake
from data_sources.vendors.polygon_refresh import Polygon
from tests.data_sources.bar_tables import job_for, read
from tests.data_sources.vendors.s3_server import STOCKS, S3Server, day_file, key_of

KEY_ID, SECRET = "AKIAHIDDENHIDDEN", "hidden/secret+hidden"
DAYS = [dt.date(2026, 11, day) for day in (16, 17, 18, 19, 20)]  # Monday to Friday
OPEN = dt.time(14, 30)  # 09:30 New York in November, UTC
START_NS, END_NS, NOW_NS = (
    int(dt.datetime(2026, month, day, tzinfo=dt.UTC).timestamp()) * 10**9
    for month, day in ((11, 1), (11, 22), (11, 22))
)
NUM_BARS = 30


class Recorder:
    """A Progress that records its calls."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.units = self.num_bytes = 0
        self.warnings: list[str] = []
        self.summary = ""
        self._lock = threading.Lock()

    def start(self, source: str, what: str, total: int | None) -> None:
        self.total = total

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        with self._lock:
            self.units += units
            self.num_bytes += num_bytes

    def finish(self, source: str, summary: str) -> None:
        self.summary = summary

    def warn(self, source: str, message: str) -> None:
        self.warnings.append(message)


def stamp_of(day: dt.date, minute: int) -> int:
    return int((dt.datetime.combine(day, OPEN, dt.UTC) + dt.timedelta(minutes=minute)).timestamp()) * 10**9


def price_of(ticker: str, day: dt.date, minute: int) -> float:
    return round(100 + sum(map(ord, ticker)) % 50 + day.day + minute / 100, 2)


def trades_of(ticker: str, minute: int) -> int:
    return 1 + (sum(map(ord, ticker)) + 13 * minute) % 90


def rows(
    ticker: str, day: dt.date, num_bars: int = NUM_BARS, volume: str = "1200", shift_ns: int = 0
) -> list[str]:
    lines = []
    for minute in range(num_bars):
        price = price_of(ticker, day, minute)
        stamp = stamp_of(day, minute) + shift_ns
        lines.append(
            f"{ticker},{volume},{price},{price + 0.01:.2f},{price + 0.05:.2f},{price - 0.05:.2f},{stamp}"
            f",{trades_of(ticker, minute)}"
        )
    return lines


def put_days(
    server: S3Server, tickers: list[str], days: list[dt.date] = DAYS, data_type: str = STOCKS
) -> None:
    for day in days:
        server.put(
            key_of(day, data_type), day_file([line for ticker in tickers for line in rows(ticker, day)])
        )


def refresh(
    source: Polygon, lake: Lake, stocks: list[str], crypto: list[str] | None = None, start_ns: int = START_NS
) -> Recorder:
    recorder = Recorder()
    symbols = {"stocks": stocks, "polygon_crypto": crypto or []}
    with job_for(lake, symbols, start_ns, END_NS, NOW_NS, recorder) as job:
        source.refresh(job)
    return recorder


def held_days(lake: Lake, dataset: str = "us_stocks_sip") -> list[dt.date]:
    return sorted(dt.date.fromisoformat(unit) for unit in lake.parts("polygon", dataset))


def closes(lake: Lake, symbol: str, dataset: str = "us_stocks_sip") -> list[float]:
    return read(lake, "polygon", dataset, [symbol], START_NS, END_NS).column("close").to_pylist()


def expected_closes(ticker: str, days: list[dt.date] = DAYS) -> list[float]:
    return [round(price_of(ticker, day, minute) + 0.01, 2) for day in days for minute in range(NUM_BARS)]
