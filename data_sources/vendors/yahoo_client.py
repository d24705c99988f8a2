"""yfinance, with its traps defused (1.7.0 read, 2026-11).

Failures raise instead of turning into empty frames; its cache of answers, which also replays failures for
ever, is emptied before every question; its process-wide state is replaced for every refresh; and all of its
requests go through a session of ours that bounds and counts them: yfinance swallows, retries and replaces
errors on their way up, so only the session knows what happened on the wire.

Prices come adjusted for the splits that Yahoo knows at the time of the fetch, not for dividends.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pandas as pd
import pyarrow as pa

from data_sources.bars import MINUTE_NS
from data_sources.errors import BadAnswer, DataError, SourceUnavailable
from data_sources.lake.quality import SCHEMA, bar_table
from data_sources.splits import Split
from data_sources.vendors.http import FinalAnswer, Host, RetryPolicy, error_of, prepare, short, unreachable
from data_sources.vendors.spelling import at_yahoo

CHART_PATH = "/v8/finance/chart/"
COOKIE_HOST = "fc.yahoo.com"
SIDE_SECONDS = 5.0  # for cookie, crumb and consent: the chart answers without them, too
MAX_ANSWER_BYTES = 32 << 20  # a week of minutes is about 0.2 MB
# Without curl_cffi yfinance, too, sends this browser's name (yfinance 1.7.0, _http.py).
BROWSER = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/131.0.0.0 Safari/537.36"
)
Answer = TypeVar("Answer")


class Client:
    """One refresh's use of yfinance. Nothing is imported or opened before the first question.

    Args:
        base_url: where to send all requests instead of Yahoo's hosts.
        policy: how long to wait and how often to try.
        deadline: monotonic; no request is sent later.
        cache_folder: yfinance keeps time zones and cookies there, in sqlite.
    """

    def __init__(
        self, base_url: str | None, policy: RetryPolicy, deadline: float, cache_folder: Path
    ) -> None:
        # Yahoo limits an address for up to a day: a wait would not help.
        self.host = Host(replace(policy, longest_wait_seconds=0.0), f"Yahoo {base_url or ''}".rstrip())
        self.wire = Wire(base_url, self.host, deadline)
        self._cache_folder: Path | None = cache_folder
        self._session: Any = None

    def minutes(
        self, symbol: str, start_ns: int, end_ns: int, attempts: int | None = None
    ) -> tuple[pa.Table, list[Split]]:
        """Return the minutes of [start_ns, end_ns) as they came (SCHEMA), perhaps none, and the splits.

        Raises:
            DataError: what went wrong, after ``attempts`` where more can help; None: the policy's.
        """
        frame = self._ask(symbol, lambda ticker: self._history(ticker, "1m", start_ns, end_ns), attempts)
        return _table(frame, symbol), _splits(frame)

    def splits(self, symbol: str, start_ns: int, end_ns: int, attempts: int | None = None) -> list[Split]:
        """Return the splits executed in [start_ns, end_ns); see ``minutes``."""
        frame = self._ask(symbol, lambda ticker: self._history(ticker, "1d", start_ns, end_ns), attempts)
        if frame.empty:
            raise BadAnswer("Yahoo has no daily bars to read splits from")
        return _splits(frame)

    def close(self) -> None:
        """Release everything global."""
        self._close_session()

    def _history(self, ticker: Any, interval: str, start_ns: int, end_ns: int) -> pd.DataFrame:
        """Ask yfinance; an answer without rows is an empty frame here.

        Raises:
            BadAnswer: it is another symbol's answer, or of another interval.
            Exception: what yfinance makes of other answers.
        """
        from yfinance.exceptions import YFPricesMissingError

        start, end = (pd.Timestamp(time_ns, unit="ns", tz="UTC") for time_ns in (start_ns, end_ns))
        try:
            frame: pd.DataFrame = ticker.history(interval=interval, start=start, end=end, auto_adjust=False)
        except YFPricesMissingError as error:
            if self.wire.status != 200 or getattr(error, "yahoo_reason", None):
                raise
            return pd.DataFrame()
        meta = ticker.get_history_metadata()
        for field, asked in (("symbol", ticker.ticker), ("dataGranularity", interval)):
            if meta.get(field, asked) != asked:
                raise BadAnswer(f"asked Yahoo for {asked}, got {str(meta[field])[:20]}")
        return frame

    def _ask(self, symbol: str, question: Callable[[Any], Answer], attempts: int | None) -> Answer:
        """Call ``question`` with a Ticker, and again with a new session where it fails. Raises DataError."""
        is_again = False

        def once() -> Answer:
            nonlocal is_again
            if is_again:
                self._close_session()
            is_again = True
            return self._ask_once(symbol, question)

        return self.host.retry(once, attempts)

    def _ask_once(self, symbol: str, question: Callable[[Any], Answer]) -> Answer:
        if self._session is None:
            self._open_session()
        import yfinance
        from yfinance.data import YfData
        from yfinance.exceptions import YFException

        YfData.cache_get.cache_clear()
        self.wire.begin_question()
        try:
            return question(yfinance.Ticker(at_yahoo(symbol), session=self._session))
        except DataError:
            raise
        except Exception as error:  # a strange answer can do anything to its parser
            failure = self._translate(error)
            if self.wire.failure is None and not isinstance(error, OSError | ValueError | YFException):
                self._abandon_cache()
            raise failure from error

    def _translate(self, error: Exception) -> DataError:
        """Return our error for a failed question, by what was on the wire first and by yfinance second."""
        from yfinance.exceptions import YFRateLimitError

        wire, status = self.wire, self.wire.status or 0
        if isinstance(error, YFRateLimitError):
            status = 429
        elif wire.failure is not None:
            return unreachable("Yahoo", wire.failure)
        elif status == 404:
            return FinalAnswer("Yahoo does not know this symbol (HTTP 404)")
        if status in (401, 403, 429, 451) or status >= 500:
            fix = "try another network, or set YAHOO_BASE_URL"
            return error_of(status, "Yahoo", fix=fix, headers=wire.headers)
        reason = getattr(error, "yahoo_reason", None)
        if reason:
            return FinalAnswer(f"Yahoo answered: {' '.join(str(reason).split())[:200]}")
        return BadAnswer(f"cannot read Yahoo's answer: {short(error)}")

    def _open_session(self) -> None:
        import yfinance
        from yfinance.data import SingletonMeta, YfData

        # pandas 3 to yfinance 1.7: not the user's to fix
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"yfinance\.")
        for name in ("yfinance", "bs4"):  # else Python prints what they log; bs4 reads the consent page
            logging.getLogger(name).addHandler(_NO_HANDLER)
        yfinance.config.debug.hide_exceptions = False
        yfinance.config.network.retries = 0  # it would sleep 1, 2, 4 seconds; Host retries
        _use_cache(self._cache_folder)
        # The one YfData keeps a crumb that may be an error's text, and a cookie strategy that failed.
        SingletonMeta._instances.pop(YfData, None)
        self._session = new_session(self.wire, self.host.policy)

    def _close_session(self) -> None:
        if self._session is None:
            return
        from yfinance.data import SingletonMeta, YfData

        SingletonMeta._instances.pop(YfData, None)
        YfData.cache_get.cache_clear()  # it holds the YfData and its answers
        _use_cache(None)
        self._session.close()
        self._session = None

    def _abandon_cache(self) -> None:
        """Continue without yfinance's sqlite files: damaged, locked, or on a disk that has no locks."""
        self._close_session()
        if self._cache_folder:
            shutil.rmtree(self._cache_folder, ignore_errors=True)  # a rest is abandoned again next time
        self._cache_folder = None


_NO_HANDLER = logging.NullHandler()


def _use_cache(folder: Path | None) -> None:
    """Point yfinance's sqlite caches at ``folder``, or close them and do without (None).

    set_tz_cache_location alone does nothing once a cache was used: its open database stays.
    """
    from yfinance import cache

    cache._TzDBManager.close_db()
    cache._CookieDBManager.close_db()
    cache._TzCacheManager._tz_cache = None if folder else cache._TzCacheDummy()
    cache._CookieCacheManager._Cookie_cache = None if folder else cache._CookieCacheDummy()
    if folder:
        cache.set_tz_cache_location(str(folder))


def _table(frame: pd.DataFrame, symbol: str) -> pa.Table:
    """Return yfinance's frame as SCHEMA, without the quote that Yahoo appends at its own second."""
    if frame.empty:
        return SCHEMA.empty_table()
    open_time = pd.DatetimeIndex(frame.index).as_unit("ns").asi8
    num_rows = len(open_time) - int(open_time[-1] % MINUTE_NS != 0)
    names = ("Open", "High", "Low", "Close", "Volume")
    columns = [frame[name].to_numpy(np.float64)[:num_rows] for name in names]
    return bar_table(symbol, [open_time[:num_rows], *columns])


def _splits(frame: pd.DataFrame) -> list[Split]:
    """Return the splits in yfinance's event column; the ledger judges odd ratios (spin-offs) by the prices."""
    if "Stock Splits" not in frame:
        return []
    events = frame["Stock Splits"]
    events = events[np.isfinite(events) & (events > 0)]
    days = pd.DatetimeIndex(events.index).tz_convert("America/New_York").date
    return [Split(day, float(ratio)) for day, ratio in zip(days, events, strict=True)]


class Wire:
    """Sends, bounds and counts every request of yfinance's.

    ``status``, ``failure`` and ``headers`` are those of the last chart request of the question.
    """

    def __init__(self, base_url: str | None, host: Host, deadline: float) -> None:
        self.requests = 0
        self.num_bytes = 0
        self.status: int | None = None
        self.failure: OSError | None = None
        self.headers: Mapping[str, str] = {}
        self._base_url = base_url
        self._host = host
        self._deadline = deadline
        self._silent_hosts: dict[str, OSError] = {}
        self._side_answers: dict[tuple[str, str, str], Any] = {}

    def begin_question(self) -> None:
        """Forget the last chart request."""
        self.status, self.failure, self.headers = None, None, {}

    def begin_session(self) -> None:
        """Forget cookie and crumb."""
        self._side_answers.clear()

    def send(
        self, send: Callable[..., Any], has_cookies: bool, method: str, url: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Send one request by ``send``, to ``base_url`` if there is one.

        yfinance asks for cookie and crumb again before every chart, unless it could store a cookie of
        yahoo.com and was given a crumb. Within a session the first answer is reused, and so is a
        refusal: a crumb that is limited would be limited more.

        Raises:
            SourceUnavailable: the deadline has passed; goes through yfinance, which swallows none but OSError.
            OSError: whatever curl_cffi or requests raise.
        """
        if time.monotonic() > self._deadline:
            self._host.down = SourceUnavailable("Yahoo was too slow: the time for this refresh is over")
            raise self._host.down
        parts = urlsplit(url)
        netloc, is_chart = parts.netloc, parts.path.startswith(CHART_PATH)
        if not is_chart and netloc in self._silent_hosts:
            raise self._silent_hosts[netloc]  # wait for it once, not before every chart
        side = (method, netloc, parts.path)
        if side in self._side_answers and (has_cookies or netloc != COOKIE_HOST):
            return self._side_answers[side]
        policy = self._host.policy
        seconds = policy.total_seconds if is_chart else min(SIDE_SECONDS, policy.total_seconds)
        connect = min(policy.connect_seconds, seconds / 2)
        kwargs["timeout"] = (connect, seconds - connect)
        self.requests += 1
        try:
            response = send(method, self._rewritten(url), *args, **kwargs)
        except OSError as error:  # the base of both libraries' exceptions
            if is_chart:
                self.status, self.failure = None, error
            else:
                self._silent_hosts[netloc] = error
            raise
        self.num_bytes += len(response.content)
        if not is_chart and (netloc == COOKIE_HOST or response.status_code >= 400):
            self._side_answers[side] = response
        if is_chart:
            self.status, self.failure, self.headers = response.status_code, None, response.headers
        return response

    def _rewritten(self, url: str) -> str:
        if self._base_url is None:
            return url
        base, parts = urlsplit(self._base_url), urlsplit(url)
        path = base.path.rstrip("/") + parts.path
        return urlunsplit((base.scheme, base.netloc, path, parts.query, ""))


def new_session(wire: Wire, policy: RetryPolicy) -> Any:
    """Return a session of a kind that yfinance accepts, each request of which goes through ``wire``.

    It is curl_cffi's, which looks like Chrome down to TLS, or plain requests where that is not installed:
    Yahoo limits those sooner.
    """
    base: Any
    try:
        from curl_cffi import requests as curl
    except ImportError:
        import requests

        base = requests.Session
        arguments = {}
    else:
        base = curl.Session
        arguments = {"impersonate": "chrome"}

    class WiredSession(base):
        # yfinance's libraries call this with method and url by keyword or place.
        def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            response = wire.send(super().request, len(self.cookies) > 0, method, url, *args, **kwargs)
            if not arguments:
                self.cookies.update(response.cookies)  # DeadlineAdapter's answers hide them from requests
            return response

    wire.begin_session()
    session = WiredSession(**arguments)
    if not arguments:
        prepare(session, policy, MAX_ANSWER_BYTES)
        session.headers.update({"User-Agent": BROWSER, "Accept-Language": "en-US,en;q=0.5"})
    return session
