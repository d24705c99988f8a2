"""The ledger of exams: one JSON object per line, only ever appended to, whole whatever kills the writer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files import sync_folder

NAME = "ledger.jsonl"
Line = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """Return every exam on record, oldest first; a line that a kill tore, or that is no exam, is left out.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line for text in content.splitlines() if (line := _parsed(text)) is not None]


def key_of(line: Line) -> tuple[Any, ...]:
    """Return what makes two lines the same exam: an epoch that is played again on the same bars is one trial."""
    return line["run"], line["epoch"], line["data"]


def append(path: Path, line: Line) -> None:
    """Add one exam; after this returns it outlives a power cut. A torn last line is taken away first.

    Raises:
        OSError: the disk is full, or the file cannot be written; what was on record stays.
    """
    text = json.dumps(line, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    size = _whole_size(path)
    # A last line that only lacks its end is an exam all the same.
    text = b"\n" + text if _lacks_end(path, size) else text
    with path.open("ab", buffering=0) as file:
        file.truncate(size)
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if is_new:
        sync_folder(path.parent)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        key_of(line)
    except (ValueError, TypeError, KeyError):
        return None
    return dict(line)


def _whole_size(path: Path) -> int:
    # Bytes up to the end of the last line that is whole.
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    return len(content) if _parsed(content[end:]) is not None else end


def _lacks_end(path: Path, size: int) -> bool:
    return size > 0 and path.read_bytes()[size - 1 : size] != b"\n"
