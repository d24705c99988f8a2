"""Trackers get every epoch once, in one run, from a process beside the training; a dead one delays nothing."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from continuous_training import Settings
from monitoring import telemetry
from monitoring.telemetry import SINKS, Sender
from tests.monitoring.test_notify import SECRET
from tests.program import ALONE, ROOT, Start, environment, metrics, tiny_flags
from tests.runtime.test_supervisor import wait_for
from training import validation

FAKES = ROOT / "tests" / "monitoring" / "trackers"


class Recorded:
    """A sink that remembers, fails or hangs as told."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.steps: list[int] = []
        self.config: Mapping[str, Any] = {}
        self.is_dead, self.ended = False, 0
        self.gate = threading.Event()
        self.gate.set()

    def begin(self, run: str, name: str, config: Mapping[str, Any]) -> str:
        self.config = config
        self.runs.append(run)
        return run or f"run-{len(self.runs)}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.gate.wait()
        if self.is_dead:
            raise ConnectionError(f"https://user:{SECRET}@tracker.example refused")
        assert "time" not in figures and all(isinstance(value, float) for value in figures.values())
        self.steps.append(step)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(telemetry.SINKS, "mlflow", lambda log_dir: recorded)  # type: ignore[misc]
    monkeypatch.setattr(telemetry, "RETRY_SECONDS", 0.05)
    return recorded


def row(epoch: int, second: int = 0, **figures: Any) -> dict[str, Any]:
    moment = f"2026-11-29T10:00:{second or epoch:02d}+00:00"
    return {"time": moment, "epoch": epoch, "transitions": 64 * epoch, "rollout/reward_bps": 0.5, **figures}


def sender(folder: Path, said: list[str]) -> Sender:
    return Sender("mlflow", folder, "a training", {"d_model": 16}, said.append)


def closed(sending: Sender) -> None:
    sending.finish()
    sending.join(30)


def test_every_epoch_comes_once_and_a_restart_goes_on_in_the_run(tmp_path: Path, sink: Recorded) -> None:
    said: list[str] = []
    first = sender(tmp_path, said)
    first.offer([row(1), row(2, **{"loss/value": None, "loss/outlying_symbol": "AAA", "exam/edge": 0})])
    wait_for(lambda: len(sink.steps) == 2)
    first.offer([row(1), row(2), row(3)])
    closed(first)
    second = sender(tmp_path, said)
    second.offer([row(2), row(3), row(4)])
    closed(second)
    assert sink.steps == [64, 128, 192, 256] and sink.runs == ["", "run-1"] and sink.ended == 2
    assert sink.config == {"d_model": 16} and said == []


def test_an_epoch_that_is_done_again_is_sent_again(tmp_path: Path, sink: Recorded) -> None:
    sending = sender(tmp_path, [])
    sending.offer([row(1), row(2), row(3)])
    wait_for(lambda: len(sink.steps) == 3)
    sending.offer([row(1), row(2, second=40), row(3, second=41)])  # after a return to a checkpoint
    closed(sending)
    assert sink.steps == [64, 128, 192, 128, 192]


def test_what_a_dead_one_missed_it_gets_later_and_its_words_are_not_repeated(
    tmp_path: Path, sink: Recorded
) -> None:
    said: list[str] = []
    sink.is_dead = True
    sending = sender(tmp_path, said)
    sending.offer([row(1)])
    wait_for(lambda: len(sink.runs) >= 3)  # tried again and again, in the same run
    sink.is_dead = False
    sending.offer([row(1), row(2)])
    wait_for(lambda: sink.steps == [64, 128])
    closed(sending)
    assert len(said) == 2 and said[0].startswith("mlflow took no figures: ConnectionError; they are kept")
    assert said[1] == "mlflow takes figures again" and SECRET not in str(said)
    assert set(sink.runs[1:]) == {"run-1"}


def test_one_that_hangs_holds_nobody(tmp_path: Path, sink: Recorded) -> None:
    sink.gate.clear()
    sending = sender(tmp_path, [])
    began = time.monotonic()
    for epoch in range(1, 1_000):
        sending.offer([row(min(epoch, 59))])
    sending.finish()
    sending.join(0.2)
    assert time.monotonic() - began < 5 and sink.steps == []
    sink.gate.set()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"run": "a"}'])
def test_a_torn_note_begins_a_new_run(tmp_path: Path, sink: Recorded, text: str) -> None:
    (tmp_path / "telemetry_mlflow.json").write_text(text)
    sending = sender(tmp_path, [])
    sending.offer([row(1)])
    closed(sending)
    assert (
        sink.runs == [""] and json.loads((tmp_path / "telemetry_mlflow.json").read_text())["run"] == "run-1"
    )


def test_names_and_packages_are_checked_before_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(SINKS) == validation.TRACKERS
    with pytest.raises(
        ValueError, match=r"telemetry=.* has tracker, which is unknown; use some of: wandb, mlflow"
    ):
        Settings(telemetry=("mlflow", "tracker"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = Settings(telemetry=("mlflow", "wandb"))  # a checkpoint's settings are valid anywhere
    with pytest.raises(ValueError, match=r"needs what is not installed: \.venv/bin/pip install mlflow wandb"):
        validation.check_watchers(settings, {})


def test_a_training_reports_to_its_tracker_and_tells_it_no_secret(tmp_path: Path) -> None:
    """The whole way: settings, companion, a package of the name, and the figures of metrics.jsonl."""
    given = environment(
        PYTHONPATH=str(FAKES), TRACKIO_DIR=str(tmp_path), NOTIFY_URLS=f"http://127.0.0.1:9/{SECRET}"
    )
    words = [*ALONE, *tiny_flags(tmp_path, runs=1, epochs=3), "--telemetry", "trackio"]
    Start(tmp_path / "out", words, env=given).ends_well()
    text = (tmp_path / "got.jsonl").read_text(encoding="utf-8")
    begin, *epochs, end = map(json.loads, text.splitlines())
    assert (begin["project"], begin["config"]["d_model"], begin["config"]["epochs"]) == (
        "continuous-training",
        16,
        3,
    )
    assert [epoch["step"] for epoch in epochs] == [row["transitions"] for row in metrics(tmp_path)]
    assert epochs[-1]["metrics"]["rollout/reward_bps"] == metrics(tmp_path)[-1]["rollout/reward_bps"]
    assert end == {"ended": True} and SECRET not in text
