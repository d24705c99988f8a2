"""kill -9 at random instants of a refresh: the lake verifies, no kept bar is lost, the next refresh completes.

KILLS=50 makes it fifty instants instead of twelve.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_sources.lake.lake import Lake
from tests.data_sources.bar_tables import read
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import ns
from tests.data_sources.vendors.polygon_harness import DAYS, closes, expected_closes, put_days
from tests.data_sources.vendors.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "12"))
STOCKS, PAIRS = ["AAPL", "MSFT"], ["BTCUSDT", "ETHUSDT"]
START_NS, NOW_NS = ns("2026-11-15T00:00"), ns("2026-11-22T12:00:30")


class Refreshes:
    """Refreshes in processes of their own, one at a time."""

    def __init__(self, job: dict[str, object]) -> None:
        self.job = job
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.data_sources.refresh_forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _line(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def run(self, root: Path, kill_after: float | None = None, **more: object) -> int:
        """Return the exit code, -9 when the kill came before the end."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(self.job | {"root": str(root)} | more) + "\n")
        self._server.stdin.flush()
        child = self._line()
        killer = threading.Timer(kill_after or 0.0, lambda: os.kill(child, signal.SIGKILL))
        if kill_after is not None:
            killer.start()
        code = self._line()
        killer.cancel()
        if kill_after is not None:
            killer.join()
        return code

    def stop(self) -> None:
        self._server.kill()
        self._server.communicate()


@pytest.fixture(scope="module")
def binance() -> Iterator[BinanceServer]:
    with BinanceServer(NOW_NS) as server:
        yield server


@pytest.fixture(scope="module")
def refreshes(binance: BinanceServer) -> Iterator[Refreshes]:
    s3 = S3Server()
    s3.empty()
    put_days(s3, STOCKS)
    job = {"s3": s3.endpoint, "binance": binance.url, "stocks": STOCKS, "pairs": PAIRS}
    running = Refreshes(job | {"start_ns": START_NS, "now_ns": NOW_NS})
    yield running
    running.stop()
    s3.stop()


def assert_complete(lake: Lake, binance: BinanceServer) -> None:
    for stock in STOCKS:
        assert closes(lake, stock) == expected_closes(stock, DAYS)
    for pair in PAIRS:
        table = read(lake, "binance", pair, [pair], START_NS, NOW_NS)
        times, values = binance.truth(pair, START_NS, ns("2026-11-22T12:00"))
        np.testing.assert_array_equal(table["open_time"].to_numpy(), times)
        np.testing.assert_array_equal(table["close"].to_numpy(), values[:, 3])


def held(lake: Lake) -> dict[tuple[str, str, str], str]:
    return {(part.source, part.dataset, part.unit): part.content for part in lake.all_parts()}


@pytest.mark.drill
def test_killed_at_random_instants_a_refresh_loses_nothing_and_the_next_one_completes(
    refreshes: Refreshes, binance: BinanceServer, tmp_path: Path
) -> None:
    assert refreshes.run(tmp_path / "whole") == 0
    began = time.monotonic()
    assert refreshes.run(tmp_path / "timed") == 0
    seconds = time.monotonic() - began
    whole = held(Lake(tmp_path / "whole"))
    assert_complete(Lake(tmp_path / "whole"), binance)

    instants = random.Random(3)
    root, num_killed, num_empty_handed = tmp_path / "lake", 0, 0
    while num_killed < KILLS:
        code = refreshes.run(root, kill_after=instants.uniform(0.0, seconds))
        assert code in (0, -signal.SIGKILL)
        num_killed += code != 0
        lake = Lake(root)
        assert lake.verify() == []
        kept = held(lake)
        assert kept.items() <= whole.items()  # only whole parts
        num_empty_handed += not kept
        if code == 0 or num_killed % 3 == 0:
            assert refreshes.run(root) == 0  # the lock is free, and only missing parts are fetched
            assert_complete(Lake(root), binance)
            assert list(root.rglob("*.tmp")) == []
            shutil.rmtree(root)
    assert num_empty_handed < num_killed  # instants within the refresh, not before it


def test_what_a_killed_refresh_kept_is_not_fetched_again(
    refreshes: Refreshes, binance: BinanceServer, tmp_path: Path
) -> None:
    assert refreshes.run(tmp_path / "lake") == 0
    lake = Lake(tmp_path / "lake")
    (day,) = [part for part in lake.all_parts() if part.unit == "2026-11-19" and part.dataset == "BTCUSDT"]
    lake.remove(day)
    binance.requests.clear()
    assert refreshes.run(tmp_path / "lake") == 0
    files = [path for path in binance.requests if ".zip" in path and not path.endswith(".CHECKSUM")]
    assert len(files) == 1
    assert "2026-11-19" in files[0]
    assert_complete(lake, binance)


def test_a_disk_that_is_full_keeps_what_fits_and_heals(
    refreshes: Refreshes, binance: BinanceServer, tmp_path: Path
) -> None:
    root = tmp_path / "lake"
    assert refreshes.run(root, largest_file=20_000) == 1  # days of stocks fit, most days of pairs do not
    lake = Lake(root)
    assert lake.verify() == []
    before = held(lake)
    assert len(lake.parts("polygon", "us_stocks_sip")) == len(DAYS)
    assert list(root.rglob("*.tmp")) == []
    assert refreshes.run(root) == 0
    assert before.items() < held(lake).items()
    assert_complete(Lake(root), binance)
