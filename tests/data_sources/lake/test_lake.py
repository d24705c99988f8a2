import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bar_tables import DAY_NS, ns, read, table, walk, with_values

from data_sources.bars import COLUMNS, MINUTE_NS
from data_sources.errors import BadAnswer, LakeError
from data_sources.lake import listing
from data_sources.lake.lake import Lake
from data_sources.progress import NullProgress

ROOT = Path(__file__).parents[3]
START = ns("2026-11-20 00:00")
NOW = ns("2026-11-23 00:00")
EVER = (0, 2**62)


class Warnings(NullProgress):
    def __init__(self):
        self.texts = []

    def warn(self, source, message):
        self.texts.append(f"{source}: {message}")


@pytest.fixture
def warned():
    return Warnings()


@pytest.fixture
def lake(tmp_path, warned):
    return Lake(tmp_path / "lake", warned)


def put(lake, bars, unit="2026-11-20", *, dataset="AAA", version="v1", now_ns=NOW, source="binance", **more):
    names = sorted(set(bars["symbol"].to_pylist())) or ["AAA"]
    spans = {"start_ns": START, "end_ns": START + DAY_NS, "symbols": names} | more
    return lake.write(source, dataset, unit, bars, key=f"{unit}.zip", version=version, now_ns=now_ns, **spans)


def part_file(lake, unit="2026-11-20", source="binance", dataset="AAA"):
    return lake.root / source / dataset / f"{unit}.parquet"


def test_what_is_written_is_read_back_by_another_lake_object_with_its_ledger_entry(lake):
    bars = walk("AAA", START, 1440)
    part = put(lake, bars)
    again = Lake(lake.root)
    assert read(again, "binance", "AAA", None, *EVER).equals(bars)
    assert again.parts("binance", "AAA") == {"2026-11-20": part}
    assert (part.rows, part.key, part.version, part.fetched_ns) == (1440, "2026-11-20.zip", "v1", NOW)
    assert again.sources() == ["binance"]
    assert again.datasets("binance") == ["AAA"]


def test_an_answer_without_rows_is_kept_as_a_part_so_that_it_is_not_fetched_again(lake):
    put(lake, walk("AAA", START, 0))
    part = Lake(lake.root).parts("binance", "AAA")["2026-11-20"]
    assert (part.rows, part.symbols, part.end_ns) == (0, ("AAA",), START + DAY_NS)
    assert read(lake, "binance", "AAA", None, *EVER).num_rows == 0


def test_nothing_is_there_before_anything_was_written_and_no_folder_is_made(lake):
    assert lake.parts("yahoo", "AAPL") == {}
    assert lake.datasets("yahoo") == lake.sources() == []
    assert read(lake, "yahoo", "AAPL", None, *EVER).num_rows == 0
    assert not lake.root.exists()


def test_rejected_rows_are_beside_their_part_and_removed_with_it(lake):
    bars = with_values(walk("AAA", START, 100), [5, 6], close=np.nan)
    part = put(lake, bars)
    quarantine = part_file(lake).with_name("2026-11-20.quarantine.parquet")
    assert part.rejected == {"not_finite": 2}
    assert pq.read_table(quarantine)["reason"].to_pylist() == ["not_finite"] * 2
    assert list(lake.parts("binance", "AAA")) == ["2026-11-20"]
    put(lake, walk("AAA", START, 100))  # the vendor repaired it
    assert not quarantine.exists()
    put(lake, bars, version="v2")
    lake.remove(part)
    assert list(part_file(lake).parent.iterdir()) == []
    lake.remove(part)  # it is gone already


@pytest.mark.parametrize("later_first", [False, True])
def test_where_parts_overlap_the_row_fetched_later_wins_and_no_row_is_lost(lake, later_first):
    old, new = walk("AAA", START, 100, seed=1), walk("AAA", START + 50 * MINUTE_NS, 100, seed=2)
    writes = [
        lambda: put(lake, old, "old", now_ns=NOW),
        lambda: put(lake, new, "new", now_ns=NOW + 1, start_ns=START + 50 * MINUTE_NS),
    ]
    for write in reversed(writes) if later_first else writes:
        write()
    assert read(lake, "binance", "AAA", None, *EVER).equals(pa.concat_tables([old.slice(0, 50), new]))
    put(lake, old, "old", now_ns=NOW + 2)
    assert read(lake, "binance", "AAA", None, *EVER).equals(pa.concat_tables([old, new.slice(50)]))


def test_reading_cuts_to_the_interval_and_the_requested_symbols(lake):
    both = pa.concat_tables([walk("AAA", START, 100, seed=1), walk("BBB", START, 100, seed=2)])
    put(lake, both, source="polygon", dataset="us_stocks_sip")
    put(lake, walk("AAA", START + DAY_NS, 9), "2026-11-21", source="polygon", dataset="us_stocks_sip",
        start_ns=START + DAY_NS, end_ns=START + 2 * DAY_NS)  # fmt: skip
    interval = (START + 10 * MINUTE_NS, START + 20 * MINUTE_NS)
    span = read(lake, "polygon", "us_stocks_sip", ["BBB", "CCC"], *interval)
    assert span.equals(both.slice(110, 10))
    columns = lake.columns("polygon", "us_stocks_sip", ["BBB", "CCC"], *interval)
    assert columns["BBB"]["fetched_ns"].tolist() == [NOW] * 10
    columns = lake.columns("polygon", "us_stocks_sip", None, *EVER)
    assert {symbol: len(arrays["open_time"]) for symbol, arrays in columns.items()} == {
        "AAA": 109,
        "BBB": 100,
    }
    assert all(array.flags.writeable for arrays in columns.values() for array in arrays.values())


def test_the_wanted_symbols_of_a_large_part_come_whole(lake, monkeypatch):
    monkeypatch.setattr("data_sources.lake.parts.ROW_GROUP_ROWS", 7)
    names = [f"S{number:02d}" for number in range(20)]
    bars = pa.concat_tables([walk(name, START, 5, seed=number) for number, name in enumerate(names)])
    put(lake, bars, dataset="many", symbols=names)
    for wanted in (["S03"], ["S00", "S19"], ["S07", "S08", "S09"], names, ["S99"]):
        found = lake.columns("binance", "many", wanted, START, START + DAY_NS)
        assert list(found) == [name for name in wanted if name in names]
        for name, columns in found.items():
            expected = walk(name, START, 5, seed=names.index(name))
            np.testing.assert_array_equal(columns["close"], expected["close"].to_numpy())
    assert lake.verify() == []


def test_of_a_part_that_was_read_whole_a_few_symbols_are_read_alone_and_checked_again(lake, monkeypatch):
    monkeypatch.setattr("data_sources.lake.parts.ROW_GROUP_ROWS", 100)
    names = ["AAA", "BBB", "CCC"]
    bars = [walk(name, START, 100, seed=number) for number, name in enumerate(names)]
    put(lake, pa.concat_tables(bars), dataset="many", symbols=names)
    path = next(lake.root.rglob("*.parquet"))
    assert read(lake, "binance", "many", ["CCC"], *EVER).equals(bars[2])
    place = pq.read_metadata(path).row_group(1).column(3).data_page_offset + 200  # among the values of BBB
    data, status = bytearray(path.read_bytes()), path.stat()
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(lake, "binance", "many", ["AAA"], *EVER).equals(bars[0])
    assert read(lake, "binance", "many", ["CCC"], *EVER).equals(bars[2])
    assert read(lake, "binance", "many", ["BBB"], *EVER).num_rows == 0
    assert path.with_name(path.name + ".corrupt").exists()


def test_merging_agrees_with_a_dictionary_filled_in_the_order_of_fetching(lake):
    random = np.random.default_rng(5)
    expected = {}
    for k in range(12):
        first, count = int(random.integers(0, 800)), int(random.integers(1, 300))
        bars = pa.concat_tables([walk(s, START + first * MINUTE_NS, count, seed=k) for s in ("AAA", "BBB")])
        span = (START + first * MINUTE_NS, START + (first + count) * MINUTE_NS)
        put(lake, bars, f"u{k}", now_ns=NOW + k, start_ns=span[0], end_ns=span[1])
        for row in bars.to_pylist():
            expected[row["symbol"], row["open_time"]] = tuple(row.values())
    merged = read(lake, "binance", "AAA", None, *EVER)
    assert [tuple(row.values()) for row in merged.to_pylist()] == [expected[key] for key in sorted(expected)]


def damage_bit(path, random):
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    path.write_bytes(data)


def test_every_flipped_bit_is_noticed_on_reading(lake, warned):
    """As 300 flips of one small part: rows, pages, footer, magic, wherever they fall."""
    put(lake, walk("AAA", START, 60))
    path = part_file(lake)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        path.write_bytes(whole)
        damage_bit(path, random)
        assert read(Lake(lake.root, warned), "binance", "AAA", None, *EVER).num_rows == 0
        assert not path.exists()
        assert path.with_name(path.name + ".corrupt").exists()


def test_a_part_is_plain_parquet_for_other_programs(lake):
    bars = walk("AAA", START, 60)
    put(lake, bars)
    assert pq.read_table(part_file(lake)).replace_schema_metadata(None).equals(bars)


@pytest.mark.parametrize("kept_bytes", [0, 3, 8, 100, -1, -9])
def test_a_truncated_part_is_set_aside_with_a_warning_and_absent(lake, warned, kept_bytes):
    put(lake, walk("AAA", START, 100))
    path = part_file(lake)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert Lake(lake.root, warned).parts("binance", "AAA") == {}
    assert path.with_name(path.name + ".corrupt").exists()
    assert len(warned.texts) == 1
    assert "binance/AAA/2026-11-20.parquet is damaged (truncated); set aside" in warned.texts[0]
    put(lake, walk("AAA", START, 100))
    assert read(Lake(lake.root), "binance", "AAA", None, *EVER).num_rows == 100


def test_damage_behind_a_whole_footer_is_found_on_reading_and_costs_only_that_part(lake, warned):
    for k in range(3):
        start = START + k * DAY_NS
        put(
            lake,
            walk("AAA", start, 100),
            f"u{k}",
            now_ns=NOW + 9 * DAY_NS,
            start_ns=start,
            end_ns=start + DAY_NS,
        )
    path = part_file(lake, "u1")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    fresh = Lake(lake.root, warned)
    assert list(fresh.parts("binance", "AAA")) == ["u0", "u1", "u2"]
    assert read(fresh, "binance", "AAA", None, *EVER).num_rows == 200
    assert list(fresh.parts("binance", "AAA")) == ["u0", "u2"]
    assert len(warned.texts) == 1


def test_a_part_under_another_parts_name_is_damage(lake, warned):
    put(lake, walk("AAA", START, 100))
    shutil.copy(part_file(lake), part_file(lake, "2026-11-21"))
    assert list(lake.parts("binance", "AAA")) == ["2026-11-20"]
    assert "by its footer it is binance/AAA/2026-11-20" in warned.texts[0]


def test_a_file_system_that_lists_names_in_another_case_loses_nothing(lake, warned, monkeypatch):
    for symbol in ("AAA", "jKL"):
        put(lake, walk(symbol, START, 100), dataset=symbol)
    before = lake.fingerprint()
    for folder in list((lake.root / "binance").iterdir()):
        folder.rename(folder.with_name(folder.name.lower()))
        if folder.name != folder.name.lower():
            folder.symlink_to(folder.name.lower())  # found by either name
    entries = listing.entries
    monkeypatch.setattr(
        listing, "entries", lambda folder: [entry for entry in entries(folder) if not entry.is_symlink()]
    )
    folded = Lake(lake.root, warned)
    assert folded.datasets("binance") == ["AAA", "jKL"]
    assert folded.fingerprint() == before
    assert folded.verify() == [] and warned.texts == []


def test_verify_names_what_is_damaged_and_is_quiet_about_the_rest(lake):
    for k in range(3):
        put(lake, walk("AAA", START, 100, seed=k), f"u{k}")
    assert lake.verify() == []
    data = bytearray(part_file(lake, "u1").read_bytes())
    data[200] ^= 1
    part_file(lake, "u1").write_bytes(data)
    assert Lake(lake.root).verify() == ["binance/AAA/u1"]
    assert Lake(lake.root).verify() == []


def test_half_an_answer_under_the_same_version_does_not_replace_the_kept_bars(lake):
    put(lake, walk("AAA", START, 1000))
    with pytest.raises(BadAnswer, match="got 900 bars where 1000 are kept"):
        put(lake, walk("AAA", START, 900))
    assert put(lake, walk("AAA", START, 960)).rows == 960  # within 5 %
    assert put(lake, walk("AAA", START, 10), version="v2").rows == 10  # the vendor replaced it
    later = START + 12 * 60 * MINUTE_NS
    assert put(lake, walk("AAA", later, 3), version="v2", start_ns=later).rows == 3  # another interval


def test_the_fingerprint_names_contents_not_times_or_folders(lake, tmp_path):
    put(lake, walk("AAA", START, 100), now_ns=NOW)
    other = Lake(tmp_path / "other")
    put(other, walk("AAA", START, 100), now_ns=NOW + DAY_NS)
    assert lake.fingerprint() == other.fingerprint()
    put(other, with_values(walk("AAA", START, 100), [3], volume=7.0))
    assert lake.fingerprint() != other.fingerprint()
    before = lake.fingerprint()
    put(lake, walk("BBB", START, 5), dataset="BBB")
    assert lake.fingerprint() != before


@pytest.mark.parametrize(
    "name", ["^GSPC", "X:BTC-USD", "BRK.B", "../escape", "..", "a/b", "CON", "\u00e4", "%41"]
)
def test_any_text_names_a_dataset_and_a_unit_within_the_lakes_folder(lake, name):
    put(lake, walk("AAA", START, 5), name, dataset=name)
    assert Lake(lake.root).datasets("binance") == [name]
    assert list(Lake(lake.root).parts("binance", name)) == [name]
    assert {path.name for path in lake.root.parent.iterdir()} == {"lake"}
    assert [path.parent.parent.name for path in lake.root.rglob("*.parquet")] == ["binance"]


def start_python(code, *arguments, **more):
    code = "import sys\nfrom pathlib import Path\nfrom data_sources.lake.lake import Lake\n" + code
    more = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT} | more
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **more)


def test_a_second_writer_is_refused_by_name_until_the_first_is_gone_even_by_kill(lake):
    holder = start_python(
        "with Lake(Path(sys.argv[1])).writing():\n    print('held', flush=True)\n    sys.stdin.read()",
        lake.root,
        stdin=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LakeError, match=f"written by process {holder.pid} now"), lake.writing():
            pass
        with pytest.raises(LakeError, match="written by process"):
            put(lake, walk("AAA", START, 5))
        assert lake.parts("binance", "AAA") == {}  # reading needs no lock
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    put(lake, walk("AAA", START, 5))


def test_locks_nest_and_exclude_a_second_lake_object_of_the_same_process(lake):
    with lake.writing(), lake.writing():
        put(lake, walk("AAA", START, 5))
        with pytest.raises(LakeError, match=f"process {os.getpid()}"), Lake(lake.root).writing():
            pass
    with Lake(lake.root).writing():
        pass


WRITE_FOREVER = """
sys.path.insert(0, "tests/data_sources")
from bar_tables import DAY_NS, walk
start, now = int(sys.argv[2]), int(sys.argv[3])
lake = Lake(Path(sys.argv[1]))
with lake.writing():
    for k in range(100000):
        unit = f"u{k % 7}"
        lake.write("binance", "AAA", unit, walk("AAA", start, 1440, seed=k), key="", version=str(k),
                   start_ns=start, end_ns=start + DAY_NS, symbols=["AAA"], now_ns=now + k)
        print(k, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_only_whole_parts_and_a_free_lock(lake, warned):
    random = np.random.default_rng(1)
    for _ in range(4):
        writer = start_python(WRITE_FOREVER, lake.root, START, NOW)
        acknowledged = [int(writer.stdout.readline()) for _ in range(int(random.integers(1, 12)))]
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        acknowledged += [int(line) for line in rest.split("\n")[:-1]]
        fresh = Lake(lake.root, warned)
        assert fresh.verify() == []
        versions = {int(part.version) for part in fresh.parts("binance", "AAA").values()}
        # acknowledged parts exist, unless the one in flight overwrote them
        newest = {max(k for k in acknowledged if k % 7 == unit) for unit in {k % 7 for k in acknowledged}}
        assert len(newest - versions) <= 1
        with fresh.writing():
            pass
        assert list(lake.root.rglob("*.tmp")) == []
        shutil.rmtree(lake.root)
    assert warned.texts == []


def test_a_full_disk_is_a_lake_error_that_leaves_the_old_part(lake):
    """The operating system lets no file grow, as on a full disk."""
    put(lake, walk("AAA", START, 10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(LakeError, match=r"cannot write .*2026-11-20.parquet: File too large"):
            put(lake, walk("AAA", START, 1440), version="v2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Lake(lake.root).parts("binance", "AAA")["2026-11-20"].rows == 10
    assert [path.name for path in part_file(lake).parent.iterdir()] == ["2026-11-20.parquet"]


def test_a_file_in_place_of_the_lake_is_a_lake_error(tmp_path):
    (tmp_path / "lake").write_text("not a folder")
    with pytest.raises(LakeError, match="cannot write to"), Lake(tmp_path / "lake").writing():
        pass


def test_a_read_only_lake_is_read_and_refuses_writing_with_a_lake_error(lake):
    put(lake, walk("AAA", START, 10))
    code = (
        "import os\n"
        "os.getuid() or (os.setgid(65534), os.setuid(65534))\n"  # root is never refused: become another user
        "from data_sources.errors import LakeError\n"
        "lake = Lake(Path(sys.argv[1]))\n"
        "print(len(lake.columns('binance', 'AAA', None, 0, 2**62)['AAA']['open_time']))\n"
        "try:\n"
        "    lake.remove(lake.parts('binance', 'AAA')['2026-11-20'])\n"
        "except LakeError as error:\n"
        "    print(error)\n"
    )
    folders = [lake.root, lake.root / "binance", part_file(lake).parent]
    parents = [
        path for path in lake.root.parents if path.stat().st_uid == os.getuid() and len(path.parts) > 2
    ]
    modes = {path: path.stat().st_mode for path in folders + parents}
    try:
        for path in parents:
            path.chmod(modes[path] | 0o055)
        for path in folders:
            path.chmod(0o555)
        (lake.root / ".lock").chmod(0o444)
        output, _ = start_python(code, lake.root).communicate()
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    rows, error = output.splitlines()
    assert rows == "10"
    assert error.startswith(f"cannot write to {lake.root}: Permission denied")


def test_footers_are_read_once_and_again_when_a_file_changes(lake, monkeypatch):
    import data_sources.lake.lake as module

    put(lake, walk("AAA", START, 10))
    fresh, calls = Lake(lake.root), []
    real = module.parse_footer
    monkeypatch.setattr(module, "parse_footer", lambda path: calls.append(path) or real(path))
    for _ in range(3):
        assert fresh.parts("binance", "AAA")["2026-11-20"].rows == 10
    assert len(calls) == 1
    put(lake, walk("AAA", START, 11))  # by another Lake object
    assert fresh.parts("binance", "AAA")["2026-11-20"].rows == 11
    assert len(calls) == 2


def test_dictionary_columns_and_other_row_orders_of_the_writer_do_not_matter(lake):
    bars = pa.concat_tables([walk("BBB", START, 20), walk("AAA", START, 30)])
    encoded = bars.set_column(0, "symbol", bars["symbol"].dictionary_encode())
    put(lake, encoded.take(np.random.default_rng(0).permutation(50)))
    found = read(lake, "binance", "AAA", None, *EVER)
    assert found.equals(pa.concat_tables([bars.slice(20), bars.slice(0, 20)]))
    assert table([], *[[]] * 6).num_rows == 0
    assert found.column_names == ["symbol", *COLUMNS]
