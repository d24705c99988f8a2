"""``status`` and ``dashboard``: a training of another process, and what is said where there is none."""

from __future__ import annotations

import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest

from commands import status
from continuous_training import Settings
from monitoring.attach import Attached
from runtime.control import ENTER, LEAVE, ExitProgram, SupervisorControl, report_plan
from tests.monitoring.published_training import exam, hold_exams, publish
from tests.program import ALONE, Start, environment, written_to


def lines_of(folder: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    lines: list[str] = []
    attached = Attached(folder / "logs", folder / "checkpoints")
    assert status.show(attached, lambda line, **_: lines.append(line), as_json=False) == 0
    return lines


@pytest.mark.parametrize("width", [100, 80, 60])
def test_it_fits_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    publish(tmp_path, lines=tuple(f"line {number} " + "x" * 200 for number in range(20)), restarts=2)
    hold_exams(tmp_path, exam(25, decision="promoted"), exam(50))
    lines = lines_of(tmp_path, monkeypatch, width)
    assert len(lines) <= 24 and max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for words in (
        "training run 1 of 2, epoch 3 of 200, ",
        "2 restarts; 1 x cpu",
        "verdict No edge: its mean day is between -0.21% and +0.35%, not surely above 0",
        "policy +2.1%, buy and hold +8.7%, Sharpe 1.9 [-0.2, 3.1]",
        "champion run1_epoch25.pt since 2026-11-25 10:25 UTC",
        "reward -0.700 bp per bar",
        "health no metric is outside its range",
        "sources binance: newest bar 60 min old, 26 symbols",
        "lines line 14 xxx",
    ):
        assert words in text, words


def test_its_exit_code_tells_whether_the_training_lives(tmp_path: Path) -> None:
    attached = Attached(tmp_path / "logs", tmp_path / "checkpoints")
    silent: list[str] = []
    publish(tmp_path, time=time.time() - 3600)
    assert status.show(attached, lambda line, **_: silent.append(line), as_json=True) == 1
    assert json.loads(silent[0])["alive"] is False
    publish(tmp_path, ended=time.time())
    assert status.show(attached, lambda line, **_: None, as_json=False) == 0
    said: list[str] = []
    publish(tmp_path, ended=time.time(), has_failed=True)
    assert status.show(attached, lambda line, **_: said.append(line), as_json=False) == 1
    assert said[0].startswith("training  ended by an error 20")


def test_where_nothing_ran_it_names_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = Settings(log_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ExitProgram, match=r"no training has run with this log_dir.* of its start$"):
        status.find(settings)
    with SupervisorControl() as control:
        monkeypatch.setenv("CONTROL_DIR", str(control.folder))
        report_plan(1, Path("/elsewhere/logs"))
        with pytest.raises(ExitProgram, match="running now: --log-dir /elsewhere/logs"):
            status.find(settings)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_the_dashboard_of_another_process(tmp_path: Path) -> None:
    publish(tmp_path)
    words = [*ALONE, "dashboard", "--attach", "--log-dir", str(tmp_path / "logs")]
    plain = Start(tmp_path / "out", words)
    assert plain.ends() == 2 and "dashboard needs a terminal" in plain.output
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(Path(__file__).parents[2])
        os.execve(sys.executable, [sys.executable, *words], environment(TERM="xterm"))
    seen = ""
    while "Newest bars" not in seen:
        seen += os.read(terminal, 65_536).decode(errors="replace")
    os.write(terminal, b"\x03")
    seen += written_to(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert seen.count(ENTER) == seen.count(LEAVE) == 1 and "Traceback" not in seen
