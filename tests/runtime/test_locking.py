"""Locks of folders: what a hold that ends by an error leaves, and that nobody holds a file that was removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import locking
from runtime.locking import LOCK_NAME, FolderHeld, FolderLock, FolderUnwritable


def fail_in(folder: Path, come: str = "") -> None:
    """Hold a folder's lock up to an error, before which a file may come into it."""
    with pytest.raises(ValueError, match="refused"), FolderLock(folder).hold():
        assert (folder / LOCK_NAME).exists()
        if come:
            (folder / come).write_text("")
        raise ValueError("refused")


def test_an_error_before_anything_was_done_leaves_nothing(tmp_path: Path) -> None:
    fail_in(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())
    (tmp_path / "theirs").write_text("")
    fail_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b").hold(is_trial=True):
        assert (tmp_path / "a" / "b" / LOCK_NAME).exists()
    assert not any(tmp_path.iterdir())


def test_a_lock_file_stays_where_it_was_or_where_something_was_done(tmp_path: Path) -> None:
    fail_in(tmp_path / "a" / "b", come="done")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {LOCK_NAME, "done"}
    with FolderLock(tmp_path / "c").hold():
        pass
    fail_in(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == [LOCK_NAME]


def test_a_holder_that_cannot_be_named_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FolderUnwritable, match="No space left"), FolderLock(tmp_path / "a" / "b").hold():
        pass
    assert not any(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_has_just_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = locking._flock, []

    def remove_first(descriptor: int, wait: bool) -> bool | None:
        if not removed:
            removed.append((tmp_path / LOCK_NAME).unlink())
        return lock(descriptor, wait)

    monkeypatch.setattr(locking, "_flock", remove_first)
    with FolderLock(tmp_path).hold(), pytest.raises(FolderHeld), FolderLock(tmp_path).hold():
        pass
