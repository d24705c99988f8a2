"""The record: what the champions earned on bars that did not exist when they were saved, a chain of lines.

    checkpoints/record.jsonl   one JSON object a line: begin, champion, missed, revised, scored
    checkpoints/record.head    the newest lines, their number and hash, and the accounts as they stand

Every line has its number, the hash of the line before it, and its own: SHA-256 of all before it in the line. So
an edited, removed, added or moved line shows, and with the head a cut end does. What no chain can show: that
all lines from some place on were rewritten, hashes and head included, or that older copies of both files were put
back. A hash that was kept elsewhere (train.log and reports have it) shows that, too.

The head is written first, and whole; then the lines are appended. After a kill in between the next start appends
what is missing: nothing is lost, and no line comes twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from envs.open_group_env import AnyAccount, account_of
from runtime.files import append_durably, write_atomically

NAME, HEAD = "record.jsonl", "record.head"
START = "0" * 64  # the hash before the first line
HASH = re.compile(rb', "hash": "([0-9a-f]{64})"}$')
Line = dict[str, Any]
Accounts = dict[str, dict[str, AnyAccount]]  # contestant -> symbol or group -> account


@dataclass
class Record:
    """A folder's record as it was read; ``faults`` are empty where it is whole."""

    folder: Path
    lines: list[Line] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hash: str = START
    accounts: Accounts = field(default_factory=dict)
    unwritten: bytes = b""  # what a kill kept from ``NAME``
    intact_size: int = 0  # of ``NAME``, without a line that a kill tore

    def append(self, lines: Sequence[Mapping[str, Any]], accounts: Accounts) -> None:
        """Add lines, all or none of them, durably.

        Raises:
            OSError: it cannot be written; the record is as it was, or the next start completes it.
        """
        number, previous, texts = len(self.lines), self.hash, []
        values = {n: {s: asdict(a) for s, a in own.items()} for n, own in accounts.items()}
        digest = _digest(values)
        for line in lines:
            number += 1
            numbered = {"number": number, "previous": previous, **line, "accounts": digest}
            text, previous = _seal(numbered)
            texts.append(text)
        head = {
            "number": number,
            "hash": previous,
            "lines": texts,
            "accounts": values,
        }
        content = json.dumps(head, allow_nan=False).encode()
        write_atomically(self.folder / HEAD, lambda file: file.write(content))
        self.lines += [json.loads(text) for text in texts]
        self.hash, self.accounts = previous, accounts
        self.unwritten += "".join(f"{text}\n" for text in texts).encode()
        self.complete()

    def complete(self) -> None:
        """Append what the head has and the record lacks.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        if not self.unwritten:
            return
        append_durably(self.folder / NAME, self.unwritten, self.intact_size)
        self.intact_size += len(self.unwritten)
        self.unwritten = b""


def read(folder: Path) -> Record:
    """Read and check a folder's record; one that is not there is empty.

    Raises:
        OSError: a file exists and cannot be read.
    """
    record = Record(folder)
    content, head_text = _content(folder / NAME) or b"", _content(folder / HEAD)
    if head_text is None:
        if content:
            record.faults.append(f"{HEAD} is missing, which has the accounts and the last hash")
        _check_lines(record, content)
        return record
    try:
        head = json.loads(head_text)
        newest = [text.encode() + b"\n" for text in head["lines"]]
        number, final = int(head["number"]), str(head["hash"])
        record.accounts = {
            name: {symbol: account_of(account) for symbol, account in own.items()}
            for name, own in head["accounts"].items()
        }
        digest = _digest(head["accounts"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        record.faults.append(f"{HEAD} was edited or is damaged")
        _check_lines(record, content)
        return record
    whole = b"".join(newest)
    # A kill between the two files: the end of the record is a beginning of the newest lines.
    before = number - len(newest)
    start = _offset(content, before)
    if start is not None and whole.startswith(content[start:]) and len(content) - start < len(whole):
        torn = content[start:]
        kept = torn[: torn.rfind(b"\n") + 1]
        record.intact_size = start + len(kept)
        record.unwritten = whole[len(kept) :]
        content = content[: record.intact_size] + record.unwritten
    else:
        record.intact_size = len(content)
    _check_lines(record, content)
    if not record.faults and (len(record.lines), record.hash) != (number, final):
        what = "its end was cut off" if len(record.lines) < number else f"{HEAD} is older"
        record.faults.append(f"it ends with line {len(record.lines)}, {HEAD} with line {number}: {what}")
    if not record.faults and record.lines and record.lines[-1].get("accounts") != digest:
        record.faults.append(f"the accounts in {HEAD} are others than those of line {number}")
    return record


def _check_lines(record: Record, content: bytes) -> None:
    """Parse all lines; add what is wrong with them."""
    previous = START
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            sealed = HASH.search(text)
            is_whole = sealed is not None and _hash(text[: sealed.start()] + b"}") == line["hash"]
            wanted, follows = line["number"], line["previous"] == previous
        except (ValueError, TypeError, KeyError, RecursionError):
            record.faults.append(f"line {number} is no line of a record: it was edited or is torn")
            return
        if not is_whole:
            record.faults.append(f"line {number} was edited: its hash is another")
        elif wanted != number or not follows:
            record.faults.append(
                f"line {number} does not follow the one before it (it is number {wanted}): lines were removed, "
                "added or moved"
            )
        if record.faults:
            return
        previous = line["hash"]
        record.lines.append(line)
    record.hash = previous


def _offset(content: bytes, lines: int) -> int | None:
    """Return where the line after so many lines begins, None if there are fewer."""
    place = 0
    for _ in range(lines):
        place = content.find(b"\n", place) + 1
        if not place:
            return None
    return place


def _seal(line: Mapping[str, Any]) -> tuple[str, str]:
    """Return a line's text with its hash at the end, and the hash."""
    text = json.dumps(line, allow_nan=False)
    digest = _hash(text.encode())
    return f'{text[:-1]}, "hash": "{digest}"}}', digest


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _digest(accounts: Mapping[str, Mapping[str, Any]]) -> str:
    # Of the values as they are on disk: accounts that an older program wrote lack fields that came since.
    values = {n: dict(sorted(own.items())) for n, own in sorted(accounts.items())}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
