"""CSV and Parquet files of any size as batches of raw columns, read by pyarrow; gz and zip as they stream."""

from __future__ import annotations

import csv
import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_sources.errors import BadAnswer
from data_sources.vendors.files_columns import BINANCE, find_roles

SUFFIXES = (".csv", ".csv.gz", ".csv.zip", ".zip", ".parquet", ".pq")
BLOCK_BYTES = 1 << 24  # of a CSV in one batch, some 200,000 bars
BATCH_ROWS = 1 << 17  # of a Parquet file
HEAD_BYTES = 1 << 16
HEADER_WITHIN = 10  # lines: some sites put their name above the header
EXAMPLE = "time,open,high,low,close,volume"
DELIMITERS = ",;\t|"
MOST_BAD_LINES = 0.5  # of all, with another number of values than the header
_ERRORS = (
    pa.ArrowException, OSError, EOFError, zlib.error, zipfile.BadZipFile, UnicodeError, RuntimeError, ValueError,
    NotImplementedError, pl.exceptions.PolarsError, pl.exceptions.PanicException,
)  # fmt: skip


@dataclass
class Content:
    """What a file has: its header by role, and batches with one column per role.

    ``num_bad_lines`` counts lines that were left out for their number of values, while the batches are read;
    ``example`` says which was the first.
    """

    header: dict[str, str]
    delimiter: str
    batches: Iterator[pl.DataFrame]
    num_bad_lines: int = 0
    example: str = ""
    num_rows: int = 0


@contextmanager
def opened(path: Path) -> Iterator[Content]:
    """Open a file of bars; errors of reading it are BadAnswers that say what is wrong with it.

    Raises:
        BadAnswer: here or from ``batches``: it is no such file, is damaged, or its columns are not those of bars.
    """
    with ExitStack() as stack:
        with _reading():
            if path.stat().st_size == 0:
                raise BadAnswer("it is empty")
            is_parquet = path.name.lower().endswith((".parquet", ".pq"))
            content = _parquet(stack, path) if is_parquet else _csv(stack, path)
        yield content


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise BadAnswer("it cannot be read: Permission denied") from error
    except _ERRORS as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise BadAnswer(f"it cannot be read, damaged or no such file: {reason}") from error


def _parquet(stack: ExitStack, path: Path) -> Content:
    file = stack.enter_context(pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
    names = file.schema_arrow.names
    roles = find_roles(names)
    header = {role: names[place] for role, place in roles.items()}

    def batches() -> Iterator[pl.DataFrame]:
        with _reading():
            for batch in file.iter_batches(BATCH_ROWS, columns=[*header.values()]):
                table = pa.table({role: batch.column(name) for role, name in header.items()})
                content.num_rows += len(table)
                yield pl.DataFrame(pl.from_arrow(table))

    content = Content(header, "", batches())
    return content


def _csv(stack: ExitStack, path: Path) -> Content:
    with _stream(path) as head_of:
        head = head_of.read(HEAD_BYTES)
    if not head.strip():
        raise BadAnswer("it is empty")
    encoding = _encoding_of(head)
    text = head.decode(encoding, errors="replace").lstrip("\ufeff")
    skipped, delimiter, names, roles = _find_header(text)
    is_whole = len(head) < HEAD_BYTES
    if is_whole and not "".join(text.splitlines()[skipped:]).strip():
        raise BadAnswer("it has a header and no rows")
    header = {role: names[place] for role, place in roles.items()}
    columns = [str(place) for place in range(len(names))]

    def note_bad_line(row: pa_csv.InvalidRow) -> str:
        content.num_bad_lines += 1
        if not content.example:
            content.example = f"{row.text[:60]!r} has {row.actual_columns} values, the header {len(names)}"
        return "skip"

    def batches() -> Iterator[pl.DataFrame]:
        with _reading(), _stream(path) as stream:
            reader = pa_csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                pa_csv.ReadOptions(
                    block_size=BLOCK_BYTES,
                    column_names=columns,
                    skip_rows=skipped,
                    encoding="utf8" if encoding == "utf-8-sig" else encoding,
                ),
                pa_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=note_bad_line),
                pa_csv.ConvertOptions(
                    include_columns=[str(place) for place in roles.values()],
                    column_types=dict.fromkeys(columns, pa.string()),
                ),
            )
            for batch in reader:
                content.num_rows += len(batch)
                _refuse_other_lines(content)
                yield pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]).rename_columns([*roles])))
            _refuse_other_lines(content)

    content = Content(header, delimiter, batches())
    return content


def _refuse_other_lines(content: Content) -> None:
    if content.num_bad_lines > MOST_BAD_LINES * (content.num_rows + content.num_bad_lines):
        raise BadAnswer(
            f"{content.num_bad_lines:,} lines do not fit its header: {content.example}; a number with a decimal "
            "comma must not be between commas"
        )


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    """Open a CSV, or the only one in a zip, to be read from its first byte on."""
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.open(path) as file:
            yield file  # type: ignore[misc]
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            members = [
                info
                for info in archive.infolist()
                if not info.is_dir() and not info.filename.startswith("__MACOSX/")
            ]
            if len(members) != 1:
                names = ", ".join(info.filename for info in members[:3])
                raise BadAnswer(f"it has {len(members)} files ({names or 'none'}), not one: unpack it")
            if members[0].filename.lower().endswith((".parquet", ".pq", ".zip", ".gz")):
                raise BadAnswer(f"it has {members[0].filename}, which is no CSV: unpack it")
            with archive.open(members[0]) as member:
                yield member
    else:
        with path.open("rb") as file:
            yield file


def _encoding_of(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        head[: head.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _find_header(text: str) -> tuple[int, str, list[str], dict[str, int]]:
    """Return how many lines come before the bars, the delimiter, and the header with its roles."""
    lines = text.splitlines()[:HEADER_WITHIN]
    failure: BadAnswer | None = None
    for place, line in enumerate(lines):
        delimiter = max(DELIMITERS, key=line.count)
        names = next(csv.reader([line], delimiter=delimiter), [])
        try:
            return place + 1, delimiter, names, find_roles(names)
        except BadAnswer as error:
            is_longer = failure is None or "twice" in str(error)
            failure = error if len(names) >= 5 and is_longer else failure
    first = next(csv.reader(lines[:1]), [])
    if len(first) == len(BINANCE) and all(re.fullmatch(r"[\d.]+", value) for value in first):
        return 0, ",", list(BINANCE), find_roles(BINANCE)
    if first and all(re.fullmatch(r"[-\d.:/ TZ]+", value) for value in first):
        raise BadAnswer(f"its first line has values: it must name the columns, such as {EXAMPLE}")
    raise failure or BadAnswer(f"it has no line that names columns such as {EXAMPLE}")
