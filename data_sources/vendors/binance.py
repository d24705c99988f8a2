"""Binance spot pairs: minute bars of its bulk archive, and of REST for the last days."""

from __future__ import annotations

from collections.abc import Iterator

from data_sources.sources import Answer, DataRequest, RefreshJob, Source, SymbolGroup, ask
from data_sources.vendors.spelling import advise_binance_pair

PAIRS = SymbolGroup("crypto", "binance_pairs", advise=advise_binance_pair)


class _Binance(Source):
    name, label, groups = "binance", "Binance", (PAIRS,)

    # Imported on use: python-binance takes a second, and its absence must cost this source alone.

    def refresh(self, job: RefreshJob) -> None:
        from data_sources.vendors.binance_refresh import Binance

        Binance.from_environment().refresh(job)

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors import http
        from data_sources.vendors.binance_refresh import Binance

        pairs = PAIRS.symbols(request)
        if pairs:
            binance = Binance.from_environment(http.PROBE_POLICY)
            yield ask("Binance API", lambda: binance.probe_api(pairs[0], now_ns), "BINANCE_API_URL")
            yield ask(
                "Binance archive", lambda: binance.probe_archive(pairs[0], now_ns), "BINANCE_ARCHIVE_URL"
            )


SOURCE = _Binance()
