"""``history``: every exam and champion on one page, from the checkpoint folder alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import history as command
from continuous_training import Settings
from evaluation import history, ledger, record
from evaluation.exam import POLICY
from monitoring.console import Console
from runtime.control import ExitProgram
from tests.evaluation.reports import Page

HOSTILE = "<script>alert(1)</script>"


def exam(epoch: int, earned: float, decision: str = "refused", **given: Any) -> dict[str, Any]:
    pooled = {
        POLICY: {"total_return": earned, "sharpe": 1.5, "sharpe_interval": [-1.0, 4.0], "max_drawdown": 0.1}
    }
    pooled["buy and hold"] = {"total_return": 0.02}
    return {
        "time": f"2026-11-{epoch:02d}T10:00:00+00:00", "run": 1, "epoch": epoch, "data": "d", "days": 14,
        "checkpoint": f"run1_epoch{epoch}.pt", "verdict": "no edge", "verdict_reason": f"why {HOSTILE}",
        "decision": decision, "dethroned": None, "claim": "the best so far, not proven", "pooled": pooled,
        "margin": {"break_even_bps": 1.25},
    } | given  # fmt: skip


EXAMS = [
    {"run": 1, "epoch": 1, "data": "d", "verdict": "no edge"},  # of an older program
    exam(2, 0.05, "promoted"),
    exam(3, -0.01),
    exam(4, 0.07, "promoted"),
    exam(5, 0.01, dethroned="run1_epoch4.pt"),
    exam(6, 0.03, "promoted"),
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = tmp_path / "checkpoints"
    for line in EXAMS:
        ledger.append(folder / ledger.NAME, line)
    days = {"2026-11-03": 1.01, "2026-11-04": 1.02}
    scored = {
        "kind": "scored", "time": "2026-11-05T00:00:00", "champion": "run1_epoch2.pt", "stocks_only": False,
        "days": {POLICY: days, "buy and hold": days},
    }  # fmt: skip
    record.read(folder).append([scored], {})
    return replace(Settings(), checkpoint_dir=str(folder), report_dir=str(tmp_path / "reports"))


def shown(settings: Settings, tmp_path: Path, as_json: bool = False) -> str:
    with Console(tmp_path / "logs", to_stderr=as_json) as console:
        command.show(settings, console, as_json, has_all=False)
    return ""


def test_champions_have_their_reign_and_what_they_earned_later(settings: Settings) -> None:
    found = history.read(Path(settings.checkpoint_dir))
    first, second, third = found.champions
    assert (first["checkpoint"], first["ended"], first["record_days"]) == (
        "run1_epoch2.pt",
        "beaten in exam 4",
        2,
    )
    assert first["record_return"] == pytest.approx(1.01 * 1.02 - 1)
    assert (second["ended"], second["record_return"]) == ("lost the title in exam 5", None)
    assert (third["until"], third["ended"]) == (None, "the champion")
    assert found.headline == "6 exams in 1 run, none with an edge; 3 champions"
    assert found.about_record.startswith("Record: 2 days since 2026-11-03: +3.02%")


def test_the_command_shows_tables_json_and_a_page(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(settings, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 exams in 1 run, none with an edge; 3 champions"
    row = "   2  2026-11-02 10:00  1/2          14  +5.00%        +2.00%    1.50        1.25  no edge  new"
    assert f"{row} champion" in lines
    assert any(
        line.startswith("run1_epoch6.pt") and line.endswith("the champion, the best so far, not proven")
        for line in lines
    )
    shown(settings, tmp_path, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert len(content["exams"]) == 6 and content["exams"][0]["returns"] == {}
    page = Page((tmp_path / "reports" / "history" / "history.html").read_bytes())
    page.loads_nothing()
    assert HOSTILE in page.text and HOSTILE not in page.source
    assert page.text.index("run1_epoch6.pt") < page.text.index("run1_epoch2.pt")


def test_a_record_that_was_edited_says_nothing(settings: Settings) -> None:
    path = Path(settings.checkpoint_dir) / record.NAME
    path.write_bytes(path.read_bytes().replace(b"1.02", b"9.02", 1))
    found = history.read(Path(settings.checkpoint_dir))
    assert found.about_record.startswith("The record was edited: line 1 was edited")
    assert found.champions[0]["record_return"] is None


def test_no_exam_yet_is_one_line(settings: Settings, tmp_path: Path) -> None:
    (Path(settings.checkpoint_dir) / ledger.NAME).unlink()
    with pytest.raises(ExitProgram, match=r"There is no exam in \S+ yet: each checkpoint") as failure:
        shown(settings, tmp_path)
    assert failure.value.code == 3


def test_simulated_bars_are_said_to_be(settings: Settings, tmp_path: Path) -> None:
    folder = Path(settings.checkpoint_dir)
    ledger.append(folder / ledger.NAME, exam(7, 0.09, simulated=True))
    assert (
        history.read(folder).headline
        == "7 exams in 1 run, none with an edge, 1 on simulated bars; 3 champions"
    )
    (folder / ledger.NAME).unlink()
    ledger.append(folder / ledger.NAME, exam(7, 0.09, simulated=True))
    assert (
        history.read(folder).headline == "1 exam in 1 run, none with an edge on simulated bars; no champion"
    )
    shown(settings, tmp_path)
    page = Page((tmp_path / "reports" / "history" / "history.html").read_bytes())
    assert "UTC, simulated bars" in page.text
