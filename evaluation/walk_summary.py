"""What a walk forward says in sum: one curve of all its windows, deflated by all that was tried for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation import plots
from evaluation.baselines import ALWAYS_FLAT, BASELINES, BUY_AND_HOLD, MOMENTUM
from evaluation.exam import CHAMPION, POLICY, Contestants, at_flat_cost
from evaluation.forecasts import TREES
from evaluation.measures import (
    Interval,
    Margin,
    Measures,
    break_even,
    break_even_interval,
    interval_of_mean,
    jsonable,
    margin_of_days,
    measure,
)
from evaluation.plots import FIRST
from evaluation.record_summary import as_walk
from evaluation.uncertainty import LEAST_DAYS, NORMAL, resampled_days, score, tail_of
from evaluation.verdict import Verdict, deflated_probability, verdict
from runtime.wording import count_of

# In this order, where they walked.
SHOWN = (POLICY, CHAMPION, FIRST, BUY_AND_HOLD, MOMENTUM, ALWAYS_FLAT, TREES)
Result = Mapping[str, Any]


@dataclass(frozen=True)
class WindowRow:
    """One window: who traded, and what came of it."""

    number: int
    first: str  # day
    last: str
    champion: str  # "": none, cash
    is_new: bool  # it is another one than in the window before
    exams: int
    returns: Mapping[str, float]  # by contestant
    mean_daily_interval: Interval | None  # of the champion's mean day; None with fewer than LEAST_DAYS
    members: Sequence[str] = ()  # who decided together; empty where the champion decides alone


@dataclass(frozen=True)
class SymbolRow:
    """One symbol over the whole walk."""

    symbol: str
    decisions: int
    traded: float  # value, in equities
    costs: float
    measures: Mapping[str, Measures]  # of the champions, and of buy and hold


@dataclass(frozen=True)
class Above:
    """By how much the champions' mean day is above that of another contestant."""

    mean_daily_return: float
    interval: Interval | None  # None with too few days, or where both are the same
    certainty: float | None  # that it is above 0


@dataclass(frozen=True)
class WalkSummary:
    """All windows of a walk, as one curve that nobody has traded on in hindsight."""

    days: NDArray[np.datetime64]  # (D,)
    walks: Contestants  # one a contestant: its pool as an account that decides once a day
    measures: Mapping[str, Measures]
    verdict: Verdict
    probability_alone: float | None  # as if this walk had been the only trial; None where nothing was traded
    num_trials: int
    margin: Margin
    ladder: Sequence[tuple[float, float]]  # cost in bps, net return
    break_even: tuple[float | None, str]
    break_even_interval: tuple[float | None, float | None] | None
    band: NDArray[np.float64]  # (2, D) growth: 95 % of resampled histories up to each day
    above_first: Above  # the first champion: what training on was worth
    # The champion alone: what deciding together was worth; None without an ensemble.
    above_champion: Above | None
    windows: Sequence[WindowRow]
    symbols: Sequence[SymbolRow]
    stamp: str = ""  # why this is no walk forward
    notes: Sequence[str] = field(default_factory=list)

    @property
    def beside(self) -> dict[str, str]:
        """Who traded beside the champions, but for cash, which earns nothing: name -> what readers call it."""
        names = (name for name in self.measures if name not in (POLICY, ALWAYS_FLAT))
        return {name: "champion alone" if name == CHAMPION else name for name in names}

    @property
    def headline(self) -> str:
        """Whether there is an edge, and over how many days: one sentence."""
        days = count_of(len(self.days), "day")
        if self.stamp:
            return f"Not out of sample: {self.stamp}."
        if self.verdict.edge:
            return f"An edge over {days} out of sample."
        few = f", of which at least {LEAST_DAYS} are needed" if len(self.days) < LEAST_DAYS else ""
        return f"No edge over {days} out of sample{few}."

    @property
    def result(self) -> str:
        """What it earned, in one sentence."""
        own, hold = self.measures[POLICY], self.measures[BUY_AND_HOLD]
        if not any(row.champion for row in self.windows):
            return (
                f"No exam crowned a champion, so nothing was traded; buy and hold {hold.total_return:+.2%}."
            )
        text = f"{own.total_return:+.2%} after costs, buy and hold {hold.total_return:+.2%}"
        if own.mean_daily_interval is not None:
            low, high = own.mean_daily_interval
            mean = 1e4 * own.mean_daily_return
            text += f"; mean day {mean:+.1f} bps [{1e4 * low:+.1f}, {1e4 * high:+.1f}]"
        return f"{text}."

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain types; docs/walkforward.md explains them."""
        return jsonable(
            {
                "format": 1,
                "headline": self.headline,
                "result": self.result,
                "first": str(self.days[0]),
                "last": str(self.days[-1]),
                "verdict": asdict(self.verdict),
                "probability_alone": self.probability_alone,
                "trials": self.num_trials,
                "stamp": self.stamp,
                "measures": {name: asdict(found) for name, found in self.measures.items()},
                "margin": asdict(self.margin),
                "cost_ladder": [{"bps": bps, "total_return": value} for bps, value in self.ladder],
                "break_even_bps": self.break_even[0],
                "break_even": self.break_even[1],
                "break_even_interval": self.break_even_interval,
                "above_first_champion": asdict(self.above_first),
                "above_champion": asdict(self.above_champion) if self.above_champion else None,
                "windows": [asdict(row) for row in self.windows],
                "symbols": [asdict(row) for row in self.symbols],
                "curve": {
                    "days": [str(day) for day in self.days],
                    "growth": {name: self._curve(name).tolist() for name in self.walks},
                    "band": self.band.tolist(),
                },
                "notes": list(self.notes),
            }
        )

    def pictures(self) -> dict[str, Callable[[float], Figure]]:
        """Return functions that draw a picture at a width in inches, by file name."""
        own = [row for row in self.windows if POLICY in row.returns]
        policy, hold = ([row.returns[name] for row in own] for name in (POLICY, BUY_AND_HOLD))
        found: dict[str, Callable[[float], Figure]] = {
            "equity": partial(plots.equity, self.walks, band=self.band),
            "windows": partial(plots.windows, [row.first[5:] for row in own], policy, hold),
        }
        if self.ladder and self.margin.turnover:
            paid = float(self.paid_bps), self.measures[POLICY].total_return
            costs, returns = zip(*self.ladder, strict=True)
            found["costs"] = partial(plots.cost_curve, costs, returns, paid, self.break_even[0])
        return found

    @property
    def paid_bps(self) -> float:
        """Mean fee and slippage per traded value; 0 without a trade."""
        traded = self.margin.turnover
        return (self.margin.gross_bps - self.margin.net_bps) / traded if traded else 0.0

    def _curve(self, name: str) -> NDArray[np.float64]:
        return np.exp(np.cumsum(self.walks[name][0].log_returns))


def summarize(
    results: Sequence[Result], costs_bps: Sequence[float], stamp: str = "", notes: Sequence[str] = ()
) -> WalkSummary | None:
    """Sum up the windows of a walk; None where none of them has a day.

    Every exam of every window counts as a trial, and every window as one at least.

    Args:
        results: of the windows, in order.
        costs_bps: flat costs at which the champions traded, too.
        stamp: why this is no walk forward; "" if it is one.
        notes: for people.
    """
    growth = {name: _joined(results, name) for name in dict.fromkeys(n for r in results for n in r["days"])}
    if POLICY not in growth:
        return None
    kinds = {row["asset_class"] for result in results for row in result["symbols"].values()}
    kind = "stock" if kinds == {"stock"} else "crypto"
    days = np.array(sorted(growth[POLICY]), dtype="datetime64[D]")

    def factors(name: str) -> NDArray[np.float64]:
        return np.array([growth.get(name, {}).get(str(day), 1.0) for day in days])

    walks = {name: [as_walk(days, factors(name), kind)] for name in SHOWN if name in growth}
    measures = {name: measure(own) for name, own in walks.items()}
    num_trials = max(len(results), sum(result["exams"] for result in results))
    judged = verdict(measures[POLICY], {name: measures[name] for name in BASELINES}, num_trials)
    own = measures[POLICY]
    margin = margin_of_days(np.array([_trades(results)[str(day)] for day in days]))
    alone = None
    if own.mean_daily_score is not None and margin.turnover:
        alone = deflated_probability(own.mean_daily_score, 1)
    rungs = [factors(at_flat_cost(POLICY, bps)) for bps in costs_bps]
    returns = [float(np.prod(rung) - 1) for rung in rungs]
    return WalkSummary(
        days=days,
        walks=walks,
        measures=measures,
        verdict=judged,
        probability_alone=alone,
        num_trials=num_trials,
        margin=margin,
        ladder=list(zip(costs_bps, returns, strict=True)),
        break_even=break_even(costs_bps, returns) if costs_bps else (None, "no ladder"),
        break_even_interval=(
            break_even_interval(costs_bps, np.log(np.stack(rungs))[:, :, None]) if costs_bps else None
        ),
        band=_band(factors(POLICY)),
        above_first=_above(factors(POLICY) - factors(FIRST)),
        above_champion=_above(factors(POLICY) - factors(CHAMPION)) if CHAMPION in walks else None,
        windows=_window_rows(results, kind),
        symbols=_symbol_rows(results),
        stamp=stamp,
        notes=list(notes),
    )


def _above(differences: NDArray[np.float64]) -> Above:
    is_apart = len(differences) >= LEAST_DAYS and bool(differences.any())
    return Above(
        float(differences.mean()),
        interval_of_mean(differences) if is_apart else None,
        NORMAL.cdf(float(score(differences))) if is_apart else None,
    )


def _joined(results: Sequence[Result], name: str) -> dict[str, float]:
    """Return by which factor a contestant's pool grew on each day; two windows may have parts of one."""
    growth: dict[str, float] = {}
    for result in results:
        for day, factor in result["days"].get(name, {}).items():
            growth[day] = growth.get(day, 1.0) * factor
    return growth


def _trades(results: Sequence[Result]) -> dict[str, NDArray[np.float64]]:
    sums: dict[str, NDArray[np.float64]] = {}
    for result in results:
        for day, line in result["trades"].items():
            sums[day] = sums.get(day, np.zeros(len(line))) + np.array(line)
    return sums


def _band(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return between what 95 % of resampled histories lie after each day, (2, D) growth; NaN with few days."""
    num_days = len(factors)
    if num_days < LEAST_DAYS:
        return np.full((2, num_days), np.nan)
    histories = np.cumsum(np.log(factors)[resampled_days(num_days)], axis=1)
    tail = 100 * tail_of(num_days)
    return np.exp(np.percentile(histories, (tail, 100 - tail), axis=0))


def _window_rows(results: Sequence[Result], kind: str) -> list[WindowRow]:
    rows, before = [], ""
    for result in results:
        champion = result["champion"] or ""
        own = result["days"].get(POLICY, {})
        interval = None
        if len(own) >= LEAST_DAYS:
            days = np.array(sorted(own), dtype="datetime64[D]")
            interval = measure(
                [as_walk(days, np.array([own[str(d)] for d in days]), kind)]
            ).mean_daily_interval
        rows.append(
            WindowRow(
                number=result["number"],
                first=str(np.datetime64(result["start_ns"], "ns"))[:10],
                last=str(np.datetime64(result["end_ns"] - 1, "ns"))[:10],
                champion=champion,
                is_new=bool(champion) and champion != before,
                exams=result["exams"],
                returns={
                    name: float(np.prod(list(result["days"][name].values())) - 1)
                    for name in SHOWN
                    if name in result["days"]
                },
                mean_daily_interval=interval,
                members=result.get("members", ()),
            )
        )
        before = champion
    return rows


def _symbol_rows(results: Sequence[Result]) -> list[SymbolRow]:
    names = dict.fromkeys(symbol for result in results for symbol in result["symbols"])
    rows = []
    for symbol in names:
        own = [result["symbols"][symbol] for result in results if symbol in result["symbols"]]
        measures = {}
        for name in (POLICY, BUY_AND_HOLD):
            growth: dict[str, float] = {}
            for part in own:
                for day, value in part["days"][name].items():
                    growth[day] = growth.get(day, 0.0) + value
            days = np.array(sorted(growth), dtype="datetime64[D]")
            factors = np.exp([growth[str(day)] for day in days])
            measures[name] = measure([as_walk(days, factors, own[0]["asset_class"])])
        sums = {key: sum(part[key] for part in own) for key in ("decisions", "traded", "costs")}
        rows.append(SymbolRow(symbol, sums["decisions"], sums["traded"], sums["costs"], measures))
    return rows
