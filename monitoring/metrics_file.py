"""``metrics.jsonl``: one line of JSON per epoch, for every program that reads."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

NAME = "metrics.jsonl"
BYTES_PER_EPOCH = 4_096  # an upper bound: how far back to read for a number of epochs


def append_metrics(folder: Path, metrics: Row) -> None:
    """Append one epoch as a line of JSON, with the time.

    Raises:
        OSError: the file cannot be written.
    """
    # JSON has no NaN or infinity, and most readers refuse Python's spelling.
    finite = {name: value if is_finite(value) else None for name, value in metrics.items()}
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **finite}, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(folder: Path, epochs: int, up_to_transitions: int) -> list[dict[str, Any]]:
    """Return the newest epochs of ``metrics.jsonl``, each once, up to where a start resumes.

    Lines that are not an epoch are skipped: another program may have changed the file.
    """
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), (folder / NAME).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - epochs * BYTES_PER_EPOCH))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("transitions"), int):
                    # A later start resumed from a checkpoint before these epochs and did them again.
                    while found and found[-1]["transitions"] >= row["transitions"]:
                        found.pop()
                    found.append(row)
    return [row for row in found if row["transitions"] <= up_to_transitions][-epochs:]


def is_finite(value: Any) -> bool:
    """Whether a value is no float, or a finite one."""
    return not isinstance(value, float) or math.isfinite(value)
