"""Polygon's (now Massive's) flat files: one gzip CSV per day and data type in an S3 bucket.

* List first, by year: two years of one data type are three requests. Fetch only the days that the lake
  lacks, that the vendor replaced (ETag and size), or that were fetched without a symbol wanted now.
* Newest day first, and the first one alone. Objects outside of the plan are listed all the same and answer
  403, by data type or from some age on, so one answer is enough to stop asking for older ones.
* A file is decoded to its end, so that its gzip checksum holds, before any of it is kept.
* Prices and volumes are as traded: splits are applied on load. All rows of the day are kept, before and
  after the regular session too.

Vendor's pages, 2026: massive.com/docs/flat-files, massive.com/knowledge-base/article/
how-to-get-started-with-s3 and .../what-time-are-massives-flat-files-ready-each-day.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from data_sources import renames
from data_sources.calendar import utc
from data_sources.errors import BadAnswer, DataError, MissingCredentials, Refused, SourceUnavailable
from data_sources.lake.parts import Part
from data_sources.sources import RefreshJob, SymbolGroup
from data_sources.universe import KEPT_FOLD, kept_rule, look_back, plain_names, top_of
from data_sources.vendors.http import RetryPolicy, require_address
from data_sources.vendors.polygon import CRYPTO, GLOBAL_CRYPTO, STOCKS, US_STOCKS, DataType
from data_sources.vendors.polygon_days import read_day
from data_sources.vendors.polygon_files import DayFile, FlatFiles
from data_sources.vendors.spelling import other_polygon_pairs, other_tickers

SOURCE = "polygon"
DEFAULT_ENDPOINT = "https://files.massive.com"  # https://files.polygon.io is the older name of the host
# A day file has 27 MB: 900 seconds are 30 kB/s, and slower than that is a hang.
RETRY_POLICY = RetryPolicy(
    connect_seconds=10,
    read_seconds=30,
    total_seconds=900,
    longest_wait_seconds=60,
    attempts=4,
    failures_in_a_row=4,
)
PARALLEL_GETS = 4
DENIED_IN_A_ROW = 4  # so many days refused in a row: older ones will be refused too
WARNINGS_PER_TYPE = 3  # the rest is a count


@dataclass(frozen=True)
class Polygon:
    """Polygon's flat files with one pair of S3 keys; ``endpoint`` is scheme and host of the S3 service."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    endpoint: str = DEFAULT_ENDPOINT
    policy: RetryPolicy = RETRY_POLICY

    @classmethod
    def from_environment(cls, policy: RetryPolicy = RETRY_POLICY) -> Polygon:
        """Read POLYGON_S3_ACCESS_KEY, POLYGON_S3_SECRET_KEY and POLYGON_S3_ENDPOINT.

        Raises:
            MissingCredentials: a key is not set, is empty, or has characters that no key has.
            DataError: POLYGON_S3_ENDPOINT is not an address.
        """
        keys = []
        for name in ("POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY"):
            key = os.environ.get(name, "").strip()
            if not key:
                raise MissingCredentials(f"{name} is not set, see .env.example")
            if not re.fullmatch(r"[!-~]+", key):
                raise MissingCredentials(f"{name} has spaces or characters that no key has, copy it again")
            keys.append(key)
        endpoint = os.environ.get("POLYGON_S3_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        require_address("POLYGON_S3_ENDPOINT", endpoint, DEFAULT_ENDPOINT)
        return cls(keys[0], keys[1], endpoint, policy)

    def probe(self, data_type: DataType, today: dt.date) -> tuple[str, str]:
        """Ask once whether these keys may read a data type; see FlatFiles.probe."""
        return self._files().probe(data_type, today)

    def _files(self) -> FlatFiles:
        return FlatFiles(self.endpoint, self.access_key, self.secret_key, self.policy, 2 * PARALLEL_GETS)

    def refresh(self, job: RefreshJob) -> None:
        """Bring the lake's days up to date with the vendor's listing.

        What arrives is kept whatever happens later. A damaged day is a warning and left for the next
        refresh; so is a data type, or an age, that the plan does not cover.

        Raises:
            Refused: none of the data types may even be listed with these keys.
            SourceUnavailable: the source does not answer (any more).
            LakeError: the lake cannot be written.
        """
        wanted = [
            (group, data_type, plain_names(symbols), KEPT_FOLD * top_of(symbols))
            for group, data_type in ((STOCKS, US_STOCKS), (CRYPTO, GLOBAL_CRYPTO))
            if (symbols := group.symbols(job.request))
        ]
        if not wanted or job.end_ns <= job.start_ns:
            job.progress.finish(SOURCE, "no symbols to fetch")
            return
        works = self._list(self._files(), job, wanted)
        job.progress.start(SOURCE, "day files", sum(len(work.missing) for work in works))
        for work in works:
            work.run()
            work.warn_of_gaps()
            if work.unreachable:  # one host serves all data types
                text = f"{work.unreachable}; {work.arrived} of {len(work.missing)} day files arrived"
                raise SourceUnavailable(text) from work.unreachable
        job.progress.finish(SOURCE, _summary(works))

    def _list(
        self,
        files: FlatFiles,
        job: RefreshJob,
        wanted: Sequence[tuple[SymbolGroup, DataType, tuple[str, ...], int]],
    ) -> list[_TypeRefresh]:
        """List every data type and compare with the lake; a type that may not be listed is left out."""
        works: list[_TypeRefresh] = []
        refusals: list[Refused] = []
        days = {
            data_type: (
                data_type.day_of(look_back(job.start_ns) if num_largest else job.start_ns),
                data_type.day_of(job.end_ns - 1),
            )
            for _, data_type, _, num_largest in wanted
        }
        pool = ThreadPoolExecutor(PARALLEL_GETS, "polygon-list")
        try:
            listings = {
                data_type: [
                    pool.submit(files.list_year, data_type, year) for year in range(first.year, last.year + 1)
                ]
                for data_type, (first, last) in days.items()
            }
            known = renames.read(job.lake.root)
            for group, data_type, symbols, num_largest in wanted:
                former = renames.former(known, group.setting, symbols, job.start_ns, job.end_ns)
                first, last = days[data_type]
                try:
                    listed = [file for year in listings[data_type] for file in year.result()]
                except Refused as refusal:
                    refusals.append(refusal)
                    continue
                listed = [file for file in listed if first <= file.day <= last]
                listed.sort(key=lambda file: file.day, reverse=True)
                if not listed and (last - first).days >= 7:
                    job.progress.warn(
                        SOURCE, f"{data_type.dataset}: no day file is listed for {first} to {last}"
                    )
                held = job.lake.parts(SOURCE, data_type.dataset)
                needed = {*symbols, *kept_rule(num_largest)}
                work = _TypeRefresh(
                    files, job, group.setting, data_type, symbols, num_largest, held, known, former
                )
                work.missing = [
                    file
                    for file in listed
                    if _is_news(file, needed | work.former_names(file.day), held.get(file.day.isoformat()))
                ]
                works.append(work)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if not works:
            raise refusals[0]
        for refused in refusals:
            job.progress.warn(SOURCE, str(refused))
        return works


@dataclass(frozen=True)
class _Day:
    """Our rows of one day file, and the version and size of the file that they are from."""

    table: pa.Table
    version: str
    num_bytes: int
    dollar_volume: dict[str, int]  # of the largest, where a rule asks for them
    spellings: set[str]  # other spellings of symbols without bars that the file has


@dataclass
class _TypeRefresh:
    """The refresh of one data type: what it needs, and how far it came."""

    files: FlatFiles
    job: RefreshJob
    setting: str
    data_type: DataType
    symbols: tuple[str, ...]  # by name
    num_largest: int  # kept of each day beside them, for a rule
    held: dict[str, Part]
    known_renames: Sequence[renames.Rename]
    former: Sequence[renames.Stretch]  # other names that the symbols had
    missing: list[DayFile] = field(default_factory=list)  # newest first
    arrived: int = 0
    num_bytes: int = 0
    left: int = 0  # for the next refresh: damaged, or the source was given up
    denied: list[dt.date] = field(default_factory=list)  # refused, or skipped after those that were
    unreachable: DataError | None = None  # set when the source was given up
    rows: Counter[str] = field(default_factory=Counter)  # arrived now, by symbol
    spellings: set[str] = field(default_factory=set)  # seen in the files, of symbols that are not

    def run(self) -> None:
        """Fetch the missing days, a few at a time, and write each as it comes."""
        pool = ThreadPoolExecutor(PARALLEL_GETS, f"polygon-{self.data_type.dataset}")
        ahead = deque(self.missing)
        retried: set[DayFile] = set()
        pending: dict[Future[_Day], DayFile] = {}
        parallel = 1  # the first alone shows whether the data type is in the plan
        denied_in_a_row = 0
        host = self.files.host
        try:
            while True:
                # Only so many in flight, so that neither bodies nor tables pile up over hundreds of days.
                while ahead and len(pending) < parallel:
                    file = ahead.popleft()
                    pending[pool.submit(self._fetch, file)] = file
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    file = pending.pop(future)
                    self.job.progress.advance(SOURCE)
                    try:
                        day = future.result()
                        denied_in_a_row = 0
                        host.note(None)
                        self._keep(file, day)
                    except FileNotFoundError:
                        continue  # listed, but gone since
                    except Refused:
                        self.denied.append(file.day)
                        denied_in_a_row += 1
                        if self.arrived == 0 or denied_in_a_row >= DENIED_IN_A_ROW:
                            self.denied += [older.day for older in ahead]
                            self.job.progress.advance(SOURCE, len(ahead))
                            ahead.clear()
                    except BadAnswer as error:  # damaged, or the lake has better bars of the same version
                        self._leave(error)
                    except SourceUnavailable as error:
                        host.note(error)
                        if host.down is not None:
                            self.unreachable = host.down
                            self.left += 1 + len(ahead)
                            ahead.clear()
                        elif file not in retried:  # a bad minute of the host: once more, at the end
                            retried.add(file)
                            ahead.append(file)
                            self.job.progress.advance(SOURCE, -1)
                        else:
                            self._leave(error)
                parallel = PARALLEL_GETS
        finally:
            # A request that hangs must not hold up a stop.
            pool.shutdown(wait=False, cancel_futures=True)
            if pending:
                host.stop.set()

    def _leave(self, error: DataError) -> None:
        self.left += 1
        if self.left <= WARNINGS_PER_TYPE:
            self.job.progress.warn(SOURCE, f"{error}; left for the next refresh")

    def _fetch(self, file: DayFile) -> _Day:
        """Return one day's rows of our symbols; a damaged answer is asked for once more."""
        start_ns, end_ns = self.data_type.interval(file.day)
        symbols, num_largest = self._symbols_for(file), self._largest_for(file)
        others = {other for symbol in symbols if symbol not in self.rows for other in self._others(symbol)}
        others -= set(symbols)
        for is_last in (False, True):
            try:
                body = self.files.get(file, lambda count: self.job.progress.advance(SOURCE, 0, count))
                table, dollars = read_day(
                    body.content, file.key, (*symbols, *others), start_ns, end_ns, num_largest,
                    self.data_type.ending,
                )  # fmt: skip
                seen = others.intersection(table.column("symbol").unique().to_pylist()) if others else set()
                if seen := seen - dollars.keys():
                    is_other = pc.is_in(table.column("symbol"), value_set=pa.array(sorted(seen)))
                    table = table.filter(pc.invert(is_other))
                return _Day(table, body.version, len(body.content), dollars, seen)
            except BadAnswer:
                if is_last:
                    raise
        raise AssertionError("the second attempt returns or raises")

    def _others(self, symbol: str) -> tuple[str, ...]:
        return other_polygon_pairs(symbol) if self.data_type is GLOBAL_CRYPTO else other_tickers(symbol)

    def _symbols_for(self, file: DayFile) -> tuple[str, ...]:
        """Return the symbols to take by name: never fewer than the lake already has of that day."""
        part = self.held.get(file.day.isoformat())
        names = (*plain_names(part.symbols if part else ()), *self.symbols, *self.former_names(file.day))
        return tuple(dict.fromkeys(names))

    def former_names(self, day: dt.date) -> set[str]:
        """Return the other names of symbols on a day."""
        start_ns, end_ns = self.data_type.interval(day)
        return {name.name for name in self.former if name.start_ns < end_ns and start_ns < name.end_ns}

    def _largest_for(self, file: DayFile) -> int:
        """Return how many of the day's largest to take, again never fewer."""
        part = self.held.get(file.day.isoformat())
        return max(self.num_largest, top_of(part.symbols) if part else 0)

    def _keep(self, file: DayFile, day: _Day) -> None:
        """Write one day and count it."""
        unit = file.day.isoformat()
        start_ns, end_ns = self.data_type.interval(file.day)
        part = self.job.lake.write(
            SOURCE,
            self.data_type.dataset,
            unit,
            day.table,
            key=file.key,
            version=day.version,
            start_ns=start_ns,
            end_ns=end_ns,
            symbols=(*self._symbols_for(file), *day.dollar_volume, *kept_rule(self._largest_for(file))),
            now_ns=self.job.now_ns,
            dollar_volume=day.dollar_volume,
        )
        self.arrived += 1
        self.num_bytes += day.num_bytes
        self.spellings |= day.spellings
        for count in day.table.column("symbol").value_counts():
            self.rows[count["values"].as_py()] += count["counts"].as_py()
        before = self.held.get(unit)
        if before and before.version != part.version and part.rows < 0.95 * before.rows:
            self.job.progress.warn(
                SOURCE,
                f"{self.data_type.dataset} {unit}: the vendor's new file has {part.rows:,} rows of our"
                f" symbols, the previous one had {before.rows:,}",
            )

    def warn_of_gaps(self) -> None:
        """Warn once of what did not come, and of symbols without bars."""
        dataset = self.data_type.dataset
        if self.denied:
            self.job.progress.warn(
                SOURCE,
                f"{dataset}: {len(self.denied)} missing days up to {max(self.denied)} are listed but refused"
                " (HTTP 403): the plan of these keys does not cover this data type, or files of that age",
            )
        if self.left > WARNINGS_PER_TYPE and not self.unreachable:
            self.job.progress.warn(
                SOURCE, f"{dataset}: {self.left} days in all are left for the next refresh"
            )
        unknown = [
            symbol
            for symbol in self.symbols
            if not any(
                name.name in self.rows for name in renames.stretches(self.known_renames, self.setting, symbol)
            )
        ]
        if unknown and self.arrived >= 5:
            text = f"{dataset}: no bars of {', '.join(unknown)} in {self.arrived} day files"
            self.job.progress.warn(SOURCE, f"{text}: {'; '.join(self._explain(unknown))}")

    def _explain(self, unknown: Sequence[str]) -> Iterator[str]:
        """Yield for each symbol without bars what is known of it."""
        job = self.job
        kept = job.lake.columns(SOURCE, self.data_type.dataset, unknown, job.start_ns, job.end_ns)
        never = [symbol for symbol in unknown if symbol not in kept]
        for symbol in unknown:
            spelled = (self.spellings | self.rows.keys()).intersection(self._others(symbol))
            if rename := renames.successor(self.known_renames, symbol):
                yield str(rename)
            elif symbol in kept:
                yield f"the last bar of {symbol} is of {utc(int(kept[symbol]['open_time'][-1])).date()}"
            elif spelled:
                yield f"{symbol} is spelled {', '.join(sorted(spelled))} there"
            else:
                continue
            never = [other for other in never if other != symbol]
        if never:
            yield f"no file from {utc(job.start_ns).date()} on has {', '.join(never)}: it never existed there"


def _is_news(file: DayFile, needed: set[str], part: Part | None) -> bool:
    if part is None or part.version != file.version:
        return True
    return not set(plain_names(needed)) <= set(part.symbols) or top_of(needed) > top_of(part.symbols)


def _summary(works: Sequence[_TypeRefresh]) -> str:
    arrived = sum(work.arrived for work in works)
    text = f"{arrived} day files, {sum(work.num_bytes for work in works) / 1e6:,.1f} MB"
    for count, words in (
        (sum(len(work.held) for work in works), "already in the lake"),
        (sum(work.left for work in works), "left for the next refresh"),
    ):
        text += f", {count} {words}" if count else ""
    return text
