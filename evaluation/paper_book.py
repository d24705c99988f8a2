"""A paper account's folder: where it stands, and what it did, on disk after every minute.

    paper.state   the accounts, the decisions that wait for their fill, and the newest lines
    paper.jsonl   one JSON object a line: fills, bars that came late, and all that was said

The state is written first, whole, with the minute's lines in it; then they are appended. After a kill in between
the next start appends them: no fill is lost, and none comes twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from envs.open_group_env import account_of
from evaluation.paper import PaperState
from runtime.files import append_durably, make_folder, write_atomically

STATE, LINES = "paper.state", "paper.jsonl"
FORMAT = 1


class BookError(Exception):
    """The folder cannot be gone on with; the text is one line."""


@dataclass
class Book:
    """A folder's content; ``identity`` says whose accounts these are."""

    folder: Path
    identity: dict[str, Any]
    state: PaperState = field(default_factory=PaperState)
    extra: dict[str, Any] = field(default_factory=dict)  # of the command: totals, a portfolio
    size: int = 0  # of ``LINES``
    is_new: bool = True

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Book:
        """Open a folder, and complete what a kill left undone; a new one is empty.

        Raises:
            BookError: it is another account's, or a file in it was edited or is damaged.
            OSError: it cannot be read or written.
        """
        book = cls(folder, dict(identity))
        try:
            content = json.loads((folder / STATE).read_bytes())
            theirs, kept, start = content["identity"], content["state"], int(content["size"])
            texts = "".join(f"{line}\n" for line in content["lines"]).encode()
            book.state, book.extra = _state_of(kept), content["extra"]
        except FileNotFoundError:
            if (folder / LINES).exists():
                raise BookError(
                    f"{folder / STATE} is missing beside {LINES}: put it back, or use another --output"
                ) from None
            return book
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BookError(
                f"{folder / STATE} is damaged: put the right one back, or use another --output"
            ) from error
        other = [name for name, value in book.identity.items() if theirs.get(name) != value]
        if other:
            raise BookError(
                f"{folder} has accounts of another {', '.join(other)}: use another --output, or what they began "
                "with"
            )
        try:
            size = (folder / LINES).stat().st_size
        except FileNotFoundError:
            size = 0
        if size < start or size > start + len(texts):
            raise BookError(
                f"{folder / LINES} has {size:,} bytes, {STATE} knows of {start + len(texts):,}: it was edited"
            )
        book.size, book.is_new = start, False
        book._write(texts)
        return book

    def save(self, state: PaperState, extra: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep a minute: all of it or, where this raises, nothing.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        texts = [json.dumps(line, allow_nan=False) for line in lines]
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "state": asdict(state),
            "extra": dict(extra),
            "size": self.size,
            "lines": texts,
        }
        text = json.dumps(content, allow_nan=False).encode()
        make_folder(self.folder)
        write_atomically(self.folder / STATE, lambda file: file.write(text))
        self.state, self.extra, self.is_new = state, dict(extra), False
        self._write("".join(f"{line}\n" for line in texts).encode())

    def _write(self, texts: bytes) -> None:
        """Let the lines end with these."""
        if not texts and not self.size:
            return
        append_durably(self.folder / LINES, texts, self.size)
        self.size += len(texts)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines, oldest first."""
        try:
            content = (self.folder / LINES).read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in content.splitlines()]


def _state_of(kept: Mapping[str, Any]) -> PaperState:
    return PaperState(
        minute_ns=int(kept["minute_ns"]),
        accounts={n: {key: account_of(a) for key, a in own.items()} for n, own in kept["accounts"].items()},
        decided={
            key: {int(at): _targets_of(targets) for at, targets in own.items()}
            for key, own in kept["decided"].items()
        },
        seen={
            s: {int(bar): (float(p[0]), float(p[1])) for bar, p in own.items()}
            for s, own in kept["seen"].items()
        },
        groups={name: tuple(symbols) for name, symbols in kept.get("groups", {}).items()},
    )


def _targets_of(kept: float | Sequence[float]) -> tuple[float, ...]:
    # Before there were accounts over groups, a number.
    return (float(kept),) if isinstance(kept, int | float) else tuple(map(float, kept))
