"""Promised errors hold for worthless days; the formulas agree with resampling, with arch, and with scipy."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.uncertainty import (
    NORMAL,
    degrees_of_freedom,
    interval,
    normal_of_t,
    resampled_days,
    score,
    t_of_normal,
    tail_of,
)

ROUGH = np.random.default_rng(5).standard_t(4, 14) * 0.01


def test_resampled_days_are_runs_of_neighbours() -> None:
    days = resampled_days(27, resamples=4_000)
    assert days.shape == (4_000, 27)
    assert (days.min(), days.max()) == (0, 26)
    follows = (days[:, 1:] == (days[:, :-1] + 1) % 27).mean()
    # A run continues with probability 1 - 1/3; otherwise a day is drawn, once in 27 the next one.
    assert follows == pytest.approx(2 / 3 + 1 / 3 / 27, abs=0.01)
    assert np.bincount(days.flatten()).std() / 4_000 < 0.05
    assert np.array_equal(days, resampled_days(27, resamples=4_000))
    assert (resampled_days(1) == 0).all()


def test_the_score_divides_by_the_error_of_resampled_means_over_that_of_independent_days() -> None:
    drawn = resampled_days(14, resamples=40_000)
    plain = ROUGH[drawn].mean(axis=1).std()
    noise = np.random.default_rng(0).normal(size=(2_000, 14))
    counts = np.stack([np.bincount(row, minlength=14) for row in drawn[:4_000]])
    shrunk = ((noise @ counts.T / 14).var(axis=1).mean() * 14) ** 0.5  # 1 if the bootstrap were right
    statistic = t_of_normal(float(score(ROUGH)), degrees_of_freedom(14))
    assert statistic == pytest.approx(ROUGH.mean() / (plain / shrunk), rel=0.02)
    np.testing.assert_allclose(score(np.stack([ROUGH, -ROUGH])), [score(ROUGH), -score(ROUGH)])
    assert score(0 * ROUGH) == 0.0 and score(0 * ROUGH + 0.01) > 10


def test_resampling_is_that_of_arch() -> None:
    bootstrap = pytest.importorskip("arch.bootstrap")
    for days in (ROUGH, np.cumsum(ROUGH)):  # independent, and not at all
        num_days, levels = len(days), (2.5, 25, 50, 75, 97.5)
        theirs = bootstrap.StationaryBootstrap(num_days ** (1 / 3), days, seed=1).apply(np.mean, 4_000)[:, 0]
        ours = days[resampled_days(num_days, 20_000)].mean(axis=1)
        np.testing.assert_allclose(
            np.percentile(ours, levels), np.percentile(theirs, levels), atol=0.12 * theirs.std()
        )
        share = 100 * tail_of(num_days)
        assert interval(ours, num_days) == pytest.approx(
            tuple(np.percentile(theirs, (share, 100 - share))), abs=0.3 * theirs.std()
        )


def test_t_statistics_are_as_rare_as_their_normal_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (6.3, 13.0, 40.0):
        for value in (-1.0, 0.5, 1.96, 3.0, 4.0):
            statistic = t_of_normal(value, freedom)
            assert normal_of_t(np.array(statistic), freedom) == pytest.approx(value)
            exact = stats.norm.isf(stats.t.sf(statistic, freedom))
            assert value == pytest.approx(exact, abs=0.01 + 0.01 * abs(value))


@pytest.mark.parametrize("num_days", [10, 14, 60])
def test_promised_errors_hold_for_days_without_a_mean(num_days: int) -> None:
    random = np.random.default_rng(0)
    days = random.normal(size=(10_000, num_days))
    for certainty in (0.95, 0.975):
        wrong = (score(days) > NORMAL.inv_cdf(certainty)).mean()
        assert 0.8 < wrong / (1 - certainty) < 1.2
    counts = np.stack([np.bincount(row, minlength=num_days) for row in resampled_days(num_days)])
    means = days[:6_000] @ counts.T / num_days
    share = 100 * tail_of(num_days)
    low, high = np.percentile(means, (share, 100 - share), axis=1)
    for wrong in ((low > 0).mean(), (high < 0).mean()):
        assert 0.6 < wrong / 0.025 < 1.4  # a fifth, and what 6,000 worlds leave open
