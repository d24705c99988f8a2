"""The features of a run's bars are kept beside them: mapped by all ranks, and added to by the next run."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from continuous_training import Settings
from data_sources import snapshot
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData
from data_sources.sources import DataRequest
from envs import feature_reuse, features
from envs.features import compute
from envs.market import Market
from runtime.control import ExitProgram
from tests.data_sources.bar_tables import ns, walk
from training import kept_features
from training.data_feed import make_market
from training.distributed import Ranks

START, MINUTES, NEWER = ns("2026-10-01 00:00"), 5_000, 60
PAIRS = ("AAAUSDT", "BBBUSDT")
SETTINGS = Settings(sources=("binance",), holdout_days=1, context_bars=8, horizon=16, episode_bars=64)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bars features were computed of, one number a call."""
    monkeypatch.delenv("CONTROL_DIR", raising=False)
    for module in (features, feature_reuse):
        monkeypatch.setattr(module, "SAME_TIME_BARS", 30)
    lengths: list[int] = []

    def count(bars: Any, *given: Any) -> torch.Tensor:
        lengths.append(len(bars))
        return compute(bars, *given)

    for module in (kept_features, feature_reuse):
        monkeypatch.setattr(module, "compute", count)
    yield lengths


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake, size = Lake(tmp_path), MINUTES + NEWER
    span = {"start_ns": START, "end_ns": START + size * MINUTE_NS, "now_ns": START + 9 * DAY_NS}
    for seed, pair in enumerate(PAIRS):
        bars = walk(pair, START, size, seed=seed)
        lake.write("binance", pair, "u", bars, key="u", version="", symbols=[pair], **span)
    return lake


def run(lake: Lake, newer: int = 0) -> LoadedData:
    """Map the bars of a run."""
    end_ns = START + (MINUTES + newer) * MINUTE_NS
    request = DataRequest(("binance",), {"binance_pairs": PAIRS}, START + newer * MINUTE_NS, end_ns)
    path = snapshot.provide(lake, request)
    assert path is not None
    return snapshot.open_snapshot(path)


def market_of(data: LoadedData, former: Market | None = None, ranks: Ranks = ALONE) -> Market:
    market = make_market(SETTINGS, data.bars, ranks, former and former.statistics, data.copy)
    for thread in threading.enumerate():
        if thread.name == "features":
            thread.join()
    return market


def tables(lake: Lake) -> list[str]:
    return sorted(path.name for path in (lake.root / ".ready").iterdir() if ".features" in path.name)


def test_a_restart_computes_nothing_and_the_next_run_only_what_is_new(lake: Lake, counted: list[int]) -> None:
    data = run(lake)
    first = market_of(data)
    assert torch.equal(first.features, make_market(SETTINGS, data.bars, ALONE, None).features)
    assert sum(counted) == 4 * MINUTES and len(tables(lake)) == 2

    counted.clear()
    resumed = market_of(run(lake), first)
    assert torch.equal(resumed.features, first.features) and counted == []
    assert market_of(run(lake)).statistics.mean.equal(first.statistics.mean)  # of no checkpoint yet
    assert sum(counted) == 2 * MINUTES  # measured once more

    counted.clear()
    data = run(lake, NEWER)
    second = market_of(data, first)
    assert torch.equal(second.features, make_market(SETTINGS, data.bars, ALONE, first.statistics).features)
    # Where the history begins now, and for what is new.
    assert sum(counted) < 2 * 2 * (feature_reuse.LOOKBACK_BARS + NEWER + feature_reuse.COMPARED_ROWS)


@dataclass(frozen=True)
class Second(Ranks):
    """Rank 1, to which rank 0 has sent ``sent``."""

    sent: Any = None

    def broadcast(self, value: Any) -> Any:
        return self.sent


@dataclass(frozen=True)
class First(Ranks):
    """Rank 0, which keeps what it sends."""

    sent: Any = None

    def broadcast(self, value: Any) -> Any:
        self.sent.append(value)
        return value


def both(data: LoadedData) -> tuple[Market, Market]:
    sent: list[Any] = []
    first = market_of(data, ranks=First(0, 1, ALONE.device, sent=sent))
    # A check of own features comes first.
    return first, market_of(data, ranks=Second(1, 1, ALONE.device, sent=sent[-1] if sent[-1] else None))


def test_ranks_map_one_file_and_only_the_first_computes(
    lake: Lake, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data_feed._check_features", lambda *_: None)
    first, second = both(run(lake))
    assert sum(counted) == 4 * MINUTES
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.statistics.std, second.statistics.std)
    assert len(list((lake.root / ".ready").glob("*.features"))) == 1


def test_without_room_every_rank_computes_the_same(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.data_feed._check_features", lambda *_: None)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_features, "move_over", full)
    data = run(lake)
    expected = make_market(SETTINGS, data.bars, ALONE, None)
    first, second = both(data)
    assert torch.equal(first.features, expected.features) and torch.equal(second.features, expected.features)
    assert caplog.messages == [
        f"every rank computes all features, and each restart again: {lake.root / '.ready'} cannot be written: "
        "No space left on device"
    ]
    assert not any(path.name.endswith(".tmp") for path in (lake.root / ".ready").iterdir())


def test_what_is_damaged_or_of_another_program_does_not_count(
    lake: Lake, counted: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    first = market_of(run(lake))
    path = next((lake.root / ".ready").glob("*.features"))
    rows = np.memmap(path, np.float16, mode="r+").reshape(-1, first.num_features)
    rows[MINUTES - 5] += 1  # among those that the next run compares
    counted.clear()
    second = market_of(run(lake, NEWER), first)
    expected = make_market(SETTINGS, run(lake, NEWER).bars, ALONE, first.statistics)
    assert torch.equal(second.features, expected.features)
    assert caplog.messages == [
        "the known features of AAAUSDT are not what is computed now: all are computed again"
    ]
    for damage in ("cut", "no marker", "other code"):
        counted.clear()
        path = max((lake.root / ".ready").glob("*.features"), key=lambda each: each.stat().st_mtime)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-2])
        elif damage == "no marker":
            path.with_name(path.name + ".json").unlink()
        else:
            other = replace(first, statistics=replace(first.statistics, mean=first.statistics.mean + 1))
            market_of(run(lake, NEWER), other)
            assert sum(counted) == 2 * MINUTES
            continue
        again = market_of(run(lake, NEWER), first)
        assert torch.equal(again.features, expected.features) and counted


def test_tables_go_with_their_bars_and_few_are_kept(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_features, "KEPT_TABLES", 2)
    market = market_of(run(lake))
    for newer in (10, 20, 30):
        market = market_of(run(lake, newer), market)
    assert len(tables(lake)) == 4  # with their markers
    for path in (lake.root / ".ready").glob("*.npy"):
        snapshot._remove(path)
    assert list((lake.root / ".ready").iterdir()) == []


def test_too_few_bars_are_one_line(lake: Lake) -> None:
    data = run(lake)
    with pytest.raises(ExitProgram, match="no symbol has over 15 bars before the holdout"):
        make_market(replace(SETTINGS, holdout_days=30), data.bars, ALONE, None, data.copy)
