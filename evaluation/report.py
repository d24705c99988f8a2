"""A report of an evaluation: its figures, as JSON and as pictures, and the folder that they are written to."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation import plots, tear_plots
from evaluation.baselines import BUY_AND_HOLD
from evaluation.comparison import Comparison
from evaluation.exam import POLICY, Contestants, Walk
from evaluation.measures import (
    Margin,
    Measures,
    break_even,
    break_even_interval,
    jsonable,
    margin,
    measure,
)
from evaluation.tear_sheet import TearSheet, busiest_day
from evaluation.verdict import Verdict
from runtime.files import TEMPORARY_SUFFIX, make_folder, remove_empty, sync_file, sync_folder

FORMAT = 1
LEFTOVER_SECONDS = 3_600.0
# Drawn where metrics.jsonl has them: key and title.
TRAINING_PANELS = (
    ("rollout/reward_bps", "reward, bp per bar"),
    ("exam/daily_bps", "held-out mean day, bps"),
    ("exam/sharpe", "held-out Sharpe"),
    ("loss/entropy", "entropy, nats"),
    ("ppo/explained_variance", "explained variance"),
    ("rollout/turnover", "turnover per bar"),
)


@dataclass(frozen=True)
class Report:
    """Everything that is written."""

    checkpoint: str  # its name; of an ensemble those of all members
    members: Sequence[Mapping[str, Any]]  # the checkpoint, or those of an ensemble, with hashes
    first: np.datetime64  # fill of the first decision
    last: np.datetime64  # fill of the last decision
    trained_until: np.datetime64
    overlaps: bool  # with bars that these weights were trained on
    walks: Contestants
    pooled: Mapping[str, Measures]
    verdict: Verdict
    num_trials: int
    ladder: Sequence[tuple[float, Measures]]  # flat cost in bps, ascending
    plotted: Sequence[str]  # symbols
    training: Sequence[Mapping[str, Any]]  # rows of metrics.jsonl
    made: Mapping[str, str]  # how it was made: name and value
    notes: Sequence[str]
    # `daily_growth` at each rung of the ladder: an exact break-even cost of a pool, and its interval.
    ladder_growth: Sequence[NDArray[np.float64]] = ()
    record: str = ""  # headline of the record beside the checkpoint
    is_simulated: bool = False  # the bars are
    comparison: Comparison | None = None  # with another checkpoint
    symbols: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        compared = zip(self.walks[POLICY], self.walks[BUY_AND_HOLD], strict=True)
        rows = [
            {
                "symbol": own.symbol,
                "asset_class": own.asset_class,
                "decisions": len(own.time),
                "contribution": math.expm1(own.log_returns.sum()) / len(self.walks[POLICY]),
                POLICY: measure([own]),
                BUY_AND_HOLD: measure([other]),
            }
            for own, other in compared
        ]
        self.symbols.extend(sorted(rows, key=lambda row: -row["contribution"]))

    def _sole(self, key: str) -> Any:
        return self.members[0][key] if len(self.members) == 1 else None

    @property
    def name(self) -> str:
        """Which weights, whatever the file is called; of an ensemble all files."""
        if len(self.members) > 1:
            return self.checkpoint
        return f"run {self._sole('run')}, epoch {self._sole('epoch')}"

    @cached_property
    def tear(self) -> TearSheet:
        """Days, months, trades and hours."""
        return TearSheet.of(self.walks)

    @property
    def paid_bps(self) -> float:
        """Costs of the policy in bps of its traded value, borrowing included; 0 without a trade."""
        traded = sum(float(walk.traded.sum()) for walk in self.walks[POLICY])
        return 1e4 * sum(float(walk.costs.sum()) for walk in self.walks[POLICY]) / traded if traded else 0.0

    @cached_property
    def margin(self) -> Margin:
        """What the policy's trades earn gross and net, at the stated costs."""
        return margin(self.walks[POLICY])

    @cached_property
    def busiest_day(self) -> tuple[Walk, str]:
        """The day on which the pool earned or lost most, of the symbol that moved it most."""
        return busiest_day(self.walks[POLICY])

    @property
    def break_even(self) -> tuple[float | None, str]:
        """The cost above which nothing is earned, None if it is not on the ladder, and a text."""
        if not self.ladder:
            return None, "not computed"
        if not self.pooled[POLICY].turnover:
            return None, "none: it never trades"
        costs_bps = [bps for bps, _ in self.ladder]
        if len(self.ladder_growth):
            return break_even(costs_bps, [np.expm1(growth.sum(axis=0)) for growth in self.ladder_growth])
        return break_even(costs_bps, [rung.total_return for _, rung in self.ladder])

    @cached_property
    def break_even_interval(self) -> tuple[float | None, float | None] | None:
        """The 95 % interval of the break-even cost; None for an end beyond the ladder, or without a value."""
        if self.break_even[0] is None or not len(self.ladder_growth):
            return None
        return break_even_interval([bps for bps, _ in self.ladder], np.stack(self.ladder_growth))

    @property
    def break_even_range(self) -> str:
        """The interval as a text, empty without one."""
        if self.break_even_interval is None:
            return ""
        low, high = self.break_even_interval
        least, most = self.ladder[0][0], self.ladder[-1][0]
        below = ("none" if least == 0 else f"below {least:g}") if low is None else f"{low:.2f}"
        return f"{below} to {f'above {most:g}' if high is None else f'{high:.2f}'}"

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain types; None where a figure has no value."""
        return jsonable(
            {
                "format": FORMAT,
                "checkpoint": self.checkpoint,
                "simulated": self.is_simulated,
                "run": self._sole("run"),
                "epoch": self._sole("epoch"),
                "members": list(self.members),
                "first": str(self.first)[:19],
                "last": str(self.last)[:19],
                "trained_until": str(self.trained_until)[:19],
                "overlaps_training": self.overlaps,
                "verdict": asdict(self.verdict),
                "trials": self.num_trials,
                "record": self.record,
                "pooled": {name: asdict(measures) for name, measures in self.pooled.items()},
                "paid_bps": self.paid_bps,
                "margin": asdict(self.margin),
                "cost_ladder": [{"bps": bps} | asdict(measures) for bps, measures in self.ladder],
                "break_even_bps": self.break_even[0],
                "break_even": self.break_even[1],
                "break_even_interval": self.break_even_interval,
                "symbols": [
                    row | {name: asdict(row[name]) for name in (POLICY, BUY_AND_HOLD)} for row in self.symbols
                ],
                "comparison": self.comparison.as_json() if self.comparison else None,
                "tear_sheet": self.tear.as_json(),
                "made": dict(self.made),
                "notes": list(self.notes),
            }
        )

    def pictures(self) -> dict[str, Callable[[float], Figure]]:
        """Return functions that draw a picture at a width in inches, by file name."""
        returns = [measures.total_return for _, measures in self.ladder]
        as_trained = (self.paid_bps, self.pooled[POLICY].total_return)
        result: dict[str, Callable[[float], Figure]] = {
            "equity": partial(plots.equity, self.walks),
            "drawdown": partial(plots.drawdowns, self.walks),
        }
        if self.ladder:
            rungs = [bps for bps, _ in self.ladder]
            result["costs"] = partial(plots.cost_curve, rungs, returns, as_trained, self.break_even[0])
        if self.tear.window:
            dates = self.tear.dates[self.tear.window - 1 :]
            result["rolling"] = partial(tear_plots.rolling_sharpe, dates, self.tear.rolling_sharpe)
        result["hours"] = partial(tear_plots.hours, self.tear.hours)
        result["day"] = partial(tear_plots.day, self.busiest_day[0])
        by_name: dict[str, Walk] = {walk.symbol: walk for walk in self.walks[POLICY]}
        for number, name in enumerate(self.plotted, 1):
            result[f"symbol{number}_{file_name(name)}"] = partial(plots.symbol, by_name[name])
        panels = [
            panel for panel in TRAINING_PANELS if any(row.get(panel[0]) is not None for row in self.training)
        ]
        if panels:
            result["training"] = partial(plots.training, self.training, panels)
        return result


def file_name(text: str) -> str:
    """Return a text as part of a file name that is valid on every operating system."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files to a new folder that replaces ``folder`` once it is complete.

    If writing is interrupted, ``folder`` stays as it was. Leftovers of a killed process are removed an hour later,
    as another one may be writing the same folder; one that had just been moved aside is restored.

    Raises:
        OSError: the disk is full or not writable.
    """
    made = make_folder(folder.parent)
    aside = folder.with_name(f".{folder.name}.old{TEMPORARY_SUFFIX}")
    if aside.exists() and not folder.exists():
        aside.replace(folder)
    for leftover in folder.parent.glob(f".{folder.name}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # the other one has just ended
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        unfinished.mkdir()
        for name, content in files:
            with (unfinished / name).open("xb") as file:
                file.write(content)
                sync_file(file, folder.parent)
        sync_folder(unfinished)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
        unfinished.replace(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.replace(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        remove_empty(made)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def json_bytes(report: Report) -> bytes:
    """Return ``report.json``."""
    return json.dumps(report.as_json(), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
