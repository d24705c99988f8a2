"""Which bars a run gets: fresh ones, those that were fetched ahead, or the very ones that it began with."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from continuous_training import Settings
from data_sources import snapshot
from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS
from data_sources.flow import FlowPlan
from data_sources.lake.lake import Lake
from data_sources.lake.quality import bar_table
from data_sources.load import LoadedData
from data_sources.progress import NullProgress
from data_sources.simulated import simulated_bars
from runtime.control import EXIT_NO_DATA, Control, ExitProgram
from tests.data_sources.bar_tables import as_format_1, ns, walk
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.drill.programs import living
from tests.program import (
    ALONE,
    PATIENCE,
    SUPERVISED,
    Start,
    environment,
    tiny_flags,
)
from tests.vendors import BinanceNow
from training.data_feed import data_request, fresh_bars, make_market
from training.distributed import Ranks
from training.prefetch import Prefetch
from training.progress import TrainingProgress


class Taken:
    """A Prefetch that has brought the lake up to date until ``ready_ns``, and written a snapshot of ``bars``."""

    def __init__(self, ready_ns: int, bars: str = "") -> None:
        self.ready = ready_ns, bars

    def take(self) -> tuple[int, str]:
        return self.ready


def test_a_run_asks_nobody_after_a_refresh_ahead_and_a_resumed_one_keeps_its_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONTROL_DIR", raising=False)
    settings = Settings(
        sources=("binance",), binance_pairs=("BTCUSDT",), history_days=2, data_dir=str(tmp_path / "data")
    )
    lake = Lake(tmp_path / "data")
    ranks, control = Ranks(0, 1, torch.device("cpu")), Control()

    def bars_of(progress: TrainingProgress, ready_ns: int) -> LoadedData:
        prefetch = cast(Prefetch, Taken(ready_ns))
        data = fresh_bars(lake, settings, progress, ranks, control, NullProgress(), prefetch)
        assert data is not None
        return data

    with BinanceServer(time.time_ns()) as server:
        monkeypatch.setenv("BINANCE_API_URL", server.url)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
        progress = TrainingProgress()
        first = bars_of(progress, 0)
        assert server.requests
        assert progress.cutoff_ns > server.now_ns - 2 * MINUTE_NS

        server.requests.clear()
        ahead_ns = progress.cutoff_ns + 1
        second_clock = TrainingProgress(run=2)
        bars_of(second_clock, ahead_ns)
        assert server.requests == []
        assert second_clock.cutoff_ns == ahead_ns

    part = max(lake.parts("binance", "BTCUSDT").values(), key=lambda each: each.rows)
    lake.remove(part)  # the lake is another one by now
    resumed = bars_of(progress, 0)
    assert resumed.fingerprint == first.fingerprint
    np.testing.assert_array_equal(resumed.bars[0].close, first.bars[0].close)


def test_order_flow_that_came_after_the_snapshot_waits_for_the_next_run_and_what_is_left_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONTROL_DIR", raising=False)
    caplog.set_level(logging.INFO)
    start_ns = ns("2026-09-28")
    lake, end_ns = Lake(tmp_path), start_ns + 3 * DAY_NS
    bars = walk("BTCUSDT", start_ns, 3 * 1440)
    span = {"start_ns": ns("2026-09-01"), "end_ns": end_ns, "symbols": ["BTCUSDT"], "now_ns": end_ns + DAY_NS}
    lake.write("binance", "BTCUSDT", "2026-09", bars, key="k", version="v", **span)
    as_format_1(lake, "binance", "BTCUSDT")
    settings = Settings(
        sources=("binance",), binance_pairs=("BTCUSDT",), start_date="2026-09-28", data_dir=str(tmp_path)
    )
    request = data_request(settings, end_ns)
    ready = snapshot.provide(lake, request)
    assert ready is not None

    def begin(bars: str) -> LoadedData:
        prefetch, ranks = cast(Prefetch, Taken(end_ns, bars)), Ranks(0, 1, torch.device("cpu"))
        data = fresh_bars(
            Lake(tmp_path), settings, TrainingProgress(), ranks, Control(), NullProgress(), prefetch
        )
        assert data is not None
        return data

    first = begin(snapshot.content_of(ready))
    assert caplog.messages == [str(FlowPlan(1, 3 * 1440))]
    flow = {"trades": np.ceil(bars["volume"].to_numpy())}
    (part,) = Lake(tmp_path).parts("binance", "BTCUSDT").values()
    Lake(tmp_path).add_flow(part, bars.append_column("trades", pa.array(flow["trades"])), end_ns + DAY_NS)
    assert begin(snapshot.content_of(ready)).fingerprint == first.fingerprint
    assert list((tmp_path / ".ready").glob("*.npy")) == [ready]  # none was written while training waited
    later = begin("")
    assert first.bars[0].trades is None and later.bars[0].trades is not None
    np.testing.assert_array_equal(later.bars[0].trades, flow["trades"])
    np.testing.assert_array_equal(later.bars[0].close, first.bars[0].close)
    assert len(caplog.messages) == 1


@pytest.fixture
def binance(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinanceServer]:
    monkeypatch.delenv("CONTROL_DIR", raising=False)
    with BinanceServer(time.time_ns()) as server:
        monkeypatch.setenv("BINANCE_API_URL", server.url)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
        yield server


def bars_elsewhere(folder: Path, progress: TrainingProgress, **changes: Any) -> LoadedData | None:
    """Return the bars of a run on a machine whose lake is ``folder``."""
    pairs = {"binance_pairs": ("BTCUSDT", "ETHUSDT")}
    settings = Settings(sources=("binance",), history_days=2, data_dir=str(folder), **pairs | changes)
    prefetch, ranks = cast(Prefetch, Taken(0)), Ranks(0, 1, torch.device("cpu"))
    return fresh_bars(Lake(folder), settings, progress, ranks, Control(), NullProgress(), prefetch)


def test_a_run_resumed_on_another_machine_fetches_the_bars_that_it_began_with(
    binance: BinanceServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = TrainingProgress(epoch=2)
    first = bars_elsewhere(tmp_path / "here", progress)
    assert first is not None and progress.num_bars == {bars.symbol: len(bars) for bars in first.bars}
    cutoff_ns = progress.cutoff_ns
    binance.now_ns += 3 * DAY_NS  # newer bars exist by now
    again = bars_elsewhere(tmp_path / "there", replace(progress))
    assert again is not None and binance.requests
    for before, after in zip(first.bars, again.bars, strict=True):
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert progress.cutoff_ns == cutoff_ns
    assert "no copy of the bars that run 1 began with" in caplog.text


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_resumed_run_never_loses_a_symbol_in_silence(
    binance: BinanceServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_copied: bool
) -> None:
    progress = TrainingProgress(epoch=2)
    bars_elsewhere(tmp_path / "here", progress)
    if is_copied:  # half of it
        shutil.copytree(tmp_path / "here" / "binance" / "BTCUSDT", tmp_path / "there" / "binance" / "BTCUSDT")
    binance.pairs = ("BTCUSDT",)
    with pytest.raises(ExitProgram, match=r"ETHUSDT \(no bars\).*--missing-symbols continue") as stopped:
        bars_elsewhere(tmp_path / "there", replace(progress))
    assert stopped.value.code == EXIT_NO_DATA

    allowed = bars_elsewhere(tmp_path / "there", replace(progress), missing_symbols="continue")
    assert allowed is not None and [bars.symbol for bars in allowed.bars] == ["BTCUSDT"]
    assert "it continues without them" in caplog.text
    unnamed = bars_elsewhere(tmp_path / "there", replace(progress), binance_pairs=("BTCUSDT",))
    assert unnamed is not None and "without ETHUSDT, which the settings no longer name" in caplog.text

    shutil.copytree(tmp_path / "here" / "binance", tmp_path / "there" / "binance", dirs_exist_ok=True)
    healed = bars_elsewhere(tmp_path / "there", replace(progress))
    assert healed is not None and len(healed.bars) == 2


def test_a_resumed_run_with_fewer_bars_names_them(
    binance: BinanceServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = TrainingProgress(epoch=2)
    bars_elsewhere(tmp_path / "here", progress)
    binance.listed_ns["ETHUSDT"] = progress.cutoff_ns - 2_500 * MINUTE_NS
    bars_elsewhere(tmp_path / "there", replace(progress))
    count = progress.num_bars["ETHUSDT"]
    assert f"fewer bars than it began with: ETHUSDT 2,500 of {count:,}" in caplog.text


def test_a_run_that_began_with_a_pegged_symbol_continues_without_it_by_name(
    binance: BinanceServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = TrainingProgress(epoch=2)
    bars_elsewhere(tmp_path, progress)
    pegged = replace(progress, num_bars=progress.num_bars | {"USDCUSDT": 2_880})  # of an earlier version
    time_ns = progress.cutoff_ns - np.arange(2_880, 0, -1) * MINUTE_NS
    columns = [time_ns, *([np.full(2_880, 1.0)] * 5)]
    Lake(tmp_path).write(
        "binance", "USDCUSDT", "u", bar_table("USDCUSDT", columns), key="u", version="", start_ns=int(time_ns[0]),
        end_ns=progress.cutoff_ns, symbols=["USDCUSDT"], now_ns=progress.cutoff_ns + DAY_NS,
    )  # fmt: skip
    pairs = {"binance_pairs": ("BTCUSDT", "ETHUSDT", "USDCUSDT")}
    data = bars_elsewhere(tmp_path, pegged, **pairs)
    assert data is not None and [bars.symbol for bars in data.bars] == ["BTCUSDT", "ETHUSDT"]
    assert data.dropped == {"USDCUSDT": "pegged or constant: one price throughout"}
    assert "run 1 continues without USDCUSDT, whose price stands still" in caplog.text
    kept = bars_elsewhere(tmp_path, replace(progress), keep_pegged=True, **pairs)
    assert kept is not None and len(kept.bars) == 3


class Second(Ranks):
    """Rank 1 of two, whose first one has all to itself."""

    def broadcast(self, value: object) -> object:
        return time.time_ns() if value == 0 else value

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: object) -> list[object]:
        return [value]


@pytest.mark.parametrize(("local_rank", "expected"), [("0", 2), ("1", 0)])
def test_a_machine_that_waits_for_the_download_of_another_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: str, expected: int
) -> None:
    """But the second rank beside the one that downloads does not: it would hide that one's hanging."""
    monkeypatch.delenv("CONTROL_DIR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    waits: list[float] = []

    @contextlib.contextmanager
    def thread(max_seconds: float) -> Iterator[None]:
        waits.append(max_seconds)
        yield

    monkeypatch.setattr("runtime.control.heartbeat_thread", thread)
    settings = Settings(sources=("simulated",), simulated_symbols=2, simulated_bars=3_000)
    ranks = Second(1, 2, torch.device("cpu"))
    lake, prefetch = Lake(tmp_path), cast(Prefetch, Taken(0))
    assert (
        fresh_bars(lake, settings, TrainingProgress(), ranks, Control(), NullProgress(), prefetch) is not None
    )
    assert len(waits) == expected and all(seconds > 3600 for seconds in waits)


class Held(BinanceNow):
    """Gives its first archive file at once, and others when it is let ``go``."""

    def __init__(self) -> None:
        super().__init__(0, ("BTCUSDT",))
        self.asked, self.go = threading.Event(), threading.Event()

    def answer(self, handler: Any) -> None:
        if handler.path.endswith(".zip") and self.zips():
            self.asked.set()
            assert self.go.wait(PATIENCE)
        super().answer(handler)

    def zips(self) -> list[str]:
        return [path for path in self.requests if path.endswith(".zip")]


@pytest.mark.drill
def test_ctrl_c_while_bars_arrive_exits_0_and_the_next_start_keeps_what_arrived(tmp_path: Path) -> None:
    settings = {"sources": "binance", "binance_pairs": "BTCUSDT", "end_date": "none", "history_days": 5}
    settings["positions"] = "0,1"
    flags = tiny_flags(tmp_path, **settings, batch_size=64, epochs=2, runs=1)
    with Held() as binance:
        addresses = {"BINANCE_API_URL": binance.url, "BINANCE_ARCHIVE_URL": binance.url}
        start = Start(tmp_path / "out", [*SUPERVISED, *flags], environment(NPROC="2", **addresses))
        try:
            assert binance.asked.wait(PATIENCE), start.output
            start.process.send_signal(signal.SIGINT)
            start.wait_for("Stopping after this epoch")
            binance.go.set()
            start.ends_well()
        finally:
            start.kill()
        assert "epoch  1" not in start.output and not living(tmp_path)
        before = binance.zips()
        Start(tmp_path / "again", [*ALONE, *flags], environment(**addresses)).ends_well()
    asked_twice = [path for path, times in Counter(binance.zips()).items() if times > 1]
    assert before[0] not in asked_twice
    assert (tmp_path / "checkpoints" / "run1_epoch2.pt").exists()


@pytest.mark.parametrize(
    ("groups", "known", "expected"),
    [
        (("symbol", "flow"), 0.0, "0% of the bars have the order flow that features flow look at"),
        (("flow", "panel"), 0.25, "25% of the bars have the order flow that features flow and panel look at"),
        (("panel",), 0.25, "25% of the bars have the order flow that features panel look at"),
        (("panel",), 0.0, ""),  # bars of stocks: no source has it
        (("symbol", "day"), 0.25, ""),
        (("flow",), 0.75, ""),
    ],
)
def test_a_new_training_says_that_few_bars_have_the_flow_that_it_looks_at(
    groups: tuple[str, ...], known: float, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    (bars,) = simulated_bars(1, 4_000, seed=1, end_ns=ns("2026-03-01"))
    taker = np.where(np.arange(4_000) >= 4_000 * (1 - known), bars.volume / 2, np.nan)
    bars = replace(bars, taker_buy_volume=taker if known else None)
    settings = Settings(features=groups, holdout_days=0)
    ranks = Ranks(0, 1, torch.device("cpu"))
    market = make_market(settings, [bars], ranks, None)
    assert [record.message.split(", and")[0] for record in caplog.records] == [expected][: bool(expected)]
    caplog.clear()
    make_market(settings, [bars], ranks, market.statistics)  # a run of a training that has its scales
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "set the keys in .env (see .env.example), check the network, or try it offline with --demo"),
        ({"sources": ("simulated",)}, "raise simulated_bars, or lower min_bars"),
        (
            {"sources": ("files",)},
            "put files of bars into own (docs/data.md), lower min_bars, or try it offline with",
        ),
        ({"sources": ("files", "yahoo")}, "put files of bars into own (docs/data.md), set the keys in .env"),
    ],
)
def test_without_bars_the_advice_is_of_the_sources(changes: dict[str, Any], advice: str) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(ExitProgram) as ended:
        make_market(Settings(files_dir="own", **changes), [], ranks, None)
    assert ended.value.code == EXIT_NO_DATA and str(ended.value).startswith(
        f"No symbol has 2,000 bars: {advice}"
    )
