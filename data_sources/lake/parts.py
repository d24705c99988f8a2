"""One part of the lake as a Parquet file: its rows, its footer, and how damage is detected."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, Bars, join_columns
from data_sources.lake.quality import FLOW_SCHEMA, OUTSIDE_TOLERANCE_NS, SCHEMA, flow_of

SUFFIX = ".parquet"
QUARANTINE_SUFFIX = ".quarantine.parquet"
FETCHED = "fetched_ns"  # the column of Lake.columns that says when a row's part was fetched
FORMAT = 2  # parts of format 1 have no order flow, whether or not their source has it
_MAGIC = b"PAR1"
_TRAILER_BYTES = 8  # length of the footer (4, little endian) and the magic
ROW_GROUP_ROWS = 1 << 14  # sorted by symbol, so that a few of thousands cost a few groups
_FOOTER_GUESS_BYTES = 1 << 14
_PART_KEY = b"part"
_PART_CHECKSUM_KEY = b"part_crc32"
_SEAL_KEY = b"file_crc32"
_SEAL = b"over the file with zeros here: "
_UNSEALED = b"00000000"
_TOO_LARGE = (MemoryError, RecursionError)

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """One fetched unit and its origin; kept in the footer of its file.

    ``start_ns`` and ``end_ns`` bound the half-open interval that the answer covered, also where it has no
    rows; ``symbols`` are the requested ones, present or not; ``content`` is a SHA-256 of the rows;
    ``dollar_volume`` is what each of the day's largest symbols traded, where a rule asked for them (universe.py).

    Order flow: ``flow`` counts the bars with a value by column, ``flow_content`` is a SHA-256 of those columns,
    ``flow_rejected`` counts by symbol the bars that lost theirs. ``content`` is without it, as in format 1.
    ``flow_asked_ns`` is when a part of format 1 was last asked for in vain to get its flow.
    """

    source: str
    dataset: str
    unit: str
    key: str
    version: str
    start_ns: int
    end_ns: int
    symbols: tuple[str, ...]
    rows: int
    rejected: dict[str, int]
    fetched_ns: int
    content: str = ""
    rejected_by_symbol: dict[str, dict[str, int]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    dollar_volume: dict[str, int] = field(default_factory=dict)
    format: int = 1
    flow: dict[str, int] = field(default_factory=dict)
    flow_content: str = ""
    flow_rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    flow_asked_ns: int = 0


class DamagedPartError(Exception):
    """A file is not a whole part any more. Never leaves the lake, which sets the file aside."""


def write_part(file: BinaryIO, table: pa.Table, part: Part) -> None:
    """Write ``table`` (SCHEMA, perhaps flow, sorted) with ``part`` in the footer, every byte under a checksum.

    The checksum of the whole file is in its own footer: it is computed with zeros in its place.
    """
    text = json.dumps(asdict(part), sort_keys=True).encode()
    metadata = {
        _PART_KEY: text,
        _PART_CHECKSUM_KEY: str(zlib.crc32(text)).encode(),
        _SEAL_KEY: _SEAL + _UNSEALED,
    }
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        _schema(table.column_names),
        compression="zstd",
        use_dictionary=["symbol"],
        column_encoding={"open_time": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table.replace_schema_metadata(None), row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata(metadata)
    data = buffer.getbuffer()
    place = bytes(data).rindex(_SEAL) + len(_SEAL)
    data[place : place + len(_UNSEALED)] = b"%08x" % zlib.crc32(data)
    file.write(data)


def _is_sealed(data: bytes) -> bool:
    place = data.rfind(_SEAL) + len(_SEAL)
    behind = place + len(_UNSEALED)
    view = memoryview(data)
    checksum = zlib.crc32(view[behind:], zlib.crc32(_UNSEALED, zlib.crc32(view[:place])))
    return data[place:behind] == b"%08x" % checksum


def parse_footer(path: Path) -> Part:
    """Read a part's footer, without its rows (about 0.1 ms).

    Raises:
        DamagedPartError: it is not the footer of a whole part.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _, footer = _read_footer(file)
    return _parse_metadata(pa.BufferReader(_MAGIC + footer))


def _read_footer(file: BinaryIO) -> tuple[int, bytes]:
    """Return the size of a file, and its last bytes from the footer on; raises as ``parse_footer``."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _FOOTER_GUESS_BYTES))
    tail = file.read()
    needed = int.from_bytes(tail[-_TRAILER_BYTES:-4], "little") + _TRAILER_BYTES
    if len(tail) < needed <= size:
        file.seek(size - needed)
        tail = file.read()
    if size < needed + len(_MAGIC) or not tail.endswith(_MAGIC):
        raise DamagedPartError("truncated")
    return size, tail[-needed:]


def parse_part(path: Path, symbols: set[str] | None = None, is_verified: bool = False) -> pa.Table:
    """Read the rows of a part, every checksum verified; ``symbol`` comes as a dictionary column.

    Args:
        path: the file.
        symbols: those wanted; rows of others may be left out. None: all rows.
        is_verified: its file was read whole before, and has not changed: of thousands of symbols a few are then
            read without the others, under the checksums of their pages.

    Raises:
        DamagedPartError: the file is not as it was written.
        OSError: the file cannot be read.
    """
    # Real I/O errors surface here: below, every error is damage.
    data = _read_groups(path, symbols) if is_verified and symbols is not None else path.read_bytes()
    if isinstance(data, bytes) and not _is_sealed(data):
        raise DamagedPartError("truncated" if not data.endswith(_MAGIC) else "the file fails its checksum")
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=True, read_dictionary=["symbol"]
        )
        groups = _groups_with(file.metadata, symbols)
        names = _schema(file.schema_arrow.names).names
        table = file.read_row_groups(groups, columns=names, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise DamagedPartError(_one_line(error)) from error
    if symbols is None and table.num_rows != (rows := _parse_metadata(pa.BufferReader(data)).rows):
        raise DamagedPartError(f"{table.num_rows} rows where {rows} were written")
    return table.replace_schema_metadata(None)


def _read_groups(path: Path, symbols: set[str]) -> mmap.mmap:
    """Return memory of a file's size, filled with its footer and with the row groups of ``symbols`` alone."""
    with path.open("rb") as file:
        size, footer = _read_footer(file)
        data = mmap.mmap(-1, size)  # takes memory only where it is filled
        data[size - len(footer) :] = footer
        try:
            metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
            spans = [_span(metadata.row_group(group)) for group in _groups_with(metadata, symbols)]
        except (pa.ArrowException, OSError) as error:
            raise DamagedPartError(_one_line(error)) from error
        for first, end in spans:
            if not 0 <= first <= end <= size:
                raise DamagedPartError("its footer points outside of it")
            file.seek(first)
            if len(read := file.read(end - first)) < end - first:
                raise DamagedPartError("truncated")
            data[first:end] = read
    return data


def _span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Return the first byte of a row group, and that behind its last."""
    columns = [group.column(number) for number in range(group.num_columns)]
    starts = [
        column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        for column in columns
    ]
    ends = (start + column.total_compressed_size for start, column in zip(starts, columns, strict=True))
    return min(starts), max(ends)


def _schema(names: Sequence[str]) -> pa.Schema:
    """Return SCHEMA with those columns of the flow that are among ``names``."""
    return pa.schema([field for field in FLOW_SCHEMA if field.name in SCHEMA.names or field.name in names])


def _groups_with(metadata: pq.FileMetaData, symbols: set[str] | None) -> list[int]:
    """Return the row groups that may have one of ``symbols``, by the first and last name of each."""
    groups = range(metadata.num_row_groups)
    if symbols is None or len(groups) == 1:
        return list(groups)
    statistics = [metadata.row_group(group).column(0).statistics for group in groups]
    return [
        group
        for group, names in zip(groups, statistics, strict=True)
        if names is None
        or not names.has_min_max
        or any(names.min <= symbol <= names.max for symbol in symbols)
    ]


def digest_of(table: pa.Table) -> str:
    """Return a SHA-256 over names, counts and values as hex: for fingerprints."""
    digest = hashlib.sha256(_runs_text(table))
    for name in COLUMNS:
        digest.update(table[name].to_numpy())
    return digest.hexdigest()


def flow_digest_of(table: pa.Table) -> str:
    """Return a SHA-256 over the columns of the flow as hex, "" for a table without."""
    names = flow_of(table)
    digest = hashlib.sha256(" ".join(names).encode())
    for name in names:
        digest.update(table[name].to_numpy())
    return digest.hexdigest() if names else ""


def fault_of(table: pa.Table, part: Part) -> str:
    """Return what is wrong with the rows of a readable part, "" if nothing."""
    if digest_of(table) != part.content:
        return "its rows are not those that were written"
    if flow_digest_of(table) != part.flow_content:
        return "its order flow is not what was written"
    arrays = {name: table[name].to_numpy() for name in (*COLUMNS, *flow_of(table))}
    for symbol, first, last in symbol_runs(table):
        if symbol not in part.symbols:
            return f"it has rows of {symbol}, which was not requested"
        try:
            bars = Bars(symbol, "stock", **{name: array[first:last] for name, array in arrays.items()})
        except ValueError as error:
            return str(error)
        earliest, latest = part.start_ns - OUTSIDE_TOLERANCE_NS, part.end_ns + OUTSIDE_TOLERANCE_NS
        if bars.open_time[0] < earliest or bars.open_time[-1] >= latest:
            return f"{symbol} has rows outside of the interval"
    return ""


def _runs_text(table: pa.Table) -> bytes:
    return "\n".join(f"{symbol} {start} {end}" for symbol, start, end in symbol_runs(table)).encode()


def symbol_runs(table: pa.Table) -> list[tuple[str, int, int]]:
    """Return (symbol, first row, end row) of each symbol of a table sorted by symbol."""
    if not table.num_rows:
        return []
    names = table["symbol"].combine_chunks()
    if not pa.types.is_dictionary(names.type):
        names = names.dictionary_encode()
    codes = names.indices.to_numpy()
    starts = np.append(0, np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist()
    ends = [*starts[1:], table.num_rows]
    symbols = names.dictionary.to_pylist()
    return [(symbols[codes[start]], start, end) for start, end in zip(starts, ends, strict=True)]


def merge_rows(pieces: list[Columns]) -> Columns:
    """Join one symbol's pieces, oldest interval first; of rows for one minute the last fetched one stays."""
    columns = join_columns(pieces)
    time = columns["open_time"]
    if (time[1:] > time[:-1]).all():
        return columns
    order = np.lexsort((columns[FETCHED], time))  # stable: ties go to the part that starts later
    time = time[order]
    order = order[np.append(time[1:] != time[:-1], True)]
    return {name: array[order] for name, array in columns.items()}


def _parse_metadata(source: pa.BufferReader) -> Part:
    try:
        metadata = pq.read_metadata(source).metadata or {}
        text = metadata[_PART_KEY]
        if zlib.crc32(text) != int(metadata[_PART_CHECKSUM_KEY]):
            raise DamagedPartError("footer fails its checksum")
        values = json.loads(text)
        known = {field.name for field in fields(Part)}
        part = Part(**{name: value for name, value in values.items() if name in known})
        _check_types(part)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        *_TOO_LARGE,
    ) as error:
        raise DamagedPartError(_one_line(error)) from error
    # A rule's parts list thousands of symbols each: one string per name, not per part.
    symbols = tuple(map(sys.intern, part.symbols))
    dollar_volume = {sys.intern(symbol): amount for symbol, amount in part.dollar_volume.items()}
    return replace(part, symbols=symbols, dollar_volume=dollar_volume)


def _check_types(part: Part) -> None:
    """Raise a TypeError unless every field has its type: a footer may be of another version, or made by hand."""
    texts = (part.source, part.dataset, part.unit, part.key, part.version, part.content, *part.symbols)
    texts += (part.flow_content,)
    numbers = (part.start_ns, part.end_ns, part.fetched_ns, part.rows, part.format, part.flow_asked_ns)
    counts = (part.rejected, part.repaired, part.dollar_volume, *part.rejected_by_symbol.values())
    counts += (part.flow, *part.flow_rejected.values())
    is_right = (
        isinstance(part.symbols, list | tuple)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int and abs(number) < 1 << 62 for number in numbers)
        and all(type(number) is int for count in counts for number in count.values())
    )
    if not is_right:
        raise TypeError("its footer is of another version")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
