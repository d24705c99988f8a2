"""``check`` tries the mirror as copies of checkpoints do, and leaves nothing there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from commands.check import mirror as check
from commands.check.report import Line
from continuous_training import Settings
from runtime.control import EXIT_SETTING
from tests.training.checkpoints import small

URL = "memory://store/mirror"


@pytest.fixture(autouse=True)
def store() -> Iterator[dict[str, Any]]:
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


def line(url: str | None, has_checkpoint: bool = True, offline: bool = False) -> Line:
    (found,) = check.check_mirror(replace(Settings(), mirror=url), has_checkpoint, offline)
    return found


def test_without_a_mirror_nothing_is_said() -> None:
    assert list(check.check_mirror(Settings(), has_checkpoint=False, offline=False)) == []


def test_a_mirror_that_works_names_its_newest_copy_and_keeps_nothing(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    assert line(URL) == Line("mirror", "OK", f"{URL} takes a file and gives it back; newest copy: none")
    assert not store
    folder = tmp_path / "other disk" / "mirror"
    assert line(str(folder)).text.endswith("newest copy: none")
    assert not folder.parent.exists()
    for epoch in (1, 12, 5):
        small(folder, 1, epoch).save(keep=9)
    before = sorted(folder.rglob("*"))
    assert line(str(folder), offline=True).text.endswith("newest copy: run1_epoch12.pt")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("call", ["pipe_file", "cat_file", "rm_file", "ls"])
def test_every_call_that_fails_is_a_line(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "https://canary-secret@store")

    monkeypatch.setattr(MemoryFileSystem, call, fail)
    text = f"{URL} cannot be used: Permission denied"
    assert line(URL) == Line("mirror", "warning", f"{text}. Training would go on without copies")
    expected = Line("mirror", "error", f"{text}. An empty folder is filled from it first", EXIT_SETTING)
    assert line(URL, has_checkpoint=False) == expected


def test_other_bytes_an_unknown_protocol_and_silence_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert line("nonsense://store").text.startswith(
        "nonsense://store cannot be used: fsspec knows no such protocol"
    )
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: b"x")
    assert "it gives back other bytes than it took" in line(URL).text
    ended = threading.Event()
    monkeypatch.setattr(check, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: ended.wait(60))
    assert "no answer within 0 s" in line(URL).text
    ended.set()


def test_offline_no_server_is_contacted(store: dict[str, Any]) -> None:
    assert line(URL, offline=True) == Line("mirror", "OK", f"{URL} is not contacted, for --offline")
    assert not store
