"""The snapshot of a run's bars: the same to the last bit, mapped, whole or not at all, and kept for a resume."""

import resource
import tracemalloc

import numpy as np
import pytest
from bar_tables import DAY_NS, ns, walk

from data_sources import snapshot
from data_sources.bars import COLUMNS, MINUTE_NS
from data_sources.errors import LakeError
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.load import load
from data_sources.sources import DataRequest

START = ns("2026-10-01 00:00")
MINUTES = 5_000
END = START + MINUTES * MINUTE_NS
PAIRS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")


def put(lake, pair, num_bars=MINUTES, seed=0):
    span = {"start_ns": START, "end_ns": END, "symbols": [pair], "now_ns": END + DAY_NS}
    bars = walk(pair, START, num_bars, seed=seed)
    lake.write("binance", pair, "u", bars, key="u", version=str(seed), **span)


@pytest.fixture
def lake(tmp_path):
    lake = Lake(tmp_path / "lake")
    for number, pair in enumerate(PAIRS):
        put(lake, pair, MINUTES - 10 * number, seed=number)
    put(lake, "FEWUSDT", 100)
    return lake


def request_for(**more):
    wanted = {
        "sources": ("binance",),
        "symbols": {"binance_pairs": (*PAIRS, "FEWUSDT")},
        "start_ns": START,
        "end_ns": END,
    }
    return DataRequest(**wanted | more)


def files(lake):
    return sorted(path.name for path in (lake.root / READY_FOLDER).iterdir())


def copies(lake):
    """The names of whole snapshots, each of two files."""
    arrays = [name for name in files(lake) if name.endswith(".npy")]
    assert files(lake) == sorted([*arrays, *(name.replace(".npy", ".jsonl") for name in arrays)])
    return arrays


def snapshot_path(lake, request):
    """Where the snapshot of the lake as it is would be."""
    asked, interval = snapshot._names(request)
    return lake.root / READY_FOLDER / f"{asked}-{interval}-{snapshot.fingerprint(lake, request)}.npy"


def is_same(one, other):
    assert [bars.symbol for bars in one.bars] == [bars.symbol for bars in other.bars]
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one.bars, other.bars, strict=True)
        for name in COLUMNS
    )


def test_a_snapshot_is_what_loading_returns_rows_and_fingerprint_included(lake):
    loaded, copied = (
        load(lake, request_for()),
        snapshot.open_snapshot(snapshot.provide(lake, request_for())),
    )
    assert is_same(loaded, copied)
    assert [bars.asset_class for bars in copied.bars] == ["crypto"] * 3
    assert (copied.rows, copied.dropped, copied.fingerprint) == (
        loaded.rows,
        loaded.dropped,
        loaded.fingerprint,
    )
    assert copied.dropped == {"FEWUSDT": "100 bars, fewer than 2,000"}


def test_a_resumed_run_gets_its_own_bars_although_the_lake_has_new_ones(lake):
    first = snapshot.provide(lake, request_for())
    before = load(lake, request_for())
    put(lake, "AAAUSDT", seed=77)
    assert load(lake, request_for()).fingerprint != before.fingerprint
    assert snapshot.provide(Lake(lake.root), request_for(), symbols=["AAAUSDT"]) == first
    assert is_same(snapshot.open_snapshot(first), before)
    new_run = snapshot.provide(Lake(lake.root), request_for())  # which begins in the same minute
    assert is_same(snapshot.open_snapshot(new_run), load(lake, request_for()))
    other = snapshot.provide(lake, request_for(end_ns=END - MINUTE_NS))
    assert other != first
    assert len(snapshot.open_snapshot(other).bars[0]) == MINUTES - 1


def test_bars_are_views_of_the_mapped_file_and_writing_to_them_stays_in_the_process(lake):
    path = snapshot.provide(lake, request_for())
    content = path.read_bytes()
    closes = snapshot.open_snapshot(path).bars[1].close
    assert closes.flags.writeable
    assert isinstance(closes.base.base, np.memmap) and type(closes) is np.ndarray
    closes[:] = 1.0
    assert path.read_bytes() == content


def test_writing_a_snapshot_takes_little_memory_beside_one_symbol(lake):
    pairs = [f"P{number}USDT" for number in range(8)]
    for pair in pairs:
        put(lake, pair)
    request = request_for(symbols={"binance_pairs": pairs})
    load(lake, request)  # warms imports and caches
    tracemalloc.start()
    try:
        path = snapshot.provide(lake, request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.8 * path.stat().st_size


@pytest.mark.parametrize("place", [0, 4, 40, 100, 5_000, -3, -15, -200])
@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_damage_anywhere_is_found_by_verify_and_the_snapshot_written_again(lake, suffix, place):
    path = snapshot.provide(lake, request_for())
    assert snapshot.verify(lake) == []
    content = bytearray(path.with_suffix(suffix).read_bytes())
    content[place % len(content)] ^= 0x40
    path.with_suffix(suffix).write_bytes(content)
    assert snapshot.verify(lake) == [f"{READY_FOLDER}/{path.name}"]
    assert files(lake) == []
    assert is_same(snapshot.open_snapshot(snapshot.provide(lake, request_for())), load(lake, request_for()))


@pytest.mark.parametrize("kept_bytes", [0, 7, 1_000, -1])
@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_truncated_snapshot_is_not_opened_and_written_again(lake, suffix, kept_bytes):
    path = snapshot.provide(lake, request_for())
    half = path.with_suffix(suffix)
    half.write_bytes(half.read_bytes()[:kept_bytes])
    with pytest.raises(LakeError, match=path.name):
        snapshot.open_snapshot(path)
    again = snapshot.provide(lake, request_for())
    assert is_same(snapshot.open_snapshot(again), load(lake, request_for()))


def test_the_oldest_snapshots_are_removed(lake):
    paths = [
        snapshot.provide(lake, request_for(end_ns=END - number * MINUTE_NS), kept_snapshots=2)
        for number in range(4)
    ]
    assert copies(lake) == sorted(path.name for path in paths[2:])
    snapshot.provide(lake, request_for(min_bars=10), kept_snapshots=2)  # of other settings: another daemon's
    assert len(copies(lake)) == 3


def test_a_refresh_leaves_a_snapshot_alone_that_is_being_written(lake):
    folder = lake.root / READY_FOLDER
    folder.mkdir()
    (folder / ".a.npy.1-ab.tmp").write_bytes(b"half")
    with lake.writing():
        pass
    assert files(lake) == [".a.npy.1-ab.tmp"]


def test_a_full_disk_is_a_lake_error_that_leaves_no_file(lake):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(LakeError, match="cannot write"):
            snapshot.provide(lake, request_for())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(lake) == []


def test_half_a_snapshot_does_not_count(lake):
    for suffix in (".npy", ".jsonl"):
        path = snapshot.provide(lake, request_for())
        path.with_suffix(suffix).unlink()
        with pytest.raises(LakeError, match="cannot read"):
            snapshot.open_snapshot(path)
        assert snapshot.provide(lake, request_for()) == path
        assert is_same(snapshot.open_snapshot(path), load(lake, request_for()))


def test_snapshots_of_the_former_format_are_removed(lake):
    folder = lake.root / READY_FOLDER
    folder.mkdir()
    (folder / "0123456789ab-0123456789ab-0123456789abcdef.bars").write_bytes(b"BARS")
    path = snapshot.provide(lake, request_for())
    assert copies(lake) == [path.name]


def test_a_snapshot_without_bars_is_neither_kept_nor_used(lake):
    request = request_for(min_bars=10 * MINUTES)
    assert snapshot.provide(lake, request) is None
    assert files(lake) == []


def test_a_snapshot_without_bars_of_an_earlier_version_is_replaced_once_there_are_bars(tmp_path):
    lake = Lake(tmp_path / "lake")
    empty = snapshot_path(lake, request_for())
    snapshot._write(empty, lake, request_for())
    assert len(files(lake)) == 2 and snapshot.open_snapshot(empty).bars == []
    put(lake, "AAAUSDT")
    path = snapshot.provide(lake, request_for())
    assert [bars.symbol for bars in snapshot.open_snapshot(path).bars] == ["AAAUSDT"]
    assert copies(lake) == [path.name]


def test_a_snapshot_that_lacks_a_symbol_of_the_run_is_not_used_for_it(tmp_path):
    lake = Lake(tmp_path / "lake")
    put(lake, "AAAUSDT")
    first = snapshot.provide(lake, request_for())
    put(lake, "BBBUSDT", seed=1)
    assert snapshot.find(lake, request_for(), ["AAAUSDT"]) == first
    assert snapshot.find(lake, request_for(), ["AAAUSDT", "BBBUSDT"]) is None
    second = snapshot.provide(lake, request_for(), symbols=["AAAUSDT", "BBBUSDT"])
    assert [bars.symbol for bars in snapshot.open_snapshot(second).bars] == ["AAAUSDT", "BBBUSDT"]
    assert snapshot.provide(lake, request_for()) == second
