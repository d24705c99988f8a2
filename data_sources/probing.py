"""Ask every source one small question before a start: are there keys, are they accepted, does the host answer."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial

from data_sources.errors import DataError
from data_sources.load import DataRequest
from data_sources.universe import named
from data_sources.vendors.http import RetryPolicy

# A person waits for the answer.
RETRY_POLICY = RetryPolicy(connect_seconds=5, read_seconds=10, total_seconds=15, attempts=1)


@dataclass(frozen=True)
class Answer:
    """What one question brought: ``error`` is None where all is well, and then ``found`` says what came."""

    asked: str  # for people, such as "Polygon us_stocks_sip"
    error: Exception | None = None
    found: str = ""
    seconds_ahead: float | None = (
        None  # this machine's clock less the server's, at least, where it told its own
    )
    gives_bars: bool = True


def probe(request: DataRequest, now_ns: int) -> list[Answer]:
    """Ask the sources of a request, all at once; nothing is kept.

    Args:
        request: its sources and symbols decide what is asked.
        now_ns: the present.
    """
    questions = {"polygon": _polygon, "binance": _binance, "yahoo": _yahoo}
    asked = [questions[source] for source in dict.fromkeys(request.sources) if source in questions]
    with ThreadPoolExecutor(len(questions), "probe") as pool:
        found = pool.map(lambda ask: list(ask(request, now_ns)), asked)
        return [answer for answers in found for answer in answers]


def _ask(asked: str, question: Callable[[], tuple[str, str]], gives_bars: bool = True) -> Answer:
    """Put one question; it returns what came and the HTTP header Date ("" without one)."""
    asked_at = time.time()
    try:
        found, date = question()
    except (DataError, OSError, ImportError) as error:
        return Answer(asked, error, gives_bars=gives_bars)
    return Answer(asked, None, found, _seconds_ahead(date, asked_at, time.time()), gives_bars)


def _seconds_ahead(date: str, asked_at: float, answered_at: float) -> float | None:
    """Return how far this machine's clock is off at least: an answer may have been under way for long."""
    try:
        server = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    # The header has whole seconds, cut off.
    return max(0.0, asked_at - server - 1) - max(0.0, server - answered_at)


def _polygon(request: DataRequest, now_ns: int) -> Iterator[Answer]:
    try:
        from data_sources.vendors.polygon import Polygon
        from data_sources.vendors.polygon_files import GLOBAL_CRYPTO, US_STOCKS
        from data_sources.vendors.polygon_splits import PolygonSplits
    except ImportError as error:
        yield Answer("Polygon", error)
        return
    today = dt.datetime.fromtimestamp(now_ns // 10**9, dt.UTC).date()
    try:
        polygon = replace(
            Polygon.from_environment(),
            connect_timeout_seconds=RETRY_POLICY.connect_seconds,
            read_timeout_seconds=RETRY_POLICY.read_seconds,
            attempts=RETRY_POLICY.attempts,
        )
    except DataError as error:
        yield Answer("Polygon", error)
    else:
        for data_type, symbols in ((US_STOCKS, request.stocks), (GLOBAL_CRYPTO, request.polygon_crypto)):
            if symbols:
                yield _ask(f"Polygon {data_type.dataset}", partial(polygon.probe, data_type, today))
    try:
        splits = PolygonSplits.from_environment() if request.stocks else None
    except DataError as error:
        yield Answer("Polygon splits", error, gives_bars=False)
    else:
        if splits is not None:
            yield _ask("Polygon splits", replace(splits, policy=RETRY_POLICY).probe, gives_bars=False)


def _binance(request: DataRequest, now_ns: int) -> Iterator[Answer]:
    if not request.binance_pairs:
        return
    try:
        from data_sources.vendors.binance import Binance
    except ImportError as error:
        yield Answer("Binance", error)
        return
    binance, pair = Binance.from_environment(RETRY_POLICY), request.binance_pairs[0]
    yield _ask("Binance API", lambda: binance.probe_api(pair, now_ns))
    yield _ask("Binance archive", lambda: binance.probe_archive(pair, now_ns))


def _yahoo(request: DataRequest, now_ns: int) -> Iterator[Answer]:
    stocks = named(request.stocks)
    if not stocks:
        return
    try:
        from data_sources.vendors.yahoo import Yahoo
    except ImportError as error:
        yield Answer("Yahoo", error)
        return
    yield _ask("Yahoo", lambda: Yahoo.from_environment(RETRY_POLICY).probe(stocks[0], now_ns))
