"""The ledger of exams: one JSON object per line, append-only, intact even if the writer is killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.files import append_durably

NAME = "ledger.jsonl"
Line = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """Return every exam in the ledger, oldest first, without torn lines and lines that are no exam.

    Raises:
        OSError: the file exists and cannot be read.
    """
    content = _content(path) or b""
    return [line for text in content.splitlines() if (line := _parse(text)) is not None]


def key_of(line: Line) -> tuple[Any, ...]:
    """Return the identity of an exam: an epoch that is repeated on the same bars is one trial."""
    return line["run"], line["epoch"], line["data"]


def is_proven(champion: str, lines: Iterable[Line]) -> bool:
    """Return whether the exam that made a checkpoint the champion found an edge.

    Lines without a deflated probability are of before it was required, and prove nothing.
    """
    promotions = [
        line for line in lines if line.get("checkpoint") == champion and line.get("decision") == "promoted"
    ]
    return bool(promotions) and promotions[-1]["verdict"] == "edge" and "probability" in promotions[-1]


def append(path: Path, line: Line) -> None:
    """Add one exam, durably: once this returns, it survives a power cut. A torn last line is removed first.

    Raises:
        OSError: the disk is full, or the file cannot be written; earlier lines stay.
    """
    text = json.dumps(line, allow_nan=False).encode() + b"\n"
    content = _content(path)
    size = _intact_size(content or b"")
    # A last line without its newline is an exam all the same.
    text = b"\n" + text if content and size and content[size - 1 : size] != b"\n" else text
    append_durably(path, text, size)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        key_of(line)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return dict(line)


def _content(path: Path) -> bytes | None:
    # Not exists(), which takes a folder that cannot be read for an empty one: every line would be cut off.
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _intact_size(content: bytes) -> int:
    # Bytes up to the end of the last intact line.
    end = content.rfind(b"\n") + 1
    return len(content) if _parse(content[end:]) is not None else end
