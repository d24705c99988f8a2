"""Checkpoints in the background: a copy that training does not change, one write at a time, full disks."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.drill.programs import kill_while_writing
from tests.program import ALONE, SUPERVISED, Start, checkpoint, is_same, tiny_flags
from tests.training.checkpoints import small
from training import checkpoint as files
from training.checkpoint import Checkpoint
from training.checkpoint_writer import CheckpointWriter, Snapshot

MEBIBYTE = 1 << 20


def state(folder: Path, run: int, epoch: int, mebibytes: float = 0.01) -> Checkpoint:
    return small(folder, run, epoch, int(mebibytes * MEBIBYTE / 4))


def test_a_snapshot_does_not_change_with_the_weights() -> None:
    snapshot, weights = Snapshot(), torch.ones(3)
    taken = snapshot.take({"model": {"w": weights}, "steps": [1, (weights[:2], "text")]})
    weights += 1
    assert is_same(taken["model"]["w"], torch.ones(3)) and is_same(taken["steps"][1][0], torch.ones(2))
    assert (taken["steps"][0], taken["steps"][1][1]) == (1, "text")
    again = snapshot.take({"model": {"w": weights}})
    assert again["model"]["w"].data_ptr() == taken["model"]["w"].data_ptr()  # the buffer is reused
    assert is_same(snapshot.take({"model": {"w": torch.zeros(5)}})["model"]["w"], torch.zeros(5))


def test_training_continues_during_a_write_and_the_next_save_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, order = threading.Event(), []
    write = Checkpoint.save

    def slow(saved: Checkpoint, keep: int) -> None:
        order.append(f"begins {saved.epoch}")
        allowed.wait(60)
        order.append(f"ends {saved.epoch}")
        write(saved, keep)

    monkeypatch.setattr(Checkpoint, "save", slow)
    with CheckpointWriter(tmp_path, 16, True, lambda saved: order.append(f"saved {saved.name}")) as writer:
        first = state(tmp_path, 1, 1)
        writer.save(first)
        first.model["w"] += 1  # training continues
        assert "ends 1" not in order
        threading.Timer(0.2, allowed.set).start()
        writer.save(state(tmp_path, 1, 2))
        assert order[:3] == ["begins 1", "ends 1", "saved run1_epoch1.pt"]
    # Leaving waits for the last save.
    assert order[3:] == ["begins 2", "ends 2", "saved run1_epoch2.pt"]
    assert is_same(Checkpoint.read(tmp_path / "run1_epoch1.pt").model, state(tmp_path, 1, 1).model)


def test_a_save_that_fails_is_a_warning_and_remembered_until_one_succeeds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")
    with CheckpointWriter(folder, 16, wanted=True) as writer:
        writer.save(state(folder, 1, 1))
        assert "run1_epoch1.pt was not saved: " in writer.finish() and writer.last_save_failed
        assert len(caplog.messages) == 1 and "run1_epoch1.pt was not saved: " in caplog.text
        folder.unlink()
        writer.save(state(folder, 1, 2))
        assert writer.finish() == str(folder / "run1_epoch2.pt") and not writer.last_save_failed


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    state(tmp_path, 1, 1).save(keep=16)
    broken = state(tmp_path, 1, 2)
    broken.model["w"][7] = float("nan")
    with pytest.raises(files.CheckpointError, match="not finite"):
        broken.save(keep=16)
    found, warnings = files.newest(tmp_path)
    assert found is not None and (found.epoch, warnings) == (1, [])


def test_the_next_start_removes_what_killed_writers_left(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    leftovers = [tmp_path / ".run1_epoch2.pt.1-ab.tmp", tmp_path / "resume" / ".run1_epoch2.pt.1-cd.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")
    with CheckpointWriter(tmp_path, 16, wanted=False):
        assert all(path.exists() for path in leftovers)  # this rank does not write
    with CheckpointWriter(tmp_path, 16, wanted=True):
        assert not any(path.exists() for path in leftovers)


def test_the_newest_checkpoint_is_known_before_anything_is_saved(tmp_path: Path) -> None:
    for name in ("run1_epoch2.pt", "run1_epoch10.pt", "best.pt"):
        (tmp_path / name).write_bytes(b"")
    with CheckpointWriter(tmp_path, 16, wanted=True) as writer:
        assert writer.finish() == str(tmp_path / "run1_epoch10.pt")


# --- a disk that is really full -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_on_a_full_disk_older_files_go_first_and_the_last_of_each_run_stays(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for run, epoch in [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]:
        state(small_disk, run, epoch, mebibytes=2.8).save(keep=16)
    assert [path.name for path in files.existing(small_disk)] == [
        "run2_epoch3.pt",
        "run2_epoch2.pt",
        "run1_epoch2.pt",
    ]
    assert caplog.messages
    for line in caplog.messages:
        assert "the disk is full: " in line and "was removed to make room" in line
    found, warnings = files.newest(small_disk)
    assert found is not None and found.resume is not None
    assert (found.epoch, warnings) == (3, [])


def test_if_that_is_not_enough_the_save_is_skipped_and_nothing_is_lost(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        state(small_disk, 1, epoch, mebibytes=2).save(keep=16)
    before = sorted(path.name for path in small_disk.rglob("*"))
    with pytest.raises(files.CheckpointError, match=r"the disk is full"):
        state(small_disk, 1, 3, mebibytes=20).save(keep=16)
    assert (sorted(path.name for path in small_disk.rglob("*")), caplog.messages) == (before, [])


def test_training_on_a_full_disk_continues_and_saves_once_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    checkpoints = small_disk / "checkpoints"
    checkpoints.mkdir()
    (small_disk / "filler").write_bytes(b"x" * (16 * MEBIBYTE - 64 * 1024))
    flags = tiny_flags(tmp_path, checkpoint_dir=checkpoints, epochs=60, runs=1)
    start = Start(tmp_path / "out", [*ALONE, *flags])
    try:
        start.wait_for("run 1 epoch  5/60")
        (small_disk / "filler").unlink()
        start.ends_well()
    finally:
        start.kill()
    assert "run1_epoch2.pt was not saved: the disk is full. Training continues." in start.output
    # A failed save is repeated at the next epoch, not at the next even one.
    assert "run1_epoch3.pt was not saved: the disk is full" in start.output
    assert "run1_epoch60.pt" in "".join(start.lines[-3:])  # then comes what comes next
    assert not list(checkpoints.rglob("*.tmp"))
    assert Checkpoint.read(checkpoints / "run1_epoch60.pt").epoch == 60


@pytest.mark.drill
def test_a_last_save_without_room_is_exit_4_and_not_repeated(small_disk: Path, tmp_path: Path) -> None:
    """Not 0: a script that switches the machine off after a training that ended well must notice."""
    checkpoints = small_disk / "checkpoints"
    checkpoints.mkdir()
    (small_disk / "filler").write_bytes(b"x" * (16 * MEBIBYTE - 64 * 1024))
    flags = tiny_flags(tmp_path, checkpoint_dir=checkpoints, epochs=2, runs=1)
    start = Start(tmp_path / "out", [*SUPERVISED, *flags])
    assert start.ends() == 4, start.output
    assert re.fullmatch(r"Newest checkpoint: \S+ was not saved: the disk is full", start.lines[-2])
    assert start.lines[-1].startswith(
        f"The final checkpoint was not saved: free disk space in {checkpoints}. "
    )
    assert start.output.count("Run 1: epochs 1 to 2") == 1


# --- kill -9 while a checkpoint is written ------------------------------------------------------------------


@pytest.mark.drill
def test_kill_9_during_a_background_write_changes_nothing_in_the_end(tmp_path: Path) -> None:
    unbroken = Start(tmp_path / "out", [*ALONE, *tiny_flags(tmp_path / "unbroken", d_model=128, runs=1)])
    killed = kill_while_writing(tmp_path / "killed", epoch=4, d_model=128, runs=1)
    again = Start(tmp_path / "again", [*ALONE, *tiny_flags(killed, d_model=128, runs=1)]).ends_well()
    unbroken.ends_well()
    assert "Resuming from" in again.output and "run1_epoch2.pt" in again.output
    assert not list((killed / "checkpoints").rglob("*.tmp"))
    ours, theirs = (checkpoint(tmp_path / name, "run1_epoch8.pt") for name in ("killed", "unbroken"))
    assert is_same(ours["model"], theirs["model"])
