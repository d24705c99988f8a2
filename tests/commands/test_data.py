"""The command ``data`` as people and machines call it, against a loopback Binance; and its verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import data
from commands.cli import flags_of
from continuous_training import Settings
from data_sources.bars import MINUTE_NS, Bars
from data_sources.coverage import Extent, Series, row_of
from data_sources.flow import FlowPlan
from data_sources.lake.lake import Lake
from data_sources.lake.quality import bar_table
from data_sources.load import LoadedData
from data_sources.snapshot import content_of as content_of_snapshot
from data_sources.snapshot import open_snapshot
from data_sources.sources import DataRequest
from data_sources.vendors import SOURCES
from data_sources.vendors.binance_archive import months
from monitoring.console import Console
from monitoring.tables import fit, lay_out
from tests.data_sources.bar_tables import as_format_1
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.program import ROOT, environment
from training.data_feed import refresh_command

DAY_NS = 86_400 * 10**9


@pytest.fixture(scope="module")
def server() -> Iterator[BinanceServer]:
    with BinanceServer(time.time_ns()) as running:
        yield running


def data_command(
    server: BinanceServer, folder: Path, *words: str, pairs: str = "BTCUSDT,NOSUCHUSDT"
) -> subprocess.CompletedProcess[str]:
    # Two days and more without "recent", which begins up to three days ago.
    start = datetime.fromtimestamp((server.now_ns - 5 * DAY_NS) // 10**9, UTC).date().isoformat()
    flags = ["--sources", "binance", "--binance-pairs", pairs, "--start-date", start]
    flags += ["--data-dir", str(folder / "data"), "--log-dir", str(folder / "logs")]
    return subprocess.run(
        [sys.executable, "continuous_training.py", "data", *flags, *words],
        cwd=ROOT,
        env=environment(BINANCE_API_URL=server.url, BINANCE_ARCHIVE_URL=server.url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def content_of(answer: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert answer.returncode == 0, answer.stderr
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def test_json_is_the_truth_no_refresh_asks_no_source_and_verify_finds_what_a_refresh_repairs(
    server: BinanceServer, tmp_path: Path
) -> None:
    first = content_of(data_command(server, tmp_path, "--json"))
    entry, unknown = first["series"]
    start_ns = int(datetime.fromisoformat(first["from"]).timestamp()) * 10**9
    times, _ = server.truth("BTCUSDT", start_ns, server.now_ns // MINUTE_NS * MINUTE_NS)
    assert (entry["symbol"], entry["source"], entry["verdict"]) == ("BTCUSDT", "binance", "ok")
    assert entry["bars"] in (len(times), len(times) - 1)  # a minute closes five seconds after its end
    assert datetime.fromisoformat(entry["first"]).timestamp() * 10**9 == times[0]
    assert (entry["coverage"], entry["gaps"], entry["rejected"]) == (1.0, 0, {})
    assert (unknown["bars"], unknown["verdict"]) == (0, "no bars")
    assert first["refreshed"]["binance"]["status"] == "ok"
    assert first["symbols"][0]["stretches"][0]["bars"] == entry["bars"]

    server.requests.clear()
    again = content_of(data_command(server, tmp_path, "--json", "--no-refresh"))
    assert server.requests == []
    assert again["fingerprint"] == first["fingerprint"]
    assert again["refreshed"] == {}

    lake = Lake(tmp_path / "data")
    part = max(lake.parts("binance", "BTCUSDT").values(), key=lambda part: (part.rows, part.unit))
    path = lake.root / "binance" / "BTCUSDT" / f"{part.unit}.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    answer = data_command(server, tmp_path, "--verify", "--no-refresh")
    assert answer.returncode == 1
    damage = f"damaged and set aside: binance/BTCUSDT/{part.unit}; a refresh fetches it again"
    assert damage in answer.stdout.replace("\n", " ")
    path.write_bytes(content)
    answer = data_command(server, tmp_path, "--verify")
    assert answer.returncode == 0
    assert f"damaged and set aside: binance/BTCUSDT/{part.unit}" in answer.stdout
    assert (
        content_of(data_command(server, tmp_path, "--json", "--no-refresh"))["series"][0]["bars"]
        >= entry["bars"]
    )
    assert lake.verify() == []


def test_in_the_background_it_prints_one_line_and_leaves_the_snapshot_that_the_next_run_maps(
    server: BinanceServer, tmp_path: Path
) -> None:
    settings = Settings(
        sources=("binance",), binance_pairs=("BTCUSDT",), history_days=2, data_dir=str(tmp_path / "data")
    )
    command = refresh_command(settings, flags_of(settings))
    assert command is not None
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(BINANCE_API_URL=server.url, BINANCE_ARCHIVE_URL=server.url),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    printed = json.loads(child.stdout.read())  # its standard input stays open
    child.communicate()
    assert child.returncode == 0
    assert printed["warnings"] == []
    (copy,) = (tmp_path / "data" / ".ready").glob("*.npy")
    (bars,) = open_snapshot(copy).bars
    assert bars.open_time[-1] > printed["now_ns"] - 10 * 60 * MINUTE_NS


def test_former_bars_get_their_order_flow_after_the_result_was_told_or_at_once(
    server: BinanceServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BINANCE_API_URL", server.url)
    monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
    *_, month = months(server.now_ns - 100 * DAY_NS, server.now_ns - 70 * DAY_NS)
    span = {"start_ns": month.start_ns, "end_ns": month.end_ns}
    request = DataRequest(("binance",), {"binance_pairs": ("OLDUSDT",)}, **span, min_bars=1)
    monkeypatch.setattr(server, "pairs", ("OLDUSDT",))
    monkeypatch.setitem(server.listed_ns, "OLDUSDT", month.end_ns - DAY_NS)
    times, values = server.truth("OLDUSDT", **span)
    table = bar_table("OLDUSDT", [times, *values.T])
    for name in ("background", "by hand"):
        lake = Lake(tmp_path / name)
        origin = {"key": month.name, "version": "v", "symbols": ["OLDUSDT"], "now_ns": server.now_ns}
        lake.write("binance", "OLDUSDT", month.name, table, **origin, **span)
        as_format_1(lake, "binance", "OLDUSDT")

    lake, told = Lake(tmp_path / "background"), []
    data.in_background(lake, request, server.now_ns, month.end_ns, told.append)
    (result,) = map(json.loads, told)
    (ready,) = (lake.root / ".ready").glob("*.npy")
    assert result == {"now_ns": month.end_ns, "bars": content_of_snapshot(ready), "warnings": []}
    assert open_snapshot(ready).bars[0].trades is None  # told before, so that nothing waits for it
    assert lake.parts("binance", "OLDUSDT")[month.name].flow == {"trades": 1440, "taker_buy_volume": 1440}

    lake, console = Lake(tmp_path / "by hand"), Console(tmp_path / "logs", to_stderr=True)
    with console:
        assert data.show(lake, request, server.now_ns, console, False, False, False, False) == 0
        assert f"{FlowPlan(1, 1440)}; or at once, by data --flow" in capsys.readouterr().err
        for fetches, files, flow in ((False, 1, {}), (True, 0, {"trades": 1440, "taker_buy_volume": 1440})):
            assert data.show(lake, request, server.now_ns, console, False, False, fetches, True) == 0
            printed = capsys.readouterr()
            content = json.loads(printed.out)
            assert content["flow_to_fetch"]["files"] == files
            assert ("order flow of 1 of 1 files added" in printed.err) == fetches
            assert content["series"][0]["flow"] == flow


def test_without_a_bar_it_ends_with_3(server: BinanceServer, tmp_path: Path) -> None:
    answer = data_command(server, tmp_path, "--no-refresh")
    assert answer.returncode == 3
    assert answer.stderr.strip().splitlines() == ["There are no bars."]


END = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()) * 10**9


def verdict_of(
    asset_class: str, source: str, minutes_behind: int, *, step: int = 1, dropped: str = "", **more: Any
) -> str:
    newest = END - (minutes_behind + 1) * MINUTE_NS
    time_ns = newest - np.arange(3_000 * step, 0, -step, dtype=np.int64) * MINUTE_NS + step * MINUTE_NS
    prices = [np.full(len(time_ns), 100.0)] * 4
    bars = Bars("AAA", asset_class, time_ns, *prices, np.ones(len(time_ns)))  # type: ignore[arg-type]
    index = list(SOURCES).index(source)
    row = row_of(Series(bars, np.full(len(bars), index, np.int8), **more), dropped)
    request = DataRequest((source,), {}, END - 10 * DAY_NS, END)
    report = data.report(LoadedData([bars], {}, [row], "f"), {}, [], request, FlowPlan(0, 0))
    return str(report["series"][0]["verdict"])


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (("crypto", "binance", 3), "ok"),
        (("crypto", "binance", 90), "stale"),
        (("crypto", "polygon", 1_500), "ok"),
        (("crypto", "polygon", 3_000), "stale"),
        (("crypto", "simulated", 1_439), "ok"),  # it ends at midnight
    ],
)
def test_how_far_a_source_may_lag_depends_on_when_it_publishes(given: Any, verdict: str) -> None:
    assert verdict_of(*given) == verdict


def test_thin_series_and_missing_splits_are_named() -> None:
    assert verdict_of("crypto", "binance", 0, step=2) == "thin"
    assert verdict_of("crypto", "binance", 0, flags=["a split of about 10 ..."]) == "split missing"
    assert verdict_of("crypto", "binance", 0, flags=["something else"]) == "see warning"


def test_why_a_symbol_is_dropped_is_its_verdict() -> None:
    assert verdict_of("crypto", "binance", 0, dropped="1,999 bars, fewer than 2,000") == "too few bars"
    pegged = "pegged or constant: within 0.1 % in 15 of 16 days"
    assert verdict_of("crypto", "binance", 90, dropped=pegged) == "pegged"


def test_a_symbol_of_two_sources_has_a_row_for_each_and_one_for_the_merged_series() -> None:
    bars = Bars("AAA", "stock", *(np.empty(0, np.int64), *[np.empty(0)] * 5))
    extents = {
        "polygon": Extent(5, END - DAY_NS, END - DAY_NS, 0, 0, 1.0),
        "yahoo": Extent(0, None, None, 0, 0, None),
    }
    row = row_of(Series(bars, np.empty(0, np.int8), extents), "no bars")
    request = DataRequest(("polygon", "yahoo"), {"stocks": ("AAA",)}, END - 10 * DAY_NS, END)
    series = data.report(LoadedData([], {}, [row], "f"), {}, [], request, FlowPlan(0, 0))["series"]
    assert [(entry["source"], entry["verdict"], entry["is_series"]) for entry in series] == [
        ("polygon", "ok", False), ("yahoo", "no bars", False), ("merged", "no bars", True),
    ]  # fmt: skip


def test_the_table_has_a_row_for_each_symbol_and_fits_a_terminal() -> None:
    names = ("BTCUSDT", "1000SHIBUSDT.P", *(f"COIN{number}USDT" for number in range(7)))
    entries = [
        {
            "symbol": name,
            "source": "merged",
            "bars": 1_051_200,
            "first": "2024-11-28T00:00:00Z",
            "last": "2026-11-28T23:59:00Z",
            "coverage": 0.9987,
            "flow": {"trades": 1_051_200, "taker_volume": 1_051_200},
            "gaps": 1_204,
            "rejected": {"price is not positive": 1_234},
            "splits": 0,
            "behind_minutes": 90,
            "verdict": "ok" if name == "BTCUSDT" else "too few bars",
        }
        for name in names
    ]
    rows = [data._cells(entry, in_full=False) for entry in entries]
    for width in (100, 80, 60):
        columns, cells = fit(data.COLUMNS, rows, width, data.SPARE)
        assert {"symbol", "bars", "last, UTC", "verdict"} <= set(columns)
        assert max(map(len, lay_out(columns, cells))) <= width
    assert data._summary(entries) == (
        "1 ok; 8 too few bars: 1000SHIBUSDT.P, COIN0USDT, COIN1USDT, COIN2USDT, COIN3USDT and 3 more"
    )
    detailed = data._cells(entries[0], in_full=True)
    assert "1,234 price is not positive" in detailed and "2026-11-28 23:59" in detailed
