"""What the console records is read by other programs, whatever the training came to."""

from __future__ import annotations

import json
from pathlib import Path

from monitoring.console import Console


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_figures_that_are_not_finite_are_null_in_the_metrics(tmp_path: Path) -> None:
    figures = {"epoch": 3, "loss/policy": float("nan"), "loss/value": float("-inf"), "learning_rate": 1e-4}
    Console(tmp_path).record(figures)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    recorded = json.loads(line, parse_constant=refuse)
    assert recorded.pop("time")
    assert recorded == {"epoch": 3, "loss/policy": None, "loss/value": None, "learning_rate": 1e-4}
