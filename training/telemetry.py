"""Where each epoch's figures go: ``metrics.jsonl``, TensorBoard's events beside it, and Prometheus if wanted."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.prometheus import Endpoint
from training.tensorboard import EventFile

Row = Mapping[str, Any]
NAME = "metrics.jsonl"
BYTES_PER_EPOCH = 4_096  # of metrics.jsonl, at most: how far back to read for so many epochs


class Telemetry:
    """Records figures. What cannot be written is a warning, once, and is tried again with the next epoch.

    Args:
        folder: ``log_dir``.
        prometheus_port: on 127.0.0.1; None: no endpoint. One that is taken is a warning.
        warn: told what went wrong, in one line.
    """

    def __init__(self, folder: Path, prometheus_port: int | None, warn: Callable[[str], None]) -> None:
        self._path = folder / NAME
        self._events = EventFile(folder)
        self._warn = warn
        self._failing: set[str] = set()
        self._endpoint: Endpoint | None = None
        if prometheus_port is not None:
            try:
                self._endpoint = Endpoint(prometheus_port)
            except OSError as error:
                warn(f"no Prometheus endpoint on port {prometheus_port}: {error.strerror}")

    def record(self, metrics: Row) -> None:
        """Keep one epoch's figures everywhere."""
        self._try("metrics.jsonl", lambda: self._append(metrics))
        self._try("TensorBoard's events", lambda: self._write_events(metrics))
        if self._endpoint is not None:
            self._endpoint.show(metrics)

    def close(self) -> None:
        """Close files and endpoint."""
        self._events.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _append(self, metrics: Row) -> None:
        # JSON has no word for what is not finite, and most readers refuse Python's.
        told = {name: value if _is_finite(value) else None for name, value in metrics.items()}
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **told}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped, allow_nan=False) + "\n")

    def _write_events(self, metrics: Row) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and _is_finite(v)}
        step = int(numbers.pop("transitions", 0))
        self._events.write(step, numbers)

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._failing:
                self._warn(f"{what} in {self._path.parent} cannot be written: {error.strerror or error}")
            self._failing.add(what)
        else:
            self._failing.discard(what)


def recorded(folder: Path, epochs: int, up_to_transitions: int) -> list[dict[str, Any]]:
    """Return the newest epochs in ``metrics.jsonl``, each once, up to where a start goes on.

    A file that another program has changed is no reason to stop: lines that are no epoch are left out.
    """
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), (folder / NAME).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - epochs * BYTES_PER_EPOCH))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("transitions"), int):
                    # What was recorded after the checkpoint that a later start went on from was taken back.
                    while found and found[-1]["transitions"] >= row["transitions"]:
                        found.pop()
                    found.append(row)
    return [row for row in found if row["transitions"] <= up_to_transitions][-epochs:]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
