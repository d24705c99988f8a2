"""The console shows log records, and records figures for other programs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from monitoring.console import Console

log = logging.getLogger("continuous_training")


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_figures_that_are_not_finite_are_null_in_the_metrics(tmp_path: Path) -> None:
    figures = {"epoch": 3, "loss/policy": float("nan"), "loss/value": float("-inf"), "learning_rate": 1e-4}
    with Console(tmp_path) as console:
        console.record(figures)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    recorded = json.loads(line, parse_constant=refuse)
    assert recorded.pop("time")
    assert recorded == {"epoch": 3, "loss/policy": None, "loss/value": None, "learning_rate": 1e-4}


def test_records_are_shown_while_a_console_is_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for log_dir, shown in ((tmp_path, ["50% done", "Warning: not [b]old[/b]"]), (None, [])):
        with Console(log_dir):
            log.info("50% done")
            log.debug("not shown at this level")
            log.warning("not [b]old[/b]")
        assert capsys.readouterr().out.splitlines() == shown
        assert caplog.messages == []  # another library's handler on the root logger repeats nothing
    log.warning("after it was closed")
    assert caplog.messages == ["after it was closed"] and capsys.readouterr().out == ""
    assert log.handlers == []


def test_a_console_for_warnings_alone_prints_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for level, shown in (("info", ["title", "column", "cell"]), ("warning", ["Warning: late"])):
        with Console(tmp_path, log_level=level) as console:
            console.table("title", ["column"], [["cell"]])
            if level == "warning":
                log.warning("late")
        assert [line.strip() for line in capsys.readouterr().out.splitlines()] == shown
