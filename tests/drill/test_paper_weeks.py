"""Two weeks of ``paper`` under faults and kills: every fill is the exam's of these minutes, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commands.signals import request_of
from continuous_training import Settings
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.market import Market
from envs.open_env import OpenEnv
from envs.open_group_env import account_of
from evaluation import ensemble
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import Reader, one_thread, play_segment, walks_of
from evaluation.paper import SETTLED_MINUTES
from evaluation.paper_book import LINES, STATE
from evaluation.trained_policy import NEVER_NS, TrainedPolicy
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import Fault
from tests.evaluation.members import save_member
from tests.program import ROOT, environment
from tests.training.checkpoints import NOW, PAIRS

MINUTES = 14  # of each day, followed one by one; the clock jumps over the rest
SEED = 66  # of weights that trade often


class Life:
    """A paper account that is fed minute by minute, and killed where it is said."""

    def __init__(self, folder: Path, server: BinanceServer) -> None:
        self.folder, self.server = folder, server
        self.path = save_member(folder / "members", SEED, history_days=3)
        self.random = np.random.default_rng(0)
        self.decided: dict[str, dict[int, float]] = {pair: {} for pair in PAIRS}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """Start the program where it does not run."""
        if self.process is None:
            env = environment(BINANCE_API_URL=self.server.url, BINANCE_ARCHIVE_URL=self.server.url)
            command = [sys.executable, "-m", "tests.drill.paper_minutes", str(self.path), str(self.folder)]
            with (self.folder / "said").open("a") as said:
                self.process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                )
            self._wait()
        return self.process

    def _wait(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        while (line := self.process.stdout.readline()) != "done\n":
            assert line, (self.folder / "said").read_text()

    def run(self, now_ns: int, is_killed: bool) -> None:
        """Do one minute, or die in it; note what was decided by then."""
        process = self.start()
        assert process.stdin is not None
        self.server.now_ns = now_ns
        process.stdin.write(f"{now_ns}\n")
        process.stdin.flush()
        if is_killed:
            time.sleep(self.random.uniform(0.0, 1.0))
            process.kill()
            process.communicate()
            self.process = None
        else:
            self._wait()
        for symbol, own in self.state["state"]["decided"].items():
            self.decided[symbol] |= {int(bar): target for bar, (target,) in own.items()}

    @property
    def state(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "paper" / STATE).read_text())
        return content


def without_newest(rows: list[Any]) -> list[Any]:
    return rows[:-2]  # the last one is not closed


def half_made(rows: list[Any]) -> list[Any]:
    *before, row, running = rows
    return [*before, [*row[:4], row[1], *row[5:]], running]  # its close is its open


def faults_of(day: int) -> dict[int, Fault]:
    """Return what goes wrong on a day, by minute, for that minute alone."""
    return [
        {},
        {5: Fault("klines.*BTCUSDT", "rows", rows=without_newest)},
        {
            5: Fault("klines.*ETHUSDT", "rows", rows=without_newest),
            6: Fault("klines", "rows", rows=half_made),
        },
        {minute: Fault("/", status=503) for minute in (4, 5, 6)},
        {4: Fault("klines.*BTCUSDT", "truncate"), 7: Fault("klines", "reset"), 9: Fault("klines", "corrupt")},
        {
            3: Fault(
                "api/v3/klines", status=429, headers={"Retry-After": "1"}
            ),  # the archive is another host
            8: Fault("klines", "body", body=b"<html>"),
        },
        {6: Fault("klines", "rows", rows=lambda rows: [*rows[-3:], *rows]), 9: Fault("klines", "hang")},
    ][day % 7]


def walk_in_steps(
    trained: TrainedPolicy, market: Market, symbol: str, decided: dict[int, float]
) -> tuple[Any, dict[str, tuple[float, ...]], list[int]]:
    """Let an exam's account take these decisions, and hold at other bars, one step at a time.

    Returns:
        The account, its trades by time, and the bars at which the policy decides otherwise by now.
    """
    config, positions = trained.env_config(1), trained.settings.positions
    env = OpenEnv(market, config, market.device, [(symbol, min(decided))], [None])
    schedule = env.schedule[:, :1]
    reader = Reader(trained.policy, market, [market.symbols.index(symbol)], config.horizon, 16)
    projected = reader.read(schedule.T[None], lambda: None)[0]  # (R, S, W)
    other: list[int] = []

    def decide(accounts: Tensor, bar: Tensor, encoded: Tensor) -> tuple[Tensor]:
        target = decided.get(int(bar))
        if target is None:
            return (accounts[:, : len(positions)].argmax(-1),)
        if positions[int(trained.policy.head.decide(encoded, accounts[None])[0].argmax())] != target:
            other.append(int(bar))
        return (torch.tensor([positions.index(target)]),)

    times, played = market.open_time[schedule], []
    with torch.no_grad(), one_thread(market.device):
        for row in range(len(schedule)):
            env.begin_segment()
            played.append(play_segment(env, decide, times[row], [projected[row]]))
    columns = list(np.concatenate(played, axis=1))
    (walk,) = walks_of(["policy"], [symbol], market, schedule, torch.arange(1), columns)["policy"]
    rows = np.flatnonzero(walk.traded > 0)
    trades = {
        str(walk.time[row])[:16]: tuple(
            float(column[row])
            for column in (walk.price, walk.position, walk.traded, walk.costs - walk.borrowing)
        )
        for row in rows
    }
    return env.accounts()[0], trades, other


@pytest.mark.drill
def test_two_weeks_under_faults_and_kills_are_the_exam_of_these_minutes(tmp_path: Path) -> None:
    first_ns = NOW // MINUTE_NS * MINUTE_NS + 6 * 10**9
    with BinanceServer(first_ns) as server:
        server.outages = [(first_ns + 4 * DAY_NS + 10 * MINUTE_NS, first_ns + 4 * DAY_NS + 12 * MINUTE_NS)]
        life = Life(tmp_path, server)
        for day in range(14):
            killed = set(life.random.choice(MINUTES, 2, replace=False).tolist()) if day % 3 == 1 else set()
            for minute in range(MINUTES):
                fault = faults_of(day).get(minute)
                server.faults[:] = [fault] if fault else []
                life.run(first_ns + day * DAY_NS + minute * MINUTE_NS, minute in killed)
        life.run(first_ns + 13 * DAY_NS + MINUTES * MINUTE_NS, is_killed=False)
        life.start().communicate()
    trained = ensemble.read([life.path], Settings)
    state = life.state["state"]
    settings = replace(trained.settings, history_days=45)
    data = load(Lake(Path(settings.data_dir)), request_of(settings, state["minute_ns"] + 6 * 10**9, ()))
    market = Market.from_settings(data.bars, settings, trained.device, NEVER_NS, trained.statistics)
    market = replace(market, horizon=1).until(state["minute_ns"] - SETTLED_MINUTES * MINUTE_NS)
    lines = [json.loads(line) for line in (tmp_path / "paper" / LINES).read_text().splitlines()]
    fills = [line for line in lines if line["kind"] == "fill"]
    assert len({(line["time"], line["symbol"]) for line in fills}) == len(fills) > 60
    for symbol in PAIRS:
        account, trades, other = walk_in_steps(trained, market, symbol, life.decided[symbol])
        booked = {
            line["time"]: (line["price"], line["to"], line["traded"], line["costs"])
            for line in fills
            if line["symbol"] == symbol
        }
        assert booked == trades
        assert account == account_of(state["accounts"]["policy"][symbol])  # to the bit
        bars = market.open_time[market.open_time >= min(life.decided[symbol])].unique().tolist()
        holds, *_ = walk_in_steps(trained, market, symbol, dict.fromkeys(bars, 1.0))
        assert holds == account_of(state["accounts"][BUY_AND_HOLD][symbol])
        # Only where a bar came, or was put right, after the decision.
        assert len(other) <= 8 < 120 < len(life.decided[symbol])
