"""Splits of US stocks from Massive's (formerly Polygon's) REST, where there is a key: all in a few pages.

GET /stocks/v1/splits: ticker, execution_date, split_from, split_to, adjustment_type; in every stocks plan, the
free one with 5 requests a minute. The key is not one of the pair for the flat files.

Vendor's page, 2026: massive.com/docs/rest/stocks/corporate-actions/splits.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests

from data_sources.calendar import utc
from data_sources.errors import BadAnswer, DataError, SourceUnavailable
from data_sources.splits import Split, SplitLedger
from data_sources.vendors.http import Host, RetryPolicy, error_of, prepare, require_address, short

DEFAULT_URL = "https://api.massive.com"  # https://api.polygon.io is the older name of the host
PATH = "/stocks/v1/splits"
PAGE_ROWS = 5_000
MOST_PAGES = 50
MOST_TICKERS = 100  # named in a request; for more, those of the whole market are fetched
MAX_BYTES = 64 << 20
RETRY_POLICY = RetryPolicy(connect_seconds=5, read_seconds=20, total_seconds=40, longest_wait_seconds=60)


@dataclass(frozen=True)
class PolygonSplits:
    """Massive's REST with one API key."""

    api_key: str = field(repr=False)
    url: str = DEFAULT_URL
    policy: RetryPolicy = RETRY_POLICY

    @classmethod
    def from_environment(cls) -> PolygonSplits | None:
        """Read POLYGON_API_KEY and POLYGON_API_URL; None without a key, which is no error.

        Raises:
            DataError: POLYGON_API_URL is not an address.
        """
        key = os.environ.get("POLYGON_API_KEY", "").strip()
        if not key:
            return None
        url = os.environ.get("POLYGON_API_URL", "").strip().rstrip("/") or DEFAULT_URL
        require_address("POLYGON_API_URL", url, DEFAULT_URL)
        if not key.isascii() or not key.isprintable() or " " in key:
            raise DataError("POLYGON_API_KEY has spaces or characters that no key has, copy it again")
        return cls(key, url)

    def probe(self) -> tuple[str, str]:
        """Ask once for one split; return what came, in words, and no time of the server. Raises DataError."""
        with prepare(requests.Session(), self.policy, MAX_BYTES) as session:
            self._page(session, f"{self.url}{PATH}?limit=1")
        return "accepts the key", ""

    def update(
        self, ledger: SplitLedger, stocks: Sequence[str] | None, start_ns: int, now_ns: int
    ) -> tuple[int, int]:
        """Add the splits of ``stocks`` (None: all) executed from ``start_ns`` to ``now_ns`` to the ledger.

        Later ones may still be called off.

        Returns:
            How many splits were new, and how many entries were unreadable.

        Raises:
            DataError: the last attempt's error; the pages before it are kept.
        """
        query = {
            "execution_date.gte": f"{utc(start_ns):%Y-%m-%d}",
            "execution_date.lte": f"{utc(now_ns):%Y-%m-%d}",
            "limit": str(PAGE_ROWS),
        }
        if stocks is not None and len(stocks) <= MOST_TICKERS:
            query["ticker.any_of"] = ",".join(stocks)
        wanted = None if stocks is None else set(stocks)
        num_new = num_bad = 0
        host = Host(self.policy, f"Polygon REST {self.url}")
        with prepare(requests.Session(), self.policy, MAX_BYTES) as session:
            cursor = urlencode(query)
            for _ in range(MOST_PAGES):
                page = host.ask(partial(self._page, session, f"{self.url}{PATH}?{cursor}"))
                found: dict[str, list[Split]] = {}
                for entry in page["results"]:
                    try:
                        split = _split(entry)
                        found.setdefault(str(entry["ticker"]), []).append(split)
                    except (ValueError, KeyError, TypeError, ArithmeticError):
                        num_bad += 1
                for symbol, splits in found.items():
                    new = ledger.news(symbol, splits) if wanted is None or symbol in wanted else []
                    if new:
                        ledger.update(symbol, new)
                        num_new += len(new)
                # Its query alone: the key must never go to another host.
                cursor = _query_of(page.get("next_url"))
                if not cursor:
                    break
        return num_new, num_bad

    def _page(self, session: requests.Session, address: str) -> dict[str, Any]:
        """Ask once. Raises DataError."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        try:
            answer = session.get(address, headers=headers, timeout=self.policy.timeout, allow_redirects=False)
        except (requests.RequestException, OSError) as error:
            name = type(error).__name__  # its text may hold more than a user should paste somewhere
            name = short(error) if isinstance(error, requests.exceptions.InvalidSchema) else name
            raise SourceUnavailable(f"{self.url} does not answer: {name}") from error
        status = answer.status_code
        if status != 200:
            fix = "check POLYGON_API_KEY, the REST key, not the S3 pair"
            raise error_of(status, self.url, fix=fix, headers=answer.headers)
        try:
            page = answer.json()
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            raise BadAnswer(f"{self.url} sent something that is not JSON") from error
        if not isinstance(page, dict) or not isinstance(page.get("results"), list):
            raise BadAnswer(f"{self.url} sent no list of splits")
        return page


def _query_of(address: object) -> str:
    try:
        return urlsplit(address).query if isinstance(address, str) else ""
    except ValueError:
        return ""


def _split(entry: dict[str, Any]) -> Split:
    ratio = float(entry["split_to"]) / float(entry["split_from"])
    return Split(dt.date.fromisoformat(entry["execution_date"]), ratio)
