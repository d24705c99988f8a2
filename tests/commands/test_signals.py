"""The command ``signals``: bars of a loopback Binance in, a target position per symbol out, and how old it is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commands
from commands import signals
from commands.signals import (
    Signal,
    SignalOptions,
    compute_signals,
    freshness,
    request_of,
    seconds_to_next_minute,
)
from continuous_training import Settings
from data_sources.bars import MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from evaluation.trained_policy import TrainedPolicy
from monitoring.console import Console
from monitoring.tables import fit, lay_out
from runtime.control import ExitProgram
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import Fault, ns
from tests.envs.markets import walk
from tests.program import PATIENCE, ROOT, Start, environment
from tests.training.checkpoints import NOW, PAIRS, untrained

HOLD = """
import pathlib, sys
from runtime.locking import FolderLock
with FolderLock(pathlib.Path(sys.argv[1])).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[BinanceServer]:
    with BinanceServer(NOW) as running:
        yield running


@pytest.fixture
def trained(server: BinanceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedPolicy:
    server.now_ns = NOW
    server.faults.clear()
    monkeypatch.setenv("BINANCE_API_URL", server.url)
    monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
    return TrainedPolicy.read(untrained(tmp_path), Settings)


def run(trained: TrainedPolicy, capsys: pytest.CaptureFixture[str], now_ns: int, **options: Any) -> Any:
    """Run the command once; return its JSON and its standard error."""
    with Console(Path(trained.settings.log_dir), to_stderr=True) as console:
        signals.run(trained, SignalOptions(as_json=True, **options), console, now_ns, console, None)
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_newest_closed_bar_is_fetched_and_decided_upon(
    trained: TrainedPolicy, server: BinanceServer, capsys: pytest.CaptureFixture[str]
) -> None:
    content, _ = run(trained, capsys, NOW, holdings={"ETHUSDT": 1.0})
    assert content["no_signal"] == {}
    assert (content["checkpoint"], content["run"], content["epoch"]) == ("run1_epoch2.pt", 1, 2)
    for entry, (symbol, holding) in zip(
        content["signals"], (("BTCUSDT", 0.0), ("ETHUSDT", 1.0)), strict=True
    ):
        assert (entry["symbol"], entry["holding"], entry["state"]) == (symbol, holding, "ok")
        # The minute of 12:00 is running.
        assert (entry["bar"], entry["closed"]) == ("2026-11-20T11:59:00Z", "2026-11-20T12:00:00Z")
        assert (entry["age_seconds"], entry["minutes_behind"]) == (31.0, 0)
        _, values = server.truth(symbol, NOW - 2 * MINUTE_NS, NOW - MINUTE_NS)
        assert entry["close"] == values[-1, 3]
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert entry["probability"] == max(entry["probabilities"].values())
        assert entry["probabilities"][f"{entry['target']:g}"] == entry["probability"]
        held = {choice["holding"]: choice for choice in entry["if_holding"]}
        assert set(held) == {-1.0, 0.0, 1.0}
        assert held[holding] == {name: entry[name] for name in held[holding]}
    # Up to an earlier minute, from the lake, it decides as it did then.
    earlier, _ = run(trained, capsys, NOW - 20 * MINUTE_NS, refreshes=False)
    assert earlier["signals"][0]["bar"] == "2026-11-20T11:39:00Z"
    assert earlier["signals"][0]["probabilities"] != content["signals"][0]["probabilities"]


def test_a_minute_later_the_next_bar_speaks_and_a_dead_source_makes_it_stale(
    trained: TrainedPolicy, server: BinanceServer, capsys: pytest.CaptureFixture[str]
) -> None:
    now, slept = [NOW], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            raise KeyboardInterrupt
        if len(slept) == 3:
            server.faults.append(Fault("klines|data", status=451))
        now[0] += int(seconds * 1e9) + (20 * MINUTE_NS if len(slept) > 2 else 0)
        server.now_ns = now[0]

    with Console(Path(trained.settings.log_dir), to_stderr=True) as console:
        signals.watch(trained, SignalOptions(("BTCUSDT",), as_json=True), console, lambda: now[0], sleep)
    out, err = capsys.readouterr()
    minutes = [json.loads(line)["signals"] for line in out.splitlines()]
    assert slept == [35.0, 60.0, 60.0, 60.0, 60.0]
    assert [(len(minute), minute[0]["bar"][11:16], minute[0]["state"]) for minute in minutes] == [
        (1, "11:59", "ok"), (1, "12:00", "ok"), (1, "12:01", "ok"), (1, "12:01", "stale"), (1, "12:01", "stale"),
    ]  # fmt: skip
    assert sum("HTTP 451" in line for line in err.splitlines()) == 1  # once, while it stays down


def test_a_refresh_under_way_is_waited_for_and_used(
    trained: TrainedPolicy,
    server: BinanceServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(trained, capsys, NOW)
    server.now_ns = NOW + 2 * MINUTE_NS
    lake = trained.settings.data_dir
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lake], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdin and daemon.stdout
        assert daemon.stdout.readline() == "held\n"
        timer = threading.Timer(1.0, daemon.stdin.close)
        timer.start()
        content, warned = run(trained, capsys, NOW + MINUTE_NS)
        timer.join()
    assert [entry["bar"][11:16] for entry in content["signals"]] == ["12:00", "12:00"]
    assert content["signals"][0]["age_seconds"] >= 31.8  # by the clock after the wait
    assert not any(word in warned for word in ("failed", "skipped", "written by", "Warning"))

    monkeypatch.setattr(signals, "WAIT_SECONDS", 0.3)
    with Lake(Path(lake)).writing():
        content, warned = run(trained, capsys, NOW + 20 * MINUTE_NS)
    assert (
        f"Warning: lake: not refreshed, as it is still busy after 0 s: {lake} is written by process" in warned
    )
    assert "Binance" not in warned
    assert [entry["state"] for entry in content["signals"]] == ["stale", "stale"]


def test_unknown_symbols_are_left_out_unless_they_are_named(
    trained: TrainedPolicy, capsys: pytest.CaptureFixture[str], server: BinanceServer
) -> None:
    with pytest.raises(ValueError, match="--symbols NEWUSDT: no source is asked for it; add it to --stocks"):
        run(trained, capsys, NOW, symbols=("NEWUSDT",))
    server.pairs = (*PAIRS, "NEWUSDT")
    wider = replace(trained, settings=replace(trained.settings, binance_pairs=server.pairs))
    content, warned = run(wider, capsys, NOW)
    assert [entry["symbol"] for entry in content["signals"]] == list(PAIRS)
    assert list(content["no_signal"]) == ["NEWUSDT"]
    assert "no signal for NEWUSDT: not in the training; name it in --symbols" in warned
    content, _ = run(wider, capsys, NOW, symbols=("NEWUSDT",))
    assert [(entry["symbol"], entry["in_training"]) for entry in content["signals"]] == [("NEWUSDT", False)]
    with pytest.raises(ValueError, match="--holding XRPUSDT is unknown; there are: BTCUSDT, ETHUSDT"):
        run(trained, capsys, NOW, refreshes=False, holdings={"XRPUSDT": 1.0})


def test_a_narrow_terminal_shows_what_matters_most(trained: TrainedPolicy) -> None:
    bars = [walk("BTCUSDT", 300), walk("SHIBUSDT", 300, seed=1)]
    decisions, _ = trained.actor.decide(bars)
    found = [Signal(decision, 0.0, 0, "ok", True) for decision in decisions]
    found[1] = replace(found[1], state="stale", in_training=False)
    now_ns = decisions[0].close_time + 90 * 10**9
    title, columns, rows = signals.table(trained, found, now_ns, has_details=False)
    assert title.endswith("no orders are sent")
    for width, left_out in ((200, 0), (80, 0), (60, 2), (50, 3)):
        shown, cells = fit(columns, rows, width, signals.SPARE)
        assert set(columns) - set(shown) == set(signals.SPARE[:left_out]), width
        assert max(map(len, lay_out(shown, cells))) <= width
        assert [row[0] for row in cells] == ["BTCUSDT", "SHIBUSDT"]
        assert [row[-1] for row in cells] == ["ok", "stale, not trained on"]
    assert signals.table(trained, found, now_ns, has_details=True)[1][-3:] == ["from -1", "from 0", "from +1"]
    summary = signals.summary(found)
    assert summary.startswith("2 symbols: ") and summary.endswith("; stale: SHIBUSDT")


def test_the_verdict_of_its_exam_is_said(trained: TrainedPolicy) -> None:
    assert signals.verdict_of(trained) == (None, "no exam is known of these weights")
    line = {"verdict": "no edge", "verdict_reason": "not above buy and hold"}
    examined = replace(
        trained, checkpoints=(replace(trained.checkpoint, exam={"line": line, "symbols": {}}),)
    )
    assert signals.verdict_of(examined) == ("no edge", "not above buy and hold")
    content = signals.report(examined, [], {}, NOW, "f")
    assert (content["verdict"], content["verdict_reason"]) == ("no edge", "not above buy and hold")


def test_no_bars_is_told_from_not_in_the_training(
    trained: TrainedPolicy, capsys: pytest.CaptureFixture[str], server: BinanceServer
) -> None:
    server.pairs = (*PAIRS, "NEWUSDT")
    pairs = ("BTCUSDT", "NEWUSDT", "NOSUCHUSDT")
    content, _ = run(replace(trained, settings=replace(trained.settings, binance_pairs=pairs)), capsys, NOW)
    assert content["no_signal"] == {
        "NEWUSDT": "not in the training; name it in --symbols to see it anyway",
        "NOSUCHUSDT": "no bars, and not in the training",
        "ETHUSDT": "in the training, but no source has it with these settings",
    }


def test_a_bar_that_is_not_closed_is_never_decided_upon(trained: TrainedPolicy) -> None:
    request = request_of(trained.settings, NOW, ())
    data = replace(load(Lake(Path(trained.settings.data_dir)), request), dropped={})
    times = (NOW // MINUTE_NS - np.arange(300)[::-1]) * MINUTE_NS
    bars = replace(walk("BTCUSDT", 300), open_time=times)
    rows = [replace(row, symbol="BTCUSDT") for row in data.rows[:1]]
    found, _ = compute_signals(trained, replace(data, bars=[bars], rows=rows), NOW, SignalOptions())
    assert found[0].decision.open_time == bars.open_time[-2]


def test_the_request_ends_now_and_reaches_back_no_further_than_features_look(trained: TrainedPolicy) -> None:
    settings = replace(
        trained.settings, history_days=700, stocks=("AAPL", "top:5"), polygon_crypto=("X:A-B",)
    )
    request = request_of(settings, NOW, ("AAPL", "X:A-B"))
    assert (request.end_ns - request.start_ns) // (1440 * MINUTE_NS) == signals.LOOK_BACK_DAYS
    kept = {"stocks": ["AAPL", "top:5"], "polygon_crypto": ["X:A-B"]}
    kept |= {"binance_pairs": [], "binance_perpetuals": []}
    assert request.symbols == kept
    assert request_of(settings, NOW, ()).symbols["binance_pairs"] == PAIRS


@pytest.mark.parametrize(
    ("newest", "now", "asset_class", "expected"),
    [
        ("2026-11-20T12:00", "2026-11-20T12:01:10", "crypto", (0, "ok")),
        ("2026-11-20T12:00", "2026-11-20T12:06:10", "crypto", (5, "ok")),
        ("2026-11-20T12:00", "2026-11-20T12:07:10", "crypto", (6, "stale")),
        ("2026-11-20T15:00", "2026-11-20T15:01:10", "stock", (0, "ok")),
        ("2026-11-20T15:00", "2026-11-20T15:30:10", "stock", (29, "stale")),
        ("2026-11-20T20:59", "2026-11-22T11:00:00", "stock", (0, "closed")),  # Friday's last minute on Sunday
        ("2026-11-20T15:00", "2026-11-22T11:00:00", "stock", (359, "stale")),
        ("2026-11-20T20:59", "2026-11-23T14:31:10", "stock", (1, "ok")),  # the first minute of Monday is over
        ("2026-11-25T20:59", "2026-11-26T16:00:00", "stock", (0, "closed")),  # Thanksgiving
    ],
)
def test_stale_is_what_the_calendar_does_not_explain(
    newest: str, now: str, asset_class: Any, expected: tuple[int, str]
) -> None:
    assert freshness(ns(newest), asset_class, ns(now)) == expected


def test_a_watch_asks_when_the_minute_is_published() -> None:
    assert seconds_to_next_minute(ns("2026-11-20T12:00:31")) == 35
    assert seconds_to_next_minute(ns("2026-11-20T12:00:02")) == 4
    assert seconds_to_next_minute(ns("2026-11-20T12:00:06")) == 60


@pytest.mark.parametrize(
    ("holding", "message"),
    [
        ("BTCUSDT", "--holding BTCUSDT must be such as BTCUSDT=1"),
        ("BTCUSDT=half", "--holding BTCUSDT=half must be such as BTCUSDT=1"),
        ("BTCUSDT=0.5", "--holding BTCUSDT=0.5 must be one of the policy's positions: -1, 0, 1"),
    ],
)
def test_a_holding_is_a_symbol_and_a_position(holding: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SignalOptions.parse("", [holding], True, False, (-1.0, 0.0, 1.0))
    good = SignalOptions.parse(" A, B,A", ["A=1", "B = -1"], True, False, (-1.0, 0.0, 1.0))
    assert (good.symbols, good.holdings) == (("A", "B"), {"A": 1.0, "B": -1.0})


def test_no_bars_are_no_signal(trained: TrainedPolicy, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExitProgram) as left:
        commands.signals_command(trained, no_refresh=True)
    out, err = capsys.readouterr()
    assert (left.value.code, str(left.value)) == (3, "There is no signal.")
    assert (out.count("no bars"), err) == (1, "")


def test_the_command_as_people_and_machines_call_it(server: BinanceServer, tmp_path: Path) -> None:
    server.now_ns = time.time_ns()
    server.faults.clear()
    path = untrained(tmp_path)
    env = environment(BINANCE_API_URL=server.url, BINANCE_ARCHIVE_URL=server.url)
    words = ["continuous_training.py", "signals", str(path)]
    watching = Start(tmp_path / "watch.log", [*words, "--watch"], env)
    try:
        watching.wait_for("ETHUSDT ")
        watching.process.send_signal(signal.SIGINT)
        assert watching.ends() == 0
    finally:
        watching.kill()
    assert "no orders are sent" in watching.output
    assert watching.output.isascii() and "Traceback" not in watching.output
    command = [sys.executable, *words, "--json", "--no-refresh"]
    once = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert once.returncode == 0, once.stderr
    assert [entry["symbol"] for entry in json.loads(once.stdout)["signals"]] == list(PAIRS)
