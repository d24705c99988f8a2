"""The champion's title: what can be claimed of it, and whether it has lost it, by the ledger and the record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import record
from evaluation.evidence import LOST, PROVEN, most_of
from evaluation.record_summary import Line, daily_returns_of

BY_EXAM, BY_RECORD, NOT_PROVEN = "proven by its exam", "proven by the record", "the best so far, not proven"


@dataclass(frozen=True)
class Title:
    """What the record says about a champion and its forerunners."""

    is_proven: bool  # together they have an edge, on days that came after them
    loss: str  # why the champion loses its title; empty if it keeps it


def title_of(champion: str, folder: Path) -> Title:
    """Judge by the record in a folder; one that was edited says nothing.

    Raises:
        OSError: the record cannot be read.
    """
    kept = record.read(folder)
    return Title(False, "") if kept.faults else judge(champion, kept.lines)


def judge(champion: str, lines: Iterable[Line]) -> Title:
    """Judge by lines of a record.

    Bets on the days of all champions grow 40-fold in at most 2.5 % of worthless trainings, ever; bets against the
    own days of a champion that loses nothing grow 20-fold in at most 5 % of cases.
    """
    lines = list(lines)
    own = daily_returns_of(lines, champion)
    against, loss = most_of(-own), ""
    if against >= LOST:
        total = np.prod(1 + own) - 1
        loss = f"{champion} lost the title, with {total:+.2%} on {len(own)} days of the record"
    return Title(most_of(daily_returns_of(lines)) >= PROVEN, loss)


def claim_of(is_edge: bool, title: Title) -> str:
    """Return what can be claimed of a champion: by the exam that made it the champion, and by the record."""
    if is_edge:
        return BY_EXAM
    return BY_RECORD if title.is_proven else NOT_PROVEN
