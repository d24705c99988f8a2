"""Polygon's (now Massive's) flat files: one gzip CSV per day and data type in an S3 bucket.

* List first, by year: two years of one data type are three requests. Fetch only the days that the lake
  lacks, that the vendor replaced (ETag and size), or that were fetched without a symbol wanted now.
* Newest day first, and the first one alone. Objects outside of the plan are listed all the same and answer
  403, by data type or from some age on, so one answer is enough to stop asking for older ones.
* A file is decoded to its end, so that its gzip checksum holds, before anything of it is kept.
* Prices and volumes are as traded: splits are applied on load. All rows of the day are kept, before and
  after the regular session too.

Vendor's pages, 2026: massive.com/docs/flat-files, massive.com/knowledge-base/article/
how-to-get-started-with-s3 and .../what-time-are-massives-flat-files-ready-each-day.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pyarrow as pa

from data_sources.errors import BadAnswer, DataError, MissingCredentials, Refused, SourceUnavailable
from data_sources.lake.lake import Lake, Part
from data_sources.progress import Progress
from data_sources.universe import KEPT_FOLD, kept_rule, look_back, named, top_of
from data_sources.vendors.polygon_days import read_day, read_day_and_largest
from data_sources.vendors.polygon_files import GLOBAL_CRYPTO, US_STOCKS, DataType, DayFile, FlatFiles

SOURCE = "polygon"
DEFAULT_ENDPOINT = "https://files.massive.com"  # https://files.polygon.io is the older name of the host
PARALLEL_GETS = 4
IN_A_ROW = 4  # so many days refused, or unreachable, in a row: the rest will be too
WARNINGS_PER_TYPE = 3  # the rest is a count


@dataclass(frozen=True)
class Day:
    """What came of one day file: our rows, and which version of the file of how many bytes they are from."""

    table: pa.Table
    version: str
    num_bytes: int
    dollar_volume: dict[str, int]  # of the largest, where a rule asks for them


@dataclass
class Plan:
    """What one data type needs, and how far that came."""

    data_type: DataType
    symbols: tuple[str, ...]  # by name
    num_largest: int  # kept of each day beside them, for a rule
    held: dict[str, Part]
    missing: list[DayFile]  # newest first
    arrived: int = 0
    num_bytes: int = 0
    left: int = 0  # for the next refresh: damaged, or the source was given up
    denied: list[dt.date] = field(default_factory=list)  # refused, or skipped after those that were
    unreachable: SourceUnavailable | None = None  # set when the source was given up
    rows: dict[str, int] = field(default_factory=dict)  # arrived now, by symbol


@dataclass(frozen=True)
class Polygon:
    """Polygon's flat files with one pair of S3 keys.

    Attributes:
        endpoint: scheme and host of the S3 service.
        read_timeout_seconds: without a byte for so long, a request is tried again; ``attempts`` in all.
    """

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    endpoint: str = DEFAULT_ENDPOINT
    connect_timeout_seconds: float = 10
    read_timeout_seconds: float = 30
    attempts: int = 4

    @classmethod
    def from_environment(cls) -> Polygon:
        """Return the source as the environment describes it.

        Raises:
            MissingCredentials: a key is not set, is empty, or holds characters that no key has.
            DataError: POLYGON_S3_ENDPOINT is not an address.
        """
        keys = []
        for name in ("POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY"):
            key = os.environ.get(name, "").strip()
            if not key:
                raise MissingCredentials(f"{name} is not set, see .env.example")
            if not re.fullmatch(r"[!-~]+", key):
                raise MissingCredentials(f"{name} holds spaces or characters that no key has, copy it again")
            keys.append(key)
        endpoint = os.environ.get("POLYGON_S3_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        address = urlsplit(endpoint)
        if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc:
            raise DataError(
                f"POLYGON_S3_ENDPOINT must look like {DEFAULT_ENDPOINT}, see .env.example; what is set is not"
                " an http address of a host"
            )
        return cls(keys[0], keys[1], endpoint)

    def probe(self, data_type: DataType, today: dt.date) -> tuple[str, str]:
        """Ask once whether these keys may read a data type; see FlatFiles.probe."""
        return self._files().probe(data_type, today)

    def _files(self) -> FlatFiles:
        return FlatFiles(
            self.endpoint,
            self.access_key,
            self.secret_key,
            connect_timeout_seconds=self.connect_timeout_seconds,
            read_timeout_seconds=self.read_timeout_seconds,
            attempts=self.attempts,
            connections=2 * PARALLEL_GETS,
        )

    def refresh(
        self,
        lake: Lake,
        stocks: Sequence[str],
        crypto: Sequence[str],
        start_ns: int,
        end_ns: int,
        now_ns: int,
        progress: Progress,
    ) -> None:
        """Bring the lake's days in [start_ns, end_ns) up to what the vendor lists.

        What arrives is kept whatever happens later. A damaged day is warned of and left for the next
        refresh; so is a data type, or an age, that the plan does not cover.

        Args:
            lake: where the days go, datasets "us_stocks_sip" and "global_crypto", unit "YYYY-MM-DD".
            stocks: symbols as in the files, such as "BRK.B", or a rule, "top:500" (universe.py); none: the
                data type is not asked for.
            crypto: pairs as in the files, such as "X:BTC-USD", or a rule.
            start_ns: first instant wanted.
            end_ns: end of what is wanted.
            now_ns: the present; bars that have not closed by then are not kept.
            progress: told of days and bytes.

        Raises:
            Refused: no data type that was asked for may even be listed with these keys.
            SourceUnavailable: the source does not answer (any more).
            LakeError: the lake cannot be written.
        """
        wanted = [
            (data_type, named(symbols), KEPT_FOLD * top_of(symbols))
            for data_type, symbols in ((US_STOCKS, stocks), (GLOBAL_CRYPTO, crypto))
            if symbols
        ]
        if not wanted or end_ns <= start_ns:
            progress.finish(SOURCE, "nothing was asked for")
            return
        files = self._files()
        with lake.writing():
            plans = self._plans(files, lake, wanted, start_ns, end_ns, progress)
            progress.start(SOURCE, "day files", sum(len(plan.missing) for plan in plans))
            for plan in plans:
                self._fetch_all(files, lake, plan, now_ns, progress)
                _warn_of(plan, progress)
                if plan.unreachable:  # one host serves all data types
                    text = f"{plan.unreachable}; {plan.arrived} of {len(plan.missing)} day files arrived"
                    raise SourceUnavailable(text) from plan.unreachable
        progress.finish(SOURCE, _summary(plans))

    def _plans(
        self,
        files: FlatFiles,
        lake: Lake,
        wanted: Sequence[tuple[DataType, tuple[str, ...], int]],
        start_ns: int,
        end_ns: int,
        progress: Progress,
    ) -> list[Plan]:
        """List every data type and compare with the lake; a type that may not be listed is left out."""
        plans: list[Plan] = []
        refusals: list[Refused] = []
        days = {
            data_type: (
                data_type.day_of(look_back(start_ns) if num_largest else start_ns),
                data_type.day_of(end_ns - 1),
            )
            for data_type, _, num_largest in wanted
        }
        pool = ThreadPoolExecutor(PARALLEL_GETS, "polygon-list")
        try:
            listings = {
                data_type: [
                    pool.submit(files.list_year, data_type, year) for year in range(first.year, last.year + 1)
                ]
                for data_type, (first, last) in days.items()
            }
            for data_type, symbols, num_largest in wanted:
                first, last = days[data_type]
                try:
                    listed = [file for year in listings[data_type] for file in year.result()]
                except Refused as refusal:
                    refusals.append(refusal)
                    continue
                held = lake.parts(SOURCE, data_type.dataset)
                listed = sorted(
                    (file for file in listed if first <= file.day <= last),
                    key=lambda file: file.day,
                    reverse=True,
                )
                if not listed and (last - first).days >= 7:
                    progress.warn(SOURCE, f"{data_type.dataset}: no day file is listed for {first} to {last}")
                needed = {*symbols, *kept_rule(num_largest)}
                missing = [file for file in listed if _is_news(file, needed, held.get(file.day.isoformat()))]
                plans.append(Plan(data_type, symbols, num_largest, held, missing))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if not plans:
            raise refusals[0]
        for refused in refusals:
            progress.warn(SOURCE, str(refused))
        return plans

    def _fetch_all(self, files: FlatFiles, lake: Lake, plan: Plan, now_ns: int, progress: Progress) -> None:
        """Fetch a plan's missing days, a few at a time, and write each as it comes."""
        stopping = threading.Event()
        pool = ThreadPoolExecutor(PARALLEL_GETS, f"polygon-{plan.data_type.dataset}")
        ahead = deque(plan.missing)
        tried_later: set[DayFile] = set()
        pending: dict[Future[Day], DayFile] = {}
        parallel = 1  # the first alone shows whether the data type is in the plan
        denied_in_a_row = unreachable_in_a_row = 0
        try:
            while True:
                # Only so many in flight, so that neither bodies nor tables pile up over hundreds of days.
                while ahead and len(pending) < parallel:
                    file = ahead.popleft()
                    symbols = self._symbols_for(plan, file)
                    future = pool.submit(self._fetch, files, plan, file, symbols, stopping, progress)
                    pending[future] = file
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    file = pending.pop(future)
                    progress.advance(SOURCE)
                    try:
                        day = future.result()
                    except Refused:
                        plan.denied.append(file.day)
                        denied_in_a_row += 1
                        if plan.arrived == 0 or denied_in_a_row >= IN_A_ROW:
                            plan.denied += [older.day for older in ahead]
                            progress.advance(SOURCE, len(ahead))
                            ahead.clear()
                        continue
                    except BadAnswer as error:
                        plan.left += 1
                        self._warn_of_day(plan, error, progress)
                        continue
                    except FileNotFoundError:
                        continue  # listed, but gone since
                    except SourceUnavailable as error:
                        unreachable_in_a_row += 1
                        if plan.unreachable or unreachable_in_a_row >= IN_A_ROW:
                            plan.unreachable = plan.unreachable or error
                            plan.left += 1 + len(ahead)
                            ahead.clear()
                        elif file not in tried_later:  # a bad minute of the host: once more, at the end
                            tried_later.add(file)
                            ahead.append(file)
                            progress.advance(SOURCE, -1)
                        else:
                            plan.left += 1
                            self._warn_of_day(plan, error, progress)
                        continue
                    denied_in_a_row = unreachable_in_a_row = 0
                    try:
                        self._keep(lake, plan, file, day, now_ns, progress)
                    except BadAnswer as error:  # the lake holds better bars of the same version
                        plan.left += 1
                        self._warn_of_day(plan, error, progress)
                parallel = PARALLEL_GETS
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)  # a hanging request must not hold up a stop

    def _warn_of_day(self, plan: Plan, error: DataError, progress: Progress) -> None:
        if plan.left <= WARNINGS_PER_TYPE:
            progress.warn(SOURCE, f"{error}; left for the next refresh")

    def _symbols_for(self, plan: Plan, file: DayFile) -> tuple[str, ...]:
        """Return what to take from a file by name: never less than the lake already holds of that day."""
        part = plan.held.get(file.day.isoformat())
        return tuple(dict.fromkeys((*named(part.symbols if part else ()), *plan.symbols)))

    def _largest_for(self, plan: Plan, file: DayFile) -> int:
        """Return how many of the day's largest to take; as above."""
        part = plan.held.get(file.day.isoformat())
        return max(plan.num_largest, top_of(part.symbols) if part else 0)

    def _keep(
        self,
        lake: Lake,
        plan: Plan,
        file: DayFile,
        day: Day,
        now_ns: int,
        progress: Progress,
    ) -> None:
        """Write one day and count it."""
        unit = file.day.isoformat()
        start_ns, end_ns = plan.data_type.interval(file.day)
        part = lake.write(
            SOURCE,
            plan.data_type.dataset,
            unit,
            day.table,
            key=file.key,
            version=day.version,
            start_ns=start_ns,
            end_ns=end_ns,
            symbols=(
                *self._symbols_for(plan, file),
                *day.dollar_volume,
                *kept_rule(self._largest_for(plan, file)),
            ),
            now_ns=now_ns,
            dollar_volume=day.dollar_volume,
        )
        plan.arrived += 1
        plan.num_bytes += day.num_bytes
        for count in day.table.column("symbol").value_counts():
            symbol = count["values"].as_py()
            plan.rows[symbol] = plan.rows.get(symbol, 0) + count["counts"].as_py()
        before = plan.held.get(unit)
        if before and before.version != part.version and part.rows < 0.95 * before.rows:
            progress.warn(
                SOURCE,
                f"{plan.data_type.dataset} {unit}: the vendor's new file has {part.rows:,} rows of our"
                f" symbols, the one before had {before.rows:,}",
            )

    def _fetch(
        self,
        files: FlatFiles,
        plan: Plan,
        file: DayFile,
        symbols: tuple[str, ...],
        stopping: threading.Event,
        progress: Progress,
    ) -> Day:
        """Return one day's rows of ``symbols``; a damaged answer is asked for once more."""
        start_ns, end_ns = plan.data_type.interval(file.day)
        for is_last in (False, True):
            try:
                body = files.get(file, lambda count: progress.advance(SOURCE, 0, count), stopping)
                num_largest, ending = self._largest_for(plan, file), plan.data_type.ending
                if num_largest:
                    table, dollars = read_day_and_largest(
                        body.content, file.key, symbols, num_largest, ending, start_ns, end_ns
                    )
                else:
                    table, dollars = read_day(body.content, file.key, symbols, start_ns, end_ns), {}
                return Day(table, body.version, len(body.content), dollars)
            except BadAnswer:
                if is_last:
                    raise
        raise AssertionError("the second attempt returns or raises")


def _is_news(file: DayFile, needed: set[str], part: Part | None) -> bool:
    if part is None or part.version != file.version:
        return True
    return not set(named(needed)) <= set(part.symbols) or top_of(needed) > top_of(part.symbols)


def _warn_of(plan: Plan, progress: Progress) -> None:
    """Say once per data type what did not come, and which symbols have no bars."""
    dataset = plan.data_type.dataset
    if plan.denied:
        progress.warn(
            SOURCE,
            f"{dataset}: {len(plan.denied)} missing days up to {max(plan.denied)} are listed but refused"
            " (HTTP 403): the plan of these keys does not cover this data type, or files of that age",
        )
    if plan.left > WARNINGS_PER_TYPE and not plan.unreachable:
        progress.warn(SOURCE, f"{dataset}: {plan.left} days in all are left for the next refresh")
    unknown = [symbol for symbol in plan.symbols if symbol not in plan.rows]
    if unknown and plan.arrived >= 5:
        progress.warn(SOURCE, f"{dataset}: no bars of {', '.join(unknown)} in {plan.arrived} day files")


def _summary(plans: Sequence[Plan]) -> str:
    arrived = sum(plan.arrived for plan in plans)
    text = f"{arrived} day files, {sum(plan.num_bytes for plan in plans) / 1e6:,.1f} MB"
    for count, word in (
        (sum(len(plan.held) for plan in plans), "held before"),
        (sum(plan.left for plan in plans), "left for the next refresh"),
    ):
        text += f", {count} {word}" if count else ""
    return text
