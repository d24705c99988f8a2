"""Bars of one's own: forms of files, columns and times that are read as they are meant."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from commands.check import machine
from commands.selftest import lookahead
from continuous_training import Settings
from data_sources import load as loading
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.splits import Split, SplitLedger
from tests.data_sources.vendors.files_harness import NOW, START, Own, assert_same, bars_of
from tests.data_sources.vendors.loopback import ns
from tests.program import ROOT
from training.data_feed import data_request

BARS = bars_of()


def in_units(frame: pd.DataFrame, unit: str) -> pd.DataFrame:
    return frame.assign(
        time=frame["time"].astype("int64") // {"s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}[unit]
    )


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def parquet(frame: pd.DataFrame, **how: object) -> bytes:
    file = io.BytesIO()
    frame.to_parquet(file, **how)
    return file.getvalue()


CSV = BARS.to_csv(index=False).encode()
FORMS = {
    "aapl.csv": CSV,
    "AAPL.csv.gz": gzip.compress(CSV),
    "AAPL_1min_2026.zip": zipped(**{"inside.csv": CSV}),
    "AAPL-2026-03.parquet": parquet(BARS),
    "sub/AAPL.pq": parquet(BARS.set_index("time")),
    "AAPL.CSV": b"\xef\xbb\xbf" + CSV,  # a byte order mark
    "AAPL.1m.csv": BARS.to_csv(index=False).encode("utf-16"),
    "AAPL bars.csv": BARS.to_csv(index=False, sep="\t").encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_has_the_same_bars(own: Own, name: str) -> None:
    own.write(name, FORMS[name])
    report = own.refresh()
    assert report.status == "ok", report.message
    assert_same(own.bars()["AAPL"], BARS)
    assert own.notes.summary == "1 files are up to date, 1 were read now"
    assert own.notes.warnings == [
        "guessed from the symbols: stock AAPL; prices of stocks count as split-adjusted. bars.toml can say it, "
        "see docs/data.md"
    ]


NEW_YORK = BARS["time"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
TIMES = {
    "seconds": (in_units(BARS, "s")["time"], "UTC"),
    "milliseconds": (in_units(BARS, "ms")["time"], "UTC"),
    "microseconds": (in_units(BARS, "us")["time"], "UTC"),
    "nanoseconds": (in_units(BARS, "ns")["time"], "UTC"),
    "seconds with decimals": (in_units(BARS, "s")["time"].astype(float), "UTC"),
    "zone in the text": (NEW_YORK.dt.strftime("%Y-%m-%d %H:%M:%S%z"), "Asia/Tokyo"),
    "Z": (BARS["time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ"), "Asia/Tokyo"),
    "UTC": (BARS["time"].dt.strftime("%d.%m.%Y %H:%M:%S UTC"), "Asia/Tokyo"),
    "Dukascopy": (BARS["time"].dt.strftime("%d.%m.%Y %H:%M:%S.000 GMT+0000"), "Asia/Tokyo"),
    "no zone": (NEW_YORK.dt.strftime("%Y-%m-%d %H:%M"), "America/New_York"),
    "half a day": (NEW_YORK.dt.strftime("%d-%b-%Y %I:%M:%S %p"), "America/New_York"),
    "digits": (NEW_YORK.dt.strftime("%Y%m%d%H%M"), "America/New_York"),
    "packed": (NEW_YORK.dt.strftime("%Y%m%d %H%M%S"), "America/New_York"),
    "packed in UTC": (BARS["time"].dt.strftime("%Y%m%dT%H%MZ"), "America/New_York"),
    "digits and seconds": (NEW_YORK.dt.strftime("%Y%m%d%H%M%S"), "America/New_York"),
}


@pytest.mark.parametrize("typed", [False, True], ids=["csv", "parquet"])
def test_every_form_of_time_is_the_same_instant(own: Own, typed: bool) -> None:
    for number, (times, timezone) in enumerate(TIMES.values()):
        frame = BARS.assign(time=times)
        own.write(f"{number}/bars.toml", f'timezone = "{timezone}"\nasset_class = "stock"')
        name = f"{number}/S{number}" + (".parquet" if typed else ".csv")
        own.write(name, parquet(frame) if typed else frame.to_csv(index=False))
    assert own.refresh().status == "ok"
    assert own.notes.warnings == []
    bars = own.bars()
    for number, form in enumerate(TIMES):
        assert f"S{number}" in bars, form
        assert_same(bars[f"S{number}"], BARS)


@pytest.mark.parametrize("zone", [None, "America/New_York"])
def test_times_of_parquet_keep_their_zone(own: Own, zone: str | None) -> None:
    times = NEW_YORK if zone else NEW_YORK.dt.tz_localize(None)
    units = {"A": "s", "B": "ms", "C": "us", "D": "ns"}
    for symbol, unit in units.items():
        own.write(f"{symbol}.parquet", parquet(BARS.assign(time=times.dt.as_unit(unit))))
    own.refresh("Asia/Tokyo" if zone else "America/New_York")
    bars = own.bars()
    for symbol in units:
        assert_same(bars[symbol], BARS)


def test_dates_and_times_of_day_in_two_columns_are_joined(own: Own) -> None:
    days, clocks = NEW_YORK.dt.strftime("%Y%m%d"), NEW_YORK.dt
    own.csv("A.csv", BARS.assign(Date=days, Time=clocks.strftime("%H:%M")).drop(columns="time"))
    own.csv("B.csv", BARS.assign(Date=days, Time=clocks.strftime("%H%M").astype(int)).drop(columns="time"))
    own.csv("C.csv", BARS.assign(Date=days, Time=clocks.strftime("%H%M%S").astype(int)).drop(columns="time"))
    metatrader = BARS.assign(**{"<DATE>": clocks.strftime("%Y.%m.%d"), "<TIME>": clocks.strftime("%H:%M:%S")})
    metatrader = metatrader.drop(columns="time").rename(columns=lambda name: f"<{name.strip('<>').upper()}>")
    own.csv("D.csv", metatrader.rename(columns={"<VOLUME>": "<VOL>"}).assign(**{"<TICKVOL>": 1}), sep="\t")
    own.csv(
        "E.csv",
        BARS.assign(Date=clocks.strftime("%m/%d/%Y"), Time=clocks.strftime("%I:%M %p")).drop(columns="time"),
    )
    later = bars_of(start_ns=START + 14 * DAY_NS)  # so that a day above 12 says which is the month
    own.csv(
        "F.csv", pd.concat([BARS, later]).assign(time=lambda rows: rows["time"].dt.strftime("%d/%m/%Y %H:%M"))
    )
    own.refresh("America/New_York")
    assert own.about("A") == own.about("B") == own.about("C") == own.about("D") == []
    bars = own.bars()
    for symbol in "ABCD":
        assert_same(bars[symbol], BARS)
    (refused,) = own.about("E")
    assert refused == (
        "E.csv: 03/02/2026 09:30 AM has its day or its month first, no date says which is the month: write dates "
        "as 2026-01-31"
    )
    assert_same(
        own.bars(extended_hours=True)["F"].between(0, START + 5 * DAY_NS),
        BARS.assign(
            time=BARS["time"].dt.tz_localize("America/New_York").dt.tz_convert("UTC").dt.tz_localize(None)
        ),
    )


def test_columns_have_any_order_case_and_usual_name_and_others_are_ignored(own: Own) -> None:
    own.csv(
        "MSFT.csv",
        BARS.rename(columns=str.title)[["Volume", "Close", "Time", "Low", "High", "Open"]].assign(Note="ä,;"),
    )
    polygon = BARS.assign(ticker="BRK.B", transactions=7, time=BARS["time"].astype("int64"))
    own.csv("2026-03-02.csv", polygon.rename(columns={"time": "window_start"}))
    short = BARS.rename(
        columns={name: name[0] for name in ("time", "open", "high", "low", "close", "volume")}
    )
    own.csv("JPM.csv", short.assign(n=3))
    site = BARS.assign(
        unix=in_units(BARS, "s")["time"], symbol="BTC/USD", time=BARS["time"].dt.strftime("%Y-%m-%d")
    )
    own.write(
        "Site_BTCUSD_2026.csv",
        "https://www.a-site.com\n" + site.rename(columns={"time": "day"}).to_csv(index=False),
    )
    unnamed = BARS.set_index("time")
    unnamed.index.name = None
    own.write("KO.csv", unnamed.to_csv())
    own.refresh()
    bars = own.bars()
    assert sorted(bars) == ["BRK.B", "BTC-USD", "JPM", "KO", "MSFT"]
    for symbol in bars:
        assert_same(bars[symbol], BARS)
    assert bars["BTC-USD"].asset_class == "crypto"


def test_archives_of_binance_without_a_header_are_known(own: Own) -> None:
    times = BARS["time"].astype("int64") // 10**6
    rest = {
        "close_time": times + 59_999,
        "quote": 1.0,
        "count": 3,
        "taker": 1.0,
        "taker_quote": 1.0,
        "ignore": 0,
    }
    own.write(
        "BTCUSDT-1m-2026-03.zip",
        zipped(
            **{
                "BTCUSDT-1m-2026-03.csv": BARS.assign(time=times, **rest)
                .to_csv(index=False, header=False)
                .encode()
            }
        ),
    )
    own.refresh()
    assert_same(own.bars()["BTCUSDT"], BARS)


def test_a_column_of_symbols_divides_a_file(own: Own) -> None:
    names = {"AAPL": 0, "btcusdt": 1, "MSFT": 2}
    frame = pd.concat(bars_of(seed=seed).assign(Symbol=name) for name, seed in names.items())
    own.write("all.parquet", parquet(frame.sample(frac=1, random_state=0)))
    own.refresh()
    bars = own.bars()
    for name, seed in names.items():
        assert_same(bars[name.upper()], bars_of(seed=seed))
    assert [bars[name].asset_class for name in ("AAPL", "BTCUSDT")] == ["stock", "crypto"]
    assert "stock AAPL, MSFT; crypto BTCUSDT" in own.notes.warnings[0]


def test_of_many_symbols_with_many_bars_a_few_are_loaded_at_once(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["AAPL", "AMZN", "JPM", "MSFT", "NVDA"]
    own.csv("all.csv", pd.concat([BARS.assign(symbol=name) for name in names]))
    own.refresh()
    together, at_once = own.bars(), []
    monkeypatch.setattr(loading, "BARS_AT_ONCE", 2 * len(BARS))
    read = Lake.columns
    monkeypatch.setattr(
        Lake, "columns", lambda lake, *asked: at_once.append(list(asked[2])) or read(lake, *asked)
    )
    assert [*own.bars()] == names and at_once == [names[:2], names[2:4], names[4:]]
    for name, bars in own.bars().items():
        np.testing.assert_array_equal(bars.close, together[name].close)


def test_bars_finer_than_a_minute_are_aggregated(own: Own) -> None:
    fine = bars_of(60 * 60, step_ns=10**9)
    broken = fine.copy()
    broken.loc[100, "high"] = np.nan
    own.csv("BTCUSDT.csv", pd.concat([broken, fine[30:40]]).sample(frac=1, random_state=0))
    own.refresh()
    assert own.about("BTC") == ["BTCUSDT.csv: aggregated 3,609 of its rows, bars finer than a minute"]
    good = fine.drop(index=100)
    grouped = good.groupby(good["time"].dt.floor("min"))
    whole = grouped.agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
    assert_same(own.bars()["BTCUSDT"], whole.reset_index())
    assert own.rejected("BTCUSDT") == {"not_finite": 1}


def test_order_flow_is_kept_where_a_file_has_it(own: Own) -> None:
    flow = BARS.assign(number_of_trades=range(1, 391), TakerBuyVolume=np.floor(BARS["volume"] / 2))
    flow.loc[7, "TakerBuyVolume"] = None
    own.csv("BTCUSDT.csv", flow)
    own.csv("ETHUSDT.csv", BARS)
    fine = flow.assign(time=START + 20 * 10**9 * flow.index)
    own.write("SOLUSDT.parquet", parquet(fine))
    own.refresh()
    bars = own.bars()
    assert (bars["ETHUSDT"].trades, bars["ETHUSDT"].taker_buy_volume) == (None, None)
    np.testing.assert_array_equal(bars["BTCUSDT"].trades, flow["number_of_trades"])
    np.testing.assert_array_equal(bars["BTCUSDT"].taker_buy_volume, flow["TakerBuyVolume"])
    minutes = fine.groupby(fine.index // 3)
    np.testing.assert_array_equal(bars["SOLUSDT"].trades, minutes["number_of_trades"].sum())
    takers = minutes["TakerBuyVolume"].sum()
    takers[2] = np.nan
    np.testing.assert_array_equal(bars["SOLUSDT"].taker_buy_volume, takers)


def test_stamps_at_the_end_of_their_minute_belong_to_it(own: Own) -> None:
    own.csv("AAPL.csv", BARS.assign(time=BARS["time"] + pd.Timedelta("59.999s")))
    own.refresh()
    assert_same(own.bars()["AAPL"], BARS)


@pytest.mark.parametrize(("step", "words"), [(5, "5"), (60, "60"), (1440, "1,440")])
def test_bars_coarser_than_a_minute_are_refused_with_the_reason(own: Own, step: int, words: str) -> None:
    own.csv("AAPL.csv", BARS)
    own.csv("SLOW.csv", bars_of(12, START - 17280 * MINUTE_NS, step * MINUTE_NS))
    thin = bars_of(2000)[np.random.default_rng(0).random(2000) < 0.1]  # a minute's, though most are missing
    own.csv("THIN.csv", thin)
    assert own.refresh(extended_hours=True).status == "ok"
    assert own.about("SLOW") == [
        f"SLOW.csv: bars of {words} minutes (SLOW) were left out: coarser ones than a minute do not say what "
        "happened within, and accounts act every minute"
    ]
    assert sorted(own.bars(extended_hours=True)) == ["AAPL", "THIN"]
    assert_same(own.bars(extended_hours=True)["THIN"], thin)


def test_a_file_that_changes_is_read_again_alone_and_one_that_goes_leaves_its_bars(own: Own) -> None:
    own.csv("AAPL.csv", BARS)
    path = own.csv("MSFT.csv", BARS)
    own.refresh()
    assert own.notes.total == 2
    own.refresh()
    assert own.notes.total == 0 and own.notes.warnings == []
    longer = bars_of(500)
    longer.to_csv(path, index=False)
    os.utime(path, ns=(NOW, NOW - DAY_NS))
    own.refresh()
    assert own.notes.total == 1
    assert_same(own.bars(extended_hours=True)["MSFT"], longer)
    assert_same(own.bars()["AAPL"], BARS)
    path.unlink()
    own.refresh()
    (line,) = own.about("MSFT")
    assert "no longer in" in line and "To drop them, remove" in line
    assert len(own.bars()["MSFT"]) == 390


def test_bars_toml_says_what_is_guessed_else(own: Own) -> None:
    own.csv("BTC.csv", BARS)
    own.csv("GOLD.csv", BARS)
    own.write(
        "bars.toml",
        'timezone = "America/New_York"\nsplit_adjusted = false\n[symbols.GOLD]\ncalendar = "24/7"\n',
    )
    own.refresh()
    bars = own.bars(extended_hours=True)
    assert (bars["GOLD"].asset_class, bars["BTC"].asset_class) == ("crypto", "crypto")
    assert bars["GOLD"].open_time[0] == ns("2026-03-02 19:30")  # 14:30 in New York
    assert own.notes.warnings == [
        "guessed from the symbols: crypto BTC. bars.toml can say it, see docs/data.md"
    ]
    own.write("bars.toml", '[symbols.BTC]\nasset_class = "stock"\n[symbols.GOLD]\nasset_class = "crypto"\n')
    own.refresh()
    bars = own.bars()
    assert bars["BTC"].asset_class == "stock"  # read again, and no longer among the others
    assert_same(bars["BTC"], BARS)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            'colour = "red"',
            "colour is unknown; it may have asset_class, calendar, split_adjusted, timezone, symbols",
        ),
        ('asset_class = "bond"', "asset_class must be stock or crypto, was bond"),
        (
            'calendar = "XLON"',
            "calendar must be one of XNYS, XNAS, 24/7, was XLON: sessions of other exchanges are not known here; "
            "24/7 keeps all bars",
        ),
        ('calendar = "24/7"\nasset_class = "stock"', "calendar 24/7 is none of asset_class stock"),
        ('timezone = "Mars"', "timezone must be one such as America/New_York or UTC, was Mars"),
        ("[symbols]\nA = 1", "symbols.A must be a table, such as [symbols.A]"),
        ("[symbols.A]\nsplit_adjusted = 1", "symbols.A: split_adjusted must be of type bool, was 1"),
        ("asset_class = ", "Invalid value (at end of document)"),
    ],
)
def test_a_wrong_bars_toml_is_one_line(own: Own, text: str, error: str) -> None:
    own.csv("AAPL.csv", BARS)
    own.write("bars.toml", text)
    report = own.refresh()
    assert (report.status, report.message) == (
        "failed",
        f"Files failed: bars.toml: {error}; nothing is kept of it yet",
    )


@pytest.mark.parametrize("is_adjusted", [True, False])
def test_splits_are_applied_where_the_files_say_that_they_are_not(own: Own, is_adjusted: bool) -> None:
    own.csv("AAPL.csv", BARS)
    own.write("bars.toml", f"split_adjusted = {str(is_adjusted).lower()}\n")
    own.refresh()
    SplitLedger(own.lake.root).update("AAPL", [Split((BARS["time"][0] + pd.Timedelta(days=4)).date(), 2.0)])
    assert own.bars()["AAPL"].open[0] == (BARS["open"][0] if is_adjusted else BARS["open"][0] / 2)


def test_another_source_fills_the_holes_of_ones_own_bars(own: Own) -> None:
    own.csv("BTCUSDT.csv", BARS.drop(index=range(100, 110)))
    own.refresh()
    theirs = BARS.assign(symbol="BTCUSDT", open_time=BARS["time"].astype("int64"), volume=BARS["volume"] + 1)
    own.lake.write(
        "binance", "BTCUSDT", "2026-03", pa.Table.from_pandas(theirs.drop(columns="time")), key="", version="",
        start_ns=START, end_ns=START + DAY_NS, symbols=["BTCUSDT"], now_ns=NOW,
    )  # fmt: skip
    request = own.request()
    both = type(request)(
        ("binance", "files"),
        {"binance_pairs": ("BTCUSDT",)},
        request.start_ns,
        NOW,
        1,
        files_dir=request.files_dir,
    )
    (row,) = load(own.lake, both).rows
    assert [(stretch.source, stretch.num_bars) for stretch in row.stretches] == [
        ("files", 100), ("binance", 10), ("files", 280),
    ]  # fmt: skip
    assert row.num_bars == 390


def test_the_look_ahead_test_and_the_plan_of_memory_know_ones_own_bars(own: Own, tmp_path: Path) -> None:
    for symbol in ("AAPL", "MSFT", "BTCUSDT"):
        own.csv(f"{symbol}.csv", BARS)
    own.refresh()
    settings = Settings(
        sources=("files",), files_dir=own.folder, data_dir=own.lake.root, start_date="2026-03-01", min_bars=1
    )
    assert [bars.symbol for bars in lookahead.load_bars(settings, NOW)] == ["AAPL", "MSFT", "BTCUSDT"]
    request = data_request(settings, NOW)
    assert (machine.num_bars(request), machine.found_bars(settings, request)) == (0, 3 * 390)
    others = replace(settings, files_dir=str(tmp_path))
    assert machine.found_bars(others, data_request(others, NOW)) == 0
    assert load(own.lake, data_request(others, NOW)).rows == []  # the bars of another folder are not its own


@pytest.mark.drill
def test_a_csv_of_any_size_is_streamed(own: Own) -> None:
    """Half a gigabyte of shuffled rows of 40 symbols, within the memory that a file of 3 GB takes, too."""
    random, lines = np.random.default_rng(0), 0
    symbols = np.array([f"C{number:02d}USDT" for number in range(40)])
    with (own.folder / "all.csv").open("w") as file:
        file.write("timestamp,symbol,open,high,low,close,volume\n")
        for block in range(170):
            minutes = np.repeat(np.arange(1_000), len(symbols))
            prices = random.uniform(99, 101, len(minutes)).round(6)
            frame = pd.DataFrame({"time": START - 200 * DAY_NS + (minutes + 1_000 * block) * MINUTE_NS})
            frame["symbol"] = np.tile(symbols, 1_000)
            frame = frame.assign(open=prices, high=prices + 1, low=prices - 1, close=prices, volume=prices)
            frame.sample(frac=1, random_state=block).to_csv(file, index=False, header=False)
            lines += len(frame)
    assert (own.folder / "all.csv").stat().st_size > 5e8
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.data_sources.vendors.files_harness import Own\n"
        "own = Own(Path(sys.argv[2]))\n"
        "print(own.refresh().message, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, sep='\\n')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, ROOT, own.folder.parent], capture_output=True, text=True, check=True
    )
    message, megabytes = ended.stdout.splitlines()
    assert message.startswith(f"Files ok: {lines:,} bars up to "), message
    assert int(megabytes) < 1_500
