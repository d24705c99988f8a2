"""The history of a training: all of its exams, its champions and their records, from the checkpoint folder alone.

Figures that a line lacks, such as those of an older program, are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import ledger, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.champion import PROMOTED
from evaluation.exam import POLICY
from evaluation.record_summary import Summary, daily_returns_of, summarize
from evaluation.tear_sheet import compound
from runtime.wording import count_of

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """Rows of plain values, the oldest first."""

    exams: list[Row]
    champions: list[Row]
    record: Summary | None  # None while nothing is scored, or if it was edited
    fault: str  # of the record, "" if it is whole

    @property
    def headline(self) -> str:
        """The history in one sentence."""
        simulated = sum(bool(exam["is_simulated"]) for exam in self.exams)
        where = " on simulated bars" if simulated == len(self.exams) else f", {simulated} on simulated bars"
        edges = sum(exam["verdict"] == "edge" for exam in self.exams)
        runs = len({exam["run"] for exam in self.exams})
        parts = [
            f"{count_of(len(self.exams), 'exam')} in {count_of(runs, 'run')}, {edges or 'none'} with an edge"
            + (where if simulated else "")
        ]
        parts.append(count_of(len(self.champions), "champion") if self.champions else "no champion")
        return "; ".join(parts)

    @property
    def about_record(self) -> str:
        """What the record says, or why it says nothing."""
        if self.fault:
            return f"The record was edited: {self.fault}"
        return f"Record: {self.record.headline}" if self.record else "No record yet"


def read(folder: Path) -> History:
    """Read the history of the training in a checkpoint folder.

    Raises:
        OSError: a file exists and cannot be read.
    """
    lines, kept = ledger.read(folder / ledger.NAME), record.read(folder)
    fault = kept.faults[0] if kept.faults else ""
    recorded = [] if fault else kept.lines
    exams = [_exam(number, line) for number, line in enumerate(lines, 1)]
    return History(exams, _champions(lines, recorded), summarize(recorded), fault)


def _exam(number: int, line: Mapping[str, Any]) -> Row:
    pooled, margin = line.get("pooled") or {}, line.get("margin") or {}
    own = pooled.get(POLICY) or {}
    return {
        "exam": number,
        "time": line.get("time"),
        "run": line["run"],
        "epoch": line["epoch"],
        "checkpoint": line.get("checkpoint"),
        "is_simulated": line.get("simulated"),
        "first": line.get("first"),
        "last": line.get("last"),
        "days": line.get("days"),
        "symbols": line.get("symbols"),
        "returns": {name: (measures or {}).get("total_return") for name, measures in pooled.items()},
        "sharpe": own.get("sharpe"),
        "sharpe_interval": own.get("sharpe_interval"),
        "max_drawdown": own.get("max_drawdown"),
        "break_even_bps": margin.get("break_even_bps"),
        "verdict": line.get("verdict"),
        "verdict_reason": line.get("verdict_reason"),
        "is_promoted": line.get("decision") == PROMOTED,
        "dethroned": line.get("dethroned"),
        "reason": line.get("reason"),
    }


def _champions(lines: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return every champion, with the exam that made it one and what it earned on days that came later."""
    champions: list[Row] = []
    for number, line in enumerate(lines, 1):
        is_promoted = line.get("decision") == PROMOTED
        if champions and champions[-1]["until"] is None and (is_promoted or line.get("dethroned")):
            how = f"lost the title in exam {number}" if line.get("dethroned") else f"beaten in exam {number}"
            champions[-1] |= {"until": line.get("time"), "ended": how}
        if is_promoted:
            own, pooled = daily_returns_of(recorded, str(line.get("checkpoint"))), line.get("pooled") or {}
            champions.append(
                {
                    "checkpoint": line.get("checkpoint"),
                    "exam": number,
                    "since": line.get("time"),
                    "until": None,
                    "ended": "the champion",
                    "claim": line.get("claim"),
                    "exam_return": (pooled.get(POLICY) or {}).get("total_return"),
                    "exam_buy_and_hold": (pooled.get(BUY_AND_HOLD) or {}).get("total_return"),
                    "record_days": len(own),
                    "record_return": compound(own) if len(own) else None,
                }
            )
    if champions and champions[-1]["until"] is None:
        champions[-1]["claim"] = lines[-1].get("claim") or champions[-1]["claim"]  # what is claimed by now
    return champions
