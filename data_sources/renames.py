"""Symbols that were renamed: the table ``renames.csv`` beside this file, and one of the user's own in the lake.

    setting,old,new,first_day,ratio,source       ratio: new units for an old one; prices are divided by it

Bars do not say it: Polygon's files have FB until the day before ``first_day`` and META from then on, Binance
closes one pair and opens another. The same names may be other companies' before and after (META was a fund until
2022-01, FB is one since 2025), so a name counts only on its side of the day.
"""

from __future__ import annotations

import csv
import datetime as dt
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_sources.calendar import new_york_midnight_ns
from data_sources.errors import LakeError, lake_errors

FILE_NAME = "renames.csv"
FOREVER_NS = 2**62
SHIPPED = Path(__file__).with_name(FILE_NAME)


@dataclass(frozen=True)
class Rename:
    """``old`` of a setting's symbols is ``new`` from ``first_day`` on, at ``ratio`` new units for an old one."""

    setting: str
    old: str
    new: str
    first_day: dt.date
    ratio: float = 1.0
    source: str = ""

    @property
    def first_ns(self) -> int:
        """Where the day begins in New York, ns UTC."""
        return new_york_midnight_ns(self.first_day)

    def __str__(self) -> str:
        return f"{self.old} is {self.new} since {self.first_day}"


def read(root: Path) -> tuple[Rename, ...]:
    """Return the known renames, oldest first; of one old name and day the user's own counts.

    Args:
        root: of the lake, which may have a table of the user's.

    Raises:
        LakeError: the user's table cannot be read; names the line where it can.
    """
    known = {(rename.setting, rename.old, rename.first_day): rename for rename in _shipped()}
    path = Path(root) / FILE_NAME
    with lake_errors("read", path):
        content = path.read_bytes() if path.exists() else b""
    try:
        text = content.decode("utf-8-sig")  # spreadsheets write a mark before it
    except UnicodeDecodeError as error:
        raise LakeError(f"{path} must be text in UTF-8: save it as CSV UTF-8") from error
    known |= {(rename.setting, rename.old, rename.first_day): rename for rename in _parse(path, text)}
    return tuple(sorted(known.values(), key=lambda rename: rename.first_day))


def successor(renames: Iterable[Rename], symbol: str) -> Rename | None:
    """Return the newest rename of a symbol, None for one that keeps its name, or took it up again."""
    own = [rename for rename in renames if symbol in (rename.old, rename.new)]
    return own[-1] if own and own[-1].old == symbol else None


@dataclass(frozen=True)
class Stretch:
    """When a symbol had which name: [start_ns, end_ns), ns UTC. Prices of then are divided by ``ratio``."""

    name: str
    start_ns: int
    end_ns: int
    ratio: float


def stretches(renames: Sequence[Rename], setting: str, symbol: str) -> list[Stretch]:
    """Return the names that a symbol had, oldest first: itself alone, if it was never renamed.

    What a name was before it became this symbol's, or after it ceased to be, is another symbol's. A symbol that
    has another name by now ends there.
    """
    own = [rename for rename in renames if rename.setting == setting]
    last = successor(own, symbol)
    name, end_ns, ratio = symbol, last.first_ns if last else FOREVER_NS, 1.0
    found: list[Stretch] = []
    while True:
        before = [rename for rename in own if rename.new == name and rename.first_ns < end_ns]
        start_ns = before[-1].first_ns if before else 0
        found.append(Stretch(name, start_ns, end_ns, ratio))
        if not before:
            return found[::-1]
        name, end_ns, ratio = before[-1].old, start_ns, ratio * before[-1].ratio


def former(
    renames: Sequence[Rename], setting: str, symbols: Iterable[str], start_ns: int, end_ns: int
) -> list[Stretch]:
    """Return when in [start_ns, end_ns) symbols had names that are not among them."""
    names = set(symbols)
    return [
        stretch
        for symbol in sorted(names)
        for stretch in stretches(renames, setting, symbol)
        if stretch.name not in names and stretch.start_ns < end_ns and start_ns < stretch.end_ns
    ]


@cache
def _shipped() -> tuple[Rename, ...]:
    return tuple(_parse(SHIPPED, SHIPPED.read_text(encoding="utf-8")))


def _parse(path: Path, text: str) -> list[Rename]:
    found = []
    try:
        rows = list(csv.DictReader(text.splitlines(), restval=""))
    except csv.Error as error:
        raise LakeError(f"{path} is no table of renames: {error}") from error
    for number, row in enumerate(rows, 2):
        try:
            ratio = float(row["ratio"] or 1)
            day = dt.date.fromisoformat(row["first_day"].strip())
            setting, old, new = (row[name].strip() for name in ("setting", "old", "new"))
            if not (setting and old and new and old != new and 0 < ratio < math.inf):
                raise ValueError
        except (KeyError, ValueError, TypeError) as error:
            form = "stocks,FB,META,2022-06-09,1,why, below setting,old,new,first_day,ratio,source"
            raise LakeError(f"{path}, line {number}: expected a rename such as {form}") from error
        found.append(Rename(setting, old, new, day, ratio, row["source"]))
    return found
