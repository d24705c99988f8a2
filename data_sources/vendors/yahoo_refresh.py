"""One refresh from Yahoo: which questions to ask for each stock, and what to do when one fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa

from data_sources.calendar import DAY_NS, new_york_midnight_ns
from data_sources.errors import BadAnswer, DataError, LakeError, RateLimited, Refused, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.progress import Progress
from data_sources.splits import Split, SplitLedger
from data_sources.vendors.http import FinalAnswer
from data_sources.vendors.yahoo_client import CHART_PATH, Watch
from data_sources.vendors.yahoo_weeks import SOURCE, Plan, Want, store
from runtime.files import write_atomically

FAILED_IN_A_ROW = 6  # stocks one after another before Yahoo counts as down, once anyone was there
SPLITS_AGE_NS = DAY_NS * 5 // 6  # so that a refresh at the same hour every day asks every day
SPLITS_ASKED = "splits_asked.json"


class Client(Protocol):
    """What a refresh needs of yfinance; every method raises DataError alone."""

    watch: Watch
    attempts: int

    def minutes(self, symbol: str, start_ns: int, end_ns: int) -> tuple[pa.Table, list[Split]]:
        """Return the rows that Yahoo gives for [start_ns, end_ns), and the splits within."""

    def splits(self, symbol: str, start_ns: int, end_ns: int) -> list[Split]:
        """Return the splits executed in [start_ns, end_ns)."""


class Refresh:
    """What is known of each stock while one refresh runs."""

    def __init__(
        self,
        lake: Lake,
        plan: Plan,
        client: Client,
        ledger: SplitLedger,
        progress: Progress,
        *,
        start_ns: int,
        pause_seconds: float,
    ) -> None:
        self._lake, self._plan, self._client, self._ledger = lake, plan, client, ledger
        self._progress, self._start_ns, self._pause_seconds = progress, start_ns, pause_seconds
        self._path = lake.root / SOURCE / SPLITS_ASKED
        # Per stock: since when splits were asked for, when that was, how many the ledger knew then.
        self._asked = _read_asked(self._path)
        self._written = 0
        self._notes: dict[str, list[str]] = {}
        self._failed: dict[str, DataError] = {}

    def run(self, stocks: list[str]) -> None:
        """Bring the stocks up to date; see Yahoo.refresh."""
        self._progress.start(SOURCE, "stocks", len(stocks))
        asked = dict(self._asked)
        num_tried = 0
        in_a_row = 0
        told: list[str] = []  # stocks that failed with the source; the one line for it speaks for them
        try:
            for stock in stocks:
                # Once a stock found nobody there, one attempt each must do for the next ones.
                error = self._try(stock, num_attempts=1 if in_a_row else None)
                in_a_row = 0 if error is None or isinstance(error, FinalAnswer) else in_a_row + 1
                num_tried += 1
                nobody = self._client.watch.failure is not None and in_a_row == num_tried
                limit = self._client.watch.policy.failures_in_a_row if nobody else FAILED_IN_A_ROW
                if error is not None and in_a_row >= limit:
                    told = list(self._failed)[-in_a_row:]
                    raise SourceUnavailable(
                        f"Yahoo was given up after {in_a_row} stocks in a row failed, the last with: {error}"
                    ) from error
            if len(self._failed) < len(stocks):  # what a short outage took, once more
                for stock in [s for s, error in self._failed.items() if not isinstance(error, FinalAnswer)]:
                    if self._try(stock, num_attempts=1) is None:
                        del self._failed[stock]
            elif not self._written:
                told = [s for s, error in self._failed.items() if not isinstance(error, FinalAnswer)]
        finally:
            for stock, notes in self._notes.items():
                self._progress.warn(SOURCE, f"{stock}: {'; '.join(notes)}")
            for stock, failure in self._failed.items():
                if stock not in told:
                    self._progress.warn(SOURCE, f"{stock}: {failure}")
            self._progress.finish(
                SOURCE,
                f"{num_tried - len(self._failed)} of {len(stocks)} stocks up to date, "
                f"{self._written} weeks written, {self._client.watch.requests} requests",
            )
            if self._asked != asked:
                self._write_asked()
        if stocks and len(self._failed) == len(stocks) and not self._written:
            raise self._failed[next(iter(told or stocks))]

    def _try(self, stock: str, num_attempts: int | None = None) -> DataError | None:
        """Bring one stock up to date; return the error that is its own, and note it in ``_failed``.

        Raises:
            DataError: one that is not its own: the source must be given up, or the lake.
        """
        watch = self._client.watch
        requests, num_bytes = watch.requests, watch.num_bytes
        self._client.attempts = num_attempts or watch.policy.attempts
        error: DataError | None = None
        try:
            self._stock(stock)
        except (LakeError, RateLimited, Refused):
            raise
        except DataError as failure:
            if watch.is_late:
                raise
            error = failure
        self._progress.advance(SOURCE, int(stock not in self._failed), watch.num_bytes - num_bytes)
        if error is not None:
            self._failed[stock] = error
        if watch.requests > requests:
            time.sleep(self._pause_seconds)
        return error

    def _stock(self, symbol: str) -> None:
        """Ask for the news of one stock.

        Raises:
            DataError: the first failure, after the other questions were tried where that makes sense.
        """
        self._notes.pop(symbol, None)
        first: DataError | None = None
        changed_ns = 0
        if self._splits_are_due(symbol):
            try:
                changed_ns = self._older_splits(symbol)
            except BadAnswer as error:
                first = self._unless_unknown(error)
        empty = []
        parts = self._lake.parts(SOURCE, symbol)
        for want in self._plan.wants(parts, self._ledger.splits(symbol), changed_ns):
            try:
                if not self._week(symbol, want):
                    empty.append(want.week.name)
            except BadAnswer as error:
                first = first or self._unless_unknown(error)
        if empty:
            self._note(symbol, f"no bars came for the week of {', '.join(empty)}, although there was trade")
        if first is not None:
            raise first

    def _unless_unknown(self, error: BadAnswer) -> BadAnswer:
        if self._client.watch.status == 404:  # no other question about this symbol will do better
            raise error
        self._client.attempts = 1  # for its other questions, which may well end alike
        return error

    def _week(self, symbol: str, want: Want) -> bool:
        """Ask for a week and keep it. False: nothing came where something should have."""
        table, splits = self._client.minutes(symbol, want.start_ns, want.end_ns)
        self._learn(symbol, splits)
        period = f"period1={want.start_ns // 10**9}&period2={want.end_ns // 10**9}"
        key = f"{CHART_PATH}{symbol}?interval=1m&{period}"
        now_ns = self._plan.now_ns
        stored = store(self._lake, symbol, want, table, key, self._ledger, now_ns)
        self._written += 1
        if table.num_rows and not stored.is_complete:
            counts = "".join(f", {count} {reason}" for reason, count in stored.rejected.items())
            self._note(
                symbol,
                f"{stored.held:,} of {stored.expected:,} bars for the week of {want.week.name}{counts}, "
                "will be asked for again",
            )
        return bool(table.num_rows or not stored.expected)

    def _note(self, symbol: str, text: str) -> None:
        self._notes.setdefault(symbol, []).append(text)

    def _splits_are_due(self, symbol: str) -> bool:
        start_ns, asked_ns, num_known = self._asked.get(symbol, (0, 0, 0))
        lost = len(self._ledger.splits(symbol)) < num_known  # a ledger that was damaged starts empty
        return lost or self._start_ns < start_ns or self._plan.now_ns - asked_ns >= SPLITS_AGE_NS

    def _older_splits(self, symbol: str) -> int:
        """Ask for the splits since the lake's start. Return when the last one new to the ledger was, or 0."""
        now_ns = self._plan.now_ns
        found = self._client.splits(symbol, self._start_ns, now_ns)
        changed_ns = self._learn(symbol, found)
        self._asked[symbol] = (self._start_ns, now_ns, len(self._ledger.splits(symbol)))
        return changed_ns

    def _learn(self, symbol: str, found: list[Split]) -> int:
        new = self._ledger.news(symbol, found)
        if not new:
            return 0
        self._ledger.update(symbol, new)
        return new_york_midnight_ns(max(split.execution_date for split in new))

    def _write_asked(self) -> None:
        text = json.dumps(self._asked, indent=0, sort_keys=True)
        try:
            write_atomically(self._path, lambda file: _write(file, text))
        except OSError as error:
            raise LakeError(f"cannot write {self._path}: {error.strerror or error}") from error


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _read_asked(path: Path) -> dict[str, tuple[int, int, int]]:
    """Return what was asked when. A file that does not read costs a question per stock, no more."""
    try:
        return {
            str(stock): (int(a), int(b), int(c)) for stock, (a, b, c) in json.loads(path.read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LakeError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError):
        return {}
