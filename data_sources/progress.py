"""Progress reporting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Receives what a source reports while it refreshes. Calls may come from any thread."""

    def start(self, source: str, what: str, total: int | None) -> None:
        """A source begins ``total`` units of work (None: unknown), such as "month files"."""

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """``units`` more are done, after downloading ``num_bytes``."""

    def finish(self, source: str, summary: str) -> None:
        """The source is done; ``summary`` is one line for the user."""

    def warn(self, source: str, message: str) -> None:
        """Something was skipped, dropped or set aside, and training continues; one line for the user."""


class NullProgress:
    """A Progress that ignores everything."""

    def start(self, source: str, what: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Ignore."""

    def finish(self, source: str, summary: str) -> None:
        """Ignore."""

    def warn(self, source: str, message: str) -> None:
        """Ignore."""


class Waiting:
    """Reports the wait for another process that refreshes the lake; called a few times a second meanwhile."""

    def __init__(self, root: Path, progress: Progress) -> None:
        self._root, self._progress = root, progress
        self._began_ns = 0
        self.nanoseconds = 0

    def __call__(self, holder: str) -> None:
        """Report the wait for ``holder``, such as "process 123"."""
        if not self._began_ns:
            self._began_ns = time.monotonic_ns()
            self._progress.start("lake", f"waiting for {holder}, which refreshes {self._root}", None)
        self._progress.advance("lake", 0)

    def end(self) -> None:
        """Stop counting."""
        if self._began_ns:
            self.nanoseconds = time.monotonic_ns() - self._began_ns
            seconds = self.nanoseconds / 1e9
            self._progress.finish(
                "lake", f"waited {seconds:.0f} s for another process to refresh {self._root}"
            )


class WarningCollector(NullProgress):
    """A Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, source: str, message: str) -> None:
        """Keep the message, with the source's name in front."""
        self.warnings.append(message if message.lower().startswith(source) else f"{source}: {message}")
