"""benchmarks/settings_grid.py: every cell is trained for its share of the time, and the best one comes first."""

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import answer, settings_grid
from tests.test_answer import SMALL, Market


def test_every_combination_is_a_cell() -> None:
    cells = settings_grid.cells_of({"horizon": [128, 256], "update_passes": [1, 3]})
    assert [tuple(cell.values()) for cell in cells] == [(128, 1), (128, 3), (256, 1), (256, 3)]


def test_best_cell_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [(1, 0, 0.9), (3, 0, 0.8), (1, 1, 0.7), (3, 1, 0.84)]
    facts = {"market": "weak", "base": {}, "epochs": 10, "seconds": 60.0, "flat": 0.0}
    lines = [
        facts | {"seed": seed, "share": share, "cell": {"update_passes": passes}}
        for passes, seed, share in given
    ]
    path = tmp_path / "lines"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings_grid.report(Namespace(lines=path))
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first == "| weak | update_passes 3 | 0, 1 | 82.0% | 80.0%, 84.0% | 10 | 60 |"
    assert second.startswith("| weak | update_passes 1 | 0, 1 | 80.0% | 70.0%, 90.0%")


@pytest.mark.drill  # it makes trainers
def test_a_grid_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(answer, "EXAM_BARS", 256)
    monkeypatch.setattr(answer, "EXAM_ACCOUNTS", 8)
    monkeypatch.setattr(settings_grid, "KnownMarket", Market)
    monkeypatch.setattr(settings_grid, "Sizes", partial(replace, SMALL))
    grid = json.dumps({"horizon": [128, 256], "update_passes": [1]})
    base = json.dumps({"envs_per_gpu": 8, "batch_size": 1_024, "context_bars": 16})
    path = tmp_path / "lines"
    options = Namespace(
        market="weak", seeds="0", symbols=2, seconds=0.1, grid=grid, base=base, lines=path
    )  # fmt: skip
    settings_grid.run(options)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["cell"]["horizon"] for line in lines] == [128, 256]
    assert all(line["epochs"] >= 1 and line["seconds"] > 0 for line in lines)
