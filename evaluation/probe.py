"""The price of the signal: what plain models earn with the features of a market, gross and at each cost.

Days are cut into four parts in order. Models are fitted to all bars before a part, less those whose moves end
within a day of it (the purge), and forecast the part. The second part chooses a rule for each cost; the third and
the fourth judge it. Nothing that is judged was seen by a fit or a choice, and no scale of a feature either.
Shapes: n = rows (bars) that are forecast, K = horizons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_sources.bars import DAY_NS
from envs.ahead import HORIZONS
from envs.config import EnvConfig
from envs.market import Market
from evaluation.forecasts import FITS, BarTable, Fit, forecasts_of, targets_of
from evaluation.measures import (
    SESSION_SHIFT,
    Interval,
    Margin,
    interval_of_mean,
    jsonable,
    margin,
)
from evaluation.rules import Decisions, Rule, apply_rule, choose_rules, play, walks_of

COSTS_BPS = (0.0, 0.5, 1.0, 2.0, 5.0)
PARTS = (0.4, 0.6, 0.8)  # where the second, third and fourth part of the days begin
EMBARGO_NS = DAY_NS
LEAST_ROWS = 100  # of a day whose rank correlation counts


@dataclass(frozen=True)
class RankIC:
    """Mean over days of the rank correlation between forecasts and the moves that followed."""

    horizon: int  # bars
    value: float
    interval: Interval | None  # 95 %, by bootstrap over days
    late: float  # the same with the move from one bar later on
    late_interval: Interval | None


@dataclass(frozen=True)
class Rung:
    """One cost of the ladder: the rule that was chosen for it, and what it earned on the judged days."""

    cost_bps: float
    rule: Rule | None  # None: no rule earned on the days of choice, so it stays flat
    margin: Margin
    late: Margin  # every order one bar late


@dataclass(frozen=True)
class Probe:
    """What one model found."""

    model: str
    rank_ic: list[RankIC]
    signs: list[Rung]  # for each horizon, on the side of every forecast at no cost: nothing is chosen
    ladder: list[Rung]
    num_trials: int  # rules that were tried on the days of choice, for each cost
    num_days: int  # forecast
    num_judged_days: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain types; None where a figure has no value."""
        return jsonable(asdict(self))


def cut_days(open_time: NDArray[np.int64], shares: Sequence[float] = PARTS) -> list[int]:
    """Return where the parts of the days begin, and the end of the last one, ns UTC.

    Raises:
        ValueError: there are too few days.
    """
    days = np.unique(open_time // DAY_NS)
    places = [round(share * len(days)) for share in shares]
    if len({0, *places, len(days)}) < len(shares) + 2 or places[0] < 3:
        raise ValueError(f"{len(days)} days are too few to fit, choose and judge on: 7 are needed")
    return [int(day) * DAY_NS for day in (*days[places], days[-1] + 1)]


def probe(
    model: str,
    market: Market,
    config: EnvConfig,
    edges_ns: Sequence[int],
    costs_bps: Sequence[float] = COSTS_BPS,
    fit: Fit | None = None,
) -> Probe:
    """Fit a model part by part, choose a rule for each cost on the first forecast part, and judge on the others.

    Args:
        model: one of ``FITS``.
        market: has the bars of all parts outside its holdout, and scales of features from before ``edges_ns[0]``.
        config: positions, borrowing and flat hours of the accounts; its fees and slippage do not count.
        edges_ns: where the forecast parts begin, and the end of the last one.
        costs_bps: flat costs of traded value.
        fit: default: of the model.
    """
    began = time.monotonic()
    table = BarTable.of(market)
    rows, forecasts = walk_forward(fit or FITS[model], market, table, edges_ns)
    judged = table.open_time[rows] >= edges_ns[1]
    rules, num_trials = choose_rules(
        Decisions.at(market, table, config, rows[~judged]), forecasts[~judged], HORIZONS, costs_bps
    )
    decisions = Decisions.at(market, table, config, rows[judged])
    ladder = [
        judge(market, table, decisions, forecasts[judged], rule, bps)
        for rule, bps in zip(rules, costs_bps, strict=True)
    ]
    signs = [
        judge(market, table, decisions, forecasts[judged], Rule(horizon, 0.0, 0.0), 0.0)
        for horizon in HORIZONS
    ]
    days = days_of(market, table, rows)
    return Probe(
        model=model,
        rank_ic=rank_ics(table, rows, days, forecasts),
        signs=signs,
        ladder=ladder,
        num_trials=num_trials,
        num_days=len(np.unique(days)),
        num_judged_days=len(np.unique(days[judged])),
        seconds=time.monotonic() - began,
    )


def walk_forward(
    fit: Fit, market: Market, table: BarTable, edges_ns: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Forecast each part by a model of the bars before it; return rows (n,) and forecasts (n, K)."""
    parts = []
    for begin, end in pairwise(edges_ns):
        known = table.rows_before(begin - EMBARGO_NS, max(HORIZONS))
        if not len(known):
            raise ValueError(
                "no bar is known a day before the first one that is forecast: more days are needed"
            )
        forecast = fit(market, torch.from_numpy(known), targets_of(table, known))
        rows = table.rows_between(begin, end)
        parts.append((rows, forecasts_of(forecast, table, rows)))
    rows = np.concatenate([part for part, _ in parts])
    order = np.argsort(rows, kind="stable")
    return rows[order], np.concatenate([part for _, part in parts])[order]


def judge(
    market: Market,
    table: BarTable,
    decisions: Decisions,
    forecasts: NDArray[np.float32],
    rule: Rule | None,
    cost_bps: float,
) -> Rung:
    """Let a rule trade on forecasts (n, K) at a flat cost, at once and one bar late."""
    sides = np.zeros(len(decisions), np.int8)
    if rule is not None:
        sides = apply_rule(rule, forecasts[:, HORIZONS.index(rule.horizon)], decisions.begins)
    at_once, late = (
        margin(walks_of(market, table, decisions, play(decisions, decisions.targets(sides, bars), cost_bps)))
        for bars in (0, 1)
    )
    return Rung(cost_bps, rule, at_once, late)


def rank_ics(
    table: BarTable, rows: NDArray[np.int64], days: NDArray[np.int64], forecasts: NDArray[np.float32]
) -> list[RankIC]:
    """Return the rank correlation of forecasts (n, K) at every horizon, over the days of the rows, (n,).

    Of a day all symbols are ranked together, forecasts and moves in volatilities of their symbol.
    """
    order = np.argsort(days, kind="stable")
    borders = np.flatnonzero(np.diff(days[order])) + 1
    scale = table.volatility[rows]
    result = []
    for number, horizon in enumerate(HORIZONS):
        forecast = forecasts[:, number] / scale
        at_once, late = (
            _daily_correlations(forecast, table.moves(horizon, bars)[rows] / scale, np.split(order, borders))
            for bars in (0, 1)
        )
        result.append(
            RankIC(horizon, _mean(at_once), interval_of_mean(at_once), _mean(late), interval_of_mean(late))
        )
    return result


def _daily_correlations(
    forecast: NDArray[np.floating], move: NDArray[np.float64], days: Sequence[NDArray[np.int64]]
) -> NDArray[np.float64]:
    daily = np.array([rank_correlation(forecast[rows], move[rows]) for rows in days])
    return daily[np.isfinite(daily)]


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def rank_correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return Spearman's correlation where both are known; NaN for too few rows, or where one never varies."""
    known = np.isfinite(one) & np.isfinite(other)
    if known.sum() < LEAST_ROWS:
        return math.nan
    ranks = [_ranks(values[known]) for values in (one, other)]
    deviations = [values - values.mean() for values in ranks]
    size = np.sqrt(np.prod([values @ values for values in deviations]))
    return float(deviations[0] @ deviations[1] / size) if size > 0 else math.nan


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ranks; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def days_of(market: Market, table: BarTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the day of each row, as ``measures.days_of_fills`` counts them: (n,) days since 1970."""
    is_stock = np.array([kind == "stock" for kind in market.asset_classes])[table.symbol[rows]]
    shift_ns = int(SESSION_SHIFT.astype("timedelta64[ns]").astype(np.int64))
    return (table.open_time[rows + 1] - is_stock * shift_ns) // DAY_NS
