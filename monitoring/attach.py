"""A training seen from another process: the state of its dashboard, read from the files that it writes.

Nothing is locked and nothing is written: any number may look, at a training that runs, hangs or has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from monitoring import exams, health, metrics_file, published
from monitoring.machine import Disk, read_disk
from monitoring.state import HEALTH_EPOCHS, KEPT_EPOCHS, KEPT_LINES, DashboardState, Line
from runtime.files import identity_of
from runtime.train_log import NAME as TRAIN_LOG

T = TypeVar("T")

LINE_BYTES = 300  # of a line of train.log, generously
DISK_SECONDS = 10.0
FOREVER = 2**62


class NothingPublished(Exception):
    """No training has published anything here; the text says what was looked for."""


class FileCache:
    """Files as they were read, and read again only when they have changed."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[Any, Any]] = {}  # by file: its stamp, and what was read of it

    def read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Return what a file holds, read again if it has changed; None where it cannot be read."""
        try:
            stamp = identity_of(path)
            if self._kept.get(path, (None,))[0] != stamp:
                self._kept[path] = stamp, read(path)
        except (OSError, ValueError):  # not there, or not readable for us
            return None
        content: T = self._kept[path][1]
        return content


class FolderReader:
    """Reads the exams and the disk of the checkpoint folder that a state names."""

    def __init__(self, files: FileCache | None = None) -> None:
        self._files = files or FileCache()
        self._disk, self._disk_due = Disk(), 0.0

    def read(self, state: DashboardState) -> None:
        """Set the exams and the disk of a state; the disk is measured now and then."""
        folder = Path(state.checkpoint_dir)
        if time.monotonic() >= self._disk_due:
            self._disk, self._disk_due = read_disk(folder), time.monotonic() + DISK_SECONDS
        state.disk = self._disk
        state.exams = self._files.read(folder / exams.NAME, exams.read_exams) or []


class Attached:
    """Reads one training's files again whenever they have changed.

    Args:
        log_dir: of the training.
        checkpoint_dir: of the training, for what it has not published itself.
    """

    def __init__(self, log_dir: Path, checkpoint_dir: Path) -> None:
        self._log_dir, self._checkpoint_dir = log_dir, checkpoint_dir
        self._files = FileCache()
        self._folder = FolderReader(self._files)

    def read(self) -> DashboardState:
        """Return the state of this moment.

        Raises:
            NothingPublished: there is no training to look at.
        """
        state = DashboardState()
        content: dict[str, Any] = self._files.read(self._log_dir / published.NAME, _read_object) or {}
        history: list[dict[str, Any]] = (
            self._files.read(self._log_dir / metrics_file.NAME, _read_history) or []
        )
        if not content and not history:
            raise NothingPublished(
                f"{self._log_dir} has neither {published.NAME} nor {metrics_file.NAME}: no training has run with "
                "this log_dir; give the --log-dir, or the --demo, of its start"
            )
        if history:
            state.history = list(history)
            newest = history[-1]
            state.run, state.epoch = int(newest.get("run", 0)), int(newest.get("epoch", 0))
            state.transitions = newest["transitions"]
        reached = state.run, state.epoch, state.transitions
        try:
            published.fill_in(state, content)
            if not state.run:  # the start has not begun a run, or was refused: those before it have
                state.run, state.epoch, state.transitions = reached
        except (ValueError, KeyError, TypeError, AttributeError):  # of another version, or none
            state.silence = time.time() - (self._log_dir / metrics_file.NAME).stat().st_mtime
            state.checkpoint_dir, state.epochs = str(self._checkpoint_dir), max(1, state.epoch)
        self._folder.read(state)
        state.findings = health.findings(state.history[-HEALTH_EPOCHS:])
        state.lines = (
            self._files.read(self._log_dir / TRAIN_LOG, lambda path: _read_lines(path, KEPT_LINES)) or []
        )
        return state


def is_alive(state: DashboardState) -> bool:
    """Whether the training still publishes."""
    return state.ended is None and state.silence <= published.SILENT_SECONDS


def describe_life(state: DashboardState) -> str:
    """Return in words whether the training runs, "" while it does."""
    if state.ended is not None:
        how = "ended by an error" if state.has_failed else "ended"
        return f"{how} {_when(state.ended)}{'; train.log has it' if state.has_failed else ''}"
    if is_alive(state):
        return ""
    return f"not running: its last sign of life was {_when(time.time() - state.silence)}"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _read_history(path: Path) -> list[dict[str, Any]]:
    return metrics_file.read_metrics(path.parent, KEPT_EPOCHS, FOREVER)


def _read_lines(path: Path, count: int) -> list[Line]:
    """Return the newest lines of train.log; a line's further lines, such as a traceback's, count as its own."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - count * LINE_BYTES))
        texts = file.read().decode("utf-8", "replace").splitlines()
    now, clock = time.monotonic(), time.time()
    lines: list[Line] = []
    for text in texts[-count:]:
        stamp, _, rest = text.partition(" ")
        try:
            at = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
            level, _, message = rest.partition(" ")
        except ValueError:
            if not lines:
                continue
            level, message, at = (
                ("WARNING" if lines[-1].is_warning else "INFO"),
                text,
                clock - (now - lines[-1].at),
            )
        lines.append(Line(now - (clock - at), message.strip(), level not in ("INFO", "DEBUG")))
    return lines
