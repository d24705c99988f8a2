"""How much a few days can tell: the bootstrap over days, and what makes its promised errors hold with few.

Resampled histories vary too little: their mean is fitted to the same days, and runs of neighbours know only what
these days show of their dependence. For independent days it is known by how much. The variance that the bootstrap
gives the mean is a weighted sum of the periodogram (``_weights``), too small by the mean of the weights; what is
left is Student's t distribution with the degrees of freedom of that sum.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
# With fewer days, Sharpe ratios and intervals are None: they would mean nothing.
LEAST_DAYS = 10
NORMAL = NormalDist()

Interval = tuple[float, float]


def resampled_days(num_days: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """Draw days for a stationary bootstrap (Politis and Romano 1994), (resamples, num_days) indices.

    Runs of neighbouring days, of random length with a mean of the cube root of ``num_days``, keep the dependence
    of a day on the one before. Seeded: the same number of days gives the same draws, so differences are paired.
    """
    random = np.random.default_rng(seed)
    new_run = random.random((resamples, num_days)) < 1.0 / _run_length(num_days)
    new_run[:, 0] = True
    number = np.arange(num_days)
    began = np.maximum.accumulate(np.where(new_run, number, 0), axis=1)
    first = np.take_along_axis(random.integers(0, num_days, (resamples, num_days)), began, axis=1)
    return (first + number - began) % num_days


def score(daily: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far means of days lie above 0, in deviations of a standard normal, (...,) of (..., days).

    Above 1.96 by luck in 2.5 % of cases, if the days have no mean: a t statistic with the standard error of the
    stationary bootstrap, corrected for few days. 0 where every day is 0.
    """
    num_days = daily.shape[-1]
    mean = daily.mean(axis=-1)
    weights = _weights(num_days)
    power = np.abs(np.fft.fft(daily - mean[..., None], axis=-1)) ** 2
    error = np.sqrt((power * weights).sum(axis=-1) / weights.sum()) / num_days
    # Equal days differ by rounding, and are as certain as can be.
    statistic = np.divide(mean, np.maximum(error, 1e-12), out=np.zeros_like(mean), where=mean != 0)
    return normal_of_t(statistic, degrees_of_freedom(num_days))


def interval(values: NDArray[np.float64], num_days: int) -> Interval:
    """Return the 95 % interval of a figure from its value in each of the resampled histories of so many days."""
    tail = 100 * tail_of(num_days)
    low, high = np.nanpercentile(values, (tail, 100 - tail))
    return float(low), float(high)


def tail_of(num_days: int) -> float:
    """Return the share of the resampled histories to leave out at either end of an interval.

    2.5 % would be too much: the histories vary too little, so the interval reaches further into their tails
    (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", expanded percentiles).
    """
    plain = NORMAL.inv_cdf((1 + CONFIDENCE) / 2)
    reach = t_of_normal(plain, degrees_of_freedom(num_days)) / math.sqrt(_weights(num_days).mean())
    return NORMAL.cdf(-reach)


def degrees_of_freedom(num_days: int) -> float:
    """Return those of the bootstrap's variance of a mean, as Satterthwaite (1946) counts them."""
    weights = _weights(num_days)
    return float(weights.sum() ** 2 / (weights**2).sum())


def normal_of_t(statistic: NDArray[np.float64], freedom: float) -> NDArray[np.float64]:
    """Return the standard normal value that is as rare as a t statistic, to 1 % (Wallace 1959)."""
    shrink = (8 * freedom + 1) / (8 * freedom + 3)
    return np.sign(statistic) * shrink * np.sqrt(freedom * np.log1p(statistic**2 / freedom))


def t_of_normal(value: float, freedom: float) -> float:
    """Return the t statistic that is as rare as a standard normal value: the inverse of ``normal_of_t``."""
    squared = (value * (8 * freedom + 3) / (8 * freedom + 1)) ** 2
    return math.copysign(math.sqrt(freedom * math.expm1(squared / freedom)), value)


def _run_length(num_days: int) -> float:
    return max(1.0, num_days ** (1 / 3))


@cache
def _weights(num_days: int) -> NDArray[np.float64]:
    """Return the weights of the periodogram in the bootstrap's variance of the mean, (num_days,).

    The transform of those of the circular autocovariances (Politis and Romano 1994, lemma 1); 0 at frequency 0,
    where days less their mean have nothing.
    """
    lag, goes_on = np.arange(num_days), 1.0 - 1.0 / _run_length(num_days)
    kernel = (1 - lag / num_days) * goes_on**lag
    kernel[1:] += lag[1:] / num_days * goes_on ** (num_days - lag[1:])
    weights = np.fft.fft(kernel).real
    weights[0] = 0.0
    weights.setflags(write=False)
    return weights
