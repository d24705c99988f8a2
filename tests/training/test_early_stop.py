"""A run that gets worse on held-out days ends, and the next one begins with its best weights, killed or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands.train import Job
from continuous_training import Settings, train
from evaluation.examiner import Exam, Examiner
from tests.program import TINY, names_of
from tests.training.rollouts import ALONE
from tests.training.test_trainer import DeafControl
from training import early_stop
from training.checkpoint import Checkpoint, read_complete
from training.progress import TrainingProgress

NETS = {
    (1, 2): 0.1,
    (1, 4): 0.3,
    (1, 6): 0.2,
    (1, 8): 0.25,
    (1, 10): 9.0,
}  # of a bar, in bp, by run and epoch


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Two exams in a row below that of epoch 4 end the first run after epoch 8 of 12."""

    def examine(_: Examiner, trainer: object, *__: object) -> Exam:
        progress = trainer.progress  # type: ignore[attr-defined]
        return Exam({"exam/net_bps": NETS.get((progress.run, progress.epoch), 1.0)})

    monkeypatch.setattr(Examiner, "examine", examine)
    folders = {name: str(tmp_path / name.split("_")[0]) for name in ("checkpoint_dir", "data_dir", "log_dir")}
    folders["checkpoint_dir"] += "s"
    given = {"sources": ("simulated",), "epochs": 12, "runs": 2, "exam_patience": 2, "cost_ramp": 0.0}
    yield Settings(**TINY | folders | given)


def test_it_ends_and_the_next_run_begins_with_the_best_weights(settings: Settings, tmp_path: Path) -> None:
    train(replace(settings, runs=1), DeafControl())  # what a kill right after the last checkpoint leaves
    assert names_of(tmp_path) == {f"run1_epoch{epoch}.pt" for epoch in (2, 4, 6, 8)}
    folder = Path(settings.checkpoint_dir)
    best, last = Checkpoint.read(folder / "run1_epoch4.pt"), read_complete(folder, "run1_epoch8.pt")
    assert last is not None and last.resume is not None
    with Job(settings, DeafControl()) as job:
        assert job.begin_run() and (job.progress.run, job.progress.epoch) == (2, 0)
        assert (job.progress.best_exam, job.progress.worse_exams) == ("", 0)
        for name, weight in job.trainer.policy.state_dict().items():
            assert torch.equal(weight, best.model[name]) and not torch.equal(weight, last.model[name]), name
        moments, saved = job.trainer.learner.state_dict()["optimizer"], last.resume.learner["optimizer"]
        assert torch.equal(moments["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.drill  # two whole trainings; above, the next run begins with what a kill leaves
def test_a_restart_between_the_runs_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    ends = []
    for name, starts in (("unbroken", (2,)), ("restarted", (1, 2))):
        own = replace(settings, checkpoint_dir=str(tmp_path / name / "checkpoints"))
        for runs in starts:
            train(replace(own, runs=runs), DeafControl())
        assert {name for name in names_of(tmp_path / name) if "run2" in name} >= {"run2_epoch12.pt"}
        ends.append(read_complete(Path(own.checkpoint_dir), "run2_epoch12.pt"))
    first, second = ends
    assert first is not None and second is not None and first.resume and second.resume
    for name, weight in first.model.items():
        assert torch.equal(weight, second.model[name]), name
    assert first.transitions == second.transitions == (8 + 12) * 64


def test_without_patience_and_while_costs_grow_no_exam_counts(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    progress = TrainingProgress()
    for net in (1.0, 0.5, float("nan"), 0.6):
        progress.epoch += 1
        early_stop.count_exam(progress, replace(settings, exam_patience=None), ALONE, {"exam/net_bps": net})
        early_stop.count_exam(progress, replace(settings, cost_ramp=1.0), ALONE, {"exam/net_bps": net})
    assert progress.best_exam == "" and not progress.got_worse(settings)
    for epoch, net in enumerate((1.0, 0.5, float("nan"), 1.0, 0.5, None, 0.6), 1):
        progress.epoch = epoch
        early_stop.count_exam(progress, settings, ALONE, {} if net is None else {"exam/net_bps": net})
    assert (progress.best_exam, progress.worse_exams) == ("run1_epoch4.pt", 2)
    assert progress.got_worse(settings) and progress.is_over(settings)
    progress.next_run()
    assert not progress.is_over(settings)


def test_a_best_checkpoint_that_is_gone_is_a_warning(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    train(replace(settings, runs=1), DeafControl())
    folder = Path(settings.checkpoint_dir)
    last = read_complete(folder, "run1_epoch8.pt")
    assert last is not None
    progress = TrainingProgress.of(last)
    (folder / progress.best_exam).unlink()
    assert early_stop.with_best_weights(last, progress, settings, ALONE) is last
    assert "run 2 begins with the last weights" in caplog.text


def test_the_best_checkpoint_stays_while_the_run_may_end_at_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many exams as checkpoints that are kept, and one that gave no figure between them.
    monkeypatch.setitem(NETS, (1, 6), float("nan"))
    monkeypatch.setitem(NETS, (1, 10), 0.1)
    train(replace(settings, runs=1, keep_checkpoints=1, keep_runs=1), DeafControl())
    assert names_of(tmp_path) == {"run1_epoch4.pt", "run1_epoch10.pt"}
    with Job(replace(settings, keep_checkpoints=1, keep_runs=1), DeafControl()) as job:
        assert job.begin_run()
        job.progress.tick(64)
        job.save({})
        job._writer.finish()
    assert "run1_epoch4.pt" not in names_of(tmp_path)  # it is not needed any more
