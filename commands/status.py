"""The commands ``status`` and ``dashboard``: a training of this machine, looked at from another process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from monitoring import attach, live, summary
from monitoring.attach import Attached, NothingPublished
from monitoring.format import shortened, wrap
from monitoring.summary import Fact
from runtime import health
from runtime.control import EXIT_SETTING, ExitProgram, log_dir_of

if TYPE_CHECKING:
    from continuous_training import Settings

NEWEST_LINES = 6
LABEL = 10  # columns


def find(settings: Settings) -> Attached:
    """Return the training of these settings.

    Raises:
        ExitProgram: none has run with this log_dir; the text names those that run with another one.
    """
    attached = Attached(Path(settings.log_dir), Path(settings.checkpoint_dir))
    try:
        attached.read()
    except NothingPublished as error:
        others = ", ".join(f"--log-dir {folder}" for folder in _living())
        raise ExitProgram(EXIT_SETTING, f"{error}{f'; running now: {others}' if others else ''}") from None
    return attached


def _living() -> Iterator[Path]:
    """Yield the log_dir of every training of this machine that runs under a supervisor."""
    for folder in health.living():
        if log_dir := log_dir_of(folder):
            yield log_dir


def show(attached: Attached, emit: Callable[..., object], as_json: bool) -> int:
    """Print the training on one screen, or as one JSON object.

    Args:
        attached: the training.
        emit: takes a line, and the colour ``fg``.
        as_json: for machines.

    Returns:
        The exit code: 0 if it runs or has ended as it should, 1 if it failed or gives no sign of life.
    """
    state = attached.read()
    if as_json:
        emit(json.dumps(summary.as_json(state), indent=1))
    else:
        width = shutil.get_terminal_size((80, 24)).columns
        for fact in summary.facts(state):
            for line in lines_of(fact, width):
                emit(line, fg="yellow" if fact.needs_attention else None)
        for number, news in enumerate(summary.newest_lines(state, NEWEST_LINES)):
            text = shortened(news.text, width - LABEL)
            emit(f"{'' if number else 'lines':<{LABEL}}{text}", fg="yellow" if news.is_warning else None)
    return int(state.has_failed or (state.ended is None and not attach.is_alive(state)))


def lines_of(fact: Fact, width: int) -> list[str]:
    """Return a fact as lines: its text goes on below itself."""
    parts = wrap(fact.text, width - LABEL)
    return [f"{'' if number else fact.label:<{LABEL}}{part}" for number, part in enumerate(parts)]


def watch(attached: Attached) -> None:
    """Show the training's dashboard until Ctrl+C; the training notices nothing.

    Raises:
        ExitProgram: the output is no terminal.
    """
    if not live.watch(attached.read, sys.stdout):
        raise ExitProgram(EXIT_SETTING, "dashboard needs a terminal; elsewhere use status, or status --json")
