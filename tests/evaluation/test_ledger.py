"""The ledger keeps every exam, even if its writer is killed or the disk is full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from evaluation import ledger


def line(epoch: int) -> dict[str, object]:
    return {"run": 1, "epoch": epoch, "data": "d", "decision": "refused"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / ledger.NAME


def test_lines_are_read_in_order(path: Path) -> None:
    assert ledger.read(path) == []
    for epoch in (1, 2, 3):
        ledger.append(path, line(epoch))
    assert ledger.read(path) == [line(1), line(2), line(3)]
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("length", range(1, len(json.dumps(line(2)))))
def test_a_line_torn_anywhere_is_skipped_and_removed(path: Path, length: int) -> None:
    ledger.append(path, line(1))
    with path.open("a") as file:
        file.write(json.dumps(line(2))[:length])
    assert ledger.read(path) == [line(1)]
    ledger.append(path, line(3))
    assert path.read_text() == json.dumps(line(1)) + "\n" + json.dumps(line(3)) + "\n"


def test_a_line_that_only_lacks_its_newline_is_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(line(1)))
    assert ledger.read(path) == [line(1)]
    ledger.append(path, line(2))
    assert ledger.read(path) == [line(1), line(2)]


def test_lines_that_are_no_exam_are_skipped(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'\xff\xfe\n[]\n{"run": 1}\n"text"\n\n' + json.dumps(line(1)).encode() + b"\n")
    assert ledger.read(path) == [line(1)]


def test_a_full_disk_leaves_earlier_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(path, line(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append(path, line(2))
    assert path.read_text() == json.dumps(line(1)) + "\n"
    ledger.append(path, line(2))
    assert ledger.read(path) == [line(1), line(2)]


def test_a_champion_is_proven_by_the_edge_of_its_own_exam_and_not_by_one_of_older_rules() -> None:
    won = {"checkpoint": "a.pt", "decision": "promoted", "verdict": "edge", "probability": 0.99}
    lost = {"checkpoint": "b.pt", "decision": "refused", "verdict": "edge", "probability": 0.99}
    assert ledger.is_proven("a.pt", [won, lost])
    assert not ledger.is_proven("b.pt", [won, lost])
    assert not ledger.is_proven("a.pt", [won | {"verdict": "no edge"}])
    assert not ledger.is_proven("a.pt", [{k: v for k, v in won.items() if k != "probability"}])
    assert not ledger.is_proven("a.pt", [won, won | {"verdict": "no edge"}])  # the newest counts
