"""A checkpoint with its exam is due by epochs or by minutes, whichever comes first, by rank 0's clock."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import train
from continuous_training import Settings
from evaluation.examiner import Exam
from runtime.control import STOP_AT_EPOCH_END, STOP_NOW, Control
from tests.program import PATIENCE, ROOT, SUPERVISED, TINY, environment, names_of, tiny_flags
from training import progress


def test_a_checkpoint_is_due_by_epochs_and_by_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    folders = {name: str(tmp_path / name.split("_")[0]) for name in ("checkpoint_dir", "data_dir", "log_dir")}
    folders["checkpoint_dir"] += "s"
    schedule = {"epochs": 8, "checkpoint_every": 5, "checkpoint_minutes": 30.0, "dashboard": False}
    settings = Settings(**TINY | {"sources": ("simulated",)} | folders | schedule)
    with train.Job(settings, Control()) as job:
        assert job.begin_run()
        due = []
        for _ in range(8):
            job.progress.tick(1)
            due.append(job.checkpoint_is_due())
        assert due == [False, False, False, False, True, False, False, True]
        job.progress.epoch = 1
        clock.now += 30 * 60 - 1
        assert not job.checkpoint_is_due()
        clock.now += 1
        assert job.checkpoint_is_due()
        first = job.ranks
        job.ranks = replace(first, rank=1)  # whose clock does not count
        assert not job.checkpoint_is_due()
        job.ranks = first
        job.save({})
        assert not job.checkpoint_is_due()
        with job._schedule.time_exam():
            clock.now += 600.0
        job.save({})  # by the clock, an exam takes a tenth of the time at most
        clock.now += 9 * 600 - 1
        assert not job.checkpoint_is_due()
        clock.now += 1
        assert job.checkpoint_is_due()
        for ends_at, num_exams in ((STOP_AT_EPOCH_END, 0), (STOP_NOW, 1)):  # without and with --exam-on-stop
            held: list[int] = []
            examine = lambda *_, held=held: held.append(1) or Exam()  # noqa: E731
            job._examiner, job.stopping = SimpleNamespace(ends_at=ends_at, examine=examine), False
            job.control._stop.level = STOP_AT_EPOCH_END
            assert job.examine() == {} and len(held) == num_exams
            assert job.stopping is (num_exams == 0)
    assert names_of(tmp_path) == {"run1_epoch1.pt"}


def test_a_training_that_is_refused_leaves_the_reason_and_nothing_else(tmp_path: Path) -> None:
    command = [*SUPERVISED, *tiny_flags(tmp_path, mirror="nowhere://at-all")]
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    reason = "the mirror nowhere://at-all cannot be read: fsspec knows no such protocol"
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(reason)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"logs/train.log", "logs/status.json"} and not (tmp_path / "checkpoints").exists()
    assert reason in (tmp_path / "logs" / "train.log").read_text()
