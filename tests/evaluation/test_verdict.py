"""The verdict is "edge" only beyond what luck, the market, and many trials explain."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.measures import measure
from evaluation.uncertainty import NORMAL, score
from evaluation.verdict import (
    PROBABILITY,
    beats,
    deflated_probability,
    describe_power,
    expected_luck,
    power,
    sharpe_bar,
    verdict,
)
from tests.evaluation.walks import of_daily

GOOD = measure([of_daily(0.010, 0.012, 0.008, 0.011, -0.001, 0.013, 0.012, 0.009, 0.010, 0.011)])
FLAT = measure([of_daily(*[0.0] * 10)])
BETTER = replace(FLAT, total_return=1.0)


@pytest.mark.parametrize("num_trials", [2, 10, 100])
def test_luck_is_the_best_of_so_many_trials_without_an_edge(num_trials: int) -> None:
    best = np.random.default_rng(1).normal(size=(3_000, num_trials)).max(axis=1).mean()
    assert expected_luck(num_trials) == pytest.approx(best, rel=0.06, abs=0.05)


def test_with_many_days_the_probability_is_the_published_one() -> None:
    days = np.random.default_rng(0).normal(0.0012, 0.01, 1_000)
    ratio = days.mean() / days.std(ddof=1)
    centred = (days - days.mean()) / days.std()
    skew, kurtosis = (centred**3).mean(), (centred**4).mean()
    # Equations 1 and 2, with the variance of trials without an edge, 1 / days.
    luck = expected_luck(20) / math.sqrt(1_000)
    error = math.sqrt((1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2) / 999)
    published = NORMAL.cdf((ratio - luck) / error)
    assert deflated_probability(float(score(days)), 20) == pytest.approx(published, abs=0.06)
    assert 0.5 < published < 0.99


def test_all_exams_of_a_life_together_err_in_less_than_half_of_five_percent() -> None:
    needed = [NORMAL.inv_cdf(PROBABILITY) + expected_luck(number) for number in range(1, 20_001)]
    shares = 1 - np.array([NORMAL.cdf(value) for value in needed])
    assert shares[:100].sum() < 0.024 and shares.sum() < 0.025  # of any life: the sum converges
    # The same from days: 100 exams of other policies on the same 14 days, in 400 lives.
    scores = score(np.random.default_rng(3).standard_t(5, (400, 100, 14)))
    assert (scores > needed[:100]).any(axis=1).mean() < 0.04


def test_the_bar_is_the_sharpe_ratio_that_is_called_an_edge_half_of_the_time() -> None:
    random = np.random.default_rng(0)
    for trials, days in ((1, 14), (8, 60)):
        bar = sharpe_bar(trials, days, 365)
        noise = random.normal(size=(4_000, days))
        for sharpe in (bar, 0.6 * bar):
            scores = score(noise + sharpe / math.sqrt(365))
            seen = np.mean([deflated_probability(value, trials) >= PROBABILITY for value in scores])
            assert power(sharpe, trials, days, 365) == pytest.approx(seen, abs=0.04)
        assert power(bar, trials, days, 365) == pytest.approx(0.5, abs=0.07)
    bars = [sharpe_bar(trials, 14, 365) for trials in (1, 2, 10, 1000)]
    assert bars == sorted(bars)
    assert power(0.0, 1, 14, 365) == pytest.approx(1 - PROBABILITY, abs=0.002)


def test_an_edge_needs_all_three() -> None:
    others = {"buy and hold": FLAT, "always flat": FLAT}
    assert str(verdict(GOOD, others, 1)) == (
        "edge: deflated Sharpe probability 99.9% after 1 trial, above every baseline"
    )
    worse = verdict(GOOD, others | {"momentum": BETTER}, 1)
    assert str(worse) == "no edge: not above momentum"
    assert verdict(GOOD, others | {"champion": BETTER}, 1).edge  # a champion does not count
    lucky = verdict(replace(GOOD, mean_daily_score=3.6), others, 20)
    assert str(lucky) == (
        "no edge: deflated Sharpe probability 95.5% after 20 trials, 98.5% needed, as of a Sharpe of 60.5"
    )
    assert lucky.sharpe_bar == sharpe_bar(20, 10, 365) and lucky.power == power(5.0, 20, 10, 365)
    unsure = verdict(replace(GOOD, mean_daily_interval=(-0.001, 0.02)), others, 1)
    assert str(unsure) == "no edge: its mean day is between -0.10% and +2.00%, not surely above 0"
    few = measure([of_daily(0.01, 0.02)])
    assert str(verdict(few, others, 1)) == "no edge: 2 days are too few to tell, 10 are needed"
    assert verdict(few, others, 1).sharpe_bar is None


def test_an_exam_says_what_it_can_see() -> None:
    assert describe_power(measure([of_daily(*[0.01, -0.01] * 7)]), 2).startswith(
        "14 days after 2 trials show a true Sharpe of 5 in "
    )
    few = measure([of_daily(0.01, 0.02)])
    assert describe_power(few, 2) == "2 days show no edge, however large; 10 are needed"


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
