"""The record: a chain of lines in which edits show, and that a kill or a full disk neither tears nor doubles."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from envs.open_env import OpenAccount
from envs.open_group_env import OpenGroupAccount
from evaluation import record
from evaluation.record import HEAD, NAME
from runtime import files

ACCOUNT = OpenAccount(60, 100.0, 120, 100.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True, 5.0, 0.0)


def accounts(cash: float) -> record.Accounts:
    return {"policy": {"AAA": replace(ACCOUNT, cash=cash)}}


def write(folder: Path, steps: int = 3) -> record.Record:
    """Six lines in three steps."""
    for step in range(steps):
        kept = record.read(folder)
        assert not kept.faults
        kept.append(
            [{"kind": "champion", "n": 2 * step}, {"kind": "scored", "n": 2 * step + 1}], accounts(step)
        )
    return record.read(folder)


def test_what_was_appended_is_read_back_in_order_with_the_accounts(tmp_path: Path) -> None:
    kept = write(tmp_path)
    assert [line["n"] for line in kept.lines] == [0, 1, 2, 3, 4, 5]
    assert [line["number"] for line in kept.lines] == [1, 2, 3, 4, 5, 6]
    assert kept.accounts == accounts(2.0)
    assert not kept.faults and kept.hash == kept.lines[-1]["hash"]
    assert record.read(tmp_path / "nowhere").lines == []


def reseal(line: dict[str, Any]) -> str:
    """A line with the right hash of its new content."""
    text = json.dumps({name: value for name, value in line.items() if name != "hash"})
    return f'{text[:-1]}, "hash": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def edit_and_reseal(lines: list[str]) -> list[str]:
    return [*lines[:2], reseal(json.loads(lines[2]) | {"n": 9}), *lines[3:]]


CHEATS: dict[str, Callable[[list[str]], list[str]]] = {
    "a figure is edited": lambda lines: [*lines[:2], lines[2].replace('"n": 2', '"n": 9'), *lines[3:]],
    "a figure is edited, and its hash computed anew": edit_and_reseal,
    "the last line is edited, and its hash computed anew": lambda lines: [
        *lines[:5],
        reseal(json.loads(lines[5]) | {"n": 9}),
    ],
    "a line is removed": lambda lines: [*lines[:2], *lines[3:]],
    "the first line is removed": lambda lines: lines[1:],
    "the last line is removed": lambda lines: lines[:-1],
    "the last step is removed": lambda lines: lines[:3],
    "all is removed": lambda lines: [],
    "two lines are swapped": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line comes twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "a line is added at the end": lambda lines: [*lines, reseal(json.loads(lines[5]) | {"number": 7})],
    "a line is another text": lambda lines: [*lines[:2], "{}", *lines[3:]],
    "a line is torn": lambda lines: [*lines[:2], lines[2][:-40], *lines[3:]],
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_every_edit_is_found(tmp_path: Path, cheat: str) -> None:
    write(tmp_path)
    path = tmp_path / NAME
    lines = CHEATS[cheat](path.read_text().splitlines())
    path.write_text("".join(f"{line}\n" for line in lines))
    kept = record.read(tmp_path)
    if cheat == "the last line is removed":  # the head has it still: as after a kill, it is put back
        assert not kept.faults and [line["n"] for line in kept.lines] == [0, 1, 2, 3, 4, 5]
        return
    (fault,) = kept.faults
    assert len(fault) < 140 and "\n" not in fault


def test_an_edited_or_missing_head_is_found_and_an_older_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    older = (tmp_path / HEAD).read_bytes()
    write(tmp_path, 1)
    newest = (tmp_path / HEAD).read_text()
    for content in (newest.replace('"cash": 0', '"cash": 5'), newest[:50], "{}", "[]"):
        (tmp_path / HEAD).write_text(content)
        assert record.read(tmp_path).faults
    (tmp_path / HEAD).write_bytes(older)
    assert "head is older" in record.read(tmp_path).faults[0]
    (tmp_path / HEAD).unlink()
    assert "is missing" in record.read(tmp_path).faults[0]


def test_what_no_chain_can_find(tmp_path: Path) -> None:
    # Said in the command and in docs/record.md: both files as they once were, and both written anew.
    write(tmp_path, 2)
    older = {name: (tmp_path / name).read_bytes() for name in (NAME, HEAD)}
    write(tmp_path, 1)
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    assert not record.read(tmp_path).faults


def test_a_kill_between_any_two_bytes_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / NAME
    before, old_head = path.read_bytes(), (tmp_path / HEAD).read_bytes()
    whole = write(tmp_path, 1)
    after, head = path.read_bytes(), (tmp_path / HEAD).read_bytes()
    assert after.startswith(before)
    for size in range(len(before), len(after) + 1):
        path.write_bytes(after[:size])
        kept = record.read(tmp_path)
        assert not kept.faults and kept.lines == whole.lines and kept.accounts == whole.accounts
        if size % 50 == 0:
            kept.complete()
            assert path.read_bytes() == after
    path.write_bytes(before)  # before the head was renamed: as if it had not begun
    (tmp_path / HEAD).write_bytes(old_head)
    assert len(record.read(tmp_path).lines) == 4
    (tmp_path / HEAD).write_bytes(head)
    path.unlink()
    assert record.read(tmp_path).faults


def test_the_first_step_may_be_killed_too(tmp_path: Path) -> None:
    whole = write(tmp_path, 1)
    content = (tmp_path / NAME).read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / NAME).write_bytes(content[:size])
        assert record.read(tmp_path).lines == whole.lines
    (tmp_path / NAME).unlink()
    kept = record.read(tmp_path)
    kept.complete()
    assert (tmp_path / NAME).read_bytes() == content


@pytest.mark.parametrize("full", ["head", "record"])
def test_a_full_disk_leaves_the_record_as_it_was_and_the_next_start_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    kept = write(tmp_path, 2)
    before = (tmp_path / NAME).read_bytes()

    sync = files.sync_file

    def refuse(file: Any, folder: Path) -> None:
        if (Path(file.name).name == NAME) == (full == "record"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file, folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_file", refuse)
        with pytest.raises(OSError, match="No space"):
            kept.append([{"kind": "scored", "n": 4}], accounts(9.0))
    assert (tmp_path / NAME).read_bytes() == before
    again = record.read(tmp_path)
    assert len(again.lines) == (4 if full == "head" else 5)
    again.complete()
    again.append([{"kind": "scored", "n": 5}], accounts(9.0))
    assert [line["n"] for line in record.read(tmp_path).lines] == [0, 1, 2, 3] + [4] * (full == "record") + [
        5
    ]


def test_accounts_of_a_program_that_knew_fewer_fields_are_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = OpenGroupAccount(
        *(("A", "B"), 60, 120, (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), 1.0, (0.0, 0.0), (0.0, 0.0), (1, 1)),
        *(0.0, 0.0, 0.0, True, 5.0, 0.0, (60, 60)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(record, "asdict", lambda a: {n: v for n, v in asdict(a).items() if n != "bars_ns"})
        record.read(tmp_path).append([{"kind": "scored"}], {"policy": {"group 1": group}})
    kept = record.read(tmp_path)
    assert not kept.faults and kept.accounts == {"policy": {"group 1": replace(group, bars_ns=())}}
    kept.append([{"kind": "scored"}], kept.accounts)
    assert not record.read(tmp_path).faults
