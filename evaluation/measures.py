"""What a walk was worth: return, risk and their uncertainty, from the walks alone.

A pool of walks starts with equal money in every symbol and never moves any between them. Its days are UTC days
of crypto and New York sessions of stocks, by date; a decision counts on the day on which it filled, so the night
after the last bar belongs to that bar. The first and last day may be partial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.config import EQUITY_FLOOR
from evaluation.exam import Walk
from evaluation.uncertainty import LEAST_DAYS, Interval, interval, resampled_days, score, tail_of

# Days per year with returns: all for a pool with crypto in it, only the sessions for one of stocks.
CRYPTO_DAYS_PER_YEAR, STOCK_DAYS_PER_YEAR = 365, 252
# New York is 4 or 5 hours behind UTC, and its longest session lasts from 04:00 to 20:00 there: shifted by five
# hours, all of it lies in one UTC day, in summer and in winter.
SESSION_SHIFT = np.timedelta64(5, "h")


@dataclass(frozen=True)
class Measures:
    """Figures of a walk or a pool, net of all costs; None with too few days or without a value."""

    total_return: float  # of the money at the start
    mean_daily_return: float
    mean_daily_interval: Interval | None  # 95 %, by bootstrap over days
    mean_daily_score: float | None  # how surely it is above 0: see ``uncertainty.score``
    sharpe: float | None  # per year; None also without any variance
    sharpe_interval: Interval | None
    sortino: float | None  # per year; None also without a losing day
    max_drawdown: float  # from a peak of equity, 0 to 1, at the opens
    turnover: float  # value traded per day, in equities
    time_in_market: float  # share of decisions that led to a position
    hit_rate: float  # share of days with a gain
    costs: float  # sum of all payments but funding, each as a fraction of equity at that time
    funding: float  # sum of the funding paid less received, likewise; in the returns, and not among the costs
    num_days: int
    days_per_year: int  # of Sharpe and Sortino


def measure(walks: Sequence[Walk]) -> Measures:
    """Measure a pool of walks, or a single one.

    Raises:
        ValueError: there is no walk.
    """
    daily, days_per_year = daily_returns(walks)
    num_days, year = len(daily), math.sqrt(days_per_year)
    enough = num_days >= LEAST_DAYS
    losses = math.sqrt(float(np.mean(np.minimum(daily, 0.0) ** 2)))
    sharpe = _sharpe(daily[None], year)[0]
    _, equity = equity_curve(walks)
    mean_interval = sharpe_interval = None
    if enough:
        resampled = daily[resampled_days(num_days)]
        mean_interval = interval(resampled.mean(axis=1), num_days)
        sharpe_interval = interval(_sharpe(resampled, year), num_days) if math.isfinite(sharpe) else None
    return Measures(
        total_return=float(equity[-1] - 1.0),
        mean_daily_return=float(daily.mean()),
        mean_daily_interval=mean_interval,
        mean_daily_score=float(score(daily)) if enough else None,
        sharpe=float(sharpe) if enough and math.isfinite(sharpe) else None,
        sharpe_interval=sharpe_interval,
        sortino=float(daily.mean() / losses * year) if enough and losses > 0 else None,
        max_drawdown=float(abs(drawdown(equity).min())),
        turnover=float(np.mean([walk.traded.sum() for walk in walks]) / num_days),
        time_in_market=float(np.mean([(walk.position != 0).mean() for walk in walks])),
        hit_rate=float((daily > 0).mean()),
        costs=float(np.mean([walk.costs.sum() for walk in walks])),
        funding=float(np.mean([0.0 if walk.funding is None else walk.funding.sum() for walk in walks])),
        num_days=num_days,
        days_per_year=days_per_year,
    )


def equity_curve(walks: Sequence[Walk]) -> tuple[NDArray[np.datetime64], NDArray[np.float64]]:
    """Return the times at which decisions of any walk filled, and the pool's equity after each of them.

    Both begin with the start: equity 1 at the first fill.

    Raises:
        ValueError: there is no walk.
    """
    _require_walks(walks)
    time = np.unique(np.concatenate([walk.time for walk in walks]))
    total = np.zeros(len(time))
    for walk in walks:
        own = np.concatenate([[1.0], np.exp(np.cumsum(walk.log_returns))])
        total += own[np.searchsorted(walk.time, time, side="right")]
    return np.concatenate([time[:1], time]), np.concatenate([[1.0], total / len(walks)])


def drawdown(equity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far a curve is below its highest value so far, (T,), 0 or less."""
    return equity / np.maximum.accumulate(equity) - 1.0


def break_even(costs_bps: Sequence[float], returns: ArrayLike) -> tuple[float | None, str]:
    """Find the cost of traded value, in basis points, above which nothing is earned.

    Costs compound, so between two rungs the log of a symbol's growth is a line, not its return.

    Args:
        costs_bps: rungs of the ladder, ascending.
        returns: net return at each rung, of one symbol (rungs,) or of each symbol of a pool (rungs, symbols).

    Returns:
        The cost, between two rungs, or None where the return does not fall to 0 on the ladder; and a text.
    """
    growth = np.log(np.maximum(1.0 + np.asarray(returns, dtype=np.float64), EQUITY_FLOOR))
    value = float(_break_evens(costs_bps, growth.reshape(1, len(costs_bps), -1))[0])
    if math.isfinite(value):
        return value, f"{value:.2f} bps"
    if value > 0:
        return None, f"above {costs_bps[-1]:g} bps"
    free = costs_bps[0] == 0
    return None, "none: it earns nothing even without costs" if free else f"below {costs_bps[0]:g} bps"


def break_even_interval(
    costs_bps: Sequence[float], growth: NDArray[np.float64]
) -> tuple[float | None, float | None] | None:
    """Return the 95 % interval of the break-even cost, by bootstrap over days.

    Args:
        costs_bps: rungs of the ladder, ascending.
        growth: ``daily_growth`` at each rung, (rungs, days, symbols).

    Returns:
        Both ends in basis points, None for an end beyond the ladder; None with too few days.
    """
    num_days = growth.shape[1]
    if num_days < LEAST_DAYS:
        return None
    days = resampled_days(num_days)
    counts = np.stack([np.bincount(row, minlength=num_days) for row in days]).astype(np.float64)
    values = np.sort(_break_evens(costs_bps, np.stack([counts @ rung for rung in growth], axis=1)))
    tail = round(tail_of(num_days) * len(values))
    low, high = (float(value) if np.isfinite(value) else None for value in (values[tail], values[-1 - tail]))
    return low, high


def _break_evens(costs_bps: Sequence[float], growth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first break-even cost of each pool, (n,), for its log growth, (n, rungs, symbols).

    Infinite above the ladder, minus infinite below.
    """
    costs, pools = np.asarray(costs_bps, dtype=np.float64), np.arange(len(growth))
    lost = np.exp(growth).mean(axis=2) <= 1.0
    above = np.maximum(lost.argmax(axis=1), 1)
    below, above_growth = growth[pools, above - 1], growth[pools, np.minimum(above, len(costs) - 1)]
    low, high = np.zeros(len(growth)), np.ones(len(growth))
    for _ in range(40):
        middle = (low + high) / 2
        earns = np.exp(below + middle[:, None] * (above_growth - below)).mean(axis=1) > 1.0
        low, high = np.where(earns, middle, low), np.where(earns, high, middle)
    at = costs[above - 1] + high * (costs[np.minimum(above, len(costs) - 1)] - costs[above - 1])
    at = np.where(lost.any(axis=1), at, np.inf)
    return np.where(lost[:, 0], -np.inf, at)


@dataclass(frozen=True)
class Margin:
    """What trades earn beside what they cost, over all decisions of a pool; None with too few days or no trade.

    Gross is before fees and slippage; borrowing and funding are taken off. A basis point a bar is the mean over
    all bars and symbols, those without a position included.
    """

    net_bps: float  # per bar
    net_interval: Interval | None  # 95 %, by bootstrap over days
    gross_bps: float  # per bar
    gross_interval: Interval | None
    turnover: float  # value traded per bar, in equities
    break_even_bps: float | None  # cost of traded value, per side, at which these trades would earn nothing
    break_even_interval: Interval | None

    def __str__(self) -> str:
        text = f"gross {self.gross_bps:+.3f} bp a bar{_range(self.gross_interval)}, {self.turnover:.4f} of equity"
        if self.break_even_bps is None:
            return f"{text} traded a bar"
        interval = _range(self.break_even_interval)
        return f"{text} traded a bar, break-even at {self.break_even_bps:.2f} bp a side{interval}"


def margin(walks: Sequence[Walk]) -> Margin:
    """Measure what the trades of a pool earn, gross and net.

    Raises:
        ValueError: there is no walk.
    """
    return margin_of_days(trades_by_day(walks)[1])


def trades_by_day(walks: Sequence[Walk]) -> tuple[NDArray[np.datetime64], NDArray[np.float64]]:
    """Return the days of a pool, and sums on each: decisions, log returns net and gross, value traded.

    Returns:
        days: (D,).
        sums: (D, 4).

    Raises:
        ValueError: there is no walk.
    """
    _require_walks(walks)
    parts = []
    for walk in walks:
        growth = np.exp(walk.log_returns)
        fees = walk.costs - walk.borrowing
        columns = (np.ones(len(growth)), walk.log_returns, np.log(growth + fees), walk.traded)
        days, first = np.unique(days_of_fills(walk), return_index=True)
        parts.append((days, np.add.reduceat(np.stack(columns, axis=1), first)))
    every_day = np.unique(np.concatenate([days for days, _ in parts]))
    sums = np.zeros((len(every_day), 4))  # decisions, net, gross, traded
    for days, own in parts:
        sums[np.searchsorted(every_day, days)] += own
    return every_day, sums


def margin_of_days(sums: NDArray[np.float64]) -> Margin:
    """Measure what trades earn by their sums on every day, (D, 4), as ``trades_by_day`` has them."""
    ratios = _margins(sums.sum(axis=0))
    intervals: list[Interval | None] = [None] * len(ratios)
    if len(sums) >= LEAST_DAYS:
        drawn = resampled_days(len(sums))
        resampled = _margins(np.stack([column[drawn].sum(axis=1) for column in sums.T]))
        intervals = [
            interval(values, len(sums)) if np.isfinite(values).any() else None for values in resampled
        ]
    net, gross, turnover, break_even_bps = map(float, ratios)
    return Margin(
        net_bps=net,
        net_interval=intervals[0],
        gross_bps=gross,
        gross_interval=intervals[1],
        turnover=turnover,
        break_even_bps=break_even_bps if math.isfinite(break_even_bps) else None,
        break_even_interval=intervals[3],
    )


def _margins(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return net and gross in bp a bar, turnover and break-even (NaN without a trade) of sums (4, ...)."""
    decisions, net, gross, traded = sums
    break_evens = np.full(np.shape(traded), np.nan)
    np.divide(1e4 * gross, traded, out=break_evens, where=traded > 0)
    return np.stack([1e4 * net / decisions, 1e4 * gross / decisions, traded / decisions, break_evens])


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def daily_returns(walks: Sequence[Walk]) -> tuple[NDArray[np.float64], int]:
    """Return the pool's return on every day of any walk, and the number of such days per year.

    Raises:
        ValueError: there is no walk.
    """
    _require_walks(walks)
    days_of = [days_of_fills(walk) for walk in walks]
    days = np.unique(np.concatenate(days_of))
    equity = np.zeros(len(days))
    for walk, own_days in zip(walks, days_of, strict=True):
        own = np.concatenate([[1.0], np.exp(np.cumsum(walk.log_returns))])
        equity += own[np.searchsorted(own_days, days, side="right")]
    equity = np.concatenate([[1.0], equity / len(walks)])
    crypto = any(walk.asset_class != "stock" for walk in walks)
    return equity[1:] / equity[:-1] - 1.0, CRYPTO_DAYS_PER_YEAR if crypto else STOCK_DAYS_PER_YEAR


def daily_growth(walks: Sequence[Walk]) -> NDArray[np.float64]:
    """Return the log growth of every symbol on every day of any walk, (days, symbols)."""
    days_of = [days_of_fills(walk) for walk in walks]
    days = np.unique(np.concatenate(days_of))
    columns = []
    for walk, own_days in zip(walks, days_of, strict=True):
        own = np.concatenate([[0.0], np.cumsum(walk.log_returns)])
        columns.append(np.diff(own[np.searchsorted(own_days, days, side="right")], prepend=0.0))
    return np.stack(columns, axis=1)


def days_of_fills(walk: Walk) -> NDArray[np.datetime64]:
    """Return the day on which each decision counts, (T,) dates: UTC days, or New York sessions of stocks."""
    time = walk.time - SESSION_SHIFT if walk.asset_class == "stock" else walk.time
    return time.astype("datetime64[D]")


def _sharpe(daily: NDArray[np.float64], year: float) -> NDArray[np.float64]:
    """Return the yearly Sharpe ratio of every row (R, days); not a number without any variance."""
    if daily.shape[1] < 2:
        return np.full(len(daily), np.nan)
    deviation = daily.std(axis=1, ddof=1)
    # As quotients of equity, equal returns differ by rounding.
    deviation[deviation <= 1e-12] = np.nan
    return daily.mean(axis=1) / deviation * year


def interval_of_mean(daily: NDArray[np.float64]) -> Interval | None:
    """Return the 95 % interval of the mean of daily values, by bootstrap over days; None with too few."""
    if len(daily) < LEAST_DAYS:
        return None
    return interval(daily[resampled_days(len(daily))].mean(axis=1), len(daily))


def _require_walks(walks: Sequence[Walk]) -> None:
    if not walks:
        raise ValueError("there is no walk to measure: no symbol has bars for a segment in these days")


def jsonable(value: Any) -> Any:
    """Return nested plain values as JSON can hold them: a float that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {name: jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
