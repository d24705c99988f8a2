"""Binance's REST klines through python-binance, one page at a time.

Sources and weights: binance_product.py. A page is at most 1,000 klines (futures would give 1,500, at twice the
weight); every answer carries the weight used in this minute, by this address, in X-MBX-USED-WEIGHT-1M.
Funding rates have a limit of their own, 500 requests in 5 minutes.
429 asks to wait, 418 is a ban for not having waited, 451 a country that Binance does not serve.
``get_historical_klines`` is not used: it sleeps a second every third page and loses all on an error.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import pyarrow as pa
import requests

from data_sources.bars import MINUTE_NS
from data_sources.errors import BadAnswer, DataError, SourceUnavailable
from data_sources.lake.quality import FLOW_SCHEMA
from data_sources.vendors.binance_archive import FundingRow
from data_sources.vendors.binance_product import SPOT, Product
from data_sources.vendors.http import FinalAnswer, Host, RetryPolicy, error_of, prepare, unreachable

with warnings.catch_warnings():  # python-binance 1.0.37 imports names that websockets 14 calls deprecated
    warnings.filterwarnings("ignore", "websockets", DeprecationWarning)
    from binance.client import Client
    from binance.exceptions import BinanceAPIException, BinanceRequestException

PAGE_BARS = PAGE_FUNDING = 1000
SLOW_DOWN_FRACTION = 0.8  # of the limit; others behind the same address need weight too
PROBED_NS = 60 * MINUTE_NS
MAX_PAGE_BYTES = 8 << 20  # a full page is about 170 kB
# No such symbol; of futures, too: settled and closed.
UNKNOWN_CODES = (-1121, -1122, -4108, -4141)


class UnknownPair(FinalAnswer):
    """Binance does not know the pair (any more)."""


class Rest:
    """Pages of klines. Safe to use from several threads: each has a client of its own."""

    def __init__(self, url: str, policy: RetryPolicy, product: Product = SPOT) -> None:
        self._url = url.rstrip("/").removesuffix(f"/{product.api}")
        self._product = product
        self.host = Host(policy, f"{product.label} REST {self._url}")
        self._local = threading.local()

    def page(self, pair: str, start_ns: int, end_ns: int, limit: int = PAGE_BARS) -> pa.Table:
        """Return the first ``limit`` bars that open in [start_ns, end_ns); fewer where fewer exist.

        Rows come as Binance sent them, with flow, junk values as NaN; rows outside of the span are left out.

        Raises:
            UnknownPair: no such pair.
            DataError: after retries; see data_sources.errors.
        """
        return self.host.ask(lambda: self._page(pair, start_ns, end_ns, limit))

    def funding(self, pair: str, start_ns: int, end_ns: int) -> list[FundingRow]:
        """Return the first 1,000 rows of funding in [start_ns, end_ns), oldest first; a rate that is none is NaN.

        Raises:
            UnknownPair: no such pair.
            DataError: after retries; see data_sources.errors.
        """
        return self.host.ask(lambda: self._funding(pair, start_ns, end_ns))

    def probe(self, pair: str, now_ns: int) -> str:
        """Ask for one of the last bars; return the server's time as the HTTP header Date.

        Raises:
            DataError: as ``page``.
        """
        self.page(pair, now_ns - PROBED_NS, now_ns, limit=1)
        response = self._client().response
        return "" if response is None else response.headers.get("Date", "")

    def _client(self) -> Client:
        client = getattr(self._local, "client", None)
        if client is None:
            policy = self.host.policy
            client = Client(requests_params={"timeout": policy.timeout}, ping=False)
            # As an attribute: braces in a class attribute are formatted.
            client.API_URL = client.FUTURES_URL = f"{self._url}/{self._product.api}"
            prepare(client.session, policy, MAX_PAGE_BYTES)
            self._local.client = client
        return client

    def _page(self, pair: str, start_ns: int, end_ns: int, limit: int) -> pa.Table:
        klines = Client.get_klines if self._product is SPOT else Client.futures_klines
        # The weight of futures grows with the limit.
        limit = min(limit, -(-(end_ns - start_ns) // MINUTE_NS))
        answer = self._ask(pair, klines, start_ns, end_ns, interval="1m", limit=limit)
        return _table(pair, answer, start_ns, end_ns)

    def _funding(self, pair: str, start_ns: int, end_ns: int) -> list[FundingRow]:
        answer = self._ask(pair, Client.futures_funding_rate, start_ns, end_ns, limit=PAGE_FUNDING)
        if not isinstance(answer, list):
            raise BadAnswer(f"{pair}: expected a list of funding rates, got {str(answer)[:40]!r}")
        rows = []
        for row in answer:
            if not isinstance(row, dict) or type(row.get("fundingTime")) is not int:
                raise BadAnswer(f"{pair}: expected a funding rate with its time, got {str(row)[:60]!r}")
            rows.append((row["fundingTime"] * 1_000_000, _number(row.get("fundingRate"))))
        if not all(start_ns <= time < end_ns for time, _ in rows):
            raise BadAnswer(f"{pair}: funding rates outside of the requested span")
        return sorted(rows)

    def _ask(
        self, pair: str, endpoint: Callable[..., Any], start_ns: int, end_ns: int, **parameters: Any
    ) -> Any:
        """Return one answer of an endpoint, of a span, as our error where it is one."""
        client = self._client()
        client.response = None
        try:
            return endpoint(
                client,
                symbol=self._product.at_binance(pair),
                startTime=start_ns // 1_000_000,
                endTime=end_ns // 1_000_000 - 1,
                **parameters,
            )
        except BinanceAPIException as error:
            raise self._translate(pair, error) from error
        except BinanceRequestException as error:
            raise BadAnswer(
                f"{pair}: expected JSON, got something else (a captive portal or proxy?)"
            ) from error
        except requests.RequestException as error:
            raise unreachable(self._product.label, error) from error
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            # python-binance 1.0.37 trips over bodies such as a bare `null` of a failing server.
            reason = f"{type(error).__name__} in its client"
            raise SourceUnavailable(f"{self._product.label} sent an unreadable answer: {reason}") from error
        finally:
            self._heed_weight(client.response)

    def _heed_weight(self, response: requests.Response | None) -> None:
        """Pause until the next minute once most of this minute's weight is used."""
        if response is None:
            return
        try:
            used = int(response.headers.get("X-MBX-USED-WEIGHT-1M", ""))
        except ValueError:
            return
        if used >= SLOW_DOWN_FRACTION * self._product.weight_limit:
            try:  # the server's minute is what counts
                second = parsedate_to_datetime(response.headers.get("Date", "")).second
            except ValueError:
                second = 0
            self.host.pause(61.0 - second)

    def unknown(self, pair: str) -> str:
        """Return that Binance does not know a pair."""
        return f"{pair}: Binance does not know this {self._product.noun}"

    def _translate(self, pair: str, error: BinanceAPIException) -> DataError:
        status = error.status_code
        if status == 400 and error.code in UNKNOWN_CODES:
            return UnknownPair(self.unknown(pair))
        text = " ".join(str(error.message or "no message").split())[:120]
        cause = "not served here" if status == 451 else "wait, use another network"
        return error_of(
            status,
            self._product.label,
            fix=f"{cause}, or {self._product.where_else}",
            details="" if status in (401, 403, 418, 429, 451) else f"for {pair}, code {error.code}: {text}",
            headers=error.response.headers,
        )


def _table(pair: str, answer: Any, start_ns: int, end_ns: int) -> pa.Table:
    if not isinstance(answer, list):
        raise BadAnswer(f"{pair}: expected a list of klines, got {str(answer)[:40]!r}")
    columns: list[list[Any]] = [[] for _ in range(8)]
    for row in answer:
        if not isinstance(row, list) or len(row) < 6 or type(row[0]) is not int:
            raise BadAnswer(f"{pair}: expected klines of 12 values, got {str(row)[:60]!r}")
        open_ns = row[0] * (1_000 if row[0] > 10**14 else 1_000_000)
        if start_ns <= open_ns < end_ns:
            values = [_number(value) for value in row[1:6]]
            if values[4] != values[4]:  # a bar without a volume is broken, not without trades
                values[3] = values[4]
            flow = [None if value is None else _number(value) for value in (*row[8:10], None, None)[:2]]
            for column, value in zip(columns, [open_ns, *values, *flow], strict=True):
                column.append(value)
    if answer and not columns[0]:
        raise BadAnswer(f"{pair}: none of {len(answer)} klines lies in the requested span")
    return pa.table([[pair] * len(columns[0]), *columns], schema=FLOW_SCHEMA)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def last_minute_ns(table: pa.Table) -> int:
    """Return the newest open_time of a table with rows, floored to its minute."""
    newest = max(table.column("open_time").to_pylist())
    return newest - newest % MINUTE_NS


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Join tables of bars, with null flow where a table has none; of no table, an empty one."""
    return pa.concat_tables([FLOW_SCHEMA.empty_table(), *tables], promote_options="default")
