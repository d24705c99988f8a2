"""Which bars a run gets: fresh ones, those that were fetched ahead, or the very ones that it began with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from continuous_training import Settings
from data_sources.lake import Lake
from data_sources.loading import LoadedData
from tests.data_sources.binance_server import BinanceServer
from training.clock import Clock
from training.console import Console
from training.control import Control
from training.distributed import Ranks
from training.fresh_bars import fresh_bars
from training.prefetch import Prefetch


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
    lake, console = Lake(tmp_path / "data"), Console(None)
    ranks, control = Ranks(0, 1, torch.device("cpu")), Control()

    def bars_of(clock: Clock, ready_ns: int) -> LoadedData:
        prefetch = cast(Prefetch, Taken(ready_ns))
        data = fresh_bars(lake, settings, clock, ranks, control, console, prefetch)
        assert data is not None
        return data

    with BinanceServer(time.time_ns()) as server:
        monkeypatch.setenv("BINANCE_API_URL", server.url)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
        clock = Clock()
        first = bars_of(clock, 0)
        assert server.requests
        assert clock.cutoff_ns > server.now_ns

        server.requests.clear()
        ahead_ns = clock.cutoff_ns + 1
        second_clock = Clock(run=2)
        bars_of(second_clock, ahead_ns)
        assert server.requests == []
        assert second_clock.cutoff_ns == ahead_ns

    part = max(lake.parts("binance", "BTCUSDT").values(), key=lambda each: each.rows)
    lake.remove(part)  # the lake is another one by now
    resumed = bars_of(clock, 0)
    assert resumed.fingerprint == first.fingerprint
    np.testing.assert_array_equal(resumed.bars[0].close, first.bars[0].close)
