"""Shared by Binance's tests: a loopback exchange, a lake and a client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_sources.bars import FLOW_COLUMNS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.vendors.binance_product import SPOT, Product
from data_sources.vendors.binance_refresh import Binance
from data_sources.vendors.http import RetryPolicy
from tests.data_sources.bar_tables import job_for, read
from tests.data_sources.vendors.binance_server import HOUR_NS, BinanceServer, flow_of
from tests.data_sources.vendors.loopback import Notes, ns

NOW = ns("2026-11-24T12:00:30")
START = ns("2026-10-20T00:00")
CLOSED = ns("2026-11-24T12:00")
DAY_NS = 24 * HOUR_NS
POLICY = RetryPolicy(
    connect_seconds=5,
    read_seconds=20,
    total_seconds=30,
    backoff_seconds=0.01,
    longest_wait_seconds=2,
    attempts=2,
)
QUICK = replace(POLICY, read_seconds=0.8, total_seconds=1.2)  # for servers that stall


class Harness:
    """A server, a lake and a client, and questions about them."""

    def __init__(self, server: BinanceServer, folder: Path, product: Product = SPOT) -> None:
        self.server, self.lake, self.notes, self.product = server, Lake(folder), Notes(), product
        self.pair = "BTCUSDT" + product.suffix
        self.binance = self.new_client()

    def new_client(self, policy: RetryPolicy = POLICY) -> Binance:
        return Binance(self.server.url, self.server.url, product=self.product, policy=policy)

    def refresh(self, *pairs: str, start_ns: int = START, seconds_later: int = 0) -> list[str]:
        """Refresh and return the requests it made."""
        self.server.now_ns += seconds_later * 10**9
        self.server.requests.clear()
        self.notes = Notes()
        now_ns = self.server.now_ns
        self.refresh_until(now_ns, *pairs, start_ns=start_ns, now_ns=now_ns)
        return list(self.server.requests)

    def refresh_until(self, end_ns: int, *pairs: str, start_ns: int, now_ns: int) -> None:
        symbols = {self.product.group.setting: pairs or (self.pair,)}
        with job_for(self.lake, symbols, start_ns, end_ns, now_ns, self.notes) as job:
            self.binance.refresh(job)

    def minutes(self, pair: str = "", start_ns: int = START, end_ns: int = CLOSED + DAY_NS) -> np.ndarray:
        pair = pair or self.pair
        table = read(self.lake, self.product.source, pair, [pair], start_ns, end_ns)
        return table.column("open_time").to_numpy()

    def assert_complete(
        self,
        pair: str = "",
        start_ns: int = START,
        end_ns: int = CLOSED,
        without: tuple[int, ...] = (),
    ) -> None:
        """The lake has every bar of the truth, flow included, bit for bit, and no other."""
        pair = pair or self.pair
        table = read(self.lake, self.product.source, pair, [pair], start_ns, self.server.now_ns + DAY_NS)
        times, values = self.server.truth(pair, start_ns, end_ns)
        keep = ~np.isin(times, np.array(without, np.int64))
        np.testing.assert_array_equal(table.column("open_time").to_numpy(), times[keep])
        for column, name in enumerate(("open", "high", "low", "close", "volume")):
            np.testing.assert_array_equal(table.column(name).to_numpy(), values[keep, column])
        flow = flow_of(values[:, 4], times // MINUTE_NS)[keep]
        for column, name in enumerate(FLOW_COLUMNS):
            np.testing.assert_array_equal(table.column(name).to_numpy(), flow[:, column])

    def units(self, pair: str = "") -> set[str]:
        return set(self.lake.parts(self.product.source, pair or self.pair))
