"""Which runs' last checkpoints stay, over weeks of runs: in bytes, after a copy, at once or one by one."""

import os
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import torch

from continuous_training import Settings
from tests.training.checkpoints import small
from training import checkpoint
from training.retention import KEEP_DAYS, most_files

DAY = 86_400
MONDAY = datetime(2024, 11, 4, tzinfo=UTC).timestamp()
FULL = Settings()
GIGABYTE = 10**9
WEIGHTS = 2.42 * GIGABYTE  # of the full model, as `check` says
RESUME = 4.83 * GIGABYTE


def put(path: Path, seconds: float, num_bytes: float = 0) -> None:
    """Make a file of that date and size, which takes no room."""
    with path.open("wb") as file:
        file.truncate(int(num_bytes))
    os.utime(path, (seconds, seconds))


def train(folder: Path, first_run: int, start: float, runs: int, runs_a_day: int, epochs: int = 200) -> int:
    """Save what a training of the full model saves, and return the most bytes that this took."""
    (folder / "resume").mkdir(exist_ok=True)
    most = 0
    for run in range(first_run, first_run + runs):
        for epoch in range(25, epochs + 1, 25):
            now = start + (run - first_run + epoch / epochs) * DAY / runs_a_day - 1
            name = checkpoint.name_of(run, epoch)
            put(folder / "resume" / name, now, RESUME)
            put(folder / name, now, WEIGHTS)
            most = max(most, sum(path.stat().st_size for path in folder.rglob("*.pt")))
            checkpoint.prune(folder, FULL.keep_checkpoints, FULL.keep_runs)
    return most


def test_a_week_at_full_size_takes_what_check_says(tmp_path: Path) -> None:
    runs_a_day = 24  # of 200 epochs: an hour each
    most = train(tmp_path, 1, MONDAY, 7 * runs_a_day, runs_a_day)
    said = (most_files(FULL) + 1) * WEIGHTS + (checkpoint.NUM_RESUME_STATES + 1) * RESUME
    assert 0.85 * said < most <= said < 95 * GIGABYTE  # with the last of every run: 450 GB, 58 more a day
    runs = {int(checkpoint.NAME.fullmatch(path.name)[1]) for path in checkpoint.existing(tmp_path)}  # type: ignore[index]
    newest = 7 * runs_a_day
    # Of the newest day that is past the newest runs, the last of those before them stays.
    assert runs == {*range(newest - 7, newest + 1), newest - 8, *(day * runs_a_day for day in range(1, 7))}


def test_of_months_one_a_week_stays_and_of_the_last_days_one_each(tmp_path: Path) -> None:
    last = date(2025, 1, 12)
    for week in range(10):
        train(tmp_path, 1 + 14 * week, MONDAY + 7 * week * DAY, 14, runs_a_day=2, epochs=25)
    stayed = [
        datetime.fromtimestamp(path.stat().st_mtime, UTC).date() for path in checkpoint.existing(tmp_path)
    ]
    # 16 checkpoints of 8 days; 8 runs of 4 days, and 7 days before them; then the Sundays.
    assert stayed[: FULL.keep_checkpoints : 2] == [last - timedelta(day) for day in range(8)]
    days, sundays = stayed[FULL.keep_checkpoints :][:3], stayed[FULL.keep_checkpoints + 3 :]
    assert days == [last - timedelta(day) for day in (8, 9, 10)]
    assert sundays == [last - timedelta(7 * week) for week in range(2, 10)]


def test_a_pruned_folder_is_pruned_to_the_same_whenever_that_is_done(tmp_path: Path) -> None:
    at_once, one_by_one = tmp_path / "at_once", tmp_path / "one_by_one"
    for folder in (at_once, one_by_one):
        folder.mkdir()
        for run in range(1, 120):
            put(folder / checkpoint.name_of(run, 1), MONDAY + run * 0.3 * DAY)
            if folder == one_by_one:
                checkpoint.prune(folder, 1, 3)
        checkpoint.prune(folder, 1, 3)
    names = [[path.name for path in checkpoint.existing(folder)] for folder in (at_once, one_by_one)]
    assert names[0] == names[1]


@pytest.mark.parametrize("end_date", [None, "2025-01-31"])
def test_the_days_of_a_copied_folder_are_those_of_its_bars(tmp_path: Path, end_date: str | None) -> None:
    original, copied = tmp_path / "original", tmp_path / "copied"
    for run in range(1, 31):
        bars_end = int(MONDAY + run * DAY)
        saved = replace(
            small(original, run, 1), config={"end_date": end_date}, data_cutoff_ns=bars_end * 10**9
        )
        saved.save(keep=1)
        os.utime(saved.path, (bars_end + 3600,) * 2)
    shutil.copytree(original, copied, copy_function=shutil.copyfile)  # every file is of today
    for folder in (original, copied):
        checkpoint.prune(folder, 1, 2)
    kept = [len(checkpoint.existing(folder)) for folder in (original, copied)]
    # 2 runs, 7 days, and the weeks before; bars that end on a date for ever say no day.
    assert kept == [2 + KEEP_DAYS + 3, 2 + 1 if end_date else 2 + KEEP_DAYS + 3]


def test_a_damaged_one_has_the_day_of_its_file_and_the_newest_run_never_goes(tmp_path: Path) -> None:
    for run in range(1, 4):
        saved = small(tmp_path, run, 1)
        saved.save(keep=1)
        if run == 1:
            torch.save(["of another program"], saved.path)
        else:
            saved.path.write_bytes(b"torn")
        os.utime(saved.path, (MONDAY + run * DAY,) * 2)
    checkpoint.prune(tmp_path, 1, 1)
    assert len(checkpoint.existing(tmp_path)) == 3
    os.utime(tmp_path / "run1_epoch1.pt", (MONDAY + 2 * DAY + 1,) * 2)
    checkpoint.prune(tmp_path, 1, 1)
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["run3_epoch1.pt", "run2_epoch1.pt"]
