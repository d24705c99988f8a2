"""The program's own exams: three runs, their ledger, kills in between, and unaffected weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import ledger, record
from runtime.launch import Launch
from tests.program import (
    ALONE,
    ROOT,
    SEGMENTS_OF_AN_HOUR,
    Start,
    checkpoint,
    environment,
    is_same,
    metrics,
    tiny_flags,
)

# Enough bars for an exam of five days.
FLAGS = {
    **SEGMENTS_OF_AN_HOUR,
    "simulated_symbols": 2,
    "simulated_bars": 14_400,
    "epochs": 2,
    "checkpoint_every": 2,
}
WITHOUT_EXAMS = (
    "from evaluation import examiner as e; e.Examiner.examine = lambda *_: e.Exam()\n"
    "import continuous_training; continuous_training.main()"
)
NEWEST = np.datetime64("2026-01-31T23:59", "ns").astype(np.int64)
DAY_NS = 86_400 * 10**9


def begin(folder: Path, words: tuple[str, ...] = ALONE, **changes: Any) -> str:
    return Start(folder / "out", [*words, *tiny_flags(folder, **(FLAGS | changes))]).ends_well().output


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return ledger.read(folder / "checkpoints" / ledger.NAME)


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Three starts of one run each; fewer days are held out in the second one, whose last line a kill tears."""
    folder = tmp_path_factory.mktemp("three_runs")
    path = folder / "checkpoints" / ledger.NAME
    plans = {1: {"holdout_days": 5, "checkpoint_every": 1}, 2: {"holdout_days": 2}, 3: {"holdout_days": 5}}
    outputs = []
    for run, plan in plans.items():
        outputs.append(begin(folder, runs=run, **plan))
        if run == 2:
            path.write_bytes(path.read_bytes()[:-30])
            assert len(ledger.read(path)) == 2
    return folder, outputs


def test_every_checkpoint_has_its_ledger_line_its_figures_and_its_message(
    three_runs: tuple[Path, list[str]],
) -> None:
    folder, outputs = three_runs
    lines = lines_of(folder)
    # All four, also the one that was torn: the third start completes the ledger from the checkpoint.
    assert [(line["run"], line["epoch"], line["trials"]) for line in lines] == [
        (1, 1, 1),
        (1, 2, 2),
        (2, 2, 3),
        (3, 2, 4),
    ]
    for line in lines:
        output = outputs[line["run"] - 1]
        saved = checkpoint(folder, line["checkpoint"])
        assert json.loads(json.dumps(saved["exam"]["line"])) == line
        (entry,) = [
            row for row in metrics(folder) if (row["run"], row["epoch"]) == (line["run"], line["epoch"])
        ]
        figures = {name: value for name, value in entry.items() if name.startswith("exam/")}
        assert len(figures) > 15
        for name, value in figures.items():
            kept = saved["metrics"][name]
            assert kept == value or (value is None and kept != kept)
        assert figures["exam/return_percent"] == pytest.approx(100 * line["pooled"]["policy"]["total_return"])
        assert figures["exam/trials"] == line["trials"]
        assert f"Exam: {line['days']} days, 2 symbols: " in output
        assert f"{line['verdict']}: {line['verdict_reason']}" in output
        assert output.isascii()
    examined = [(row["run"], row["epoch"]) for row in metrics(folder) if "exam/days" in row]
    assert examined == [(1, 1), (1, 2), (2, 2), (3, 2)]


def test_no_exam_begins_before_any_ancestor_was_trained(three_runs: tuple[Path, list[str]]) -> None:
    folder, _ = three_runs
    # The second run trained up to two days before the end: later ones are never examined before that.
    for line, days in zip(lines_of(folder), (5, 5, 2, 2), strict=True):
        until = NEWEST - days * DAY_NS
        assert checkpoint(folder, line["checkpoint"])["trained_until_ns"] == until
        first = np.datetime64(line["first"], "ns").astype(np.int64)
        assert 0 < first - until <= 2 * 60 * 10**9


def test_weights_are_the_same_with_and_without_exams(
    three_runs: tuple[Path, list[str]], tmp_path: Path
) -> None:
    # Epoch 2 is trained after the exam of epoch 1, or without it.
    output = begin(tmp_path, ("-c", WITHOUT_EXAMS), runs=1, holdout_days=5, checkpoint_every=1)
    assert "Exam" not in output
    names = ("run1_epoch1.pt", "run1_epoch2.pt")
    assert all(is_same(*(checkpoint(f, name)["model"] for f in (tmp_path, three_runs[0]))) for name in names)
    learnt = [
        [{name: value for name, value in row.items() if name.startswith(("loss/", "ppo/", "rollout/"))}]
        for folder in (tmp_path, three_runs[0])
        for row in metrics(folder)[:2]
    ]
    assert learnt[:2] == learnt[2:]


@pytest.mark.drill
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun as on POSIX")
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.drill)])
def test_other_ranks_wait_for_the_exam(tmp_path: Path, parallel: str) -> None:
    flags = tiny_flags(tmp_path, **(FLAGS | {"batch_size": 256}), runs=1, holdout_days=1, parallel=parallel)
    words = [str(ROOT / "continuous_training.py"), "train", *flags]
    ((command, additions),) = Launch(num_ranks=2).commands(words)
    Start(tmp_path / "out", command[1:], environment(**additions)).ends_well()
    (line,) = lines_of(tmp_path)
    assert (line["run"], line["epoch"], line["decision"]) == (1, 2, "refused")


@pytest.mark.drill
def test_at_a_runs_start_the_champion_walks_the_days_that_came_since(tmp_path: Path) -> None:
    begin(tmp_path, runs=1, holdout_days=5)
    folder = tmp_path / "checkpoints"
    # As if it had been saved then: the program goes by the clock.
    saved = checkpoint(tmp_path, "run1_epoch2.pt") | {"data_cutoff_ns": int(NEWEST) + 60 * 10**9}
    torch.save(saved, folder / "best.pt")
    output = begin(tmp_path, runs=2, holdout_days=5, end_date="2026-02-03")
    assert (
        "Record: run1_epoch2.pt on 8,638 new bars of 2 symbols, 2026-02-01T00:00 to 2026-02-03T23:58"
        in output
    )
    kept = record.read(folder)
    assert [line["kind"] for line in kept.lines] == ["begin", "champion", "scored"] and not kept.faults
    (_, entry) = [row for row in metrics(tmp_path) if "exam/days" in row]
    assert entry["record/days"] == 3
    words = [*ALONE[:1], "record", "--verify", "--checkpoint-dir", folder, "--log-dir", tmp_path / "logs"]
    assert "3 lines, whole and in order" in Start(tmp_path / "verified", words).ends_well().output
