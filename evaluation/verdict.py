"""The verdict: whether an exam shows an edge, or only what luck, the market or many trials would show too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from evaluation.exam import CHAMPION, Walk
from evaluation.measures import Measures, daily_returns
from evaluation.uncertainty import LEAST_DAYS, NORMAL, score

EULER_GAMMA = 0.5772156649015329
# So sure must it be that a challenger earns more than the champion.
CERTAINTY = 0.95


@dataclass(frozen=True)
class Verdict:
    """Whether there is an edge, and why or why not."""

    edge: bool
    reason: str
    sharpe_bar: float  # per year; expected of the best of so many trials without any edge

    def __str__(self) -> str:
        return f"{'edge' if self.edge else 'no edge'}: {self.reason}"


def expected_best_sharpe(num_trials: int, num_days: int, days_per_year: int) -> float:
    """Return the yearly Sharpe ratio that the best of so many trials shows by luck alone; 0 for a single trial.

    The expected maximum of independent trials (Bailey and Lopez de Prado 2014, "The Deflated Sharpe Ratio",
    equation 1), each with a Sharpe ratio without edge: mean 0, variance 1 / num_days a day (Lo 2002). The trials
    of one training resemble each other, so the bar is too high rather than too low.
    """
    if num_trials < 2:
        return 0.0
    quantile = NormalDist().inv_cdf
    best = (1 - EULER_GAMMA) * quantile(1 - 1 / num_trials) + EULER_GAMMA * quantile(
        1 - 1 / (num_trials * math.e)
    )
    return best * math.sqrt(days_per_year / num_days)


def verdict(policy: Measures, others: Mapping[str, Measures], num_trials: int) -> Verdict:
    """Judge one exam.

    An edge needs all of: the interval of the mean daily return lies above 0; the total return is above that of
    every baseline; the Sharpe ratio is above what the best of ``num_trials`` trials would show by luck.

    Args:
        policy: its pooled measures.
        others: measures of the baselines, by name; those of a champion are ignored.
        num_trials: exams so far, this one included.
    """
    bar = expected_best_sharpe(num_trials, policy.num_days, policy.days_per_year)
    reasons = []
    if policy.mean_daily_interval is None:
        reasons.append(f"{policy.num_days} days are too few to tell, {LEAST_DAYS} are needed")
    elif policy.mean_daily_interval[0] <= 0:
        low, high = policy.mean_daily_interval
        reasons.append(f"its mean day is between {low:+.2%} and {high:+.2%}, not surely above 0")
    better = [
        name
        for name, measures in others.items()
        if name != CHAMPION and measures.total_return >= policy.total_return
    ]
    if better:
        reasons.append(f"not above {', '.join(better)}")
    if policy.sharpe is not None and num_trials > 1 and policy.sharpe <= bar:
        reasons.append(f"the best of {num_trials} trials shows a Sharpe of {bar:.1f} by luck alone")
    if reasons:
        return Verdict(False, "; ".join(reasons), bar)
    reason = "surely above 0, above every baseline"
    if num_trials > 1:
        reason += f", above the Sharpe of {bar:.1f} that the best of {num_trials} trials shows by luck"
    return Verdict(True, reason, bar)


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
