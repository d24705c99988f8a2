"""What a record says in sum: one curve of all its days, of all champions, and its headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS
from evaluation import record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.evidence import PROVEN, most_of
from evaluation.exam import POLICY, Contestants, Walk
from evaluation.measures import Measures, daily_growth, days_of_fills, measure
from runtime.wording import count_of

Line = Mapping[str, Any]


def pool_days(walks: Sequence[Walk], equity_before: Mapping[str, float]) -> dict[str, float]:
    """Return by which factor a pool of accounts grew on each day of their walks.

    Args:
        walks: of one contestant.
        equity_before: what each symbol's account had before its walk.
    """
    days = np.unique(np.concatenate([days_of_fills(walk) for walk in walks]))
    before = np.array([equity_before.get(walk.symbol, 1.0) for walk in walks])
    worth = (before * np.exp(np.cumsum(daily_growth(walks), axis=0))).sum(axis=1)
    factors = worth / np.concatenate([[before.sum()], worth[:-1]])
    return {str(day): float(factor) for day, factor in zip(days, factors, strict=True)}


@dataclass(frozen=True)
class Summary:
    """All scored days of a record, in order."""

    days: NDArray[np.datetime64]  # (D,)
    walks: Contestants  # one a contestant: its pool as an account that decides once a day
    measures: Mapping[str, Measures]
    champions: int
    missed: int
    revised: int
    num_lines: int
    hash: str
    evidence: float  # what 1 that bets on the champions has become at most: see ``evidence``

    @property
    def headline(self) -> str:
        """The record in one sentence."""
        policy, hold = self.measures[POLICY], self.measures[BUY_AND_HOLD]
        mean = f"mean day {1e4 * policy.mean_daily_return:+.1f} bps"
        if policy.mean_daily_interval is not None:
            low, high = policy.mean_daily_interval
            mean += f" [{1e4 * low:+.1f}, {1e4 * high:+.1f}]"
        proof = f"bets on it grew {self.evidence:.1f}-fold, {PROVEN:g} prove an edge"
        parts = [
            f"{count_of(policy.num_days, 'day')} since {self.days[0]}: {policy.total_return:+.2%} (buy and hold "
            f"{hold.total_return:+.2%})",
            mean,
            "proven" if self.evidence >= PROVEN else proof,
            count_of(self.champions, "champion"),
        ]
        parts += [f"{self.missed} missed" for _ in range(self.missed > 0)]
        parts += [f"{self.revised} revised" for _ in range(self.revised > 0)]
        return ", ".join(parts)

    def figures(self) -> dict[str, float]:
        """Return the main figures as metrics; see docs/metrics.md."""
        policy = self.measures[POLICY]
        low, high = policy.mean_daily_interval or (float("nan"), float("nan"))
        return {
            "record/days": policy.num_days,
            "record/return_percent": 100 * policy.total_return,
            "record/buy_and_hold_percent": 100 * self.measures[BUY_AND_HOLD].total_return,
            "record/daily_bps": 1e4 * policy.mean_daily_return,
            "record/daily_bps_low": 1e4 * low,
            "record/daily_bps_high": 1e4 * high,
            "record/evidence": self.evidence,
        }


def summarize(lines: Sequence[Line]) -> Summary | None:
    """Sum up a record's lines; None while nothing is scored."""
    scored = [line for line in lines if line["kind"] == "scored"]
    if not scored:
        return None
    growth = {name: _growth(scored, name) for name in (POLICY, BUY_AND_HOLD)}
    days = np.array(sorted(growth[POLICY]), dtype="datetime64[D]")
    kind = "stock" if all(line["stocks_only"] for line in scored) else "crypto"
    walks = {
        name: [as_walk(days, np.array([total[str(day)] for day in days]), kind)]
        for name, total in growth.items()
    }
    kinds = [line["kind"] for line in lines]
    return Summary(
        days,
        walks,
        {name: measure(own) for name, own in walks.items()},
        len({line["champion"] for line in scored}),
        kinds.count("missed"),
        kinds.count("revised"),
        len(lines),
        lines[-1].get("hash", ""),  # none yet while it is put together
        most_of(daily_returns_of(lines)),
    )


def daily_returns_of(lines: Sequence[Line], champion: str = "") -> NDArray[np.float64]:
    """Return what the champions earned on every scored day, in order, (days,); or one of them on its days."""
    scored = [line for line in lines if line["kind"] == "scored" and champion in ("", line["champion"])]
    growth = _growth(scored, POLICY)
    return np.array([growth[day] - 1.0 for day in sorted(growth)])


def _growth(scored: Sequence[Line], name: str) -> dict[str, float]:
    """Return by which factor a contestant's pool grew on each day; two lines may have parts of one."""
    growth: dict[str, float] = {}
    for line in scored:
        for day, factor in line["days"][name].items():
            growth[day] = growth.get(day, 1.0) * factor
    return growth


def grown(line: Line, name: str) -> float:
    """Return what a contestant's pool earned on a scored line's bars, as a fraction."""
    return math.prod(line["days"][name].values()) - 1


def accounts_of(line: Line) -> str:
    """Put into words how many accounts a scored line is about."""
    noun = "group" if any("members" in row for row in line["symbols"].values()) else "symbol"
    return count_of(len(line["symbols"]), noun)


def describe(line: Line) -> str:
    """Put a line into words."""
    match line["kind"]:
        case "begin":
            return f"the record begins, with bars after {line['until'].replace('T', ' ')} UTC"
        case "champion":
            return f"{line['champion']} is the champion, after {line['before'] or 'none'}"
        case "missed":
            span = f"{line['from']} to {line['until']}".replace("T", " ")
            return f"{span} UTC: {line['reason']}"
        case "revised":
            names = ", ".join(
                f"{symbol} (line {', '.join(map(str, of))})" for symbol, of in line["symbols"].items()
            )
            return f"bars that were scored are others by now, and the score stays: {names}"
    parts = [f"{line['decisions']:,} decisions on {accounts_of(line)} by {line['champion']}"]
    if line["held"]:
        parts.append(
            f"in {line['held']:,} more the accounts held what they had, on bars older than the champion"
        )
    if not line["is_whole"]:
        parts.append("stopped by exam_minutes, the next line goes on from there")
    return "; ".join(parts)


def headline_beside(folder: Path) -> str:
    """Return the headline of the record in a checkpoint's folder, with its last hash; why there is none else."""
    try:
        found = record.read(folder)
    except OSError as error:
        return f"No record: {error.filename} cannot be read: {error.strerror}"
    if found.faults:
        return f"The record beside it was edited: {found.faults[0]}"
    summary = summarize(found.lines)
    if summary is None:
        return "No record yet: no champion has seen bars that are newer than itself"
    return f"Record: {summary.headline}; line {summary.num_lines}, {summary.hash[:16]}"


def as_walk(days: NDArray[np.datetime64], growth: NDArray[np.float64], asset_class: str) -> Walk:
    """Return a pool's days as a walk of one decision a day, to be measured and drawn like any other."""
    nothing = np.zeros(len(days))
    noons = (
        days.astype("datetime64[ns]").astype(np.int64) + DAY_NS // 2
    )  # within the day of a stock as of a coin
    time = noons.astype("datetime64[ns]")
    return Walk(
        "",
        asset_class,
        time,
        nothing,
        nothing,
        np.log(growth),
        nothing,
        nothing,
        nothing,
    )
