"""``status.json`` in log_dir: what a training says of itself every few seconds, for who looks from elsewhere.

Beside it, ``metrics.jsonl`` has the epochs, ``train.log`` the lines, and ``ledger.jsonl`` of the checkpoint folder
the exams; ``monitoring/attach.py`` reads them all. Times in the file are seconds since 1970.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from monitoring.state import DashboardState, Task
from runtime.control import STOP_AT_EPOCH_END, STOP_NOW, Control
from runtime.files import move_over

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

NAME = "status.json"
FORMAT = 1
PUBLISH_SECONDS = 2.0
SILENT_SECONDS = 30.0  # after which a training that published is taken for dead
PLAIN: tuple[str, ...] = ("epochs", "runs", "checkpoint_every", "keep_checkpoints", "device", "run", "epoch")
PLAIN += ("transitions", "phase", "stopping", "rollbacks", "restarts", "host", "checkpoint_dir", "report_dir")
BY_SOURCE = ("newest_ns", "symbols", "days_late")
STOPPING = {
    STOP_AT_EPOCH_END: "Stopping after this epoch, with checkpoint and summary. Ctrl+C again ends at once.",
    STOP_NOW: "Saving at the next safe point, then exit.",
}
MOMENTS = ("began", "epoch_began", "phase_began")


class Publisher:
    """Writes ``status.json`` from a thread of its own: a slow disk delays nothing else. A context manager."""

    def __init__(self, log_dir: Path, state: DashboardState, control: Control) -> None:
        self._path = log_dir / NAME
        self._state, self._control = state, control
        self._over = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(PUBLISH_SECONDS)
        if not self._thread.is_alive():
            self._write({"ended": time.time(), "has_failed": kind is not None})

    def _run(self) -> None:
        while not self._over.is_set():
            self._write({})
            self._over.wait(PUBLISH_SECONDS)

    def _write(self, additions: Mapping[str, Any]) -> None:
        self._state.stopping = describe_stop(self._control)
        folder = str(self._control.folder) if self._control.folder else None
        content = content_of(self._state.snapshot()) | {"pid": os.getpid(), "control": folder, **additions}
        temporary = self._path.with_name(f".{NAME}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
            move_over(temporary, self._path)  # not synced: it is worth nothing after a power cut
        except OSError as error:
            if not self._has_failed:
                log.warning(
                    f"{self._path} cannot be written: {error.strerror}; status and dashboard --attach lag"
                )
            self._has_failed = True
        else:
            self._has_failed = False


def describe_training(
    state: DashboardState, settings: Settings, keep_checkpoints: int, control: Control
) -> None:
    """Fill in what stays the same during a start."""
    state.epochs, state.runs = settings.epochs, settings.runs
    state.checkpoint_every, state.keep_checkpoints = settings.checkpoint_every, keep_checkpoints
    state.checkpoint_dir = str(Path(settings.checkpoint_dir).absolute())
    state.report_dir = str(Path(settings.report_dir).absolute())
    state.host = socket.gethostname()
    state.restarts, began = control.restarts()
    state.began = time.monotonic() - max(0.0, time.time() - began)


def describe_stop(control: Control) -> str:
    """Return the request to stop in words, "" without one."""
    with contextlib.suppress(FileNotFoundError):  # the supervisor has just ended
        return STOPPING.get(control.stop_level, "")
    return ""


def content_of(state: DashboardState) -> dict[str, Any]:
    """Return what is published of a snapshot, as plain types."""
    now = time.time()
    return {
        "format": FORMAT,
        "time": now,
        **{name: getattr(state, name) for name in PLAIN},
        **{name: dict(getattr(state, name)) for name in BY_SOURCE},
        **{name: now - (state.now - getattr(state, name)) for name in MOMENTS},
        "tasks": [[task.source, task.unit, task.total, task.done] for task in state.tasks.values()],
    }


def fill_in(state: DashboardState, content: Mapping[str, Any]) -> None:
    """Set what was published; times become those of this process.

    Raises:
        ValueError: it is of another version.
    """
    if content.get("format") != FORMAT:
        raise ValueError(f"{NAME} is of another version of the program")
    for name in PLAIN:
        setattr(state, name, content[name])
    for name in BY_SOURCE:
        setattr(state, name, dict(content[name]))
    now = time.time()
    for name in MOMENTS:
        setattr(state, name, state.now - max(0.0, now - content[name]))
    state.tasks = {source: Task(source, unit, total, done) for source, unit, total, done in content["tasks"]}
    state.silence = max(0.0, now - content["time"])
    state.ended, state.has_failed = content.get("ended"), bool(content.get("has_failed"))
