"""An exam without an end, with two ranks: the one that waits is released, and both train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.program import Start, epochs_of, tiny_flags
from tests.program import checkpoint as checkpoint_of


@pytest.mark.drill
def test_an_endless_exam_is_given_up_and_two_ranks_train_on(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("endless_exam.py")
    flags = tiny_flags(tmp_path, epochs=4, runs=1, holdout_days=1, exam_minutes=0.02)
    start = Start(tmp_path / "log.txt", [*launcher, script, "train", *flags]).ends_well()
    assert start.output.count("No exam: not done after exam_minutes=0.02; raise that, or lower") == 2
    assert epochs_of(tmp_path) == [(1, epoch) for epoch in range(1, 5)]
    assert checkpoint_of(tmp_path, "run1_epoch4.pt")["exam"] == {}
