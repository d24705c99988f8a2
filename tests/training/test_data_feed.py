"""Which bars a run gets: fresh ones, those that were fetched ahead, or the very ones that it began with."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from continuous_training import Settings
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData
from data_sources.progress import NullProgress
from runtime.control import Control
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.drill.programs import living
from tests.program import ALONE, PATIENCE, SUPERVISED, Start, environment, tiny_flags
from tests.vendors import BinanceNow
from training.data_feed import Prefetch, fresh_bars
from training.distributed import Ranks
from training.progress import TrainingProgress


class Taken:
    """A Prefetch that has brought the lake up to date until ``ready_ns``."""

    def __init__(self, ready_ns: int) -> None:
        self.ready_ns = ready_ns

    def take(self) -> int:
        return self.ready_ns


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
        assert progress.cutoff_ns > server.now_ns

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


def test_ctrl_c_while_bars_arrive_exits_0_and_the_next_start_keeps_what_arrived(tmp_path: Path) -> None:
    settings = {"sources": "binance", "binance_pairs": "BTCUSDT", "end_date": "none", "history_days": 5}
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
