"""Shared by Yahoo's tests: a loopback server, a lake and a client."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sources.bars import COLUMNS, Bars
from data_sources.lake.lake import Lake
from data_sources.splits import SplitLedger
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.yahoo_refresh import Yahoo
from tests.data_sources.bar_tables import job_for
from tests.data_sources.vendors.loopback import Notes, ns
from tests.data_sources.vendors.yahoo_server import MINUTE_NS, YahooServer

NOW = ns("2026-03-17T18:00:30")  # a Tuesday, 14:00 in New York; the clocks changed on 8 March
CLOSED = ns("2026-03-17T18:00")
EVENING = ns("2026-03-18T01:00")  # 21:00 in New York, all bars of the day have settled
DAY_NS = 1440 * MINUTE_NS
REACH = NOW - 29 * DAY_NS
STOCKS = ("AAPL", "MSFT", "NVDA")
POLICY = RetryPolicy(connect_seconds=0.3, total_seconds=0.8, backoff_seconds=0.01, attempts=2)
HTML = b"<!DOCTYPE html><html><body>Oh dear</body></html>"
MINUTES = "interval=1m"  # of a chart request


class Harness:
    """A server, a lake and a client, and questions about them."""

    def __init__(self, server: YahooServer, folder: Path) -> None:
        self.server, self.folder, self.notes = server, folder, Notes()
        self.lake = Lake(folder)

    @property
    def ledger(self) -> SplitLedger:
        return SplitLedger(self.folder)

    def refresh(self, *stocks: str, at: int | None = None) -> list[str]:
        """Refresh, at another time if one is given, and return the chart requests it made."""
        self.server.now_ns = now_ns = at or self.server.now_ns
        self.server.requests.clear()
        self.notes = Notes()
        self.refresh_at(now_ns, *stocks or STOCKS)
        return self.charts()

    def refresh_at(self, now_ns: int, *stocks: str, days: int = 730, yahoo: Yahoo | None = None) -> None:
        span = (now_ns - days * DAY_NS, now_ns, now_ns)
        with job_for(self.lake, {"stocks": stocks}, *span, self.notes) as job:
            (yahoo or Yahoo(self.server.url, policy=POLICY)).refresh(job)

    def charts(self, path: str = "/chart/") -> list[str]:
        return [request for request in self.server.requests if "/chart/" in request and path in request]

    def columns(self, stock: str) -> dict[str, np.ndarray]:
        return self.lake.columns("yahoo", stock, [stock], 0, 2**62).get(stock, {})

    def minutes(self, stock: str) -> set[int]:
        return set(self.columns(stock).get("open_time", np.empty(0)).tolist())

    def assert_holds(self, stock: str, start_ns: int = REACH, end_ns: int = CLOSED) -> None:
        """The lake has every bar of the span, adjusted by the ledger, and no other after ``start_ns``."""
        columns = self.columns(stock)
        bars = Bars(stock, "stock", *(columns[name] for name in COLUMNS))
        bars = self.ledger.adjust(bars, fetched_ns=columns["fetched_ns"]).between(start_ns, 2**62)
        times, values = self.server.truth(stock, start_ns, end_ns)
        np.testing.assert_array_equal(bars.open_time, times)
        held = np.column_stack([getattr(bars, name) for name in COLUMNS[1:]])
        np.testing.assert_allclose(held, values, rtol=1e-12)
