"""Yahoo Finance: minute bars of US stocks over the last 30 days, and their splits."""

from __future__ import annotations

from collections.abc import Iterator

from data_sources.lake.lake import Lake
from data_sources.progress import Progress
from data_sources.sources import Answer, DataRequest, Source, SymbolGroup, ask
from data_sources.splits import SplitLedger
from data_sources.universe import plain_names

STOCKS = SymbolGroup("stock", "stocks")


class _Yahoo(Source):
    name, label, groups = "yahoo", "Yahoo", (STOCKS,)
    adjusts_splits = True

    # Imported on use: yfinance takes a second, and its absence must cost this source alone.

    def refresh(
        self, lake: Lake, request: DataRequest, now_ns: int, progress: Progress, splits: SplitLedger
    ) -> None:
        from data_sources.vendors.yahoo_refresh import Yahoo

        end_ns = min(request.end_ns, now_ns)
        stocks = plain_names(STOCKS.symbols(request))
        Yahoo.from_environment().refresh(lake, stocks, request.start_ns, end_ns, now_ns, progress, splits)

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors import http
        from data_sources.vendors.yahoo_refresh import Yahoo

        stocks = plain_names(STOCKS.symbols(request))
        if stocks:
            yahoo = Yahoo.from_environment(http.PROBE_POLICY)
            yield ask("Yahoo", lambda: yahoo.probe(stocks[0], now_ns), "YAHOO_BASE_URL")


SOURCE = _Yahoo()
