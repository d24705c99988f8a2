"""Tables that fit a terminal: columns are left out until the rest fits, and no cell is ever cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP = 2  # columns between two of a table


def fit(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, spare: Iterable[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Leave out columns of ``spare``, the first ones first, until the table is at most ``width`` wide.

    Columns that say nothing, such as 0 rejected bars in every row, go before any other of them.
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    kept = dict.fromkeys(columns)
    spare = [name for name in spare if name in kept]
    silent = {name for number, name in enumerate(columns) if {row[number] for row in rows} <= {"0", ""}}
    for name in sorted(spare, key=lambda name: name not in silent):
        if sum(widths[columns.index(left)] + GAP for left in kept) - GAP <= width:
            break
        del kept[name]
    numbers = [columns.index(name) for name in kept]
    return list(kept), [[row[number] for number in numbers] for row in rows]


def lay_out(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a heading and the rows as lines; columns of numbers are aligned right."""
    aligned = []
    for column in zip(columns, *rows, strict=True):
        width = max(map(len, column))
        right = all(map(is_number, column[1:]))
        aligned.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return [(" " * GAP).join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def is_number(text: str) -> bool:
    """Whether a cell is a number, or empty."""
    digits = text.replace(",", "").replace(".", "").replace("%", "").replace("-", "").replace("+", "")
    return digits.isdigit() or not text
