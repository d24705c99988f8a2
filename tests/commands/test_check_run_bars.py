"""What ``check`` reports of the bars that a run in progress began with."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from commands import check
from commands.check.report import Line
from continuous_training import Settings
from data_sources.lake.lake import Lake
from data_sources.progress import NullProgress
from data_sources.refresh import refresh
from data_sources.vendors import http
from runtime.control import EXIT_NO_DATA
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.training.checkpoints import PAIRS, untrained
from tests.vendors import closed_port
from training.checkpoint import Checkpoint
from training.data_feed import data_request

RETRIES = http.RetryPolicy(connect_seconds=2, read_seconds=5, total_seconds=5, attempts=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(http, "PROBE_POLICY", RETRIES)
    with BinanceServer(time.time_ns()) as server:
        monkeypatch.setenv("BINANCE_API_URL", server.url)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
        yield server


def settings_in(folder: Path, cutoff_ns: int, *, has_counts: bool) -> Settings:
    """Save a checkpoint in the middle of a run in ``folder``; return the settings to resume with."""
    path = untrained(folder)
    saved = Checkpoint.read(path).with_resume()
    assert saved.resume is not None
    clock = {"run": 1, "epoch": 2, "cutoff_ns": cutoff_ns}
    clock |= {"num_bars": dict.fromkeys(PAIRS, 4000)} if has_counts else {}
    dataclasses.replace(saved, resume=dataclasses.replace(saved.resume, clock=clock)).save(keep=1)
    settings = Settings(**saved.config)
    return dataclasses.replace(settings, checkpoint_dir=str(path.parent), data_dir=str(folder / "lake"))


def bars_lines(settings: Settings, offline: bool = False) -> list[Line]:
    return [line for line in check.check_all(settings, os.environ, offline) if line.topic == "bars"]


@pytest.mark.parametrize("has_counts", [True, False])
def test_bars_of_the_run_that_are_gone_are_reported(
    server: BinanceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_counts: bool
) -> None:
    settings = settings_in(tmp_path, server.now_ns, has_counts=has_counts)
    for offline in (False, True):
        (line,) = bars_lines(settings, offline)
        assert line.level == "warning" and "of 2 symbols such as BTCUSDT" in line.text
        assert "a start fetches what the sources still have" in line.text and "Moving house" in line.text

    refresh(Lake(tmp_path / "lake"), data_request(settings, server.now_ns), server.now_ns, NullProgress())
    (line,) = bars_lines(settings)
    assert line.level == "OK"

    for name in ("BINANCE_API_URL", "BINANCE_ARCHIVE_URL"):
        monkeypatch.setenv(name, closed_port())
    assert bars_lines(settings)[0].level == "OK"
    (line,) = bars_lines(dataclasses.replace(settings, data_dir=str(tmp_path / "elsewhere")))
    assert (line.level, line.code) == ("error", EXIT_NO_DATA)
    assert "no source answers: copy the data_dir that it began with" in line.text


def test_a_run_that_is_complete_needs_none_of_its_bars(server: BinanceServer, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, server.now_ns, has_counts=True)
    assert bars_lines(dataclasses.replace(settings, epochs=2), offline=True) == []
