"""One Binance pair's part of a refresh: what to ask of which host, and how the answers become parts.

A perpetual is a pair here, too.

The units of a pair's dataset are in binance_parts.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_sources import renames
from data_sources.bars import DAY_NS, HOUR_NS, MINUTE_NS
from data_sources.calendar import utc
from data_sources.errors import BadAnswer, DataError, LakeError
from data_sources.funding import FundingLedger
from data_sources.lake.parts import FORMAT, Part
from data_sources.lake.quality import SCHEMA, clean, closed_before
from data_sources.sources import RefreshJob
from data_sources.vendors.binance_archive import SETTLED_NS, Archive, Unit, days, months
from data_sources.vendors.binance_funding import FundingRefresh
from data_sources.vendors.binance_parts import PairParts
from data_sources.vendors.binance_product import Product
from data_sources.vendors.binance_rest import PAGE_BARS, Rest, UnknownPair, concatenate, last_minute_ns
from data_sources.vendors.spelling import other_binance_pairs

OVERLAP_NS = 3 * MINUTE_NS  # fetched again, so that a bar kept half made under a wrong clock heals
SILENCE_NS = 10 * MINUTE_NS  # how old a minute without a bar must be to count as covered
LATE_NS = 26 * HOUR_NS  # after its due time a file is asked for: REST has its bars meanwhile
EARLY_NS = 2 * HOUR_NS  # the same while REST is down
ASK_AGAIN_NS = 6 * HOUR_NS  # after a 404 of a file that others stand in for
REST_PAGES = 90  # per pair and refresh: 62 days; 27 pairs of it weigh one minute's limit
PAGE_NS = PAGE_BARS * MINUTE_NS
NOT_IN_ARCHIVE = "not in the archive"  # the key of a month without bars
MOST_WARNINGS = 3  # about rows of funding
HEALED_NS = 4 * DAY_NS  # a recent part of up to this length is fetched again as a whole while it has gaps


@dataclass
class Hosts:
    """A product's two hosts, and when which file was not in the archive."""

    product: Product
    rest: Rest
    archive: Archive
    absent_since: dict[tuple[str, str], int] = field(default_factory=dict)  # (pair, unit) -> ns


class PairRefresh:
    """One pair's part of a refresh; runs in one thread."""

    def __init__(self, hosts: Hosts, job: RefreshJob, pair: str) -> None:
        self._rest, self._archive, self._absent_since = hosts.rest, hosts.archive, hosts.absent_since
        self._product = hosts.product
        self._pair, self._progress, self._now_ns = pair, job.progress, job.now_ns
        self._start_ns = job.start_ns - job.start_ns % MINUTE_NS
        self._end_ns = min(job.end_ns, closed_before(job.now_ns))
        self.error: DataError | None = None
        # Of REST: pages left to ask for; whether it does not know the pair; its first bar since start_ns.
        self._pages_left = REST_PAGES
        self._is_unknown = False
        self._first_bar_ns: int | None = None
        # Of the archive: files asked for in this refresh; whether it, too, has nothing before REST's first bar.
        self._asked: set[str] = set()
        self._hosts_agree = False
        self._is_name = self._product.is_name(pair)
        self._rename = renames.successor(renames.read(job.lake.root), pair)
        self._ledger = FundingLedger(job.lake.root)
        self._parts = PairParts(job.lake, self._product.source, pair, job.now_ns)
        self.num_steps = 1 + (len(self._due_files(LATE_NS)) if self._is_name else 0)

    @property
    def num_written(self) -> int:
        """How many parts were written."""
        return self._parts.num_written

    def run(self) -> None:
        """Refresh the pair; a vendor's error becomes ``error``, the lake's is raised."""
        try:
            if not self._is_name:
                noun, example = self._product.noun, "BTCUSDT" + self._product.suffix
                raise BadAnswer(f"{self._pair!r} is not a Binance {noun}; {noun}s look like {example}")
            self._refresh()
        except LakeError:
            raise
        except DataError as error:
            self.error = error
        self._progress.advance(self._product.source)

    def warn(self, message: str) -> None:
        """Warn once, with the pair's name."""
        self._progress.warn(
            self._product.source, message if self._pair in message else f"{self._pair}: {message}"
        )

    def _refresh(self) -> None:
        self._reopen_months()
        # A host's error is kept while the other host gets its turn.
        rest_error = None if self._parts.by_unit else _error_of(self._find_first_bar)
        archive_error = _error_of(self._fetch_files, LATE_NS if rest_error is None else EARLY_NS)
        rest_error = _error_of(self._extend_recent) or _error_of(self._fill_gaps)
        if rest_error is not None:  # then the archive's newest days are better than nothing
            archive_error = _error_of(self._fetch_files, EARLY_NS) or archive_error
        if self._is_unknown and not self._parts.have_rows():
            raise BadAnswer(f"{self._rest.unknown(self._pair)}; {self._find_spelling()}")
        uncovered = self._parts.uncovered(self._start_ns, self._end_ns - SILENCE_NS)
        if uncovered:
            self.error = rest_error or archive_error
            if self.error is None and not self._is_unknown:
                num_minutes = sum(end - start for start, end in uncovered) // MINUTE_NS
                self.warn(f"{num_minutes:,} minutes are left for the next refresh")
        elif isinstance(archive_error, BadAnswer):
            self.warn(f"{archive_error}; other files or REST stood in")
        elif rest_error is None and archive_error is None and not self._parts.have_rows():
            self.warn(self._explain_silence())
        if self._product.has_funding and self._parts.have_rows():
            self._refresh_funding()

    def _refresh_funding(self) -> None:
        first_ns, last_ns = self._parts.extent()
        funding = FundingRefresh(self._rest, self._archive, self._ledger, self._pair, self._now_ns)
        span = max(self._start_ns, first_ns), min(self._end_ns, last_ns)
        error = funding.run(*span, has_news=self.num_written > 0)
        for warning in funding.warnings[:MOST_WARNINGS]:
            self.warn(warning)
        if more := len(funding.warnings[MOST_WARNINGS:]):
            self.warn(f"{self._pair}: {more} more rows of funding are odd")
        if error is not None and error not in (self._rest.host.down, self._archive.host.down):
            self.warn(f"{self._pair}: funding is not up to date: {error}")

    def _find_spelling(self) -> str:
        """Return what to write instead of a pair that Binance does not know."""
        if self._rename:
            return str(self._rename)
        for other in other_binance_pairs(self._product.at_binance(self._pair), self._product.suffix):
            with contextlib.suppress(UnknownPair):
                if len(self._rest.page(other, self._end_ns - DAY_NS, self._end_ns, 1)):
                    return f"it has {other}"
        return f"take it out of {self._product.group.setting}"

    def _explain_silence(self) -> str:
        """Return why a pair that Binance knows has no bars."""
        first_day, last_day = (utc(time_ns).date() for time_ns in (self._start_ns, self._end_ns))
        text = f"{self._pair}: Binance knows this {self._product.noun}, but has no bars of it "
        text += f"from {first_day} to {last_day}"
        if self._rename:
            return f"{text}: {self._rename}"
        was_traded = len(self._rest.page(self._pair, 0, self._start_ns, 1)) > 0
        return f"{text}: it was {'delisted before' if was_traded else 'listed later'}"

    # ------------------------------------------------------------------ the archive

    def _due_files(self, delay_ns: int) -> list[Unit]:
        """Return the files to ask for, newest first: out for ``delay_ns``, not in the lake, and of use."""
        units = []
        for month in months(self._start_ns, self._end_ns):
            lowest, highest = max(month.start_ns, self._start_ns), min(month.end_ns, self._end_ns)
            if month.name in self._parts.by_unit:
                continue
            is_due = self._now_ns >= month.published_ns + delay_ns
            if is_due and self._is_of_use(month, lowest, highest):
                units.append(month)
                continue
            if month.name in self._asked and self._now_ns >= month.end_ns + SETTLED_NS:
                continue
            units += [
                day
                for day in days(lowest, highest)
                if self._now_ns >= day.published_ns + delay_ns
                and self._is_of_use(day, max(day.start_ns, lowest), min(day.end_ns, highest))
            ]
        return units[::-1]

    def _is_of_use(self, unit: Unit, lowest: int, highest: int) -> bool:
        if unit.name in self._parts.by_unit or unit.name in self._asked:
            return False
        if self._parts.uncovered(lowest, highest):
            return True
        # Covered by smaller or by REST's parts: worth replacing while young, unless there are no bars.
        inside = self._parts.between(lowest, highest)
        if unit.folder == "daily":
            inside = [part for part in inside if part.unit == "recent"]
        asked_ns = self._absent_since.get((self._pair, unit.name))
        return (
            any(part.rows for part in inside)
            and self._now_ns < unit.end_ns + SETTLED_NS
            and (asked_ns is None or self._now_ns - asked_ns >= ASK_AGAIN_NS)
        )

    def _fetch_files(self, delay_ns: int) -> None:
        """Fetch the files that are due; where a month is not to be had, its days.

        Raises:
            DataError: the last error, after all files had their turn or the host was given up.
        """
        error: DataError | None = None
        absent: list[Unit] = []
        units = self._due_files(delay_ns)
        while units:
            unit = units.pop(0)
            self._asked.add(unit.name)
            worth_days = self._now_ns < unit.end_ns + SETTLED_NS
            found = False
            try:
                found = self._fetch(unit)
            except LakeError:
                raise
            except DataError as failure:
                error = failure
                if self._archive.host.down is not None:
                    break
                worth_days = worth_days or isinstance(failure, BadAnswer)
            if not found:
                self._absent_since[self._pair, unit.name] = self._now_ns
                absent.append(unit)
            self._progress.advance(self._product.source)
            if not found and unit.folder == "monthly" and worth_days:
                lowest, highest = max(unit.start_ns, self._start_ns), min(unit.end_ns, self._end_ns)
                spans = self._parts.uncovered(lowest, highest)
                inner = [day for span in spans for day in days(*span)]
                units = [day for day in inner if day.name not in self._parts.by_unit][::-1] + units
        for part in self._parts.of_archive():
            self._parts.remove_replaced_by(part)
        if error is not None:
            raise error
        for unit in absent:
            if self._will_stay_absent(unit):
                self._write_empty(unit, NOT_IN_ARCHIVE)

    def _fetch(self, unit: Unit) -> bool:
        """Make a file a part; return False where the archive does not have it."""
        is_before_first = self._first_bar_ns is not None and unit.end_ns <= self._first_bar_ns
        # The newest month before the first bar is asked for; the older ones follow from it.
        file = None if is_before_first and self._hosts_agree else self._archive.fetch(self._pair, unit)
        if file is None:
            if is_before_first:
                self._hosts_agree = True
                self._write_empty(unit, "before the listing")
            return is_before_first
        if is_before_first:
            self._first_bar_ns = None  # REST has less than the archive
        self._progress.advance(self._product.source, 0, file.num_bytes)
        table = file.rows_of(unit)
        if any(part.rows for part in self._parts.between(unit.start_ns, unit.end_ns)):
            held = self._parts.bars(unit.start_ns, unit.end_ns)
            kept = _without(held, clean(table.select(SCHEMA.names), now_ns=self._now_ns).table)
            if len(kept):
                newest_ns = last_minute_ns(kept) + MINUTE_NS
                key = "held before " + file.key
                self._parts.write(f"kept-{unit.name}", kept, unit.start_ns, newest_ns, key)
        part = self._parts.write(unit.name, table, unit.start_ns, unit.end_ns, file.key, file.sha256)
        self._parts.remove_replaced_by(part)
        return True

    def _write_empty(self, unit: Unit, reason: str) -> None:
        self._parts.write(unit.name, SCHEMA.empty_table(), unit.start_ns, unit.end_ns, reason)

    def _will_stay_absent(self, unit: Unit) -> bool:
        """Whether a month's 404 is final: it lies before the listing, or after a pair was given up."""
        if unit.folder == "daily" or self._now_ns < unit.end_ns + SETTLED_NS or not self._parts.have_rows():
            return False
        first_ns, end_ns = self._parts.extent()
        if unit.end_ns <= first_ns:
            return self._begins_with_listing() and unit.end_ns <= (self._first_bar_ns or first_ns)
        return end_ns <= unit.start_ns and self._is_unknown

    def _begins_with_listing(self) -> bool:
        """Whether the oldest bar shows a listing: its part covers earlier minutes, too.

        Where it does not, there may be older bars that the archive alone lacks, and REST is to be asked for them.
        """
        start_ns, first_ns = self._parts.begin()
        return start_ns < first_ns

    def _reopen_months(self) -> None:
        """Ask again for months that a former version took for those before a listing, without a sign of one."""
        closed = [part for part in self._parts.by_unit.values() if part.key == NOT_IN_ARCHIVE]
        if not closed or not self._parts.have_rows() or self._begins_with_listing():
            return
        first_ns = self._parts.extent()[0]
        for part in closed:
            if part.end_ns <= first_ns:
                self._parts.remove(part)

    # ------------------------------------------------------------------ REST

    def _page(self, start_ns: int, end_ns: int, limit: int = PAGE_BARS) -> pa.Table:
        try:
            return self._rest.page(self._pair, start_ns, end_ns, limit)
        except UnknownPair:
            self._is_unknown = True
            return SCHEMA.empty_table()
        finally:
            self._pages_left -= 1

    def _find_first_bar(self) -> None:
        first = self._page(self._start_ns, self._end_ns, 1)
        if len(first):
            self._first_bar_ns = last_minute_ns(first)

    def _pages(self, start_ns: int, end_ns: int) -> tuple[pa.Table, int, DataError | None]:
        """Return REST's bars of a span, up to where it is covered, and the error that ended it early."""
        pages: list[pa.Table] = []
        cursor, error = start_ns, None
        settled_ns = max(start_ns, min(end_ns, self._end_ns - SILENCE_NS))
        while cursor < end_ns and self._pages_left > 0:
            try:
                page = self._page(cursor, end_ns)
            except DataError as failure:
                error = failure
                break
            if not len(page):
                cursor = max(cursor, settled_ns)
                break
            pages.append(page)
            cursor = last_minute_ns(page) + MINUTE_NS
            if len(page) < PAGE_BARS and cursor >= settled_ns:
                break
        return concatenate(pages), cursor, error

    def _extend_recent(self) -> None:
        """Extend ``recent`` to the newest closed bar, and drop from it what the archive has by now."""
        recent = self._parts.by_unit.get("recent")
        front_ns = recent.start_ns if recent else self._start_ns
        beyond_archive = self._parts.uncovered(front_ns, self._end_ns, self._parts.of_archive())
        if beyond_archive:
            front_ns = beyond_archive[0][0]
        if recent and (not beyond_archive or recent.end_ns <= front_ns):
            self._parts.remove(recent)
            recent = None
        if not beyond_archive:
            return
        if recent:
            self._continue_recent(recent, front_ns)
        else:
            self._begin_recent()

    def _begin_recent(self) -> None:
        missing = self._parts.uncovered(self._start_ns, self._end_ns)
        if not missing or missing[-1][1] < self._end_ns:
            return
        start_ns = max(missing[-1][0], self._end_ns - (self._pages_left - 1) * PAGE_NS)
        fresh, covered_ns, error = self._pages(start_ns, self._end_ns)
        if covered_ns > start_ns:
            self._parts.write("recent", fresh, start_ns, covered_ns, self._product.klines)
        if error is not None:
            raise error

    def _continue_recent(self, recent: Part, front_ns: int) -> None:
        start_ns = max(front_ns, recent.end_ns - OVERLAP_NS)
        is_whole = recent.rows == (recent.end_ns - recent.start_ns) // MINUTE_NS
        is_whole = is_whole and "conflicting" not in recent.rejected
        is_whole = is_whole and recent.format >= FORMAT  # before, order flow was not kept
        if not is_whole and (recent.rows or recent.rejected) and recent.end_ns - front_ns <= HEALED_NS:
            start_ns = front_ns
        if recent.end_ns >= self._end_ns and front_ns == recent.start_ns and start_ns > front_ns:
            return
        fresh, covered_ns, error = self._pages(start_ns, self._end_ns)
        end_ns = max(covered_ns, recent.end_ns)
        held = self._parts.bars(front_ns, recent.end_ns)
        sound = clean(fresh.select(SCHEMA.names), now_ns=self._now_ns).table if len(fresh) else fresh
        joined = concatenate([_without(held, sound), fresh])
        is_news = (
            bool(recent.rejected)
            or len(joined) > len(held)
            or front_ns > recent.start_ns
            or end_ns - recent.end_ns >= HOUR_NS
            or not joined.sort_by("open_time").equals(concatenate([held]))
        )
        if is_news:
            self._parts.write("recent", joined, front_ns, end_ns, recent.key)
        else:  # a silent tail: covered, but not worth a write
            self._parts.by_unit["recent"] = replace(recent, end_ns=end_ns)
        if error is not None:
            raise error

    def _fill_gaps(self) -> None:
        """Ask for the spans that no part covers, then for minutes missing in archive files, newest first."""
        for span_start_ns, end_ns in self._parts.uncovered(self._start_ns, self._end_ns - SILENCE_NS)[::-1]:
            start_ns = max(span_start_ns, end_ns - self._pages_left * PAGE_NS)
            if start_ns >= end_ns:
                return
            table, covered_ns, error = self._pages(start_ns, end_ns)
            if covered_ns > start_ns:
                stamp = np.datetime64(start_ns, "ns").astype("datetime64[m]").item().strftime("%Y%m%dT%H%M")
                self._parts.write(f"rest-{stamp}", table, start_ns, covered_ns, self._product.klines)
            if error is not None:
                raise error
        for part in sorted(self._parts.by_unit.values(), key=lambda part: -part.start_ns):
            if self._has_holes_to_ask_for(part):
                if self._pages_left * PAGE_NS < part.end_ns - part.start_ns + PAGE_NS:
                    return
                self._fill(part)

    def _has_holes_to_ask_for(self, part: Part) -> bool:
        is_bad_page = part.unit.startswith("rest-") and part.rejected and part.fetched_ns < self._now_ns
        if not is_bad_page and not part.version:
            return False
        by_unit = self._parts.by_unit
        fill, kept = by_unit.get(f"fill-{part.unit}"), by_unit.get(f"kept-{part.unit}")
        if fill and (not fill.rejected or self._now_ns - fill.fetched_ns < ASK_AGAIN_NS):
            return False
        num_rows = part.rows + (kept.rows if kept else 0)
        return num_rows < (part.end_ns - part.start_ns) // MINUTE_NS

    def _fill(self, part: Part) -> None:
        """Ask REST for the minutes missing in an archive file: an outage, or a defect of the file?"""
        held = self._parts.bars(part.start_ns, part.end_ns)
        minutes = np.arange(part.start_ns, part.end_ns, MINUTE_NS)
        missing = np.setdiff1d(minutes, held.column("open_time").to_numpy())
        pages: list[pa.Table] = []
        cursor, end_ns = part.start_ns, int(missing.max(initial=part.start_ns)) + MINUTE_NS
        while (later := missing[missing >= cursor]).size:
            page = self._page(int(later[0]), end_ns)
            if not len(page):
                break
            pages.append(page)
            cursor = last_minute_ns(page) + MINUTE_NS
        found = concatenate(pages)
        found = found.filter(pc.is_in(found.column("open_time"), value_set=pa.array(missing)))
        if f"fill-{part.unit}" in self._parts.by_unit:  # it had bad rows; keep the good ones
            found = concatenate([found, held])
        self._parts.write(f"fill-{part.unit}", found, part.start_ns, end_ns, self._product.klines)


def _error_of(step: Callable[..., None], *arguments: int) -> DataError | None:
    """Run a step and return the vendor's error that ended it."""
    try:
        step(*arguments)
    except LakeError:
        raise
    except DataError as error:
        return error
    return None


def _without(table: pa.Table, others: pa.Table) -> pa.Table:
    """Return the rows of ``table`` whose minute is not among those of ``others``."""
    times = others.column("open_time").combine_chunks()
    return table.filter(pc.invert(pc.is_in(table.column("open_time"), value_set=times)))
