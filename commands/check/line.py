"""One line of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.control import EXIT_SETTING


@dataclass(frozen=True)
class Line:
    """What was looked at, how it is, and the fix where it is not well.

    ``code`` is the exit code of a start that meets this error; 0 for what is none.
    """

    topic: str
    level: Literal["OK", "warning", "error"]
    text: str
    code: int = 0

    @staticmethod
    def setting(text: str) -> Line:
        """Return the error of a setting."""
        return Line("settings", "error", f"Invalid setting: {text}", EXIT_SETTING)


def size(num_bytes: float) -> str:
    """Say a size in GB, a small one in MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
