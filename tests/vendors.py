"""Three vendors on loopback with one market up to this minute, and a copy of the program."""

from __future__ import annotations

import datetime as dt
import shutil
import socket
import time
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from tests.data_sources.vendors import binance_server
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.s3_server import CRYPTO, STOCKS, S3Server, day_file, key_of
from tests.data_sources.vendors.yahoo_server import YahooServer
from tests.program import NAMES_IN_ENV, PACKAGES, ROOT, environment

MINUTE_NS, DAY_NS = 60 * 10**9, 86_400 * 10**9
KEY_ID, SECRET = "AKIACANARYCANARYCANA", "canary/secret+canary/secret+canary/secret"
TODAY = dt.datetime.now(dt.UTC).date()
SINCE = TODAY - dt.timedelta(days=12)  # at least eight weekdays: over 2,000 minutes of any stock
SPLIT_RATIO = 10.0
WANTED = {
    "stocks": "AAPL,MSFT,NVDA,JNJ",
    "polygon_crypto": "X:BTC-USD,X:SOL-USD",
    "binance_pairs": "BTCUSDT,ETHUSDT,NEWUSDT",
}
ENOUGH = {"AAPL", "MSFT", "NVDA", "BTCUSDT", "ETHUSDT", "X:BTC-USD"}
TOO_FEW = {"JNJ", "NEWUSDT", "X:SOL-USD"}


class BinanceNow(BinanceServer):
    now_ns = property(lambda self: time.time_ns(), lambda self, ignored: None)


def midnight_ns(day: dt.date) -> int:
    return int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 10**9


class Vendors:
    """Polygon, Binance and Yahoo. Polygon's newest stock file is out only after ``publish``.

    AAPL was split in the middle of the time: Polygon's prices jump there, Yahoo's are adjusted. MSFT has both
    sources, NVDA only Yahoo. JNJ, NEWUSDT and X:SOL-USD have under 2,000 bars.
    """

    def __init__(self) -> None:
        self.polygon = S3Server()
        self.polygon.empty()
        self.binance = BinanceNow(0, ("BTCUSDT", "ETHUSDT", "NEWUSDT"))
        self.binance.listed_ns["NEWUSDT"] = time.time_ns() - 1200 * MINUTE_NS
        # Yahoo has nothing of today: the tests run alike whether or not New York is open.
        self.yahoo = YahooServer(midnight_ns(TODAY), ("AAPL", "MSFT", "NVDA"))
        self.sessions = self.yahoo.sessions(midnight_ns(SINCE), midnight_ns(TODAY))
        self.days = [
            dt.datetime.fromtimestamp(opens // 10**9, ZoneInfo("America/New_York")).date()
            for opens, _ in self.sessions
        ]
        self.split_day = self.days[len(self.days) // 2]
        self.yahoo.splits["AAPL"] = [(self.split_day, SPLIT_RATIO)]
        for number, day in enumerate(self.days[:-1]):
            self._put_stocks(number, ("AAPL", "MSFT", "JNJ") if number < 2 else ("AAPL", "MSFT"), day)
        for days_ago in (2, 1):
            day = TODAY - dt.timedelta(days=days_ago)
            minutes = midnight_ns(day) // MINUTE_NS + np.arange(1440)
            lines = _lines("X:BTC-USD", minutes, binance_server.bars_of("X:BTC-USD", minutes))
            lines += _lines("X:SOL-USD", minutes[:900], binance_server.bars_of("X:SOL-USD", minutes[:900]))
            self.polygon.put(key_of(day, CRYPTO), day_file(lines))
        self.newest = key_of(self.days[-1], STOCKS)

    def __enter__(self) -> Vendors:
        self.binance.__enter__()
        self.yahoo.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.yahoo.__exit__()
        self.binance.__exit__()
        self.polygon.stop()

    def _put_stocks(self, number: int, tickers: tuple[str, ...], day: dt.date, factor: float = 1.0) -> None:
        times = np.arange(*self.sessions[number], MINUTE_NS)
        lines = [
            line
            for ticker in tickers
            for line in _lines(ticker, times // MINUTE_NS, self.yahoo.raw(ticker, times) * factor)
        ]
        self.polygon.put(key_of(day, STOCKS), day_file(lines))

    def publish(self) -> None:
        """Publish Polygon's newest day file, with prices that differ from Yahoo's in the tenth digit."""
        self._put_stocks(len(self.days) - 1, ("AAPL", "MSFT"), self.days[-1], 1 + 1e-10)

    @property
    def addresses(self) -> dict[str, str]:
        return {
            "POLYGON_S3_ENDPOINT": self.polygon.endpoint,
            "BINANCE_API_URL": self.binance.url,
            "BINANCE_ARCHIVE_URL": self.binance.url,
            "YAHOO_BASE_URL": self.yahoo.url,
        }

    def forget_requests(self) -> None:
        self.polygon.log.clear()
        self.binance.requests.clear()
        self.yahoo.requests.clear()

    @property
    def num_requests(self) -> int:
        return len(self.polygon.log) + len(self.binance.requests) + len(self.yahoo.requests)

    def zips(self) -> list[str]:
        """Requested archive files of Binance, without their checksums."""
        return [path for path in self.binance.requests if path.endswith(".zip")]

    def klines(self) -> list[str]:
        return [path for path in self.binance.requests if "/klines?" in path]

    def minutes(self) -> list[str]:
        """Requested charts of minutes from Yahoo."""
        return [path for path in self.yahoo.requests if "interval=1m" in path]


def _lines(ticker: str, minutes: np.ndarray, values: np.ndarray) -> list[str]:
    """Rows of a day file; ``values`` has the columns open high low close volume."""
    return [
        f"{ticker},{volume:g},{opened},{close},{high},{low},{minute * MINUTE_NS},7"
        for minute, (opened, high, low, close, volume) in zip(minutes.tolist(), values.tolist(), strict=True)
    ]


def program_with_keys(folder: Path, addresses: dict[str, str]) -> Path:
    """Copy the program into ``folder`` and write the .env that a user would; return the folder."""
    folder.mkdir()
    no_caches = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=no_caches)
    shutil.copy2(ROOT / "continuous_training.py", folder)
    keys = {"POLYGON_S3_ACCESS_KEY": KEY_ID, "POLYGON_S3_SECRET_KEY": SECRET}
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in (keys | addresses).items()))
    return folder


def environment_of_a_user(**additions: str) -> dict[str, str]:
    """Return an environment without keys and addresses, which .env has, except for ``additions``."""
    return {name: value for name, value in environment().items() if name not in NAMES_IN_ENV} | additions


def closed_port() -> str:
    """Return an address without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
