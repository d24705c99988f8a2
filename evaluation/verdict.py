"""The verdict: whether an exam shows an edge, or only what luck, the market or many trials would show too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.exam import CHAMPION, Walk
from evaluation.measures import Measures, daily_returns
from evaluation.uncertainty import LEAST_DAYS, NORMAL, degrees_of_freedom, score, t_of_normal

EULER_GAMMA = 0.5772156649015329
# So sure must it be that a challenger earns more than the champion.
CERTAINTY = 0.95
# So probable must it be that an edge is no luck. As the luck of so many trials grows with every exam, this pays
# for all of them together: at most 2.5 % of worthless trainings are ever called an edge, however long they live.
PROBABILITY = 0.985
SHARPE_OF_POWER = 5.0  # for which an exam says how often it would see it


@dataclass(frozen=True)
class Verdict:
    """Whether there is an edge, and why or why not; None with too few days."""

    edge: bool
    reason: str
    sharpe_bar: float | None  # per year, from which independent days are called an edge after so many trials
    probability: float | None  # deflated: that the Sharpe ratio is above what luck shows in so many trials
    power: float | None  # share of such exams that would call a true Sharpe ratio of SHARPE_OF_POWER an edge

    def __str__(self) -> str:
        return f"{'edge' if self.edge else 'no edge'}: {self.reason}"


def expected_luck(num_trials: int) -> float:
    """Return the score that the best of so many trials without any edge shows on average; 0 for a single trial.

    The expected maximum of independent standard normals (Bailey and Lopez de Prado 2014, "The Deflated Sharpe
    Ratio", equation 1). The trials of one training resemble each other, so it is too much rather than too little.
    """
    if num_trials < 2:
        return 0.0
    quantile = NORMAL.inv_cdf
    return (1 - EULER_GAMMA) * quantile(1 - 1 / num_trials) + EULER_GAMMA * quantile(
        1 - 1 / (num_trials * math.e)
    )


def deflated_probability(mean_daily_score: float, num_trials: int) -> float:
    """Return how probable it is that the mean day, as scored, is above what luck shows in so many trials.

    The published deflated Sharpe probability, with Student's t in place of the normal distribution, which 14 days
    are far from, and the bootstrap's standard error, which counts dependent days.
    """
    return NORMAL.cdf(mean_daily_score - expected_luck(num_trials))


def sharpe_bar(num_trials: int, num_days: int, days_per_year: int) -> float:
    """Return the yearly Sharpe ratio from which so many independent days are called an edge."""
    needed = t_of_normal(_needed_score(num_trials), degrees_of_freedom(num_days))
    return needed * math.sqrt(days_per_year / num_days)


def power(sharpe: float, num_trials: int, num_days: int, days_per_year: int) -> float:
    """Return the share of exams that would call a true yearly Sharpe ratio an edge, if its days are independent.

    The statistic's noncentral t distribution, over quantiles of the deviation (Wilson and Hilferty 1931).
    """
    freedom = degrees_of_freedom(num_days)
    quantiles = np.array([NORMAL.inv_cdf((number + 0.5) / 400) for number in range(400)])
    spread = 2 / (9 * freedom)
    deviation = np.maximum(1 - spread + quantiles * math.sqrt(spread), 0.0) ** 1.5
    needed = t_of_normal(_needed_score(num_trials), freedom)
    expected = sharpe * math.sqrt(num_days / days_per_year)
    return float(np.mean([NORMAL.cdf(expected - needed * value) for value in deviation]))


def describe_power(policy: Measures, num_trials: int) -> str:
    """Say how large an edge would have to be for an exam to see it."""
    if policy.num_days < LEAST_DAYS:
        return f"{policy.num_days} days show no edge, however large; {LEAST_DAYS} are needed"
    given = num_trials, policy.num_days, policy.days_per_year
    return (
        f"{policy.num_days} days after {_trials(num_trials)} show a true Sharpe of {SHARPE_OF_POWER:g} in "
        f"{power(SHARPE_OF_POWER, *given):.1%} of cases, one of {sharpe_bar(*given):.1f} in about half"
    )


def verdict(policy: Measures, others: Mapping[str, Measures], num_trials: int) -> Verdict:
    """Judge one exam.

    An edge needs all of: the interval of the mean daily return lies above 0; the total return is above that of
    every baseline; the deflated Sharpe probability is at least ``PROBABILITY``.

    Args:
        policy: its pooled measures.
        others: measures of the baselines, by name; those of a champion are ignored.
        num_trials: exams so far, this one included.
    """
    bar = probability = seen = None
    reasons, given = [], (num_trials, policy.num_days, policy.days_per_year)
    if policy.mean_daily_interval is None or policy.mean_daily_score is None:
        reasons.append(f"{policy.num_days} days are too few to tell, {LEAST_DAYS} are needed")
    else:
        bar, seen = sharpe_bar(*given), power(SHARPE_OF_POWER, *given)
        probability = deflated_probability(policy.mean_daily_score, num_trials)
        low, high = policy.mean_daily_interval
        if low <= 0:
            reasons.append(f"its mean day is between {low:+.2%} and {high:+.2%}, not surely above 0")
        elif probability < PROBABILITY:
            reasons.append(
                f"{_in_words(probability, num_trials)}, {PROBABILITY:.1%} needed, as of a Sharpe of {bar:.1f}"
            )
    better = [
        name
        for name, measures in others.items()
        if name != CHAMPION and measures.total_return >= policy.total_return
    ]
    if better:
        reasons.append(f"not above {', '.join(better)}")
    if reasons or probability is None:
        return Verdict(False, "; ".join(reasons), bar, probability, seen)
    reason = f"{_in_words(probability, num_trials)}, above every baseline"
    return Verdict(True, reason, bar, probability, seen)


def _in_words(probability: float, num_trials: int) -> str:
    # Rounded down: 98.46 % is not the 98.5 % that are needed.
    percent = math.floor(1e3 * probability) / 10
    return f"deflated Sharpe probability {percent:.1f}% after {_trials(num_trials)}"


def _trials(number: int) -> str:
    return "1 trial" if number == 1 else f"{number:,} trials"


def _needed_score(num_trials: int) -> float:
    return NORMAL.inv_cdf(PROBABILITY) + expected_luck(num_trials)


def beats(challenger: Sequence[Walk], other: Sequence[Walk]) -> tuple[bool, str]:
    """Return whether a challenger surely earned more than another contestant on the same days, and the reason.

    Both are pooled; the differences of their days are resampled.

    Raises:
        ValueError: there is no walk.
    """
    difference = daily_returns(challenger)[0] - daily_returns(other)[0]
    num_days = len(difference)
    if num_days < LEAST_DAYS:
        return False, f"{num_days} days are too few to tell, {LEAST_DAYS} are needed"
    if not difference.any():
        return False, "both earned the same on every day"
    certainty = NORMAL.cdf(float(score(difference)))
    return certainty >= CERTAINTY, (
        f"{difference.mean():+.3%} a day, above 0 with {certainty:.1%} certainty, {CERTAINTY:.0%} needed"
    )
