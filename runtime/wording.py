"""Words for messages."""

from __future__ import annotations

from collections.abc import Sequence


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Return names as a list in a sentence, such as "a, b and 1,998 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count_of(number: int, noun: str) -> str:
    """Return "1 symbol", "42 symbols"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
