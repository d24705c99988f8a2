"""The newest exam in words, from the lines of ``ledger.jsonl``: verdict, figures, champion.

Fields that a line lacks, such as those of an older program, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monitoring.health import number
from monitoring.state import DashboardState

Row = Mapping[str, Any]

NAME = "ledger.jsonl"
POLICY, BUY_AND_HOLD = "policy", "buy and hold"
NONE_YET = "No exam yet"


@dataclass(frozen=True)
class Verdict:
    """What people ask first. Every text is a sentence or a list of figures, "" if unknown."""

    headline: str = NONE_YET  # such as "No edge"
    reason: str = ""
    figures: str = ""  # returns and the Sharpe ratio with its interval
    champion: str = ""  # which, and since when
    record: str = ""  # what champions earned on bars that came after them
    about: str = ""  # what was examined, and when
    is_edge: bool = False


def read_exams(path: Path) -> list[dict[str, Any]]:
    """Return the exams of a ledger, oldest first, without lines that are none.

    Raises:
        OSError: it exists and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    exams = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and {"run", "epoch", "verdict"} <= line.keys():
            exams.append(line)
    return exams


def describe(exams: Sequence[Row]) -> Verdict:
    """Put the newest exam, and the newest decision for a champion, into words."""
    if not exams:
        return Verdict()
    exam = exams[-1]
    is_edge = exam.get("verdict") == "edge"
    return Verdict(
        headline="Edge" if is_edge else "No edge",
        reason=str(exam.get("verdict_reason") or ""),
        figures=_figures(exam),
        champion=describe_champion(exams),
        about=_about(exam, len(exams)),
        is_edge=is_edge,
    )


def verdict_of(state: DashboardState) -> Verdict:
    """Return the verdict on a training, with the record; one on bars that were made up says so."""
    verdict = replace(describe(state.exams), record=_record(state))
    if state.exams and list(state.newest_ns) == ["simulated"]:
        return replace(verdict, headline=f"{verdict.headline} on simulated bars")
    return verdict


def describe_champion(exams: Sequence[Row]) -> str:
    """Return which checkpoint is the champion, since when, and what is claimed of it; "" without exams."""
    for exam in reversed(exams):
        if exam.get("decision") == "promoted":
            claim = exams[-1].get("claim")  # none in lines of before it was kept
            return (
                f"{exam.get('checkpoint')} since {_minute(exam.get('time'))}{f', {claim}' if claim else ''}"
            )
        if exam.get("dethroned"):
            return f"none, {exam['dethroned']} lost the title"
    # The ledger may be younger than the champion.
    return str(exams[-1].get("champion") or "none yet") if exams else ""


def name_of(exam: Row) -> str:
    """Return which weights were examined."""
    return str(exam.get("checkpoint") or f"run {exam['run']} epoch {exam['epoch']}")


def returns_of(exam: Row) -> dict[str, float]:
    """Return the total return of every contestant of an exam, by name, as a fraction."""
    pooled = exam.get("pooled")
    if not isinstance(pooled, Mapping):
        return {}
    totals = {name: measures.get("total_return") for name, measures in pooled.items()}
    return {str(name): float(total) for name, total in totals.items() if isinstance(total, int | float)}


def _record(state: DashboardState) -> str:
    recorded = next(
        (row for row in reversed(state.history) if number(row, "record/return_percent") is not None), {}
    )
    names = ("record/return_percent", "record/buy_and_hold_percent", "record/days")
    figures = [number(recorded, name) for name in names]
    if None in figures:
        return ""
    earned, held, days = figures
    return f"champions {earned:+.1f}% on {days:.0f} days that came after them, buy and hold {held:+.1f}%"


def _figures(exam: Row) -> str:
    returns = returns_of(exam)
    parts = [f"{name} {returns[name]:+.1%}" for name in (POLICY, BUY_AND_HOLD) if name in returns]
    own = exam["pooled"][POLICY] if POLICY in returns else {}
    if isinstance(sharpe := own.get("sharpe"), int | float):
        text = f"Sharpe {sharpe:.1f}"
        if interval := own.get("sharpe_interval"):
            text += f" [{interval[0]:.1f}, {interval[1]:.1f}]"
        parts.append(text)
    return ", ".join(parts)


def _about(exam: Row, num_exams: int) -> str:
    parts = [name_of(exam)]
    if "days" in exam and "symbols" in exam:
        parts.append(f"{exam['days']} held-out days, {exam['symbols']} symbols")
    parts.append(f"exam {num_exams} of {_minute(exam.get('time'))}")
    return "; ".join(parts)


def _minute(time: object) -> str:
    return f"{str(time)[:16].replace('T', ' ')} UTC" if time else "an unknown time"
