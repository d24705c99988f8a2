"""How long work tells where it is, without knowing who listens (a terminal, a log, nobody)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by a source while it refreshes. Calls may come from any thread."""

    def start(self, source: str, what: str, total: int | None) -> None:
        """A source begins ``total`` units of work (None: not known), such as "month files"."""

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """``units`` more are done, which cost ``num_bytes`` of download."""

    def finish(self, source: str, summary: str) -> None:
        """The source is done; ``summary`` is one line for the user."""

    def warn(self, source: str, message: str) -> None:
        """Something was skipped, dropped or set aside; training goes on. One line."""


class Silence:
    """A Progress that nobody hears, for library use and tests."""

    def start(self, source: str, what: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Ignore."""

    def finish(self, source: str, summary: str) -> None:
        """Ignore."""

    def warn(self, source: str, message: str) -> None:
        """Ignore."""


class Warned(Silence):
    """A Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, source: str, message: str) -> None:
        """Keep it, with the source's name in front."""
        self.warnings.append(message if message.lower().startswith(source) else f"{source}: {message}")
