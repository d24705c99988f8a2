"""Binance's spot pairs and USD-M perpetuals: minute bars of its archive, and of REST for the last days.

BTCUSDT.P is the perpetual that Binance calls BTCUSDT, as it does the spot pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from data_sources.progress import Progress
from data_sources.sources import Answer, DataRequest, RefreshJob, Source, ask
from data_sources.vendors.binance_product import ARCHIVE_VARIABLE, SPOT, USD_M, Product, archive_address

if TYPE_CHECKING:
    from data_sources.lake.lake import Lake, Part


class _Binance(Source):
    """One of Binance's products."""

    def __init__(self, product: Product) -> None:
        self.name, self.label, self.groups = product.source, product.label, (product.group,)
        self._product = product

    # Imported on use: python-binance takes a second, and its absence must cost this source alone.

    def refresh(self, job: RefreshJob) -> None:
        from data_sources.vendors.binance_refresh import Binance

        Binance.from_environment(self._product).refresh(job)

    def without_flow(self, lake: Lake, request: DataRequest, now_ns: int) -> list[Part]:
        from data_sources.vendors import binance_flow

        return binance_flow.without_flow(lake, self._product, request, now_ns)

    def add_flow(self, lake: Lake, parts: Sequence[Part], now_ns: int, progress: Progress) -> None:
        from data_sources.vendors import binance_flow, http
        from data_sources.vendors.binance_archive import Archive

        archive = Archive(archive_address(), http.RetryPolicy(), self._product)
        binance_flow.add_flow(archive, self._product, lake, parts, now_ns, progress)

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors import http
        from data_sources.vendors.binance_refresh import Binance

        product = self._product
        pairs = product.group.symbols(request)
        if pairs:
            binance = Binance.from_environment(product, http.PROBE_POLICY)
            api, archive = f"{product.label} API", f"{product.label} archive"
            yield ask(api, lambda: binance.probe_api(pairs[0], now_ns), product.api_variable)
            yield ask(archive, lambda: binance.probe_archive(pairs[0], now_ns), ARCHIVE_VARIABLE)


SOURCE, FUTURES = _Binance(SPOT), _Binance(USD_M)
