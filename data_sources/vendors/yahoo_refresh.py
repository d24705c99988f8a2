"""Yahoo Finance minute bars of US stocks, one lake dataset per stock, one part per week.

Here is what to ask for each stock, and what to do when a question fails; yahoo_weeks.py has the weeks, and
yahoo_client.py yfinance. Splits go to the ledger: recent ones come with the minutes, older ones from one daily
chart per stock and day.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

from data_sources import renames
from data_sources.bars import DAY_NS
from data_sources.calendar import new_york_midnight_ns, utc
from data_sources.errors import BadAnswer, DataError, LakeError, RateLimited, Refused, SourceUnavailable
from data_sources.sources import RefreshJob
from data_sources.splits import Split
from data_sources.universe import plain_names
from data_sources.vendors.http import FinalAnswer, RetryPolicy
from data_sources.vendors.spelling import other_tickers
from data_sources.vendors.yahoo import STOCKS
from data_sources.vendors.yahoo_client import CHART_PATH, Client
from data_sources.vendors.yahoo_weeks import SOURCE, Plan, Want, store
from runtime.files import write_atomically

RETRY_POLICY = RetryPolicy(total_seconds=12, attempts=2)
NEVER_ANSWERED_IN_A_ROW = 3  # stocks without an answer from the first one on before Yahoo counts as down
PAUSE_SECONDS = 0.4  # between stocks, at Yahoo's own hosts only; it limits by address, for up to a day
SECONDS_PER_STOCK = 15.0  # with MINIMUM_SECONDS the deadline of a refresh; 3 are usual at first
MINIMUM_SECONDS = 120.0
PROBED_NS = 5 * DAY_NS  # a session lies within, whatever the weekend
CACHE_FOLDER = ".yfinance"
SPLITS_AGE_NS = DAY_NS * 5 // 6  # so that a refresh at the same hour every day asks every day
SPLITS_ASKED = "splits_asked.json"


class Yahoo:
    """Refreshes a lake from Yahoo's chart API. One refresh per process at a time: yfinance is global."""

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
            client = Client(self._base_url, self._policy, deadline, Path(folder))
            try:
                count = client.minutes(stock, now_ns - PROBED_NS, now_ns)[0].num_rows
            finally:
                client.close()
        return f"answers for {stock} with {count:,} minutes of the last days", ""

    def refresh(self, job: RefreshJob) -> None:
        """Bring the stocks' datasets up to date over the part of the interval that Yahoo still has.

        Each stock fails alone, with one warning; what arrived stays. The ledger gets every split since the start.

        Raises:
            RateLimited, Refused, SourceUnavailable: the source was given up; the rest is left as it was.
            DataError: not one stock could be brought up to date, or the lake cannot be written.
        """
        stocks = list(plain_names(STOCKS.symbols(job.request)))
        deadline = time.monotonic() + MINIMUM_SECONDS + SECONDS_PER_STOCK * len(stocks)
        client = Client(self._base_url, self._policy, deadline, job.lake.root / CACHE_FOLDER)
        try:
            _Refresh(job, client, pause_seconds=0.0 if self._base_url else PAUSE_SECONDS).run(stocks)
        finally:
            client.close()


class _Refresh:
    """One refresh, and what it knows of each stock."""

    def __init__(self, job: RefreshJob, client: Client, pause_seconds: float) -> None:
        self._job, self._client, self._pause_seconds = job, client, pause_seconds
        self._lake, self._ledger, self._progress = job.lake, job.splits, job.progress
        self._plan = Plan(job.start_ns, job.end_ns, job.now_ns)
        self._path = job.lake.root / SOURCE / SPLITS_ASKED
        # Per stock: since when splits were asked for, when that was, how many the ledger had then.
        self._asked = _read_requests(self._path)
        self._renames = renames.read(job.lake.root)
        self._attempts: int | None = None  # for the next question; None: the policy's
        self._written = 0
        self._notes: dict[str, list[str]] = {}
        self._failed: dict[str, DataError] = {}

    def run(self, stocks: list[str]) -> None:
        """Bring the stocks up to date; see Yahoo.refresh."""
        self._progress.start(SOURCE, "stocks", len(stocks))
        asked = dict(self._asked)
        host = self._client.host
        num_tried = 0
        reported: list[str] = []  # stocks that failed with the source, whose one line stands for them
        try:
            for stock in stocks:
                # Once a stock got no answer, one attempt each must do for the next ones.
                error = self._try(stock, attempts=1 if host.failures else None)
                host.note(None if isinstance(error, FinalAnswer) else error)
                num_tried += 1
                never_answered = self._client.wire.failure is not None and host.failures == num_tried
                if host.down or (never_answered and num_tried >= NEVER_ANSWERED_IN_A_ROW):
                    reported = list(self._failed)[-host.failures :]
                    raise SourceUnavailable(
                        f"given up after {host.failures} stocks in a row failed, the last with: {error}"
                    ) from error
            if len(self._failed) < len(stocks):  # once more, for what a short outage took
                for stock in self._failed_but_not_finally():
                    if self._try(stock, attempts=1) is None:
                        del self._failed[stock]
            elif not self._written:
                reported = self._failed_but_not_finally()
        finally:
            for stock, notes in self._notes.items():
                self._progress.warn(SOURCE, f"{stock}: {'; '.join(notes)}")
            for stock, failure in self._failed.items():
                if stock not in reported:
                    self._progress.warn(SOURCE, f"{stock}: {failure}")
            self._progress.finish(
                SOURCE,
                f"{num_tried - len(self._failed)} of {len(stocks)} stocks up to date, "
                f"{self._written} weeks written, {self._client.wire.requests} requests",
            )
            if self._asked != asked:
                self._write_requests()
        if stocks and len(self._failed) == len(stocks) and not self._written:
            raise self._failed[next(iter(reported or stocks))]

    def _failed_but_not_finally(self) -> list[str]:
        return [stock for stock, error in self._failed.items() if not isinstance(error, FinalAnswer)]

    def _try(self, stock: str, attempts: int | None) -> DataError | None:
        """Bring one stock up to date; return the error that is its own, also noted in ``_failed``.

        Raises:
            DataError: the source must be given up, or the lake.
        """
        wire = self._client.wire
        requests, num_bytes = wire.requests, wire.num_bytes
        self._attempts = attempts
        error: DataError | None = None
        try:
            self._refresh_stock(stock)
        except (LakeError, RateLimited, Refused):
            raise
        except DataError as failure:
            if self._client.host.down is not None:
                raise
            error = failure
        self._progress.advance(SOURCE, int(stock not in self._failed), wire.num_bytes - num_bytes)
        if error is not None:
            self._failed[stock] = error
        if wire.requests > requests:
            time.sleep(self._pause_seconds)
        return error

    def _refresh_stock(self, symbol: str) -> None:
        """Fetch the news of one stock.

        Raises:
            DataError: the first failure, after the other questions were tried where that makes sense.
        """
        self._notes.pop(symbol, None)
        first: DataError | None = None
        changed_ns = 0
        if self._splits_are_due(symbol):
            try:
                changed_ns = self._fetch_older_splits(symbol)
            except BadAnswer as error:
                first = self._unless_unknown(symbol, error)
        empty = []
        parts = self._lake.parts(SOURCE, symbol)
        for want in self._plan.wants(parts, self._ledger.splits(symbol), changed_ns):
            try:
                if not self._fetch_week(symbol, want):
                    empty.append(want.week.name)
            except BadAnswer as error:
                first = first or self._unless_unknown(symbol, error)
        if empty:
            weeks = ", ".join(empty)
            self._note(symbol, f"no bars came for the week of {weeks}, although the market was open")
        if first is not None:
            raise first

    def _unless_unknown(self, symbol: str, error: BadAnswer) -> BadAnswer:
        if self._client.wire.status == 404:  # no other question about this symbol will do better
            raise FinalAnswer(f"{error}{self._find_spelling(symbol)}") from error
        self._attempts = 1  # for its other questions, which may well end alike
        return error

    def _find_spelling(self, symbol: str) -> str:
        """Return what is known of a symbol that Yahoo does not know, to be appended to that."""
        if rename := renames.successor(self._renames, symbol):
            return f"; {rename}"
        bars_until = [part.end_ns for part in self._lake.parts(SOURCE, symbol).values() if part.rows]
        if bars_until:
            return f"; it did until {utc(max(bars_until)).date()}: it was delisted or renamed"
        now_ns = self._job.now_ns
        for other in other_tickers(symbol):
            with contextlib.suppress(BadAnswer):
                if self._client.minutes(other, now_ns - PROBED_NS, now_ns, 1)[0].num_rows:
                    return f"; it has {other}"
        return ""

    def _fetch_week(self, symbol: str, want: Want) -> bool:
        """Fetch a week and keep it. False: nothing came where something should have."""
        table, splits = self._client.minutes(symbol, want.start_ns, want.end_ns, self._attempts)
        self._learn(symbol, splits)
        period = f"period1={want.start_ns // 10**9}&period2={want.end_ns // 10**9}"
        key = f"{CHART_PATH}{symbol}?interval=1m&{period}"
        stored = store(self._job, symbol, want, table, key)
        self._written += 1
        if table.num_rows and not stored.is_complete:
            counts = "".join(f", {count} {reason}" for reason, count in stored.rejected.items())
            self._note(
                symbol,
                f"{stored.held:,} of {stored.expected:,} bars for the week of {want.week.name}{counts}, "
                "fetched again next time",
            )
        return bool(table.num_rows or not stored.expected)

    def _note(self, symbol: str, text: str) -> None:
        self._notes.setdefault(symbol, []).append(text)

    def _splits_are_due(self, symbol: str) -> bool:
        start_ns, asked_ns, num_known = self._asked.get(symbol, (0, 0, 0))
        is_lost = len(self._ledger.splits(symbol)) < num_known  # a ledger that was damaged starts empty
        return is_lost or self._job.start_ns < start_ns or self._job.now_ns - asked_ns >= SPLITS_AGE_NS

    def _fetch_older_splits(self, symbol: str) -> int:
        """Fetch the splits since the lake's start; return when the last new one was executed, or 0."""
        now_ns = self._job.now_ns
        found = self._client.splits(symbol, self._job.start_ns, now_ns, self._attempts)
        changed_ns = self._learn(symbol, found)
        self._asked[symbol] = (self._job.start_ns, now_ns, len(self._ledger.splits(symbol)))
        return changed_ns

    def _learn(self, symbol: str, found: list[Split]) -> int:
        new = self._ledger.news(symbol, found)
        if not new:
            return 0
        self._ledger.update(symbol, new)
        return new_york_midnight_ns(max(split.execution_date for split in new))

    def _write_requests(self) -> None:
        text = json.dumps(self._asked, indent=0, sort_keys=True)
        try:
            write_atomically(self._path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise LakeError(f"cannot write {self._path}: {error.strerror or error}") from error


def _read_requests(path: Path) -> dict[str, tuple[int, int, int]]:
    """Return when splits were asked for. An unreadable file costs a question per stock, no more."""
    try:
        return {
            str(stock): (int(a), int(b), int(c)) for stock, (a, b, c) in json.loads(path.read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LakeError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return {}
