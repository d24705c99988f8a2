"""The number of ranks changes between runs, 2 to 1 to 3 to 2: ``make drill``."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.drill.programs import SUPERVISED_WITH_FAULTS
from tests.program import Start, checkpoint, environment, epochs_of, is_same, metrics, tiny_flags

pytestmark = pytest.mark.drill

RANKS = (2, 1, 3, 2)
EPOCHS = 2
# Whole minibatches on one, two and three ranks.
SIZES = {"envs_per_gpu": 12, "batch_size": 48, "epochs": EPOCHS, "checkpoint_every": 2, "learning_rate": 1e-3}
TRANSITIONS = 12 * 8  # of one rank and epoch


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
