"""Options of commands, read as soon as the command line is: a mistake is refused before PyTorch loads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from data_sources.calendar import date_ns
from runtime.control import EXIT_SETTING, ExitProgram


def option(name: str, read: Callable[[str, str], Any], help_text: str, kind: str = "str") -> Any:
    """Return an option for typer.

    Args:
        name: such as --from.
        read: takes the name and the text as typed, returns the value; a ValueError says what is wrong.
        help_text: for ``--help``.
        kind: how its type is shown.
    """

    def parse(text: Any) -> Any:  # or the default, as it is
        from commands.cli import exit_with  # which imports the commands, and they this

        try:
            return read(name, text) if isinstance(text, str) and text else text
        except ExitProgram as refusal:
            exit_with(refusal.code, str(refusal))
        except ValueError as error:
            exit_with(EXIT_SETTING, f"Invalid setting: {error}")

    return typer.Option(name, help=help_text, parser=parse, metavar=f"<{kind}>")


def read_count(name: str, text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise ValueError(f"{name} {text} must be a whole number of 1 or more")
    return int(text)


def read_number(name: str, text: str) -> float:
    """Read a number of any range, which the command checks."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} {text} must be a number, such as 1.5") from None


def read_costs(name: str, text: str) -> str:
    """Check the costs of a ladder."""
    parse_costs(text, name)
    return text


def read_day(name: str, text: str) -> str:
    """Check a day."""
    parse_day_ns(name, text)
    return text


def read_moment(name: str, text: str) -> str:
    """Check a time."""
    parse_moment(name, text)
    return text


def read_holding(_name: str, text: str) -> str:
    """Check a position that is held."""
    parse_holding(text)
    return text


def read_checkpoint(_name: str, text: str) -> Path:
    """Check that a file is there; "best", and an export's folder, are looked for later."""
    path = _located(text)
    if path.suffix and not os.path.lexists(path):
        raise ExitProgram(EXIT_SETTING, f"{path} cannot be read: No such file or directory")
    return Path(text)


def read_output(_name: str, text: str) -> Path:
    """Check that a file's folder is there."""
    path = _located(text)
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder")
    return Path(text)


def parse_costs(text: str, name: str = "--costs") -> tuple[float, ...]:
    """Return the costs of a ladder, in basis points, ascending.

    Raises:
        ValueError: a cost is not a number of 0 or more.
    """
    try:
        costs = tuple(sorted({float(word) for word in text.split(",") if word.strip()}))
    except ValueError:
        costs = (-1.0,)
    if not all(0 <= cost < math.inf for cost in costs):
        raise ValueError(f"{name} {text} must be basis points of 0 or more, such as 0,1,2,5,10")
    return costs


def parse_day_ns(name: str, text: str) -> int:
    """Return the begin of a day, UTC.

    Raises:
        ValueError: it is none.
    """
    try:
        return date_ns(text)
    except ValueError:
        raise ValueError(f"{name} {text} must be a day such as 2026-11-20") from None


def parse_moment(name: str, text: str) -> datetime:
    """Return a time.

    Raises:
        ValueError: it is none.
    """
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} {text} must be a time in UTC such as 2026-11-20T14:30") from None


def parse_holding(text: str) -> tuple[str, float]:
    """Return the symbol and the position of SYMBOL=POSITION.

    Raises:
        ValueError: it has another form.
    """
    symbol, _, number = text.partition("=")
    try:
        return symbol.strip(), float(number)
    except ValueError:
        raise ValueError(f"--holding {text} must be such as BTCUSDT=1") from None


def _located(text: str) -> Path:
    from commands.cli import locate

    return Path(locate(text))
