"""What people's own files have wrong with them: one clear line each, and the rest goes on."""

from __future__ import annotations

import errno
import gzip
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from continuous_training import Settings
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.errors import LakeError
from data_sources.refresh import probe
from data_sources.vendors.files_columns import ROWS
from data_sources.vendors.files_minutes import Spool
from tests.data_sources.vendors.files_harness import START, Own, assert_same, bars_of
from tests.data_sources.vendors.loopback import ns
from tests.data_sources.vendors.test_files import parquet
from tests.program import ROOT

BARS = bars_of()
CSV = BARS.to_csv(index=False)


def test_units_of_time_may_change_within_a_file(own: Own) -> None:
    times = BARS["time"].astype("int64")
    units = np.select([BARS.index < 100, BARS.index < 200, BARS.index < 300], [10**9, 10**6, 10**3], 1)
    own.csv("AAPL.csv", BARS.assign(time=times // units))
    own.refresh()
    assert own.about("AAPL") == [
        "AAPL.csv: its times are in ms and ns and s and us: each was read by its size"
    ]
    assert_same(own.bars()["AAPL"], BARS)


def test_headers_in_the_middle_are_left_out(own: Own) -> None:
    lines = CSV.splitlines()
    own.write("AAPL.csv", "\n".join([*lines[:100], lines[0], *lines[100:200], lines[0], *lines[200:]]))
    own.refresh()
    assert own.about("AAPL") == ["AAPL.csv: left out 2 of its lines, copies of the header"]
    assert_same(own.bars()["AAPL"], BARS)


def test_a_header_of_another_order_in_the_middle_refuses_the_file(own: Own) -> None:
    other = BARS[["time", "close", "high", "low", "open", "volume"]].to_csv(index=False)
    own.write("AAPL.csv", CSV + other)
    own.csv("MSFT.csv", BARS)
    own.refresh()
    assert own.about("AAPL") == [
        "AAPL.csv: another header is in its middle, 'time,close,high,low,open,volume': divide it there"
    ]


def test_duplicated_and_shuffled_rows_are_bars_once(own: Own) -> None:
    other = BARS[50:60].assign(volume=0.5)
    own.csv("AAPL.csv", pd.concat([BARS, BARS[:40], other]).sample(frac=1, random_state=1))
    own.refresh()
    assert own.about("AAPL") == []
    assert_same(own.bars()["AAPL"], BARS)
    assert own.rejected("AAPL") == {"conflicting": 10, "duplicate": 40}


def test_rows_that_are_no_bars_are_set_aside_with_a_reason(own: Own) -> None:
    frame = BARS.astype({"time": str, "open": str, "volume": str})
    frame.loc[0, "time"] = "yesterday"
    frame.loc[1, "open"] = "n/a"
    frame.loc[2, "volume"] = "many"
    frame.loc[3, "high"] = -1.0
    frame.loc[4, "time"] = "1999-01-04 14:34:00"
    frame.loc[5, "time"] = "2099-01-02 14:34:00"
    lines = frame.to_csv(index=False).splitlines()
    own.write("AAPL.csv", "\n".join([*lines[:20], "2026-03-02 14:34:00,1,2", "", *lines[20:]]))
    own.refresh()
    assert own.about("AAPL") == [
        "AAPL.csv: left out 1 of its lines for their number of values: '2026-03-02 14:34:00,1,2' has 3 values, "
        "the header 6",
        "AAPL.csv: set aside 1 of its rows: their time cannot be read",
    ]
    assert_same(own.bars()["AAPL"], BARS[6:])
    assert own.rejected("AAPL") == {
        "future": 1, "no_time": 1, "not_finite": 2, "not_positive": 1, "out_of_range": 1,
    }  # fmt: skip
    (aside,) = own.lake.root.rglob("*.quarantine.parquet")
    assert len(pq.read_table(aside)) == 6


COMMAS = BARS.map(lambda value: str(value).replace(".", ",") if isinstance(value, float) else value)
LARGE = BARS.assign(volume=BARS["volume"].map("{:,.0f}".format))
LARGE_EUROPEAN = COMMAS.assign(volume=BARS["volume"].map(lambda value: f"{value:,.0f}".replace(",", ".")))


@pytest.mark.parametrize(
    "text",
    [
        COMMAS.to_csv(index=False, sep=";"),
        COMMAS.to_csv(index=False, sep="\t"),
        COMMAS.to_csv(index=False),  # in quotes
        LARGE.to_csv(index=False),
        LARGE_EUROPEAN.to_csv(index=False, sep=";"),
        BARS.to_csv(index=False, sep=";"),
    ],
    ids=["semicolons", "tabs", "quotes", "thousands", "points for thousands", "semicolons and points"],
)
def test_decimal_commas_and_thousands_are_read_as_meant(own: Own, text: str) -> None:
    own.write("AAPL.csv", text)
    own.refresh()
    assert own.about("AAPL") == []
    assert_same(own.bars()["AAPL"], BARS)
    assert own.rejected("AAPL") == {}


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("a.csv", CSV)
    archive.writestr("b.csv", CSV)
PARQUET = io.BytesIO()
BARS.to_parquet(PARQUET)
TWICE = io.BytesIO()
table = pa.Table.from_pandas(BARS)
pq.write_table(table.append_column("Close", table["close"]), TWICE)
MIXED = BARS.astype({"close": str, "open": str})
MIXED.loc[0, "close"], MIXED.loc[0, "open"] = "1,234.50", "187,15"
DAMAGED = "it cannot be read, damaged or no such file: "
BAD: dict[str, tuple[str | bytes, str]] = {
    "A.csv": (b"", "it is empty"),
    "A1.csv": (b" \n\n", "it is empty"),
    "B.csv": (CSV.splitlines()[0], "it has a header and no rows"),
    "C.csv": (CSV.replace("volume", "Close", 1), "the column close is there twice, as 'close' and 'Close'"),
    "D.parquet": (TWICE.getvalue(), "the column close is there twice, as 'close' and 'Close': keep one of"),
    "E.csv": ("\n".join(CSV.splitlines()[1:]), "its first line has values: it must name the columns, such as"),
    "F.csv": (CSV.replace("close", "price", 1), "no column is close; it must have a time, open, high, low,"),
    "G.csv": (CSV.replace("time", "when", 1), "no column is open_time; it must have a time, open, high"),
    "H.zip": (ZIP.getvalue(), "it has 2 files (a.csv, b.csv), not one: unpack it"),
    "I.zip": (CSV, DAMAGED + "File is not a zip file"),
    "J.csv.gz": (CSV, DAMAGED + "Not a gzipped file"),
    "K.csv.gz": (gzip.compress(CSV.encode())[:-400], DAMAGED + "Compressed file ended before"),
    "L.parquet": (PARQUET.getvalue()[:-400], DAMAGED),
    "M.csv": (os.urandom(5_000), "it "),
    "N.csv": (
        COMMAS.to_csv(index=False).replace('"', ""),
        "390 lines do not fit its header: '2026-03-02 14:30:00,100,0,",
    ),
    "O.csv": (BARS.assign(time="soon").to_csv(index=False), "no time in its column 'time' can be read, such as"),
    "O1.csv": (
        BARS.assign(time=range(45_000, 45_390)).to_csv(index=False),
        "no time in its column 'time' can be read, such as '45000'",
    ),
    "O2.csv": (
        BARS.assign(time=BARS["time"] - pd.Timedelta(days=9_000)).to_csv(index=False),
        "no time in its column 'time' is of 2003 to now, such as 2001-07-11 14:30:00",
    ),
    "O3.parquet": (parquet(BARS.assign(high=[[1.0]] * 390)), "its column 'high' has List(Float64) for numbers"),
    "P.csv": (MIXED.to_csv(index=False), "it has both 187,15 and 1,234.50: write all numbers with a decimal"),
    "my prices.csv": (CSV, "it has no column symbol, and its name is none: name it after one, such as AAPL.csv"),
    "Q.csv": (
        BARS.assign(volume="1,234", open="1,000", high="1,000", low="1,000", close="1,000").to_csv(index=False),
        "1,000 may be a whole number or have decimals: write numbers with a decimal point, without commas",
    ),
    "R.csv": (b"hello, this is a letter\n", "it has no line that names columns such as time,open,"),
}  # fmt: skip


def test_a_file_that_cannot_be_read_is_one_line_and_the_others_are_read(own: Own) -> None:
    own.write("MSFT.csv", CSV)
    for name, (data, _) in BAD.items():
        own.write(name, data)
    assert own.refresh().status == "ok"
    for name, (_, reason) in BAD.items():
        (line,) = own.about(f"{name}: ")
        assert line.startswith(f"{name}: {reason}") and len(line) < 330
    assert [*own.bars()] == ["MSFT"]


def test_without_a_file_that_can_be_read_the_source_fails_and_the_lake_keeps_its_bars(own: Own) -> None:
    assert own.refresh().message == (
        f"Files failed: files_dir {own.folder} has no file of bars; see docs/data.md; nothing is kept of it yet"
    )
    own.write("AAPL.csv", CSV)
    own.refresh()
    own.write("AAPL.csv", CSV.splitlines()[0])
    report = own.refresh()
    assert report.message == (
        f"Files failed: files_dir {own.folder} has no file of bars that can be read (AAPL.csv); see docs/data.md; "
        "390 bars up to 2026-03-02 21:00 UTC are kept"
    )
    assert own.about("AAPL") == ["AAPL.csv: it has a header and no rows; the bars read from it before stay"]
    assert_same(own.bars()["AAPL"], BARS)
    own.folder.rename(own.folder.with_name("elsewhere"))
    assert f"files_dir {own.folder} does not exist: give the folder" in own.refresh().message
    own.folder.write_text("")
    assert f"files_dir {own.folder} is a file, not a folder: give" in own.refresh().message
    (answer,) = probe(own.request(), 0)
    assert "is a file, not a folder" in str(answer.error)
    assert len(own.bars()["AAPL"]) == 390


def test_links_that_lead_nowhere_folders_and_pipes_are_left_out_with_a_line(own: Own) -> None:
    own.write("sub/AAPL.csv", CSV)
    (own.folder / "sub" / "up").symlink_to(own.folder)
    (own.folder / "a.csv").symlink_to(own.folder / "b.csv")
    (own.folder / "b.csv").symlink_to(own.folder / "a.csv")
    (own.folder / "c.csv").symlink_to(own.folder / "gone")
    (own.folder / "again").symlink_to(own.folder / "sub")
    (own.folder / "AAPL.csv").mkdir()
    os.mkfifo(own.folder / "d.csv")
    own.write("notes.txt", "hello")
    own.write(".hidden.csv", "hello")
    assert own.refresh().status == "ok"
    assert own.notes.warnings[:-1] == [
        "AAPL.csv is a folder with the name of a file: left out; rename it, or move its files up",
        "d.csv is no regular file: left out",
        "sub/up leads back to a folder that was looked at: left out",
        "a.csv cannot be read: Too many levels of symbolic links",
        "again leads back to a folder that was looked at: left out",
        "b.csv cannot be read: Too many levels of symbolic links",
        "c.csv cannot be read: No such file or directory",
        "notes.txt: left out, as no name of CSV or Parquet (.csv, .csv.gz, .csv.zip, .zip, .parquet, .pq)",
    ]
    assert_same(own.bars()["AAPL"], BARS)
    (answer,) = probe(own.request(), 0)
    assert answer.found == "has 1 files of 0.0 MB"


FAR = np.full(len(BARS), 2**31 - 2)
ODD_COLUMNS = {
    "days of another era": {
        "date": pa.array(FAR, pa.int32()).cast(pa.date32()),
        "clock": pa.array(["09:30"] * len(FAR)),
    },
    "times of another era": {
        "date": pa.array(FAR * 10**9, pa.timestamp("ms")),
        "clock": pa.array(["09:30"] * len(FAR)),
    },
    "moments of another era": {"time": pa.array(FAR * 10**9, pa.timestamp("ms"))},
    "names that are times": {"symbol": pa.array(FAR * 10**9, pa.timestamp("ms"))},
    "prices that are structures": {"close": pa.array([{"bid": 1.0}] * len(FAR))},
    "volumes that are lists": {"volume": pa.array([[1.0]] * len(FAR))},
}


@pytest.mark.parametrize("columns", ODD_COLUMNS.values(), ids=ODD_COLUMNS.keys())
def test_columns_of_odd_types_are_one_line_and_the_others_are_read(
    own: Own, columns: dict[str, pa.Array]
) -> None:
    table = pa.Table.from_pandas(BARS.drop(columns="time") if "date" in columns else BARS)
    for name, column in columns.items():
        table = table.drop_columns([name] if name in table.column_names else []).append_column(name, column)
    pq.write_table(table, own.folder / "AAPL.parquet")
    own.write("MSFT.csv", CSV)
    assert own.refresh().status == "ok"
    (line,) = own.about("AAPL.parquet: ")
    assert " column" in line and "\n" not in line and len(line) < 330
    assert [*own.bars()] == ["MSFT"]


def test_file_names_may_have_any_bytes_and_length(own: Own) -> None:
    long = "各地证券交易所一分钟行情数据" * 4
    names = {"AAPL": os.fsdecode(b"M\xfcnchen.csv"), "MSFT": f"{long}一.csv", "JPM": f"{long}二.csv"}
    for symbol, name in names.items():
        try:
            own.csv(name, BARS.assign(symbol=symbol))
        except OSError:
            pytest.skip("this file system takes names of UTF-8 alone")
    assert own.refresh().status == "ok"
    for bars in own.bars().values():
        assert_same(bars, BARS)
    assert sorted(own.bars()) == sorted(names)
    own.refresh()
    assert own.notes.total == 0
    for name in names.values():
        (own.folder / name).unlink()
    own.csv("KO.csv", BARS)
    own.refresh()
    assert r"M\xfcnchen.csv" in own.notes.warnings[0] and own.notes.warnings[0].isprintable()
    assert own.lake.verify() == []


def test_a_file_that_goes_while_it_is_read_costs_itself_alone(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write("AAPL.csv", CSV)
    own.write("MSFT.csv", CSV)
    add = Spool.add

    def add_and_remove(spool: Spool, rows: pl.DataFrame) -> None:
        add(spool, rows)
        (own.folder / "AAPL.csv").unlink(missing_ok=True)

    monkeypatch.setattr(Spool, "add", add_and_remove)
    assert own.refresh().status == "ok"
    assert own.about("AAPL") == ["AAPL.csv: it changed while it was read: the next refresh reads it"]
    assert [*own.bars()] == ["MSFT"]


def test_files_without_the_right_to_read_them_are_left_out_with_a_line(own: Own) -> None:
    own.write("AAPL.csv", CSV)
    own.write("MSFT.csv", CSV).chmod(0)
    own.write("JPM.parquet", PARQUET.getvalue()).chmod(0)
    own.write("closed/KO.csv", CSV)
    (own.folder / "closed").chmod(0)
    for parent in (own.folder, own.lake.root.parent, *own.folder.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o755 if parent != own.lake.root.parent else 0o777)
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import data_sources.vendors.files_refresh, data_sources.load, polars, pyarrow.csv\n"
        "import encodings.utf_8_sig\n"
        "from tests.data_sources.vendors.files_harness import Own\n"
        "os.getuid() or (os.setgid(65534), os.setuid(65534))\n"  # root is never refused: become another user
        "own = Own(Path(sys.argv[2]))\n"
        "print(own.refresh().status, *own.notes.warnings[:-1], sep='\\n')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, ROOT, own.folder.parent], capture_output=True, text=True, cwd=ROOT
    )
    (own.folder / "closed").chmod(0o755)
    assert ended.stdout.splitlines() == [
        "ok",
        "closed/ cannot be read: Permission denied",
        "JPM.parquet: it cannot be read: Permission denied",
        "MSFT.csv: it cannot be read: Permission denied",
    ], ended.stderr


def test_times_of_the_hour_that_clocks_repeat_are_set_aside(own: Own) -> None:
    local = bars_of(4 * 60, ns("2025-11-02 04:00"))  # 01:00 New York comes at 05:00 and at 06:00
    times = (
        local["time"].dt.tz_localize("UTC").dt.tz_convert("America/New_York").dt.strftime("%Y-%m-%d %H:%M")
    )
    own.csv("BTCUSDT.csv", local.assign(time=times))
    own.refresh("America/New_York")
    assert own.about("BTCUSDT.csv") == [
        "BTCUSDT.csv: set aside 120 of its rows: the clocks of America/New_York repeat or skip their time; save "
        "times in UTC"
    ]
    assert_same(own.bars(start_ns=ns("2025-01-01 00:00"))["BTCUSDT"], pd.concat([local[:60], local[180:]]))


def test_times_of_another_zone_and_days_that_were_not_asked_for_are_reported(own: Own) -> None:
    own.csv(
        "AAPL.csv", BARS.assign(time=BARS["time"] - pd.Timedelta(hours=5))
    )  # New York's clock, read as UTC
    own.refresh()
    assert own.about("AAPL") == [
        "AAPL.csv: with times in UTC, only 23% of its bars are of 09:30-16:00 New York; see --files-timezone and "
        "bars.toml in docs/data.md"
    ]
    own.refresh("America/New_York", start_ns=ns("2026-03-10 00:00"))
    assert own.about("AAPL") == [
        "AAPL: all bars, 2026-03-02 to 2026-03-02, are outside of the days asked for, 2026-03-10 to 2026-03-20: "
        "see --start-date"
    ]
    assert_same(own.bars()["AAPL"], BARS)


def test_settings_need_the_folder_and_a_time_zone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"files_dir=None must be the folder that has the files of bars"):
        Settings(sources=("files",))
    with pytest.raises(
        ValueError, match=r"files_timezone=.*Mars.* must be a time zone such as America/New_York"
    ):
        Settings(sources=("files",), files_dir=str(tmp_path), files_timezone="Mars")
    with pytest.raises(
        ValueError, match=r"must be a folder outside of data_dir, which has the lake's own files"
    ):
        Settings(sources=("files",), files_dir=tmp_path / "lake" / "files", data_dir=tmp_path / "lake")
    assert Settings(sources=("files",), files_dir=tmp_path).files_dir == str(tmp_path)


def test_a_file_that_was_half_read_to_the_lake_is_read_again(own: Own) -> None:
    frame = pd.concat(BARS.assign(symbol=name) for name in ("AAPL", "BTCUSDT"))
    own.csv("all.csv", frame)
    own.refresh()
    crypto = next(own.lake.root.glob("files/*-crypto/*.parquet"))
    crypto.unlink()  # as if it had been killed between the two
    own.refresh()
    assert own.notes.total == 1
    assert_same(own.bars()["BTCUSDT"], BARS)


def test_rows_beyond_what_fits_go_over_the_disk_in_whole_months_and_days(tmp_path: Path) -> None:
    times = START + np.random.default_rng(0).permutation(4_000) * 60 * MINUTE_NS  # five months, shuffled
    dense = START + 200 * DAY_NS + np.random.default_rng(1).permutation(2_000) * 10 * MINUTE_NS  # two weeks
    columns = {"symbol": "A", "open_time": [*times.tolist(), *dense.tolist(), *[None, 5] * 600]}
    rows = pl.DataFrame(columns, schema_overrides={"symbol": pl.String, "open_time": pl.Int64})
    rows = rows.with_columns(pl.lit(1.0).alias(name) for name in list(ROWS)[2:])
    with Spool(tmp_path / "spool", part_rows=500) as spool:
        for piece in rows.iter_slices(600):
            spool.add(piece)
        frames = list(spool.frames())
    assert not (tmp_path / "spool").exists()
    assert max(map(len, frames)) <= 1_000 and len(frames) > 10
    assert pl.concat(frames)["open_time"].sort().equals(rows["open_time"].sort())
    days = [set(frame.filter(pl.col("open_time") > 5)["open_time"] // DAY_NS) for frame in frames]
    assert len(set().union(*days)) == sum(map(len, days))


def test_nothing_stays_on_a_disk_that_is_full(tmp_path: Path) -> None:
    class FullDisk:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    row = {name: [None] for name in ROWS}
    with pytest.raises(LakeError, match="No space left"), Spool(tmp_path / "spool", part_rows=0) as spool:
        spool.add(pl.DataFrame(row, schema=ROWS))
        spool._files[0] = FullDisk()
    assert not (tmp_path / "spool").exists()
