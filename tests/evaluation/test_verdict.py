"""The verdict is "edge" only beyond what luck, the market, and many trials explain."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.measures import measure
from evaluation.verdict import beats, expected_best_sharpe, verdict
from tests.evaluation.walks import of_daily

GOOD = measure([of_daily(0.010, 0.012, 0.008, 0.011, -0.001, 0.013, 0.012, 0.009, 0.010, 0.011)])
FLAT = measure([of_daily(*[0.0] * 10)])
BETTER = replace(FLAT, total_return=1.0)


@pytest.mark.parametrize("num_trials", [2, 10, 100])
def test_the_bar_is_the_best_of_so_many_trials_without_an_edge(num_trials: int) -> None:
    random = np.random.default_rng(1)
    days = 250
    daily = random.normal(0, 0.01, (300, num_trials, days)).astype(np.float32)
    best = (daily.mean(2) / daily.std(2, ddof=1)).max(1).mean() * math.sqrt(365)
    assert expected_best_sharpe(num_trials, days, 365) == pytest.approx(best, rel=0.1, abs=0.1)


def test_one_trial_has_no_luck_to_subtract() -> None:
    assert expected_best_sharpe(1, 14, 365) == 0.0
    bars = [expected_best_sharpe(trials, 14, 365) for trials in (1, 2, 10, 1000)]
    assert bars == sorted(bars)
    assert expected_best_sharpe(10, 56, 365) == pytest.approx(expected_best_sharpe(10, 14, 365) / 2)


def test_an_edge_needs_all_three() -> None:
    others = {"buy and hold": FLAT, "always flat": FLAT}
    assert str(verdict(GOOD, others, 1)).startswith("edge: surely above 0")
    worse = verdict(GOOD, others | {"momentum": BETTER}, 1)
    assert str(worse) == "no edge: not above momentum"
    assert verdict(GOOD, others | {"champion": BETTER}, 1).edge  # a champion does not count
    lucky = verdict(replace(GOOD, sharpe=5.0), others, 20)
    assert str(lucky) == "no edge: the best of 20 trials shows a Sharpe of 11.5 by luck alone"
    assert lucky.sharpe_bar == expected_best_sharpe(20, 10, 365)
    unsure = verdict(replace(GOOD, mean_daily_interval=(-0.001, 0.02)), others, 1)
    assert str(unsure) == "no edge: its mean day is between -0.10% and +2.00%, not surely above 0"
    few = measure([of_daily(0.01, 0.02)])
    assert str(verdict(few, others, 1)) == "no edge: 2 days are too few to tell, 10 are needed"


def test_staying_flat_is_no_edge() -> None:
    expected = "no edge: its mean day is between +0.00% and +0.00%, not surely above 0; not above always flat"
    assert str(verdict(FLAT, {"always flat": FLAT}, 3)) == expected


def test_earning_a_little_more_every_day_beats_in_any_market() -> None:
    market = np.random.default_rng(0).normal(0, 0.05, 14)
    champion = of_daily(*market)
    better, reason = beats([of_daily(*(market + 0.001))], [champion])
    assert better
    assert reason == "+0.100% a day, above 0 with 100.0% certainty, 95% needed"
    worse, _ = beats([of_daily(*(market - 0.001))], [champion])
    assert not worse
    other = np.random.default_rng(1).normal(0.001, 0.05, 14)
    assert not beats([of_daily(*other)], [champion])[0]


def test_equal_days_and_too_few_days_beat_no_contestant() -> None:
    walk = of_daily(*[0.01, 0.02, -0.01, 0.03, 0.01] * 2)
    assert beats([walk], [walk]) == (False, "both earned the same on every day")
    two = of_daily(0.5, 0.5)
    assert beats([two], [of_daily(0.0, 0.0)]) == (False, "2 days are too few to tell, 10 are needed")
