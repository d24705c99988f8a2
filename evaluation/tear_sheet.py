"""The tear sheet: what the policy earned by day, month, side, holding time and hour, and beside buy and hold.

Days are those of ``evaluation/measures.py``; returns compound, and money adds up to the pool's change of equity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY, Contestants, Walk
from evaluation.measures import daily_returns, days_of_fills, drawdown
from evaluation.trades import Trades, money_earned, trades_of
from evaluation.uncertainty import LEAST_DAYS

NUM_DRAWDOWNS = 5
# Days of a rolling figure: a third of all, as far as that is enough to tell and at most half a year.
LONGEST_WINDOW = 126
HOLDING_TIMES: tuple[tuple[str, float], ...] = (
    ("up to 5 min", 5),
    ("5 to 15 min", 15),
    ("15 to 60 min", 60),
    ("1 to 4 h", 240),
    ("4 to 24 h", 1_440),
    ("over a day", math.inf),
)
SIDES = {"all": 0, "long": 1, "short": -1}

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class TearSheet:
    """Figures for the page and for ``report.json``; rows are plain values, None where one does not exist."""

    dates: NDArray[np.datetime64]  # (D,)
    returns: Mapping[str, Floats]  # (D,) of every contestant
    trades: Trades
    months: list[Row]
    days: list[Row]
    drawdowns: list[Row]
    window: int  # days of the rolling Sharpe ratio; 0: too few days
    rolling_sharpe: Floats  # (D - window + 1,)
    sides: list[Row]
    holding: list[Row]
    hours: list[Row]
    beside_hold: Row

    @classmethod
    def of(cls, walks: Contestants) -> TearSheet:
        """Compute it from the walks of an exam."""
        own = walks[POLICY]
        dates = np.unique(np.concatenate([days_of_fills(walk) for walk in own]))
        returns = {name: daily_returns(contestant)[0] for name, contestant in walks.items()}
        year = daily_returns(own)[1]
        trades = trades_of(own)
        window = min(max(LEAST_DAYS, len(dates) // 3), LONGEST_WINDOW)
        window = window if len(dates) > window else 0
        return cls(
            dates,
            returns,
            trades,
            _months(dates, returns),
            _days(dates, returns, own, trades),
            worst_drawdowns(dates, returns[POLICY]),
            window,
            rolling_sharpe(returns[POLICY], window, year) if window else np.zeros(0),
            [_about(name, trades.where(_of_side(trades, side))) for name, side in SIDES.items()],
            _by_holding_time(trades),
            _by_hour(own),
            beside(returns[POLICY], returns[BUY_AND_HOLD], year),
        )

    def as_json(self) -> dict[str, Any]:
        """Return all but the trades as plain types."""
        ends = self.dates[self.window - 1 :] if self.window else self.dates[:0]
        return {
            "months": self.months,
            "days": self.days,
            "drawdowns": self.drawdowns,
            "rolling_sharpe": {
                "window": self.window,
                "ends": list(map(str, ends)),
                "values": [float(value) for value in self.rolling_sharpe],
            },
            "sides": self.sides,
            "holding_times": self.holding,
            "hours": self.hours,
            "beside_buy_and_hold": self.beside_hold,
        }


def compound(returns: Floats) -> float:
    """Return the total of returns in a row."""
    return float(np.prod(1.0 + returns) - 1.0)


def worst_drawdowns(dates: NDArray[np.datetime64], daily: Floats, most: int = NUM_DRAWDOWNS) -> list[Row]:
    """Return the deepest falls from a peak, from day to day, the deepest first.

    Each has its first day below the peak, its lowest day, the day on which the peak was reached again (None if it
    was not), the depth, and the days up to then.
    """
    below = drawdown(np.concatenate([[1.0], np.cumprod(1.0 + daily)]))[1:]
    is_below = np.concatenate([[False], below < 0, [False]])
    starts, ends = (
        np.flatnonzero(~is_below[:-1] & is_below[1:]),
        np.flatnonzero(is_below[:-1] & ~is_below[1:]),
    )
    rows: list[Row] = []
    for start, end in zip(
        starts.tolist(), ends.tolist(), strict=True
    ):  # end: the first day that is not below any more
        lowest = start + int(below[start:end].argmin())
        is_over = end < len(dates)
        rows.append(
            {
                "first": str(dates[start]),
                "lowest": str(dates[lowest]),
                "recovered": str(dates[end]) if is_over else None,
                "depth": float(below[lowest]),
                "days": int((dates[min(end, len(dates) - 1)] - dates[start]).astype(int)) + (not is_over),
            }
        )
    return sorted(rows, key=lambda row: float(row["depth"]))[:most]


def rolling_sharpe(daily: Floats, window: int, days_per_year: int) -> Floats:
    """Return the yearly Sharpe ratio of every ``window`` days in a row; not a number without any variance."""
    views = np.lib.stride_tricks.sliding_window_view(daily, window)
    deviation = views.std(axis=1, ddof=1)
    deviation[deviation <= 1e-12] = np.nan
    return views.mean(axis=1) / deviation * math.sqrt(days_per_year)


def beside(own: Floats, hold: Floats, days_per_year: int) -> Row:
    """Return beta, yearly alpha and correlation of daily returns to those of buy and hold, by least squares."""
    if len(own) < LEAST_DAYS or not hold.var() > 1e-24:
        return {"beta": None, "alpha": None, "correlation": None}
    beta = float(np.cov(own, hold)[0, 1] / hold.var(ddof=1))
    correlation = float(np.corrcoef(own, hold)[0, 1]) if own.var() > 1e-24 else None
    alpha = float(own.mean() - beta * hold.mean()) * days_per_year
    return {"beta": beta, "alpha": alpha, "correlation": correlation}


def busiest_day(walks: Sequence[Walk]) -> tuple[Walk, str]:
    """Return one symbol's walk on one day, and the day: where the pool earned or lost most, what moved it most."""
    days = np.unique(np.concatenate([days_of_fills(walk) for walk in walks]))
    earned = np.zeros((len(walks), len(days)))
    for number, walk in enumerate(walks):
        place = np.searchsorted(days, days_of_fills(walk))
        earned[number] = np.bincount(place, money_earned(walk), len(days))
    day = int(np.abs(earned.sum(axis=0)).argmax())
    walk = walks[int(np.abs(earned[:, day]).argmax())]
    return walk.where(days_of_fills(walk) == days[day]), str(days[day])


def _months(dates: NDArray[np.datetime64], returns: Mapping[str, Floats]) -> list[Row]:
    months = dates.astype("datetime64[M]")
    rows = []
    for month in np.unique(months):
        own = returns[POLICY][months == month]
        rows.append(
            {
                "month": str(month),
                "days": len(own),
                **{name: compound(daily[months == month]) for name, daily in returns.items()},
                "best_day": float(own.max()),
                "worst_day": float(own.min()),
            }
        )
    return rows


def _days(
    dates: NDArray[np.datetime64], returns: Mapping[str, Floats], walks: Sequence[Walk], trades: Trades
) -> list[Row]:
    equity = np.concatenate([[1.0], np.cumprod(1.0 + returns[POLICY])])
    below = drawdown(equity)[1:]
    costs = np.zeros(len(dates))
    for walk in walks:
        place = np.searchsorted(dates, days_of_fills(walk))
        costs += np.bincount(place, walk.costs * walk.equity_before, len(dates)) / len(walks)
    entered = np.bincount(_day_of(trades, dates), minlength=len(dates))
    return [
        {
            "day": str(day),
            **{name: float(daily[number]) for name, daily in returns.items()},
            "below_peak": float(below[number]),
            "costs": float(costs[number]),
            "trades": int(entered[number]),
        }
        for number, day in enumerate(dates)
    ]


def _day_of(trades: Trades, dates: NDArray[np.datetime64]) -> NDArray[np.intp]:
    """Return the number of the day on which each trade began; stocks' nights lie between two of them."""
    return np.maximum(np.searchsorted(dates, trades.entry.astype("datetime64[D]"), side="right") - 1, 0)


def _of_side(trades: Trades, side: int) -> NDArray[np.bool_]:
    return np.ones(len(trades), np.bool_) if side == 0 else trades.side == side


def _about(name: str, trades: Trades) -> Row:
    """Describe a group of trades."""
    number, won = len(trades), trades.net > 0
    wins, losses = float(trades.net[won].sum()), float(-trades.net[~won].sum())
    return {
        "trades": number,
        "group": name,
        "win_rate": float(won.mean()) if number else None,
        "gross": float(trades.gross.sum()),
        "costs": float(trades.costs.sum()),
        "funding": float(trades.funding.sum()),
        "net": float(trades.net.sum()),
        "mean_gain": float(trades.gain.mean()) if number else None,
        "best": float(trades.gain.max()) if number else None,
        "worst": float(trades.gain.min()) if number else None,
        "profit_factor": wins / losses if losses > 0 else None,
        "median_minutes": float(np.median(trades.minutes)) if number else None,
    }


def _by_holding_time(trades: Trades) -> list[Row]:
    least, rows = 0.0, []
    for name, most in HOLDING_TIMES:
        rows.append(_about(name, trades.where((trades.minutes > least) & (trades.minutes <= most))))
        least = most
    return rows


def _by_hour(walks: Sequence[Walk]) -> list[Row]:
    """Return by hour, UTC: mean value held long and short, in equities, and what was earned of the money."""
    long, short, earned, decisions = np.zeros((4, 24))
    for walk in walks:
        hour = (walk.time.astype("datetime64[h]").astype(np.int64) % 24).astype(np.intp)
        long += np.bincount(hour, np.maximum(walk.position, 0.0), 24)
        short += np.bincount(hour, np.minimum(walk.position, 0.0), 24)
        earned += np.bincount(hour, money_earned(walk), 24) / len(walks)
        decisions += np.bincount(hour, minlength=24)
    return [
        {
            "hour": hour,
            "decisions": int(decisions[hour]),
            "long": float(long[hour] / decisions[hour]),
            "short": float(short[hour] / decisions[hour]),
            "net": float(earned[hour]),
        }
        for hour in range(24)
        if decisions[hour]
    ]
