"""Yahoo Finance: minute bars of US stocks over the last 30 days, and their splits."""

from __future__ import annotations

from collections.abc import Iterator

from data_sources.sources import Answer, DataRequest, RefreshJob, Source, SymbolGroup, ask
from data_sources.universe import plain_names
from data_sources.vendors.spelling import advise_stock

STOCKS = SymbolGroup("stock", "stocks", advise=advise_stock, adjusts_splits=True)


class _Yahoo(Source):
    name, label, groups = "yahoo", "Yahoo", (STOCKS,)

    # Imported on use: yfinance takes a second, and its absence must cost this source alone.

    def refresh(self, job: RefreshJob) -> None:
        from data_sources.vendors.yahoo_refresh import Yahoo

        Yahoo.from_environment().refresh(job)

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors import http
        from data_sources.vendors.yahoo_refresh import Yahoo

        stocks = plain_names(STOCKS.symbols(request))
        if stocks:
            yahoo = Yahoo.from_environment(http.PROBE_POLICY)
            yield ask("Yahoo", lambda: yahoo.probe(stocks[0], now_ns), "YAHOO_BASE_URL")


SOURCE = _Yahoo()
