"""The lines of a check, and how they are printed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from monitoring.console import Console
from runtime.control import EXIT_OK, EXIT_SETTING

STYLES = {"OK": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Line:
    """The result of one check, with the fix where something is wrong.

    ``code`` is the exit code of a start that meets this error; 0 for the other levels.
    """

    topic: str
    level: Literal["OK", "warning", "error"]
    text: str
    code: int = EXIT_OK

    @staticmethod
    def setting(text: str) -> Line:
        """Return the error of a setting."""
        return Line("settings", "error", f"Invalid setting: {text}", EXIT_SETTING)


def print_report(lines: Iterable[Line], console: Console, as_json: bool) -> int:
    """Print the lines as they come, or one JSON object at the end.

    Returns:
        The exit code: that of the first error.
    """
    printed = []
    for line in lines:
        printed.append(line)
        if not as_json:
            console.print_line(f"{line.level:<8} {line.topic:<11} {line.text}", STYLES[line.level])
    code = next((line.code for line in printed if line.level == "error"), EXIT_OK)
    if as_json:
        checks = [{"topic": line.topic, "level": line.level, "text": line.text} for line in printed]
        console.emit(json.dumps({"ok": code == EXIT_OK, "exit_code": code, "checks": checks}, indent=1))
    else:
        counts = Counter(line.level for line in printed)
        parts = [f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in ("warning", "error")]
        console.print_line(f"{counts['OK']} ok, {', '.join(parts)}")
    return code
