"""The figures of a tear sheet are those of QuantStats, where it has them, and add up."""

from __future__ import annotations

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest

from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.measures import measure
from evaluation.tear_sheet import TearSheet, beside, busiest_day, rolling_sharpe, worst_drawdowns
from tests.evaluation.reports import report_of
from tests.evaluation.walks import of_daily, walk_of

with warnings.catch_warnings(), matplotlib.rc_context():  # it sets the style of all pictures to come
    warnings.simplefilter("ignore")
    from quantstats import stats as quantstats

DRAW = np.random.default_rng(7)
OWN, HOLD = DRAW.normal(0.001, 0.01, 90), DRAW.normal(0.0005, 0.02, 90)
DATES = np.datetime64("2026-01-05") + np.arange(90)


def series(daily: np.ndarray) -> pd.Series:
    return pd.Series(daily, index=pd.DatetimeIndex(DATES))


def tear_of() -> TearSheet:
    return TearSheet.of({POLICY: [of_daily(*OWN)], BUY_AND_HOLD: [of_daily(*HOLD)]})


def test_ratios_and_totals_are_those_of_quantstats() -> None:
    own, measured = series(OWN), measure([of_daily(*OWN)])
    assert measured.total_return == pytest.approx(quantstats.comp(own))
    assert measured.sharpe == pytest.approx(quantstats.sharpe(own, periods=365))
    assert measured.sortino == pytest.approx(quantstats.sortino(own, periods=365))
    assert measured.max_drawdown == pytest.approx(-quantstats.max_drawdown(own))
    assert measured.hit_rate == pytest.approx(quantstats.win_rate(own))


def test_rolling_sharpe_beta_and_alpha_are_those_of_quantstats() -> None:
    rolling = quantstats.rolling_sharpe(series(OWN), rolling_period=30, periods_per_year=365).dropna()
    np.testing.assert_allclose(rolling_sharpe(OWN, 30, 365), rolling.to_numpy(), rtol=1e-9)
    found, theirs = beside(OWN, HOLD, 365), quantstats.greeks(series(OWN), series(HOLD), periods=365)
    assert found["beta"] == pytest.approx(theirs["beta"])
    assert found["alpha"] == pytest.approx(theirs["alpha"])


def test_drawdowns_are_those_of_quantstats() -> None:
    details = quantstats.drawdown_details(quantstats.to_drawdown_series(series(OWN)))
    theirs = details.sort_values("max drawdown").head(5)
    ours = worst_drawdowns(DATES, OWN)
    assert [row["depth"] for row in ours] == pytest.approx((theirs["max drawdown"] / 100).tolist())
    assert [row["first"] for row in ours] == [str(day)[:10] for day in theirs["start"]]
    assert [row["lowest"] for row in ours] == [str(day)[:10] for day in theirs["valley"]]


def test_a_drawdown_that_lasts_has_no_end() -> None:
    (over, lasts) = sorted(
        worst_drawdowns(DATES[:5], np.array([-0.1, 0.2, -0.1, -0.1, 0.05])), key=lambda r: r["first"]
    )
    assert (over["first"], over["recovered"], over["days"]) == ("2026-01-05", "2026-01-06", 1)
    assert (lasts["first"], lasts["lowest"], lasts["recovered"], lasts["days"]) == (
        "2026-01-07", "2026-01-08", None, 3,
    )  # fmt: skip
    assert worst_drawdowns(DATES[:3], np.array([0.1, 0.0, 0.1])) == []


def test_months_compound_the_days() -> None:
    tear = tear_of()
    monthly = (
        series(OWN).groupby(pd.DatetimeIndex(DATES).strftime("%Y-%m")).apply(lambda m: (1 + m).prod() - 1)
    )
    assert {row["month"]: row[POLICY] for row in tear.months} == pytest.approx(monthly.to_dict())
    assert sum(row["days"] for row in tear.months) == len(tear.days) == 90
    assert tear.months[0]["worst_day"] == pytest.approx(OWN[:27].min())
    assert tear.window == 30 and len(tear.rolling_sharpe) == 61


def test_groups_of_trades_add_up() -> None:
    position = DRAW.choice([-1.0, 0.0, 1.0], 400)
    walk = walk_of(DRAW.normal(0, 0.01, 400) * position, hours=np.arange(400) / 3, position=position)
    tear = TearSheet.of({POLICY: [walk], BUY_AND_HOLD: [walk]})
    total, long, short = tear.sides
    for column in ("trades", "net", "gross", "costs"):
        assert long[column] + short[column] == pytest.approx(total[column])
        assert sum(row[column] for row in tear.holding) == pytest.approx(total[column])
    assert total["net"] == pytest.approx(np.expm1(walk.log_returns.sum()))
    assert sum(row["net"] for row in tear.hours) == pytest.approx(total["net"])
    assert sum(row["decisions"] for row in tear.hours) == 400
    assert sum(row["trades"] for row in tear.days) == total["trades"]
    own = tear.trades
    assert total["win_rate"] == pytest.approx((own.net > 0).mean())
    assert total["profit_factor"] == pytest.approx(own.net[own.net > 0].sum() / -own.net[own.net <= 0].sum())


def test_the_day_up_close_is_the_one_that_mattered() -> None:
    quiet, loud = (
        walk_of([0.001] * 72, hours=np.arange(72)),
        walk_of([0.001] * 72, hours=np.arange(72), symbol="BBB"),
    )
    loud.log_returns[30] = -0.2
    walk, day = busiest_day([quiet, loud])
    assert (walk.symbol, day, len(walk.time)) == ("BBB", "2026-01-06", 24)


def test_few_days_have_no_rolling_ratio_and_no_beta() -> None:
    tear = report_of([of_daily(0.01, -0.01)]).tear
    assert tear.window == 0 and tear.beside_hold["beta"] is None
    assert "rolling" not in report_of([of_daily(0.01, -0.01)]).pictures()
