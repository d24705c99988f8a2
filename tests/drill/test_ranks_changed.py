"""The number of ranks changes, 2 to 1 to 3 to 2, between runs and in the middle of one: ``make drill``."""

import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.launch import Launch
from tests.drill.programs import SUPERVISED_WITH_FAULTS, living
from tests.program import Start, checkpoint, environment, epochs_of, is_same, metrics, tiny_flags

pytestmark = pytest.mark.drill

RANKS = (2, 1, 3, 2)
EPOCHS = 2
# Whole minibatches on one, two and three ranks.
SIZES = {"envs_per_gpu": 12, "batch_size": 48, "epochs": EPOCHS, "checkpoint_every": 2, "learning_rate": 1e-3}
TRANSITIONS = 12 * 8  # of one rank and epoch
MICRO_BATCHES = {2: 12, 3: 18}  # of one rank and epoch: 3 passes over minibatches of 3 or 2 segments


def start(folder: Path, number: int, ranks: int, settings: dict[str, Any], **additions: str) -> Start:
    words = [*SUPERVISED_WITH_FAULTS, "train", *tiny_flags(folder, **(SIZES | settings))]
    return Start(folder / f"out{number}", words, environment(NPROC=str(ranks), **additions))


def ranks_of_epochs(folder: Path) -> list[int]:
    """With how many ranks each epoch was trained, by the transitions that it added."""
    totals = [0, *(entry["transitions"] for entry in metrics(folder))]
    added = [after - before for before, after in pairwise(totals)]
    assert all(number % TRANSITIONS == 0 for number in added)
    return [number // TRANSITIONS for number in added]


def between_runs(folder: Path, parallel: str) -> dict[str, Any]:
    for run, ranks in enumerate(RANKS, 1):
        done = start(folder, run, ranks, {"runs": run, "parallel": parallel}).ends_well()
        assert ("Resuming from" in done.output) == (run > 1), done.output
        assert "afresh" not in done.output and "is used" not in done.output, done.output
        path = folder / "checkpoints" / "resume" / f"run{run}_epoch{EPOCHS}.pt"
        steps = torch.load(path, weights_only=True)["learner"]["optimizer_steps"]
        assert steps == EPOCHS * 3 * 2 * sum(RANKS[:run])  # passes, and minibatches of each
    return checkpoint(folder, f"run{len(RANKS)}_epoch{EPOCHS}.pt")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_between_runs_weights_and_optimizer_continue_and_a_repetition_is_the_same(
    tmp_path: Path, parallel: str
) -> None:
    first, second = (between_runs(tmp_path / name, parallel) for name in ("first", "second"))
    assert is_same(first["model"], second["model"])
    assert ranks_of_epochs(tmp_path / "first") == [ranks for ranks in RANKS for _ in range(EPOCHS)]
    epochs = [(run, epoch) for run in (1, 2, 3, 4) for epoch in range(1, EPOCHS + 1)]
    assert epochs_of(tmp_path / "first") == epochs
    assert all(bool(tensor.isfinite().all()) for tensor in first["model"].values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_in_the_middle_of_a_run_no_epoch_is_lost_or_counted_twice(tmp_path: Path, parallel: str) -> None:
    """SIGTERM in an update on 2 ranks, Ctrl+C on 1, SIGTERM in an update on 3; 2 finish."""
    settings = {"runs": 1, "parallel": parallel, "epochs": 12}
    # Without the supervisor, whose workers leave signals to it.
    driver = [str(SUPERVISED_WITH_FAULTS[-1]), "train", *tiny_flags(tmp_path, **(SIZES | settings))]
    for number, ranks in enumerate(RANKS):
        in_update = ranks > 1 and number < 3
        additions = {"TERM_AT": str(2 * MICRO_BATCHES[ranks] + 5)} if in_update else {}
        ((command, own),) = Launch(num_ranks=ranks).commands(driver)
        env = environment(PAUSE="0.3", **(own | additions))
        under_way = Start(tmp_path / f"out{number}", command[1:], env)
        try:
            if ranks == 1:
                under_way.wait_for("run 1 epoch  5/12").process.send_signal(signal.SIGINT)
            under_way.ends_well()
        finally:
            under_way.kill()
        if number:
            before = (tmp_path / f"out{number - 1}").read_text()
            newest = re.findall(r"Newest checkpoint: \S*/(run1_\S+)", before)[-1]
            assert f"{newest} (" in under_way.output, under_way.output
            assert ("_step" in newest) == (number in (1, 3)), newest
    assert epochs_of(tmp_path) == [(1, epoch) for epoch in range(1, 13)]
    by_epoch = ranks_of_epochs(tmp_path)
    changes = [ranks for before, ranks in pairwise([0, *by_epoch]) if ranks != before]
    assert changes == list(RANKS)
    saved = checkpoint(tmp_path, "run1_epoch12.pt")
    assert saved["transitions"] == TRANSITIONS * sum(by_epoch)
    assert all(bool(tensor.isfinite().all()) for tensor in saved["model"].values())
    assert not living(tmp_path)
