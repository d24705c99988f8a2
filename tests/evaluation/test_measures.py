"""Measures agree with computations by hand, also on awkward walks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.exam import Walk
from evaluation.measures import (
    break_even,
    break_even_interval,
    daily_growth,
    daily_returns,
    days_of_fills,
    drawdown,
    equity_curve,
    interval_of_mean,
    margin,
    measure,
)
from evaluation.uncertainty import LEAST_DAYS, resampled_days, tail_of
from tests.evaluation.walks import of_daily, walk_of

DAYS = (0.01, -0.02, 0.03, 0.0, 0.01, -0.01, 0.02, 0.0, 0.015, -0.005)


def test_one_symbol_by_hand() -> None:
    position, traded = [1, 1, 0, -1, 1, 0, 0, 0, 1, 1], [1, 0, 1, 1, 2, 1, 0, 0, 1, 0]
    walk = of_daily(*DAYS, position=position, costs=[0.001] * 10, traded=traded)
    got = measure([walk])
    mean = sum(DAYS) / 10
    deviation = math.sqrt(sum((r - mean) ** 2 for r in DAYS) / 9)
    downside = math.sqrt((0.02**2 + 0.01**2 + 0.005**2) / 10)
    equity, peak, drawdown = 1.0, 1.0, 0.0
    for r in DAYS:
        equity *= 1 + r
        peak = max(peak, equity)
        drawdown = max(drawdown, 1 - equity / peak)
    assert got.total_return == pytest.approx(equity - 1)
    assert got.mean_daily_return == pytest.approx(mean)
    assert got.sharpe == pytest.approx(mean / deviation * math.sqrt(365))
    assert got.sortino == pytest.approx(mean / downside * math.sqrt(365))
    assert got.max_drawdown == pytest.approx(drawdown)
    assert got.turnover == pytest.approx(0.7)
    assert got.time_in_market == pytest.approx(0.6)
    assert got.hit_rate == pytest.approx(0.5)
    assert got.costs == pytest.approx(0.01)
    assert (got.num_days, got.days_per_year) == (10, 365)
    assert got.mean_daily_interval is not None and got.sharpe_interval is not None
    assert got.mean_daily_interval[0] < mean < got.mean_daily_interval[1]
    assert got.sharpe_interval[0] < got.sharpe < got.sharpe_interval[1]


def test_a_pool_has_equal_money_in_every_symbol_and_moves_none() -> None:
    first, second = of_daily(1.0, 0.0, symbol="AAA"), of_daily(0.0, -0.5, symbol="BBB")
    daily, _ = daily_returns([first, second])
    # 2 and 1 after the first day, 2 and 0.5 after the second.
    np.testing.assert_allclose(daily, [0.5, 2.5 / 3 - 1])
    assert measure([first, second]).total_return == pytest.approx(0.25)


def test_symbols_that_trade_at_other_times_share_one_curve() -> None:
    coin = walk_of(np.log([1.1, 1.0, 1.2]), hours=[0, 1, 2])
    stock = walk_of(np.log([0.5, 2.0]), hours=[1, 30], asset_class="stock")
    time, equity = equity_curve([coin, stock])
    hours = (time - np.datetime64("2026-01-05")) / np.timedelta64(1, "h")
    assert hours.tolist() == [0, 0, 1, 2, 30]
    np.testing.assert_allclose(equity, [1, 1.05, 0.8, 0.91, 1.16])
    got = measure([coin, stock])
    assert got.max_drawdown == pytest.approx(1 - 0.8 / 1.05)
    # The stock's first fill, 01:00 UTC, is 20:00 of the day before in New York.
    assert got.num_days == 3


def test_days_are_utc_days_of_coins_and_new_york_sessions_of_stocks() -> None:
    # January: New York is 5 hours behind; its extended session lasts from 09:00 to 01:00 UTC.
    hours = [9.0, 14.5, 23.9, 24.9]
    stock, coin = (walk_of([0.0] * 4, hours, asset_class=kind) for kind in ("stock", "crypto"))
    assert [str(day) for day in days_of_fills(stock)] == ["2026-01-05"] * 4
    assert [str(day) for day in days_of_fills(coin)] == ["2026-01-05"] * 3 + ["2026-01-06"]
    # July: 4 hours behind; from 08:00 to 24:00 UTC.
    july = 24 * 180
    stock = walk_of([0.0] * 2, [july + 8.0, july + 23.99], asset_class="stock")
    assert len(set(days_of_fills(stock))) == 1


def test_stocks_alone_have_fewer_days_a_year() -> None:
    stocks = of_daily(*DAYS, asset_class="stock")
    assert measure([stocks]).days_per_year == 252
    assert measure([stocks]).sharpe == pytest.approx(measure([of_daily(*DAYS)]).sharpe * math.sqrt(252 / 365))
    assert measure([stocks, of_daily(*DAYS)]).days_per_year == 365


@pytest.mark.parametrize("num_days", [1, LEAST_DAYS - 1])
def test_too_few_days_have_no_ratio_and_no_interval(num_days: int) -> None:
    got = measure([of_daily(*DAYS[:num_days])])
    assert got.num_days == num_days
    for value in (
        got.sharpe,
        got.sharpe_interval,
        got.sortino,
        got.mean_daily_interval,
        got.mean_daily_score,
    ):
        assert value is None
    assert got.mean_daily_return == pytest.approx(sum(DAYS[:num_days]) / num_days)


def test_no_variance_has_no_sharpe_and_no_loss_no_sortino() -> None:
    flat, steady = measure([of_daily(*[0.0] * 10)]), measure([of_daily(*[0.01] * 10)])
    for got, mean in ((flat, 0.0), (steady, 0.01)):
        assert got.sharpe is None and got.sharpe_interval is None and got.sortino is None
        assert got.mean_daily_interval == pytest.approx((mean, mean))
        assert got.max_drawdown == 0.0
    assert (flat.hit_rate, steady.hit_rate) == (0.0, 1.0)


def test_ruin_is_a_number() -> None:
    got = measure([walk_of([0.0, math.log(1e-6), *[0.0] * 9])])
    assert got.total_return == pytest.approx(-1, abs=1e-5)
    assert got.max_drawdown == pytest.approx(1, abs=1e-5)
    assert got.sharpe is not None and got.sharpe < 0
    assert all(map(math.isfinite, (*got.sharpe_interval, *got.mean_daily_interval)))


def test_no_walk_is_no_measure() -> None:
    for call in (measure, daily_returns, equity_curve):
        with pytest.raises(ValueError, match="there is no walk to measure"):
            call([])


def test_drawdown_is_measured_from_the_last_peak() -> None:
    assert drawdown(np.array([1.0, 2.0, 1.5, 3.0, 2.4])) == pytest.approx([0, 0, -0.25, 0, -0.2])


@pytest.mark.parametrize(
    ("costs", "returns", "value", "words"),
    [
        # Costs compound: 1.1 falls to 0.8 by the same factor per basis point.
        ((0, 2, 5), (0.3, 0.1, -0.2), 2 + 3 * math.log(1.1) / math.log(1.1 / 0.8), "2.90 bps"),
        ((0, 2), (0.3, 0.1), None, "above 2 bps"),
        ((0, 2), (-0.1, -0.2), None, "none: it earns nothing even without costs"),
        ((1, 2), (0.0, -0.2), None, "below 1 bps"),
        ((0, 1, 2), (0.2, 0.0, -0.1), 1.0, "1.00 bps"),
    ],
)
def test_break_even_lies_where_nothing_is_left(
    costs: tuple[float, ...], returns: tuple[float, ...], value: float | None, words: str
) -> None:
    assert break_even(costs, returns) == (pytest.approx(value) if value is not None else None, words)


def traders_at(cost_bps: float) -> list[Walk]:
    """Two symbols of 40 days; one gains 3 % a day and trades 30 times, the other 1 % and 8 times."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.02, (2, 40))
    paid = [trades * math.log1p(-cost_bps / 1e4) for trades in (30, 8)]
    return [
        walk_of(gain + noise[n] + paid[n], symbol=name)
        for n, (name, gain) in enumerate((("AAA", 0.03), ("BBB", 0.01)))
    ]


def test_the_break_even_cost_of_a_pool_is_exact_to_a_hundredth() -> None:
    costs = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
    growth = [daily_growth(traders_at(cost)) for cost in costs]
    value, text = break_even(costs, [np.expm1(rung.sum(axis=0)) for rung in growth])
    assert value is not None and text == f"{value:.2f} bps"
    for factor, earns in ((0.99, True), (1.01, False)):
        assert (measure(traders_at(value * factor)).total_return > 0) == earns
    assert measure(traders_at(value)).total_return == pytest.approx(0, abs=1e-3)


def test_the_interval_of_the_break_even_cost_has_ends_on_the_ladder_or_none() -> None:
    costs = (0.0, 5.0, 10.0, 20.0)
    growth = np.stack([daily_growth(traders_at(cost)) for cost in costs])
    value, _ = break_even(costs, [np.expm1(rung.sum(axis=0)) for rung in growth])
    interval = break_even_interval(costs, growth)
    assert interval is not None and None not in interval
    assert 0 < interval[0] < value < interval[1] < 20
    # By hand: the same days at the same costs, one symbol, whose log growth is a line over all costs.
    line = growth[:, :, :1]
    slope = (line[0] - line[-1]).sum() / 20
    drawn = line[0, :, 0][resampled_days(40)].sum(axis=1) / slope
    low, high = break_even_interval(costs, line)
    assert (low, high) == pytest.approx(
        tuple(np.percentile(drawn, (100 * tail_of(40), 100 - 100 * tail_of(40)))), rel=0.02
    )
    assert break_even_interval(costs[:2], growth[:2])[1] is None
    assert break_even_interval(costs, growth - 0.02)[0] is None
    assert break_even_interval(costs, growth[:, :9]) is None


def test_the_margin_of_trades_by_hand() -> None:
    """Per decision of all symbols: net, gross before fees, traded; break-even is gross over traded."""
    long = of_daily(
        *DAYS,
        symbol="AAA",
        costs=[0.002] * 10,
        borrowing=[0.0005] * 10,
        traded=[1, 0, 1, 1, 2, 1, 0, 0, 0, 0],
    )
    idle = of_daily(*[0.0] * 10, symbol="BBB")
    got = margin([long, idle])
    gross = sum(math.log(1 + r + 0.0015) for r in DAYS)
    assert got.net_bps == pytest.approx(1e4 * sum(map(math.log1p, DAYS)) / 20)
    assert got.gross_bps == pytest.approx(1e4 * gross / 20)
    assert got.turnover == pytest.approx(6 / 20)
    assert got.break_even_bps == pytest.approx(1e4 * gross / 6)
    for interval, value in ((got.net_interval, got.net_bps), (got.break_even_interval, got.break_even_bps)):
        assert interval is not None and value is not None and interval[0] < value < interval[1]
    assert f"break-even at {1e4 * gross / 6:.2f} bp a side [" in str(got)
    never = margin([idle])
    assert never.break_even_bps is None and never.break_even_interval is None
    assert str(never) == "gross +0.000 bp a bar [+0.000, +0.000], 0.0000 of equity traded a bar"
    few = margin([of_daily(*DAYS[: LEAST_DAYS - 1])])
    assert few.net_interval is None and interval_of_mean(np.zeros(LEAST_DAYS - 1)) is None
