"""Bets on worthless days seldom grow, however long one looks; on good ones they grow as they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.evidence import BETS, FIRST_DAYS, PROVEN, bets_on, most_of


def test_bets_by_hand() -> None:
    daily = np.array([0.01, -0.02, 0.01, 0.0, 0.02, 0.03, -0.5, 0.01])
    money = [1.0 for _ in BETS]
    for day, earned in enumerate(daily):
        if day >= FIRST_DAYS:
            usual = math.sqrt(sum(r * r for r in daily[:day]) / day)
            moved = max(-4.0, min(4.0, earned / usual))
            money = [own * (1 + bet * moved) for own, bet in zip(money, BETS, strict=True)]
        assert bets_on(daily)[day] == pytest.approx(sum(money) / len(BETS))
    assert money[-1] == 0.0  # the largest bet lost all; the others go on
    assert most_of(daily) == pytest.approx(bets_on(daily)[5])


def test_days_without_a_return_and_too_few_days_prove_nothing() -> None:
    assert most_of(np.zeros(100)) == most_of(np.full(FIRST_DAYS, 0.01)) == most_of(np.zeros(0)) == 1.0


def test_no_bet_knows_the_day_that_it_is_made_on() -> None:
    daily = np.random.default_rng(0).normal(size=50)
    changed = daily.copy()
    changed[30:] = 9.0
    np.testing.assert_array_equal(bets_on(daily)[:30], bets_on(changed)[:30])


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "calm and wild", "mostly idle"])
def test_worthless_days_prove_an_edge_in_one_life_of_40_at_most(kind: str) -> None:
    random = np.random.default_rng(0)
    daily = random.normal(size=(2_000, 500))
    if kind == "heavy tails":
        daily = random.standard_t(3, daily.shape)
    elif kind == "calm and wild":
        daily *= np.where(np.arange(500) // 50 % 2, 5.0, 1.0)
    elif kind == "mostly idle":
        daily *= random.random(daily.shape) < 0.1
    assert (bets_on(daily).max(axis=1) >= PROVEN).mean() < 0.025


def test_a_good_champion_is_proven_within_months() -> None:
    daily = np.random.default_rng(1).normal(5 / math.sqrt(365), 1, (400, 250))  # a Sharpe ratio of 5
    proven = (bets_on(daily) >= PROVEN).any(axis=1).mean()
    assert proven > 0.8
