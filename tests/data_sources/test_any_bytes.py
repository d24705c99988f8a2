"""Whatever bytes a vendor sends or a disk returns: bars, or one of our errors, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from data_sources.bars import Bars
from data_sources.errors import BadAnswer, DataError, LakeError
from data_sources.lake import parts
from data_sources.lake.lake import Lake
from data_sources.lake.quality import FLOW_SCHEMA, SCHEMA, clean, flow_of
from data_sources.splits import FILE_NAME, SplitLedger
from data_sources.vendors import binance_archive, polygon_days, yahoo_refresh
from data_sources.vendors.binance_product import USD_M
from data_sources.vendors.binance_rest import Rest
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.polygon_splits import PolygonSplits
from data_sources.vendors.yahoo_client import Client
from tests.data_sources.bar_tables import walk
from tests.data_sources.vendors.loopback import Answer, Fault, LoopbackServer, ns

LONG = os.environ.get("DRILL") == "1"
EXAMPLES = 1_000 if LONG else 15
START, DAY_NS = ns("2026-03-16T00:00"), 86_400 * 10**9
NOW = START + 2 * DAY_NS
MOST_SECONDS = 20.0  # on a busy machine; a bomb takes minutes
MOST_BYTES = 1 << 30
any_bytes = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=not LONG, suppress_health_check=list(HealthCheck)
)
ONE_TRY = RetryPolicy(connect_seconds=2, read_seconds=5, total_seconds=10, backoff_seconds=0.0, attempts=1)

# Cells that have surprised parsers: too large, too small, not finite, not numbers, of other scripts.
CELLS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e999",
        "-1e-999",
        "NaN",
        "inf",
        "9" * 400,
        "1_0",
        "٣",
        "0x10",
        "null",
        '"',
        '"a,b"',
        "\x00",
        "\r",
    ]
) | st.text(max_size=5)
ENTRIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(CELLS, inner, max_size=4),
    max_leaves=12,
)


def mutated(whole: bytes) -> SearchStrategy[bytes]:
    """Bytes of a real answer: cut, a bit flipped, bytes inserted, or repeated; and bytes of nothing."""
    places = st.integers(0, len(whole))
    return st.one_of(
        st.binary(max_size=200),
        places.map(lambda place: whole[:place]),
        st.tuples(places, st.integers(0, 7)).map(lambda at: flipped(whole, *at)),
        st.tuples(places, st.binary(min_size=1, max_size=9)).map(
            lambda at: whole[: at[0]] + at[1] + whole[at[0] :]
        ),
        st.tuples(places, places).map(lambda ends: whole[min(ends) :] + whole[: max(ends)]),
    )


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    content = bytearray(whole)
    if content:
        content[place % len(content)] ^= 1 << bit
    return bytes(content)


def json_bytes(valid: Any) -> SearchStrategy[bytes]:
    """JSON like ``valid`` with one value replaced, any JSON, JSON too deep, and broken text."""
    text = json.dumps(valid).encode()
    return st.one_of(
        mutated(text),
        ENTRIES.map(lambda entry: json.dumps(entry).encode()),
        st.tuples(st.integers(0, 10_000), ENTRIES).map(lambda at: json.dumps(replaced(valid, *at)).encode()),
        st.integers(900, 100_000).map(lambda depth: b"[" * depth + b"]" * depth),
        st.integers(300, 3_000).map(
            lambda depth: text.replace(b"1", b'{"a":' * depth + b"1" + b"}" * depth, 1)
        ),
    )


def replaced(nest: Any, place: int, entry: Any) -> Any:
    """Replace the value at one of the places of a nest."""
    places = list(paths(nest))
    path = places[place % len(places)]
    return put(nest, path, entry)


def paths(nest: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, list) else ()
    for key, part in items:
        yield from paths(part, (*path, key))


def put(nest: Any, path: tuple[Any, ...], entry: Any) -> Any:
    if not path:
        return entry
    copy = dict(nest) if isinstance(nest, dict) else list(nest)
    copy[path[0]] = put(nest[path[0]], path[1:], entry)
    return copy


def is_bars(table: pa.Table) -> None:
    """What the lake makes of a table is bars, perhaps with flow: its own checks would raise, or quarantine."""
    cleaned = clean(table, now_ns=NOW, start_ns=START, end_ns=START + DAY_NS, symbols=("AAA",)).table
    names = [*SCHEMA.names, *flow_of(cleaned)]
    assert cleaned.schema.equals(pa.schema([FLOW_SCHEMA.field(name) for name in names]))
    Bars("AAA", "crypto", **{name: cleaned[name].to_numpy() for name in names[1:]})


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_refused_cheaply(parse: Callable[[], object], error: type[Exception] = BadAnswer) -> None:
    began, before = time.monotonic(), peak_bytes()
    with pytest.raises(error):
        parse()
    assert time.monotonic() - began < MOST_SECONDS
    assert peak_bytes() - before < MOST_BYTES


# --- Polygon's day files ------------------------------------------------------------------------------------

HEADER = "ticker,volume,open,close,high,low,window_start,transactions"
DAY = "\n".join(
    [HEADER, *(f"AAA,10,1.5,1.5,1.6,1.4,{START + minute * 60 * 10**9},3" for minute in range(40))]
).encode()
ROWS = st.lists(st.lists(CELLS, min_size=6, max_size=9).map(",".join), max_size=6)
HEADERS = st.permutations(HEADER.split(",")) | st.lists(
    st.sampled_from([*HEADER.split(","), "symbol", ""]), max_size=9
)
DAY_FILES = st.one_of(
    mutated(gzip.compress(DAY)),
    mutated(DAY).map(gzip.compress),
    st.tuples(HEADERS.map(",".join), ROWS).map(
        lambda made: gzip.compress("\n".join([made[0], *made[1]]).encode())
    ),
    mutated(DAY).map(lambda text: gzip.compress(text[:300]) + gzip.compress(text[300:])),
)


def read_day(content: bytes, num_largest: int = 0) -> pa.Table:
    return polygon_days.read_day(content, "2026-03-16", ["AAA"], START, START + DAY_NS, num_largest)[0]


@any_bytes
@given(DAY_FILES, st.sampled_from([0, 3]))
def test_polygon_day_files(content: bytes, num_largest: int) -> None:
    try:
        table = read_day(content, num_largest)
    except BadAnswer:
        return
    is_bars(table)


@pytest.mark.parametrize("line", [b"\0", b"AAA,1,1,1,1,1,1,1\n"])
def test_a_gzip_bomb_is_refused(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygon_days, "MAX_TEXT_BYTES", 24 << 20)
    text = HEADER.encode() + b"\n" + line * ((32 << 20) // len(line))
    is_refused_cheaply(lambda: read_day(gzip.compress(text, 1), num_largest=3))


# --- Polygon's splits, Binance, Yahoo: answers over HTTP ------------------------------------------------------


class Any200(LoopbackServer):
    """Answers every request with the same bytes."""

    body = b""

    def plain(self, handler: Any, faults: list[Fault]) -> Answer:
        return 200, self.body, {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Any200]:
    with Any200() as server:
        yield server


SPLITS = {
    "results": [{"ticker": "AAA", "execution_date": "2026-03-16", "split_from": 1, "split_to": 4}],
    "next_url": "https://api.polygon.io/x?cursor=1",
}


@any_bytes
@given(body=json_bytes(SPLITS))
def test_polygon_splits(server: Any200, tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    server.body = body
    folder = tmp_path_factory.mktemp("splits")
    vendor, ledger = PolygonSplits("key", server.url, ONE_TRY), SplitLedger(folder)
    try:
        vendor.update(ledger, ["AAA"], START, NOW)
    except DataError:
        return
    again = SplitLedger(folder)
    assert not (folder / f"{FILE_NAME}.corrupt").exists() and again is not None


KLINES = [
    [(START + minute * 60 * 10**9) // 10**6, "1.5", "1.6", "1.4", "1.5", "10", 0, "1", 1, "1", "1", "0"]
    for minute in range(3)
]


@any_bytes
@given(body=json_bytes(KLINES))
def test_binance_rest(server: Any200, body: bytes) -> None:
    server.body = body
    try:
        table = Rest(server.url, ONE_TRY).page("AAA", START, START + DAY_NS)
    except DataError:
        return
    is_bars(table)


FUNDING = [{"fundingTime": START // 10**6 + hour, "fundingRate": "0.0001"} for hour in range(3)]


@any_bytes
@given(body=json_bytes(FUNDING))
def test_binance_funding(server: Any200, body: bytes) -> None:
    server.body = body
    try:
        rows = Rest(server.url, ONE_TRY, USD_M).funding("AAA.P", START, START + DAY_NS)
    except DataError:
        return
    assert all(type(time_ns) is int and isinstance(rate, float) for time_ns, rate in rows)


CHART = {
    "chart": {
        "result": [
            {
                "meta": {
                    "symbol": "AAA", "dataGranularity": "1m", "currency": "USD", "timezone": "EST",
                    "exchangeTimezoneName": "America/New_York", "instrumentType": "EQUITY", "gmtoffset": -14400,
                    "validRanges": ["1d", "max"],
                    "regularMarketTime": START // 10**9, "priceHint": 2,
                },
                "timestamp": [START // 10**9 + 60 * minute for minute in range(3)],
                "events": {"splits": {"1": {"date": START // 10**9, "numerator": 4, "denominator": 1}}},
                "indicators": {"quote": [dict.fromkeys(("open", "high", "low", "close", "volume"), [1.5] * 3)]},
            }
        ],
        "error": None,
    }
}  # fmt: skip


@settings(any_bytes, max_examples=200 if LONG else 6)
@given(body=json_bytes(CHART))
def test_yahoo(server: Any200, tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    server.body = body
    client = Client(server.url, ONE_TRY, time.monotonic() + 60, tmp_path_factory.mktemp("yahoo"))
    try:
        table, splits = client.minutes("AAA", START, START + DAY_NS)
    except DataError:
        return
    finally:
        client.close()
    is_bars(table)
    assert all(split.ratio > 0 for split in splits)


# --- Binance's archive ----------------------------------------------------------------------------------------

NAME = "AAA-1m-2026-03"
MONTH = "\n".join(",".join(map(str, row)) for row in KLINES).encode()


def zipped(text: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = f"{NAME}.csv") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, text)
    return file.getvalue()


ARCHIVES = st.one_of(
    mutated(zipped(MONTH)),
    mutated(MONTH).map(zipped),
    mutated(zipped(MONTH, zipfile.ZIP_LZMA)),
    st.lists(st.lists(CELLS, max_size=12).map(",".join), max_size=5).map(
        lambda rows: zipped("\n".join(rows).encode())
    ),
)


@any_bytes
@given(ARCHIVES)
def test_binance_archive(body: bytes) -> None:
    try:
        table = binance_archive._rows(body, NAME, "AAA")
    except BadAnswer:
        return
    is_bars(table)


FUNDING_NAME = "AAA-fundingRate-2026-03"
FUNDING_ROWS = (
    b"calc_time,funding_interval_hours,last_funding_rate\n1772352000000,8,0.0001\n1772380800003,8,1e-5\n"
)


@any_bytes
@given(mutated(FUNDING_ROWS).map(lambda text: zipped(text, name=f"{FUNDING_NAME}.csv")))
def test_binance_funding_archive(body: bytes) -> None:
    (month,) = binance_archive.months(1772352000 * 10**9, 1772352001 * 10**9)
    try:
        rows = binance_archive._funding_rows(body, FUNDING_NAME, month)
    except BadAnswer:
        return
    assert all(month.start_ns <= time_ns < month.end_ns and isinstance(rate, float) for time_ns, rate in rows)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused_whatever_size_it_claims(method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binance_archive, "MAX_FILE_BYTES", 8 << 20)
    bomb = zipped(b"1" * (binance_archive.MAX_FILE_BYTES + 1), method)
    is_refused_cheaply(lambda: binance_archive._rows(bomb, NAME, "AAA"))
    claims = struct.pack("<I", binance_archive.MAX_FILE_BYTES + 1)
    is_refused_cheaply(
        lambda: binance_archive._rows(bomb.replace(claims, struct.pack("<I", 100)), NAME, "AAA")
    )


# --- the lake and its state files ---------------------------------------------------------------------------


def written_part(folder: Path) -> Path:
    lake = Lake(folder)
    lake.write(
        "binance", "AAA", "day", walk("AAA", START, 30), key="k", version="v", start_ns=START,
        end_ns=START + DAY_NS, symbols=["AAA"], now_ns=NOW,
    )  # fmt: skip
    return folder / "binance" / "AAA" / "day.parquet"


def read_lake(folder: Path, content: bytes) -> None:
    path = folder / "binance" / "AAA" / "day.parquet"
    path.write_bytes(content)
    (path.parent / "day.parquet.corrupt").unlink(missing_ok=True)
    lake = Lake(folder)
    try:
        bars = lake.columns("binance", "AAA", None, 0, 2**62)
        assert lake.fingerprint() and isinstance(lake.verify(), list)
    except LakeError:
        return
    assert set(bars) <= {"AAA"}


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("lake")
    return folder, written_part(folder).read_bytes()


@any_bytes
@given(data=st.data())
def test_lake_parts(part: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, whole = part
    read_lake(folder, data.draw(mutated(whole)))


@any_bytes
@given(data=st.data())
def test_footers_with_right_checksums_and_anything_in_them(
    part: tuple[Path, bytes], data: st.DataObject
) -> None:
    """As another version, or a person, would write them."""
    folder, whole = part
    import pyarrow.parquet as pq

    values = json.loads(pq.read_metadata(pa.BufferReader(whole)).metadata[b"part"])
    text = data.draw(json_bytes(values))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, store_schema=False) as writer:
        writer.write_table(pq.read_table(pa.BufferReader(whole), columns=SCHEMA.names).cast(SCHEMA))
        metadata = {
            "part": text,
            "part_crc32": str(zlib.crc32(text)),
            "file_crc32": parts._SEAL + parts._UNSEALED,
        }
        writer.add_key_value_metadata(metadata)
    content = bytearray(buffer.getvalue())
    place = bytes(content).rindex(parts._SEAL) + len(parts._SEAL)
    content[place : place + 8] = b"%08x" % zlib.crc32(content)
    read_lake(folder, bytes(content))


@any_bytes
@given(json_bytes({"splits": {"AAA": {"2026-03-16": 4.1}}}))
def test_the_ledger_of_splits(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE_NAME).write_bytes(content)
        try:
            SplitLedger(Path(folder)).news("AAA", [])
        except LakeError:
            return


@any_bytes
@given(json_bytes({"AAPL": [1, 2, 3]}))
def test_what_was_asked_of_yahoo(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.json"
        path.write_bytes(content)
        assert isinstance(yahoo_refresh._read_requests(path), dict)
