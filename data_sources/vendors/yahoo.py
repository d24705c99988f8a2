"""Yahoo Finance minute bars of US stocks through yfinance, one lake dataset per stock, one part per week.

yfinance is used as it is (1.7.0 read, 2026-11), with its traps defused: failures raise instead of turning
into empty frames; its cache of answers, which also replays failures for ever, is emptied before every
question; its process-wide state is made anew for every refresh; and its session is one that we watch
(yahoo_session.py). What to ask for is in yahoo_weeks.py, what to do with failures in yahoo_refresh.py.

Prices come adjusted for the splits that Yahoo knows at the time of the fetch, not for dividends; a part's
fetched_ns says which those are. Splits go to the ledger: recent ones come with the minutes, older ones from
one daily chart per stock and day.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from data_sources.bars import MINUTE_NS
from data_sources.errors import BadAnswer, DataError, RateLimited, Refused, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.lake.quality import SCHEMA
from data_sources.progress import Progress
from data_sources.splits import Split, SplitLedger
from data_sources.vendors.http import FinalAnswer, RetryPolicy
from data_sources.vendors.yahoo_client import Watch, new_session
from data_sources.vendors.yahoo_refresh import Refresh
from data_sources.vendors.yahoo_weeks import SOURCE, Plan

RETRY_POLICY = RetryPolicy(
    connect_seconds=5, total_seconds=12, backoff_seconds=1, attempts=2, failures_in_a_row=3
)
PAUSE_SECONDS = 0.4  # between stocks, at Yahoo's own hosts only; it limits by address, for up to a day
SECONDS_PER_STOCK = 15.0  # with MINIMUM_SECONDS the time after which a refresh gives up; 3 are usual at first
MINIMUM_SECONDS = 120.0
PROBED_NS = 5 * 1440 * MINUTE_NS  # a session lies within, whatever the weekend
CACHE_FOLDER = ".yfinance"  # time zones and cookies, in sqlite
Answer = TypeVar("Answer")


class Yahoo:
    """Refreshes a lake from Yahoo's chart API. One refresh per process at a time: yfinance is global."""

    name = SOURCE

    def __init__(self, base_url: str | None = None, *, policy: RetryPolicy = RETRY_POLICY) -> None:
        self._base_url = base_url
        self._policy = policy

    @classmethod
    def from_environment(cls, policy: RetryPolicy = RETRY_POLICY) -> Yahoo:
        """Read YAHOO_BASE_URL: where to send all requests instead of Yahoo's hosts. There is no key."""
        return cls(os.environ.get("YAHOO_BASE_URL") or None, policy=policy)

    def probe(self, stock: str, now_ns: int) -> tuple[str, str]:
        """Ask for a stock's minutes of the last days, cookie and crumb included.

        Returns:
            What came, in words, and no time of the server.

        Raises:
            DataError: as ``refresh``.
        """
        deadline = time.monotonic() + 2 * self._policy.total_seconds
        with tempfile.TemporaryDirectory(prefix="yfinance-") as folder:
            client = _Client(Watch(self._base_url, self._policy, deadline), Path(folder))
            try:
                count = client.minutes(stock, now_ns - PROBED_NS, now_ns)[0].num_rows
            finally:
                client.close()
        return f"answers for {stock} with {count:,} minutes of the last days", ""

    def refresh(
        self,
        lake: Lake,
        stocks: Sequence[str],
        start_ns: int,
        end_ns: int,
        now_ns: int,
        progress: Progress,
        splits: SplitLedger,
    ) -> None:
        """Bring the stocks' datasets up to date over what of [start_ns, end_ns) Yahoo still has.

        Each stock fails alone, with one warning; what arrived stays. ``splits`` learns every split since
        ``start_ns``.

        Raises:
            RateLimited, Refused, SourceUnavailable: the source was given up; the rest is left as it was.
            DataError: not one stock could be brought up to date, or the lake cannot be written.
        """
        stocks = list(dict.fromkeys(stocks))
        seconds = MINIMUM_SECONDS + SECONDS_PER_STOCK * len(stocks)
        client = _Client(
            Watch(self._base_url, self._policy, time.monotonic() + seconds), lake.root / CACHE_FOLDER
        )
        with lake.writing():
            try:
                Refresh(
                    lake,
                    Plan(start_ns, end_ns, now_ns),
                    client,
                    splits,
                    progress,
                    start_ns=start_ns,
                    pause_seconds=0.0 if self._base_url else PAUSE_SECONDS,
                ).run(stocks)
            finally:
                client.close()


class _Client:
    """yfinance, its global state in hand. Nothing is imported or opened before the first question."""

    def __init__(self, watch: Watch, cache_folder: Path) -> None:
        self.watch = watch
        self.attempts = watch.policy.attempts
        self._cache_folder = cache_folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._session: Any = None

    def minutes(self, symbol: str, start_ns: int, end_ns: int) -> tuple[pa.Table, list[Split]]:
        """Return the minutes of [start_ns, end_ns) as they came (SCHEMA), no row if none, and the splits.

        Raises:
            DataError: what went wrong, after a second attempt where that can help.
        """
        frame = self._ask(symbol, lambda ticker: self._history(ticker, "1m", start_ns, end_ns))
        return _table(frame, symbol), _splits(frame)

    def splits(self, symbol: str, start_ns: int, end_ns: int) -> list[Split]:
        """Return the splits executed in [start_ns, end_ns). Raises as ``minutes``."""
        frame = self._ask(symbol, lambda ticker: self._history(ticker, "1d", start_ns, end_ns))
        if frame.empty:
            raise BadAnswer("Yahoo has no daily bars to read splits from")
        return _splits(frame)

    def close(self) -> None:
        """Let go of everything global."""
        self._close_session()
        if self._temporary is not None:
            self._temporary.cleanup()

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
            if self.watch.status != 200 or getattr(error, "yahoo_reason", None):
                raise
            return pd.DataFrame()
        meta = ticker.get_history_metadata()
        for field, asked in (("symbol", ticker.ticker), ("dataGranularity", interval)):
            if meta.get(field, asked) != asked:
                raise BadAnswer(f"asked Yahoo for {asked}, came {str(meta[field])[:20]}")
        return frame

    def _ask(self, symbol: str, question: Callable[[Any], Answer]) -> Answer:
        """Call ``question`` with a Ticker; once more, with everything made anew, where it fails.

        Raises:
            DataError: what went wrong, in our words.
        """
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.watch.policy.backoff_seconds)
            try:
                return self._ask_once(symbol, question)
            except DataError as error:
                final = isinstance(error, FinalAnswer | RateLimited) or self.watch.is_late
                if final or attempt + 1 == self.attempts:
                    raise
                self._close_session()
        raise AssertionError("there is at least one attempt")

    def _ask_once(self, symbol: str, question: Callable[[Any], Answer]) -> Answer:
        if self._session is None:
            self._open_session()
        import yfinance
        from yfinance.data import YfData
        from yfinance.exceptions import YFException

        YfData.cache_get.cache_clear()
        self.watch.forget()
        try:
            # BRK.B is BRK-B at Yahoo, where a dot names an exchange.
            return question(yfinance.Ticker(symbol.replace(".", "-"), session=self._session))
        except DataError:
            raise
        except Exception as error:  # a strange answer can do anything to its parser
            failure = self._translated(error)
            if self.watch.failure is None and not isinstance(error, OSError | ValueError | YFException):
                self._abandon_cache()
            raise failure from error

    def _translated(self, error: Exception) -> DataError:
        """Say what a failed question means, by what was on the wire first and by yfinance second."""
        from yfinance.exceptions import YFRateLimitError

        watch, status = self.watch, self.watch.status
        if isinstance(error, YFRateLimitError) or status in (429, 999):
            wait = "" if watch.retry_after is None else f" and come back in {watch.retry_after:g} seconds"
            return RateLimited(f"Yahoo asks to slow down{wait}; it is left alone for now", watch.retry_after)
        if watch.failure is not None:
            return SourceUnavailable(f"Yahoo does not answer: {_short(watch.failure)}")
        if status in (401, 403, 451):
            return Refused(
                f"Yahoo refuses this machine (HTTP {status}); try another network, or set YAHOO_BASE_URL"
            )
        if status == 404:
            return FinalAnswer("Yahoo does not know this symbol (HTTP 404)")
        if status is not None and status >= 500:
            return SourceUnavailable(f"Yahoo answered HTTP {status}")
        reason = getattr(error, "yahoo_reason", None)
        if reason:
            return FinalAnswer(f"Yahoo says: {' '.join(str(reason).split())[:200]}")
        return BadAnswer(f"cannot read Yahoo's answer: {_short(error)}")

    def _open_session(self) -> None:
        import yfinance
        from yfinance.data import SingletonMeta, YfData

        for category in (
            DeprecationWarning,
            FutureWarning,
        ):  # pandas 3 to yfinance 1.7: not the user's to mend
            warnings.filterwarnings("ignore", category=category, module=r"yfinance\.")
        for name in ("yfinance", "bs4"):  # else Python prints what they log; bs4 reads the consent page
            logging.getLogger(name).addHandler(_NO_HANDLER)
        yfinance.config.debug.hide_exceptions = False
        yfinance.config.network.retries = 0  # it would sleep 1, 2, 4 seconds; the attempts are ours
        _use_cache(Path(self._temporary.name) if self._temporary else self._cache_folder)
        # The one YfData keeps a crumb that may be an error's text, and a cookie strategy that failed.
        SingletonMeta._instances.pop(YfData, None)
        self._session = new_session(self.watch)

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
        """Go on without yfinance's sqlite files: damaged, locked, or on a disk that has no locks."""
        self._close_session()
        shutil.rmtree(self._cache_folder, ignore_errors=True)  # what stays is abandoned again next time
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="yfinance-")


_NO_HANDLER = logging.NullHandler()


def _use_cache(folder: Path | None) -> None:
    """Point yfinance's sqlite caches at ``folder``, or close them (None).

    set_tz_cache_location alone does nothing once a cache was used: its open database stays.
    """
    from yfinance import cache

    cache._TzDBManager.close_db()
    cache._CookieDBManager.close_db()
    cache._TzCacheManager._tz_cache = None
    cache._CookieCacheManager._Cookie_cache = None
    if folder is not None:
        cache.set_tz_cache_location(str(folder))


def _table(frame: pd.DataFrame, symbol: str) -> pa.Table:
    """Return yfinance's frame as SCHEMA. The quote that Yahoo appends at its own second is no bar."""
    if frame.empty:
        return SCHEMA.empty_table()
    open_time = pd.DatetimeIndex(frame.index).as_unit("ns").asi8
    num_rows = len(open_time) - int(open_time[-1] % MINUTE_NS != 0)
    names = ("Open", "High", "Low", "Close", "Volume")
    columns = [frame[name].to_numpy(np.float64)[:num_rows] for name in names]
    symbols = pa.repeat(pa.scalar(symbol, pa.string()), num_rows)
    return pa.table([symbols, open_time[:num_rows], *columns], schema=SCHEMA)


def _splits(frame: pd.DataFrame) -> list[Split]:
    """Return the splits in yfinance's event column; the ledger judges odd ratios (spin-offs) by the prices."""
    if "Stock Splits" not in frame:
        return []
    events = frame["Stock Splits"]
    events = events[np.isfinite(events) & (events > 0)]
    days = pd.DatetimeIndex(events.index).tz_convert("America/New_York").date
    return [Split(day, float(ratio)) for day, ratio in zip(days, events, strict=True)]


def _short(error: BaseException) -> str:
    """Say an error in one short line, without the addresses that HTTP libraries put into it."""
    text = " ".join(str(error).split())
    text = text.split("See http")[0].split("https://")[0].split("http://")[0].rstrip(" .,;:(")
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
