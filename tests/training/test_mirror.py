"""The mirror has whole checkpoints; an empty folder is filled from it; a mirror that fails is one line."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from continuous_training import Settings
from tests.program import ALONE, PATIENCE, Start, checkpoint, environment, is_same, names_of, tiny_flags
from tests.training.checkpoints import small
from training import checkpoint as files
from training import mirror as mirror_module
from training.checkpoint import CheckpointError
from training.mirror import Mirror

SECRET = "canary/+secret"


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store: no renames, no folders."""
    MemoryFileSystem.store.clear()
    yield "memory://store/mirror"
    MemoryFileSystem.store.clear()


def settings_of(folder: Path, url: str) -> Settings:
    return replace(Settings(), checkpoint_dir=str(folder), mirror=url)


def save(folder: Path, mirror: Mirror, *epochs: int) -> None:
    for epoch in epochs:
        saved = small(folder, 1, epoch)
        saved.save(keep=2)
        mirror.after(lambda _: None)(saved)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def mirrored(url: str) -> list[str]:
    system, root = fsspec.url_to_fs(url)
    return sorted(name.removeprefix(f"{root}/") for name in system.find(root) if ".tmp" not in name)


@pytest.mark.parametrize("kind", ["objects", "folder"])
def test_checkpoints_are_copied_pruned_alike_and_fetched_into_an_empty_folder(
    tmp_path: Path, memory: str, kind: str
) -> None:
    folder, url = tmp_path / "checkpoints", memory if kind == "objects" else str(tmp_path / "other disk")
    with Mirror(settings_of(folder, url), wanted=True) as mirror:
        for epoch in (1, 2, 3, 4):
            small(folder, 1, epoch).save(keep=2)
            (folder / "best.pt").write_bytes(f"champion {epoch}".encode())
            (folder / "ledger.jsonl").write_text("{}\n" * epoch)
            mirror.after(lambda _: None)(small(folder, 1, epoch))
            wait_for(lambda epoch=epoch: f"run1_epoch{epoch}.pt" in mirrored(url))
    kept = ["run1_epoch3.pt", "run1_epoch4.pt"]
    assert mirrored(url) == ["best.pt", "ledger.jsonl", *(f"resume/{name}" for name in kept), *kept]
    shutil.rmtree(folder)  # the disk dies
    with Mirror(settings_of(folder, url), wanted=True):
        found, warnings = files.newest(folder)
    assert found is not None and found.resume is not None and (found.epoch, warnings) == (4, [])
    assert (folder / "ledger.jsonl").read_text() == "{}\n" * 4
    assert (folder / "best.pt").read_bytes() == b"champion 4"
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_with_checkpoints_is_not_touched_and_its_newest_is_copied_if_that_was_missed(
    tmp_path: Path, memory: str
) -> None:
    small(tmp_path / "mine", 1, 1).save(keep=2)
    with Mirror(settings_of(tmp_path / "mine", memory), wanted=True):
        wait_for(lambda: "run1_epoch1.pt" in mirrored(memory))
    small(tmp_path / "other", 1, 7).save(keep=2)
    with Mirror(settings_of(tmp_path / "other", memory), wanted=False):  # a rank that does not write
        pass
    assert "run1_epoch7.pt" not in mirrored(memory)
    assert [path.name for path in files.existing(tmp_path / "other")] == ["run1_epoch7.pt"]


def test_newer_copies_of_another_training_stay(tmp_path: Path, memory: str) -> None:
    for run, place in ((3, "first"), (1, "second")):
        small(tmp_path / place, run, 5).save(keep=2)
        with Mirror(settings_of(tmp_path / place, memory), wanted=True):
            wait_for(lambda run=run: f"run{run}_epoch5.pt" in mirrored(memory))
    assert {"run3_epoch5.pt", "resume/run3_epoch5.pt"} <= set(mirrored(memory))


def test_a_damaged_copy_is_named_and_the_one_before_it_is_fetched(
    tmp_path: Path, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Mirror(settings_of(tmp_path / "a", memory), wanted=True) as mirror:
        for epoch in (1, 2):
            save(tmp_path / "a", mirror, epoch)
            wait_for(lambda epoch=epoch: f"run1_epoch{epoch}.pt" in mirrored(memory))
    system, root = fsspec.url_to_fs(memory)
    system.pipe_file(f"{root}/run1_epoch2.pt", system.cat_file(f"{root}/run1_epoch2.pt")[:-100])
    with Mirror(settings_of(tmp_path / "b", memory), wanted=True):
        pass
    found, _ = files.newest(tmp_path / "b")
    assert found is not None and found.epoch == 1 and "run1_epoch2.pt in memory://" in caplog.text


def test_a_checkpoint_damaged_on_the_disk_never_replaces_a_good_copy(
    tmp_path: Path, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Mirror(settings_of(tmp_path, memory), wanted=True) as mirror:
        saved = small(tmp_path, 1, 1)
        saved.save(keep=2)
        saved.path.write_bytes(saved.path.read_bytes()[:-100])
        mirror.after(lambda _: None)(saved)
        wait_for(lambda: "run1_epoch1.pt was not copied" in caplog.text)
        assert mirrored(memory) == []


class Failing(MemoryFileSystem):
    """A store that fails, and repeats the key that it was given."""

    protocol = "failing"
    fails = True

    def __init__(self, secret: str = "", **more: Any) -> None:
        super().__init__(**more)
        self.secret = secret

    def _check(self) -> None:
        if self.fails:
            raise PermissionError(f"403 for the key {self.secret}")

    def makedirs(self, *arguments: Any, **more: Any) -> None:
        self._check()
        super().makedirs(*arguments, **more)

    def ls(self, *arguments: Any, **more: Any) -> Any:
        self._check()
        return super().ls(*arguments, **more)


def test_a_mirror_that_fails_is_one_warning_without_keys_and_works_again_later(
    tmp_path: Path, memory: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setenv("MIRROR_OPTIONS", json.dumps({"secret": SECRET}))
    monkeypatch.setattr(Failing, "fails", True)
    url = "failing://store/mirror"
    with pytest.raises(CheckpointError, match="PermissionError") as error:
        # An empty folder beside a mirror that cannot be read: what begins afresh would be copied over the rest.
        Mirror(settings_of(tmp_path, url), wanted=True).__enter__()
    assert SECRET not in str(error.value)
    small(tmp_path, 1, 1).save(keep=2)
    with caplog.at_level(logging.INFO), Mirror(settings_of(tmp_path, url), wanted=True) as mirror:
        wait_for(lambda: "was not copied" in caplog.text)
        save(tmp_path, mirror, 2)
        wait_for(lambda: mirror._waiting is None)
        monkeypatch.setattr(Failing, "fails", False)
        save(tmp_path, mirror, 3)
        wait_for(lambda: "Copied run1_epoch3.pt" in caplog.text)
    assert caplog.text.count("was not copied") == 1 and SECRET not in caplog.text


def test_a_protocol_without_its_library_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: its protocol needs another package"):
        Mirror(settings_of(tmp_path, "gs://bucket/mirror"), wanted=True).__enter__()
    with pytest.raises(CheckpointError, match="no such protocol"):
        Mirror(settings_of(tmp_path, "nonsense://bucket"), wanted=True).__enter__()


@pytest.mark.parametrize("options", ["{", "[]", "[" * 100_000, f'"{SECRET}"'])
def test_options_that_are_no_object_are_one_line(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setenv("MIRROR_OPTIONS", options)
    with pytest.raises(CheckpointError, match="MIRROR_OPTIONS must be a JSON object") as error:
        Mirror(settings_of(tmp_path, memory), wanted=True).__enter__()
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("url", [f"ftp://me:{SECRET}@host/x", f"s3://bucket/x?token={SECRET}"])
def test_a_url_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="put them into MIRROR_OPTIONS") as error:
        replace(Settings(), mirror=url)
    assert SECRET not in str(error.value)


def test_training_does_not_wait_for_a_slow_mirror_and_copies_the_newest_afterwards(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allowed, copied = threading.Event(), []
    healthy = Mirror.copy

    def slow(mirror: Mirror, path: Path) -> None:
        allowed.wait(PATIENCE)
        copied.append(path.name)
        healthy(mirror, path)

    monkeypatch.setattr(Mirror, "copy", slow)
    monkeypatch.setattr(mirror_module, "LAST_COPY_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), Mirror(settings_of(tmp_path, memory), wanted=True) as mirror:
        save(tmp_path, mirror, 1)
        wait_for(lambda: mirror._waiting is None)
        save(tmp_path, mirror, 2, 3, 4)
    assert "takes longer; the next start repeats it" in caplog.text
    allowed.set()
    wait_for(lambda: "run1_epoch4.pt" in mirrored(memory))
    assert copied == ["run1_epoch1.pt", "run1_epoch4.pt"]


def test_training_continues_bit_for_bit_from_the_mirror_on_a_new_disk(tmp_path: Path) -> None:
    mirror, disk = tmp_path / "mirror", tmp_path / "disk"
    unbroken = Start(tmp_path / "out", [*ALONE, *tiny_flags(tmp_path / "unbroken", runs=1)])
    flags = tiny_flags(disk, runs=1, mirror=mirror)
    start = Start(tmp_path / "first", [*ALONE, *flags], environment())
    try:
        start.wait_for("Copied run1_epoch2.pt")
    finally:
        start.kill()
    shutil.rmtree(disk / "checkpoints")
    again = Start(tmp_path / "again", [*ALONE, *flags]).ends_well()
    unbroken.ends_well()
    assert "Fetching run1_epoch" in again.output and "Resuming from" in again.output
    ours, theirs = checkpoint(disk, "run1_epoch8.pt"), checkpoint(tmp_path / "unbroken", "run1_epoch8.pt")
    assert is_same(ours["model"], theirs["model"])
    assert "run1_epoch8.pt" in {path.name for path in mirror.glob("*.pt")} and names_of(disk)
