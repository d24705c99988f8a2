"""Binance's minute bars: archive files for the past, REST for the last days, one lake dataset per pair.

Archive and REST are two hosts and fail independently; binance_pair.py decides what to ask of which.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from data_sources.errors import DataError
from data_sources.sources import RefreshJob
from data_sources.vendors.binance_archive import Archive
from data_sources.vendors.binance_pair import Hosts, PairRefresh
from data_sources.vendors.binance_product import ARCHIVE_URL, SPOT, Product, archive_address
from data_sources.vendors.binance_rest import Rest
from data_sources.vendors.http import RetryPolicy

NUM_THREADS = 4


class Binance:
    """Refreshes a lake from the archive and REST of one of Binance's products."""

    def __init__(
        self,
        api_url: str,
        archive_url: str = ARCHIVE_URL,
        *,
        product: Product = SPOT,
        policy: RetryPolicy | None = None,
    ) -> None:
        policy = policy or RetryPolicy()
        self._product = product
        self._hosts = Hosts(product, Rest(api_url, policy, product), Archive(archive_url, policy, product))

    @classmethod
    def from_environment(cls, product: Product = SPOT, policy: RetryPolicy | None = None) -> Binance:
        """Read the product's address of REST and BINANCE_ARCHIVE_URL; neither needs a key."""
        spot, futures = os.environ.get("BINANCE_API_URL"), os.environ.get("BINANCE_FUTURES_API_URL")
        return cls(
            (spot if product is SPOT else futures) or product.api_url,
            archive_address(),
            product=product,
            policy=policy,
        )

    def probe_api(self, pair: str, now_ns: int) -> tuple[str, str]:
        """Ask REST once; return what came, in words, and the HTTP header Date. Raises DataError."""
        return f"answers for {pair}", self._hosts.rest.probe(pair, now_ns)

    def probe_archive(self, pair: str, now_ns: int) -> tuple[str, str]:
        """Ask the archive once; as ``probe_api``, without a time."""
        self._hosts.archive.probe(pair, now_ns)
        return "answers", ""

    def refresh(self, job: RefreshJob) -> None:
        """Bring the pairs' datasets up to date, as far as minutes have closed.

        Each pair fails alone, with one warning; what arrived stays.

        Raises:
            DataError: not one pair could be brought forward, or the lake cannot be written.
        """
        rest, archive = self._hosts.rest.host, self._hosts.archive.host
        rest.begin_refresh()
        archive.begin_refresh()
        progress, source = job.progress, self._product.source
        works = []
        request = replace(job.request, end_ns=job.end_ns)
        for name, start_ns, end_ns in self._product.names(job.lake.root, request):
            then = replace(job.request, start_ns=start_ns, end_ns=end_ns)
            works.append(PairRefresh(self._hosts, replace(job, request=then), name))
        progress.start(source, f"files and {self._product.noun}s", sum(work.num_steps for work in works))
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix=source)
        try:
            for future in [pool.submit(work.run) for work in works]:
                future.result()
        finally:  # an interrupt or a lake that cannot be written ends the other threads soon
            rest.stop.set()
            archive.stop.set()
            pool.shutdown(cancel_futures=True)
        errors = [work.error for work in works if work.error is not None]
        failure: DataError | None = None  # of the source: one line, which the caller reports
        if errors and len(errors) == len(works) and not any(work.num_written for work in works):
            failure = rest.down or errors[0]
        for work in works:
            if work.error not in (None, rest.down, archive.down) and str(work.error) != str(failure):
                work.warn(str(work.error))
        for name, host in (("REST", rest), ("archive", archive)):
            if host.down is not None and failure is None:
                progress.warn(source, f"skipping {self._product.label} {name}: {host.down}")
        progress.finish(
            source,
            f"{len(works) - len(errors)} of {len(works)} {self._product.noun}s up to date, "
            f"{sum(work.num_written for work in works)} parts written, "
            f"{archive.requests} file requests, {rest.requests} page requests",
        )
        if failure is not None:
            raise failure
