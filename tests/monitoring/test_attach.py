"""A training seen from elsewhere: what it publishes is what is read, whatever state its files are in."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from continuous_training import Settings
from monitoring import published
from monitoring.attach import Attached, NothingPublished, describe_life, is_alive
from monitoring.console import Console
from monitoring.state import DashboardState, Task
from monitoring.summary import as_json, facts
from runtime.control import Control
from tests.monitoring.published_training import exam, hold_exams, publish
from tests.monitoring.test_dashboard import row, text_of
from training.progress import TrainingProgress


def attached(folder: Path) -> Attached:
    return Attached(folder / "logs", folder / "checkpoints")


def test_what_a_training_publishes_is_what_is_read(tmp_path: Path) -> None:
    settings = Settings(
        sources=("simulated",),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        log_dir=str(tmp_path / "logs"),
        epochs=8,
        runs=2,
        checkpoint_every=4,
    )
    hold_exams(tmp_path, exam(1))
    with Console.of_training(settings, Control(), is_first=True) as console:
        state = console._state
        state.newest_ns, state.symbols, state.days_late = {"yahoo": 10**18}, {"yahoo": 22}, {"yahoo": 2.5}
        state.tasks["yahoo"] = Task("yahoo", "symbols", 22, 7)
        console.begin_run(settings, TrainingProgress(run=2), "1 x cpu", Control())
        console.show_epoch(row(1, run=2), 8)
        console.phase("evaluation")
        assert console._publisher is not None
        console._publisher._write({})
        seen = attached(tmp_path).read()
        assert is_alive(seen) and describe_life(seen) == ""
    for name in ("run", "epoch", "transitions", "epochs", "runs", "device", "phase", "newest_ns", "symbols"):
        assert getattr(seen, name) == getattr(state, name), name
    assert seen.days_late == {"yahoo": 2.5} and seen.tasks["yahoo"].text.startswith("7 of 22 symbols")
    assert seen.metrics["rollout/reward_bps"] == row(1)["rollout/reward_bps"]
    assert [line["epoch"] for line in seen.exams] == [1]
    for name in ("began", "epoch_began", "phase_began"):
        assert seen.now - getattr(seen, name) == pytest.approx(time.monotonic() - getattr(state, name), abs=3)
    ended = attached(tmp_path).read()
    assert not is_alive(ended) and describe_life(ended).startswith("ended 20")
    assert "ended 20" in "\n".join(text_of(ended))


def test_a_second_rank_publishes_nothing(tmp_path: Path) -> None:
    settings = Settings(log_dir=str(tmp_path / "logs"), checkpoint_dir=str(tmp_path))
    with Console.of_training(settings, Control(), is_first=False):
        pass
    assert not (tmp_path / "logs").exists()


def test_a_training_that_falls_silent_is_said_to_be_gone(tmp_path: Path) -> None:
    publish(tmp_path, time=time.time() - 300)
    state = attached(tmp_path).read()
    assert not is_alive(state) and describe_life(state).startswith(
        "not running: its last sign of life was 20"
    )
    assert facts(state)[0].needs_attention and as_json(state)["alive"] is False


def test_a_start_that_begins_no_run_leaves_what_the_ones_before_it_reached(tmp_path: Path) -> None:
    publish(tmp_path)
    with Console.of_training(Settings(log_dir=str(tmp_path / "logs"), epochs=8), Control(), is_first=True):
        pass  # it was refused, or all of its runs were done
    after = attached(tmp_path).read()
    assert (after.run, after.epoch, after.transitions) == (1, 3, row(3)["transitions"])
    assert after.epochs == 8 and after.ended


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1}', "\xff"])
def test_a_status_that_cannot_be_read_leaves_the_metrics(tmp_path: Path, content: str) -> None:
    logs = publish(tmp_path)
    (logs / published.NAME).write_text(content, encoding="latin-1")
    state = attached(tmp_path).read()
    assert (state.run, state.epoch, state.epochs) == (1, 3, 3)
    assert text_of(state) and json.dumps(as_json(state))


def test_nothing_published_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingPublished, match="give the --log-dir"):
        attached(tmp_path).read()


def test_files_are_read_again_only_when_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, lines=("one", "Traceback (most recent call last):\n  second line"))
    view, reads = attached(tmp_path), []
    read = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *rest, **more: reads.append(path.name) or read(path, *rest, **more)
    )
    assert [line.text for line in view.read().lines] == [
        "one",
        "Traceback (most recent call last):",
        "second line",
    ]
    first = len(reads)
    view.read()
    assert first and len(reads) == first
    publish(tmp_path, epochs=4, lines=("two",))
    assert view.read().epoch == 4 and view.read().lines[-1].text == "two"


def test_a_disk_that_takes_no_status_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "continuous_training")
    (tmp_path / "logs").write_text("a file where the folder should be")
    publisher = published.Publisher(tmp_path / "logs", DashboardState(), Control())
    publisher._write({})
    publisher._write({})
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "status.json cannot be written: File exists; status and dashboard --attach lag"
    )
