"""Two ranks that share out an exam come to the figures of one, and a rank that fails costs the exam alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_champion import Training
from tests.evaluation.two_rank_exam import exams
from tests.program import PATIENCE, environment


def assert_equal(ours: Any, theirs: Any, place: str = "") -> None:
    """Compare nests of figures: numbers to 1e-6, but for clocks."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours.keys() - {"time", "exam/seconds"}:
            assert_equal(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{place}/{number}")
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9, nan_ok=True), place
    else:
        assert ours == theirs, place


@pytest.mark.timeout(600)
def test_two_ranks_share_out_an_exam_and_a_rank_that_fails_costs_only_it(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_rank_exam.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (tmp_path / "one").mkdir()
    alone = json.loads(json.dumps(exams(Training(tmp_path / "one"))))
    assert alone[1]["record"]["symbols"]["AAA"]["turnover"] > 1
    assert all(exam["figures"]["exam/champion_percent"] > 0 for exam in alone[1:])
    assert_equal(alone, found["ddp"])
    assert_equal(alone, found["fsdp"])
    assert found["failed"] == {}
    assert found["warnings"] == [
        "No exam: rank 1: KeyError: 'a fault of rank 1'",
        "No exam: rank 1: the GPU's memory is full. of 1 GiB, all",
    ]
    assert found["after"]["exam/symbols"] == 2
