"""Who decides in a window: its champion alone, or together with champions of windows before it.

A walk keeps what it needs of them in ``champions/``, each by the number of the first window that had it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.walkforward.training import champion_in, keep_champion, titles_lost_in
from training.checkpoint import Checkpoint, CheckpointError

FOLDER = "champions"


@dataclass(frozen=True)
class Champions:
    """The champions of a walk."""

    folder: Path  # of the walk
    together: int  # so many decide, the newest ones
    is_fresh: bool  # each window has a training of its own

    def of(self, number: int, training: Path, results: Sequence[Mapping[str, Any]]) -> list[Checkpoint]:
        """Return the champions that decide in a window, its own first; none: it is spent in cash.

        Args:
            number: of the window.
            training: the folder of its training.
            results: of the windows before it.

        Raises:
            CheckpointError: a champion was removed, or is damaged.
            OSError: one cannot be kept.
        """
        own = champion_in(training)
        if own is None or self.together == 1:
            return [own] if own else []
        windows = self._windows([*results, {"number": number, "champion": own.name}])
        keep_champion(training, self._path(windows[0]))
        try:
            former = [Checkpoint.read(self._path(window)) for window in windows[1:]]
        except CheckpointError as error:
            text = f"{error}; put it back, or begin another walk with --output"
            raise CheckpointError(text) from error
        lost = set() if self.is_fresh else titles_lost_in(training)
        return [own, *(champion for champion in former if champion.name not in lost)]

    def drop_others(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Remove what no window after these needs."""
        needed = {self._path(window) for window in self._windows(results)}
        for path in (self.folder / FOLDER).glob("*.pt"):
            if path not in needed:
                path.unlink()

    def _windows(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the first window of each of the newest champions, the newest one first."""
        first: dict[object, int] = {}
        for row in rows:
            if row["champion"]:
                first.setdefault(row["number"] if self.is_fresh else row["champion"], row["number"])
        return [*reversed(first.values())][: self.together]

    def _path(self, window: int) -> Path:
        return self.folder / FOLDER / f"{window:04d}.pt"
