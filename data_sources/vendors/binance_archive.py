"""Binance's bulk archive: monthly and daily zips of minute klines, each with its sha256.

Source: https://github.com/binance/binance-public-data (README, 2026-07). Facts that shape this file:

* a day's zip appears on the next day, a month's on the first Monday of the next month;
* one CSV per zip, 12 columns as REST gives them; those of futures have a header since mid-2022, of spot none;
* stamps are milliseconds, of spot microseconds from 2025-01-01 on;
* a file that is not out yet, or lies before the listing, is a plain 404.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import requests

from data_sources.bars import COLUMNS, DAY_NS, FLOW_COLUMNS, MINUTE_NS
from data_sources.calendar import to_ns, utc
from data_sources.errors import BadAnswer
from data_sources.vendors.binance_product import SPOT, Product
from data_sources.vendors.http import Host, RetryPolicy, error_of, prepare, unreachable

Content = TypeVar("Content")
FundingRow = tuple[int, float]  # time in ns, rate
# What zipfile raises for bytes that are no zip, or a damaged one.
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, IndexError, OverflowError,
)  # fmt: skip
# Columns of a kline in a file, from 0 on.
BAR_PLACES = {name: place for place, name in enumerate(COLUMNS)}
PLACES = BAR_PLACES | {"trades": 8, "taker_buy_volume": 9}
HEADER = "open"  # with which a row of names begins
SETTLED_NS = 40 * DAY_NS  # after its end; a file that is not out by now never will be
MAX_FILE_BYTES = 64 << 20  # a month of one pair is about 2.5 MB, its CSV about 6 MB


@dataclass(frozen=True)
class Unit:
    """One archive file's span: a UTC month named "2026-10" or a day named "2026-11-20"."""

    name: str
    start_ns: int
    end_ns: int
    published_ns: int  # the earliest it can be out

    @property
    def folder(self) -> str:
        """The archive's name for this kind of file."""
        return "daily" if self.name.count("-") == 2 else "monthly"

    @property
    def num_minutes(self) -> int:
        """The bars of a file without an outage."""
        return (self.end_ns - self.start_ns) // MINUTE_NS


def months(start_ns: int, end_ns: int) -> Iterator[Unit]:
    """Yield the UTC months that touch [start_ns, end_ns), oldest first."""
    month = utc(start_ns).replace(day=1, hour=0, minute=0, second=0)
    while to_ns(month) < end_ns:
        following = (month + timedelta(days=32)).replace(day=1)
        first_monday = following + timedelta(days=-following.weekday() % 7)
        yield Unit(f"{month:%Y-%m}", to_ns(month), to_ns(following), to_ns(first_monday))
        month = following


def days(start_ns: int, end_ns: int) -> Iterator[Unit]:
    """Yield the UTC days that touch [start_ns, end_ns), oldest first."""
    for day_ns in range(start_ns - start_ns % DAY_NS, end_ns, DAY_NS):
        yield Unit(f"{utc(day_ns):%Y-%m-%d}", day_ns, day_ns + DAY_NS, day_ns + DAY_NS)


@dataclass(frozen=True)
class ArchiveFile(Generic[Content]):
    """One verified zip: its rows, with all stamps in ns, and where they came from."""

    key: str
    sha256: str
    num_bytes: int
    content: Content

    def rows_of(self: ArchiveFile[pa.Table], unit: Unit) -> pa.Table:
        """Return the rows of a file of bars.

        Raises:
            BadAnswer: some are not of ``unit``; stamps that are off by a day would pass for other bars.
        """
        time = self.content.column("open_time")
        inside = self.content.filter(
            pc.and_(pc.greater_equal(time, unit.start_ns), pc.less(time, unit.end_ns))
        )
        if outside := len(self.content) - len(inside):
            raise BadAnswer(f"{self.key}: {outside} of {len(self.content)} rows are not of {unit.name}")
        return inside


class Archive:
    """Fetches and verifies files. Safe to use from several threads."""

    def __init__(self, url: str, policy: RetryPolicy, product: Product = SPOT) -> None:
        self._url = url.rstrip("/")
        self._product = product
        self.host = Host(policy, f"{product.label} archive {self._url}")
        self._session = prepare(requests.Session(), policy, MAX_FILE_BYTES)

    def fetch(self, pair: str, unit: Unit) -> ArchiveFile[pa.Table] | None:
        """Return one file, or None where the archive has no such file.

        Raises:
            BadAnswer: the file or its CHECKSUM is damaged, at every attempt.
            DataError: the archive refuses, limits or does not answer.
        """
        name = f"{self._product.at_binance(pair)}-1m-{unit.name}"
        key = self._key(pair, unit)
        return self.host.ask(lambda: self._fetch(key, lambda body: _rows(body, name, pair)))

    def fetch_funding(self, pair: str, month: Unit) -> list[FundingRow] | None:
        """Return a month's rows of funding, or None where the archive has no such file; there are none of days.

        Raises:
            BadAnswer: as ``fetch``, and where a row is of another month.
            DataError: as ``fetch``.
        """
        name = self._product.at_binance(pair)
        file = f"{name}-fundingRate-{month.name}"
        key = f"{self._product.archive}/{month.folder}/fundingRate/{name}/{file}.zip"
        found = self.host.ask(lambda: self._fetch(key, lambda body: _funding_rows(body, file, month)))
        return None if found is None else found.content

    def _fetch(self, key: str, parse: Callable[[bytes], Content]) -> ArchiveFile[Content] | None:
        # The small file first: where there is none, one request shows it.
        checksum = self._get(key + ".CHECKSUM")
        if checksum is None:
            return None
        stated = re.match(rb"([0-9a-fA-F]{64})\s", checksum)
        if stated is None:
            raise BadAnswer(f"{key}.CHECKSUM: expected a sha256, got {checksum[:40]!r}")
        body = self._get(key)
        if body is None:
            raise BadAnswer(f"{key}: 404, although its CHECKSUM exists")
        digest, expected = hashlib.sha256(body).hexdigest(), stated[1].decode().lower()
        if digest != expected:
            raise BadAnswer(f"{key}: sha256 is {digest[:12]}..., in CHECKSUM {expected[:12]}...")
        return ArchiveFile(key, digest, len(body) + len(checksum), parse(body))

    def probe(self, pair: str, now_ns: int) -> None:
        """Ask for a checksum of last week, which may be absent.

        Raises:
            DataError: as ``fetch``.
        """
        (unit,) = days(now_ns - 7 * DAY_NS, now_ns - 7 * DAY_NS + 1)
        self.host.ask(lambda: self._get(self._key(pair, unit) + ".CHECKSUM"))

    def _key(self, pair: str, unit: Unit) -> str:
        name = self._product.at_binance(pair)
        return f"{self._product.archive}/{unit.folder}/klines/{name}/1m/{name}-1m-{unit.name}.zip"

    def _get(self, key: str) -> bytes | None:
        try:
            response = self._session.get(f"{self._url}/{key}", timeout=self.host.policy.timeout)
            body = response.content
        except requests.RequestException as error:
            raise unreachable(f"{self._product.label} archive", error) from error
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise error_of(
                response.status_code,
                f"{self._product.label} archive",
                fix="set BINANCE_ARCHIVE_URL to a mirror, or use another network",
                headers=response.headers,
            )
        if not body:
            raise BadAnswer(f"{key}: empty answer")
        return body


def _unpack(body: bytes, name: str) -> bytes:
    """Return the one CSV in a zip.

    Raises:
        BadAnswer: it is not a zip of one CSV of that name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as bundle:
            members = bundle.infolist()
            if [member.filename for member in members] != [f"{name}.csv"]:
                raise BadAnswer(f"{name}.zip: expected {name}.csv inside, found {bundle.namelist()[:3]}")
            if members[0].file_size > MAX_FILE_BYTES:
                raise BadAnswer(
                    f"{name}.zip: unpacks to {members[0].file_size:,} bytes, too many for minute bars"
                )
            if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadAnswer(f"{name}.zip: packed by method {members[0].compress_type}, expected deflate")
            return bundle.read(members[0])  # at most file_size bytes, whatever it is packed from
    except (*ZIP_ERRORS, OSError) as error:
        raise BadAnswer(f"{name}.zip: cannot be unpacked: {error}") from error


def _rows(body: bytes, name: str, pair: str) -> pa.Table:
    """Unpack a zip and read its CSV, with flow where it has any; what is not a number becomes NaN.

    Raises:
        BadAnswer: not a zip of one CSV of that name with six or more columns.
    """
    text = _unpack(body, name)
    if not text[:1].isdigit() and not text.lower().startswith(HEADER.encode()):
        raise BadAnswer(f"{name}.csv: expected klines, got {text[:40]!r}")
    # A file of former days, or of another maker, may end before the flow.
    places = PLACES if text[: text.find(b"\n")].count(b",") >= max(PLACES.values()) else BAR_PLACES
    try:
        # As text first: one odd value must cost its row, not the month.
        frame = pl.read_csv(
            text, has_header=False, columns=list(places.values()),
            infer_schema=False, quote_char=None, truncate_ragged_lines=True, encoding="utf8-lossy",
        )  # fmt: skip
        frame.columns = list(places)
        # At the top, and where files were joined.
        frame = frame.filter(~pl.col("open_time").str.to_lowercase().str.starts_with(HEADER).fill_null(False))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise BadAnswer(f"{name}.csv: cannot be read: {' '.join(str(error).split())[:100]}") from error
    nothing = pl.lit(float("nan"))
    stamp = pl.col("open_time").cast(pl.Int64, strict=False).fill_null(0)
    frame = frame.select(
        pl.lit(pair).alias("symbol"),
        pl.when(stamp > 10**14).then(stamp * 1_000).otherwise(stamp * 1_000_000).alias("open_time"),
        *(pl.col(name).cast(pl.Float64, strict=False).fill_null(nothing) for name in COLUMNS[1:]),
        *(
            pl.when(pl.col(name) != "").then(pl.col(name).cast(pl.Float64, strict=False).fill_null(nothing))
            for name in places
            if name in FLOW_COLUMNS
        ),
    )
    # Binance gives every value and every minute once. A row without a volume, or with a minute that another
    # row has too, is ambiguous: without a close it goes to quarantine, and REST is asked for the minute.
    frame = frame.unique(maintain_order=True)
    bars = frame.select(COLUMNS)
    if bars["open_time"].is_duplicated().any():  # equal bars with different flow are one bar
        bars = bars.unique()
    twice = bars["open_time"].filter(bars["open_time"].is_duplicated()).unique()
    is_odd = pl.col("volume").is_nan() | pl.col("open_time").is_in(twice.implode())
    return frame.with_columns(pl.when(is_odd).then(nothing).otherwise("close").alias("close")).to_arrow()


def _funding_rows(body: bytes, name: str, month: Unit) -> list[FundingRow]:
    """Unpack a zip and read its rows of calc_time, funding_interval_hours, last_funding_rate; an odd rate is NaN.

    Raises:
        BadAnswer: not a zip of one such CSV, or a row is of another month.
    """
    rows = []
    for line in _unpack(body, name).decode("utf8", "replace").splitlines():
        cells = line.split(",")
        if cells[0].strip().lower() == "calc_time" or not line.strip():
            continue
        try:
            stamp = int(cells[0])
        except ValueError as error:
            raise BadAnswer(
                f"{name}.csv: expected a time, an interval and a rate, got {line[:40]!r}"
            ) from error
        time_ns = stamp * (1_000 if stamp > 10**14 else 1_000_000)
        if not month.start_ns <= time_ns < month.end_ns:
            raise BadAnswer(f"{name}.csv: {line[:40]!r} is not of {month.name}")
        try:
            rows.append((time_ns, float(cells[2])))
        except (ValueError, IndexError):
            rows.append((time_ns, float("nan")))
    return rows
