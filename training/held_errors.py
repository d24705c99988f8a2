"""What workers write to standard error, kept off the dashboard: a traceback must outlive the alternate screen.

Standard library only: this runs in the supervisor.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import BinaryIO

MOST_SHOWN = 200_000  # bytes at a time, the newest


class HeldErrors:
    """A file that stands in for the terminal, and what was not yet shown of it. A context manager.

    Args:
        folder: where the file lies; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "errors"
        self.file: BinaryIO = path.open("ab")  # what workers get as their standard error
        self._reader = path.open("rb")

    def __enter__(self) -> HeldErrors:
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.file.close()
        self._reader.close()

    def show(self) -> None:
        """Write what has come since the last time to the terminal; nobody else may have it now."""
        if text := self._reader.read():
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(text[-MOST_SHOWN:])
                sys.stderr.flush()


def are_wanted() -> bool:
    """Tell whether a dashboard may come between: both outputs are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()
