"""``--help`` on a terminal of 80 columns: names of options stay whole, their texts are broken instead."""

from __future__ import annotations

from typing import Any

from typer import rich_utils


class _Table(rich_utils.Table):
    """Typer's table of options; Rich would make all of its columns equally narrow, and cut names off."""

    def add_row(self, *cells: Any, **style: Any) -> None:
        super().add_row(*cells, **style)
        *names, _type, text = self.columns
        for column in names:
            column.no_wrap = True
        text.overflow = "fold"
        self.collapse_padding = bool(names)  # else it is the list of commands


def keep_names_whole() -> None:
    """Lay out what ``--help`` shows from now on so that no name of an option is cut off."""
    rich_utils.Table = _Table  # type: ignore[misc]
