"""One of Polygon's day files as rows, decoded to its end, so that its gzip checksum holds, before any is used."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pyarrow as pa
from isal import isal_zlib  # reads what zlib reads in a third of its time

from data_sources.errors import BadAnswer
from data_sources.pegged import still_symbols

PIECE_BYTES = 1 << 18  # of gzip, decoded at a time; about 1.2 MB of text, which fits a core's cache
# Of text: a file of all US stocks has about 0.15 GB. gzip shrinks repetitions to a thousandth, so a small file may
# unpack to more than any memory.
MAX_TEXT_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 16
MOST_AT_ONCE = 1 << 24  # of text; usual pieces unpack to less
STRAY_FRACTION = (
    0.5  # with more rows outside of its day a file is rejected; fewer the lake rejects one by one
)

# The columns of a day file; always float64 volume (whole numbers until early 2026, decimals since) and text
# tickers (NA, NULL, TRUE and 1E5 are or could be names).
COLUMN_TYPES: dict[str, type[pl.DataType]] = {
    "ticker": pl.String,
    "volume": pl.Float64,
    "open": pl.Float64,
    "close": pl.Float64,
    "high": pl.Float64,
    "low": pl.Float64,
    "window_start": pl.Int64,
}
TRADES = "transactions"  # some files lack it


def read_day(
    content: bytes,
    key: str,
    symbols: Sequence[str],
    start_ns: int,
    end_ns: int,
    num_largest: int = 0,
    ending: str = "",
) -> tuple[pa.Table, dict[str, int]]:
    """Decode a whole day file; return its rows of ``symbols`` and of the day's largest, as they are in the file.

    Args:
        content: gzip CSV with one header line; columns are found by name, in any order.
        key: its name, for messages.
        symbols: tickers to take.
        start_ns: start of the file's day; ``end_ns`` is its end.
        num_largest: how many more tickers to take, the largest of those with ``ending``.

    Returns:
        symbol, open_time (int64 ns UTC), open, high, low, close, volume (float64), null where empty, and trades
        where the file has them; and how much each of the largest traded: the day's volume times its median close,
        in dollars. The median, since one bad print would make any ticker the largest. Tickers that traded as much,
        but stood still (pegged.py), come last, and their dollars are negative.

    Raises:
        BadAnswer: not gzip, cut, wrong checksum, wrong columns, text instead of numbers, or times of another
            day (a real file of 2019 was a day late).
    """
    frame = _parse(content, key, None if num_largest else symbols)
    dollars: dict[str, int] = {}
    if num_largest:
        sound = (pl.col("volume") > 0) & pl.col("volume").is_finite() & (pl.col("close") > 0)
        candidates = frame.filter(pl.col("symbol").str.ends_with(ending) & sound)
        traded = (
            candidates.group_by("symbol")
            .agg((pl.col("volume").sum() * pl.col("close").median()).alias("dollars"))
            .filter(pl.col("dollars").is_finite())
            .sort(["dollars", "symbol"], descending=[True, False])
        )
        is_still = pl.col("symbol").is_in(sorted(still_symbols(candidates, has_par=bool(ending))))
        largest = traded.filter(~is_still).head(num_largest)
        least = largest["dollars"][-1] if len(largest) == num_largest else 0.0
        still = traded.filter(is_still & (pl.col("dollars") >= least))
        dollars = {symbol: round(amount) for symbol, amount in largest.iter_rows()}
        dollars |= {symbol: -max(1, round(amount)) for symbol, amount in still.iter_rows()}
    frame = frame.filter(pl.col("symbol").is_in([*symbols, *dollars]))
    times = frame["open_time"]
    strays = times.filter(((times < start_ns) | (times >= end_ns)).fill_null(True))
    if len(strays) > STRAY_FRACTION * len(frame):
        raise BadAnswer(
            f"{key}: {len(strays):,} of {len(frame):,} rows are not of that day, such as"
            f" {strays.to_numpy()[0].astype('datetime64[ns]').astype('datetime64[s]')}"
        )
    table: pa.Table = frame.to_arrow()
    return table.set_column(0, "symbol", table.column("symbol").cast(pa.string())), dollars


def _parse(content: bytes, key: str, symbols: Sequence[str] | None) -> pl.DataFrame:
    """Return the rows of ``symbols`` and perhaps of others; None: of all."""
    if not content.startswith(b"\x1f\x8b"):
        begin = f"begins with {content[:20]!a}" if content else "is empty"
        raise BadAnswer(f"{key}: expected gzip, the file {begin}")
    try:
        header, lines = _lines_of(content, symbols)
    except (isal_zlib.IsalError, EOFError) as error:  # type: ignore[misc]  # an instance in the stub
        raise BadAnswer(f"{key}: damaged ({error})") from error
    names = header.decode("utf-8-sig", "replace").rstrip("\r").split(",")
    lacking = [name for name in COLUMN_TYPES if name not in names]
    if lacking:
        raise BadAnswer(f"{key}: expected a column {lacking[0]}, the header is {','.join(names)[:100]!a}")
    text = header + b"\n" + lines
    try:
        return _scan(text, names, pl.Float64)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        try:
            return _scan(text, names, pl.String)  # an odd number of trades must not cost the day
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
            reason = " ".join(str(error).split())[:100]
            raise BadAnswer(f"{key}: damaged ({ascii(reason)[1:-1]})") from error


def _scan(text: bytes, names: Sequence[str], trades_type: type[pl.DataType]) -> pl.DataFrame:
    schema = {name: COLUMN_TYPES.get(name, pl.String) for name in names}
    columns: list[str | pl.Expr] = ["symbol", "open_time", "open", "high", "low", "close", "volume"]
    if TRADES in names:
        schema[TRADES] = trades_type
        number = pl.col(TRADES).cast(pl.Float64, strict=False)
        if trades_type == pl.String:
            number = pl.when(pl.col(TRADES) != "").then(number.fill_null(float("nan")))
        columns.append(number.alias("trades"))
    frame = pl.scan_csv(io.BytesIO(text), schema=schema)
    return frame.rename({"ticker": "symbol", "window_start": "open_time"}).select(columns).collect()


def _lines_of(content: bytes, symbols: Sequence[str] | None) -> tuple[bytes, bytes]:
    """Decompress all of ``content`` piece by piece; return the header and the lines that may be of ``symbols``.

    Parsing a line costs ten times as much as comparing its first 8 bytes, and few of the lines are ours. Those
    bytes distinguish "AAPL," from "AAPLX,", but not "X:BTC-USD," from "X:BTC-USDT,": lines of other symbols may
    be returned. All lines are if the ticker is not the first column, or if there are quotes.

    Raises:
        isal_zlib.IsalError: damaged, the checksum included.
        EOFError: cut, or too large.
    """
    starts = [f"{symbol},".encode()[:8] for symbol in symbols or ()]
    header: bytes | None = None
    kept: list[bytes] = []
    rest = b""
    for piece in itertools.chain(_ahead(_decompress(content)), (b"\n",)):  # the last line may lack its end
        first, end = piece.find(b"\n") + 1, piece.rfind(b"\n") + 1
        if not end:
            rest += piece
            if len(rest) > MAX_LINE_BYTES:
                raise EOFError(f"a line of more than {MAX_LINE_BYTES:,} bytes")
            continue
        line, rest = rest + piece[:first], piece[end:]
        if header is None:
            header, line = line[:-1], b""
        is_plain = header.startswith(b"ticker,") and symbols is not None
        for block in (line, memoryview(piece)[first:end]):  # a view: most of the text is never copied
            if len(block) > 1:  # not an empty line alone
                can_filter = is_plain and b'"' not in line and piece.find(b'"', first, end) < 0
                kept.append(_lines_starting_with(starts, block) if can_filter else bytes(block))
    return header or b"", b"".join(kept)


def _decompress(content: bytes) -> Iterator[bytes]:
    """Yield the text of a gzip file of one or more members, checking lengths and checksums."""
    member = isal_zlib.decompressobj(isal_zlib.MAX_WBITS | 16)
    num_bytes = 0
    for start in range(0, len(content), PIECE_BYTES):
        piece = content[start : start + PIECE_BYTES]
        while piece:
            if member.eof:
                member = isal_zlib.decompressobj(isal_zlib.MAX_WBITS | 16)
            text = member.decompress(piece, MOST_AT_ONCE)
            num_bytes += len(text)
            if num_bytes > MAX_TEXT_BYTES:
                raise EOFError(f"it unpacks to more than {MAX_TEXT_BYTES:,} bytes")
            yield text
            piece = member.unconsumed_tail or member.unused_data
    if not member.eof:
        raise EOFError("the file ends too early")


def _ahead(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress the next piece in a thread while the caller filters this one: it releases the GIL."""
    with ThreadPoolExecutor(1, "polygon-gzip") as pool:
        coming = pool.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(next, pieces, None)
            yield piece


def _lines_starting_with(starts: Sequence[bytes], block: bytes | memoryview) -> bytes:
    """Return the lines of ``block`` (whole lines) that begin with one of ``starts`` (at most 8 bytes each)."""
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters == ord("\n")) + 1
    begins = np.concatenate(([0], ends[:-1]))
    hits = np.ones(len(begins), np.bool_)  # the very last lines, with fewer than 8 bytes, count as hits
    compared = int(np.searchsorted(begins, len(block) - 8, side="right"))
    if compared:
        windows = np.lib.stride_tricks.as_strided(characters, (len(block) - 7, 8), (1, 1), writeable=False)
        heads = np.ascontiguousarray(windows[begins[:compared]]).view(np.uint64)[:, 0]
        hits[:compared] = False
        for length in {len(start) for start in starts}:
            mask = np.frombuffer((b"\xff" * length).ljust(8, b"\0"), np.uint64)[0]
            wanted = b"".join(start.ljust(8, b"\0") for start in starts if len(start) == length)
            hits[:compared] |= np.isin(heads & mask, np.frombuffer(wanted, np.uint64))
    edges = np.flatnonzero(np.diff(hits, prepend=False, append=False))  # where runs of hits begin and end
    runs = zip(begins[edges[::2]].tolist(), ends[edges[1::2] - 1].tolist(), strict=True)
    return b"".join(block[first:last] for first, last in runs)
