"""Rules for a healthy training, each with its threshold and a remedy.

The only place of these thresholds: the dashboard and the log use them, and a test compares docs/metrics.md. Rules
are pure functions of recorded metrics; one that is missing or not finite breaks no rule but that of the losses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

LONG = 10  # epochs in a row after which a value counts as lasting
NEEDED_FOR_USUAL = 5  # earlier epochs
HIGHEST_KL = 0.1
HIGHEST_FIRST_KL = 1e-3
HIGHEST_CLIP_FRACTION = 0.5
LOWEST_EXPLAINED_VARIANCE = -0.1
HIGHEST_VALUE_LOSS = 10.0
HIGHEST_OUTLIER_RATIO = 100.0
NAMED_OUTLIER_RATIO = 10.0  # of a symbol that a large or broken loss names
LEAST_NOTED_LOSS = 1.0  # of the critic; below, a symbol may stand out because hardly any other was traded
DECIDED = 0.999  # share of the decisions for one position
LARGEST_RATIO = 2.0  # of what training earns to what its exam earns
HIGHEST_RUINED_SHARE = 0.05  # of the episodes that ended
GRADIENT_JUMP = 20.0  # times the usual norm
SLOW = 0.5  # of the usual speed
HOTTEST_CELSIUS = 85.0
HIGHEST_DORMANT_SHARE = 0.25
LOWEST_EFFECTIVE_RANK = 2.0


@dataclass(frozen=True)
class Finding:
    """A metric that needs attention. ``metric`` names its row in docs/metrics.md."""

    metric: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def findings(recent: Sequence[Row]) -> list[Finding]:
    """Check the newest epoch against all rules.

    Args:
        recent: metrics of the newest epochs, the newest last; earlier ones define what is usual and what lasts.

    Returns:
        The findings, the most severe first.
    """
    if not recent:
        return []
    return [finding for rule in RULES if (finding := rule(recent)) is not None]


class Watch:
    """Reports each finding once, and again only after it was absent for ``LONG`` epochs."""

    def __init__(self) -> None:
        self._epochs_absent: dict[str, int] = {}

    def new(self, found: Sequence[Finding]) -> list[Finding]:
        """Count one epoch with these findings, and return those to report."""
        new = [finding for finding in found if finding.metric not in self._epochs_absent]
        absent = {metric: epochs + 1 for metric, epochs in self._epochs_absent.items() if epochs + 1 < LONG}
        self._epochs_absent = absent | dict.fromkeys((finding.metric for finding in found), 0)
        return new


def number(row: Row, name: str) -> float | None:
    """Return a metric; None where it is missing, not a number, or not finite."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class _Limit:
    """The rule that a metric does not pass a limit, in the newest epoch that has it: some are not in every epoch.

    ``what`` formats the metric's value.
    """

    metric: str
    limit: float
    what: str
    remedy: str
    is_lowest: bool = False

    def __call__(self, recent: Sequence[Row]) -> Finding | None:
        rows = [row for row in recent[-LONG:] if self.metric in row]
        value = number(rows[-1], self.metric) if rows else None
        if value is None or (value >= self.limit if self.is_lowest else value <= self.limit):
            return None
        side = "below" if self.is_lowest else "above"
        return Finding(self.metric, f"{self.what.format(value)} is {side} {self.limit:g}", self.remedy)


def _losses_are_finite(recent: Sequence[Row]) -> Finding | None:
    for name in ("loss/policy", "loss/value"):
        if name in recent[-1] and number(recent[-1], name) is None:
            what, symbol = f"{name} is not finite", recent[-1].get("loss/outlying_symbol")
            if symbol and number(recent[-1], "loss/outlier_ratio") is None:
                return Finding(name, f"{what}, first of all for {symbol}", _look_at(symbol))
            return Finding(name, what, "lower learning_rate, or try --precision fp32")
    return None


def _look_at(symbol: str) -> str:
    return f"look at the bars of {symbol} with the command data, and leave it out if they are bad"


def _value_loss_is_usual(recent: Sequence[Row]) -> Finding | None:
    """Name the symbol where the critic's loss is large because of one, or where one stands out from the others."""
    row = recent[-1]
    loss, ratio = (number(row, name) or 0.0 for name in ("loss/value", "loss/outlier_ratio"))
    symbol = row.get("loss/outlying_symbol")
    of_symbol = f"the critic's error in {symbol} is {ratio:.0f} times that of the others"
    if loss > HIGHEST_VALUE_LOSS:
        what = f"large value loss, {loss:.3g} is above {HIGHEST_VALUE_LOSS:g}"
        if symbol and ratio > NAMED_OUTLIER_RATIO:
            return Finding("loss/value", f"{what}, and {of_symbol}", _look_at(symbol))
        return Finding("loss/value", what, "lower learning_rate")
    if symbol and ratio > HIGHEST_OUTLIER_RATIO and loss > LEAST_NOTED_LOSS:
        what = f"{of_symbol}, more than {HIGHEST_OUTLIER_RATIO:g}"
        return Finding("loss/outlier_ratio", what, _look_at(symbol))
    return None


def _no_step_is_skipped(recent: Sequence[Row]) -> Finding | None:
    skipped = number(recent[-1], "ppo/skipped_steps")
    if not skipped:
        return None
    what = f"optimizer steps skipped for gradients that are not finite: {skipped:.0f}"
    return Finding("ppo/skipped_steps", what, "lower learning_rate, or try --precision fp32")


def _critic_explains(recent: Sequence[Row]) -> Finding | None:
    name, limit = "ppo/explained_variance", LOWEST_EXPLAINED_VARIANCE
    if not _lasts(recent, name, lambda value: value < limit):
        return None
    what = f"the critic is worse than a constant, explained_variance below {limit:g} for {LONG} epochs"
    return Finding(name, what, "lower learning_rate, or raise value_coef")


def _policy_varies(recent: Sequence[Row]) -> Finding | None:
    for name in recent[-1]:
        if name.startswith("rollout/in_position_") and _lasts(recent, name, lambda share: share >= DECIDED):
            position = name.removeprefix("rollout/in_position_")
            what = f"the policy chose position {position} only, for {LONG} epochs"
            remedy = "raise entropy_coef"
            if _is_zero(position):
                remedy = "there may be no edge after costs; or raise entropy_coef"
            return Finding("rollout/in_position_X", what, remedy)
    return None


def _accounts_survive(recent: Sequence[Row]) -> Finding | None:
    ruined, ended = (number(recent[-1], f"rollout/{name}") for name in ("ruined_episodes", "episodes"))
    if not ruined or not ended or ruined / ended <= HIGHEST_RUINED_SHARE:
        return None
    what = f"{ruined:.0f} of {ended:.0f} episodes ended in ruin, more than {HIGHEST_RUINED_SHARE:.0%}"
    return Finding("rollout/ruined_episodes", what, "use smaller positions, or check the costs")


def _exams_confirm(recent: Sequence[Row]) -> Finding | None:
    """Compare what training earned at full costs, in the epochs up to the newest exam, with that exam.

    Above its 95 % interval and over twice as much is too much.
    """
    name = "exam/net_bps_high"
    place = max((place for place, row in enumerate(recent) if name in row), default=-1)
    if place < 0:
        return None
    net, high = (number(recent[place], name) for name in ("exam/net_bps", name))
    before = [row for row in recent[: place + 1][-LONG:] if number(row, "rollout/cost_scale") == 1]
    earned = [value for row in before if (value := number(row, "rollout/reward_bps")) is not None]
    if net is None or high is None or len(earned) < NEEDED_FOR_USUAL:
        return None
    mean = statistics.fmean(earned)
    if mean <= max(high, 0.0, LARGEST_RATIO * net):
        return None
    what = f"training earns {mean:+.3f} bp a bar, its exam {net:+.3f} and surely no more than {high:+.3f}"
    remedy = "days were learnt by heart: trust the exam, and fetch more days, or raise feature_noise"
    return Finding(name, what, remedy)


def _gradients_are_steady(recent: Sequence[Row]) -> Finding | None:
    name = "ppo/grad_norm"
    norm, usual = number(recent[-1], name), _usual(recent, name)
    if norm is None or usual is None or norm <= GRADIENT_JUMP * usual:
        return None
    what = f"gradient spike, {norm / usual:.0f} times the usual norm, more than {GRADIENT_JUMP:g}"
    return Finding(name, what, "if it recurs, lower learning_rate")


def _speed_is_steady(recent: Sequence[Row]) -> Finding | None:
    name = "perf/transitions_per_second"
    speed, usual = number(recent[-1], name), _usual(recent, name)
    if speed is None or usual is None or speed >= SLOW * usual:
        return None
    what = f"training runs at {speed / usual:.0%} of its usual speed, below {SLOW:.0%}"
    return Finding(name, what, "check for other processes and thermal throttling")


# The most severe first.
RULES: tuple[Callable[[Sequence[Row]], Finding | None], ...] = (
    _losses_are_finite,
    _no_step_is_skipped,
    _Limit(
        "ppo/first_kl",
        HIGHEST_FIRST_KL,
        "rollout and update disagree, first_kl {:.2g}",
        "this is a defect, please report it",
    ),
    _Limit(
        "ppo/approx_kl",
        HIGHEST_KL,
        "large policy update, approx_kl {:.2f}",
        "lower learning_rate or update_passes",
    ),
    _Limit(
        "ppo/clip_fraction",
        HIGHEST_CLIP_FRACTION,
        "most of the update is clipped, clip_fraction {:.2f}",
        "lower learning_rate or update_passes",
    ),
    _critic_explains,
    _value_loss_is_usual,
    _policy_varies,
    _accounts_survive,
    _exams_confirm,
    _gradients_are_steady,
    _Limit(
        "plasticity/dormant_units",
        HIGHEST_DORMANT_SHARE,
        "many units are dormant, a share of {:.2f}",
        "the network loses plasticity: lower learning_rate, or start over",
    ),
    _Limit(
        "plasticity/effective_rank",
        LOWEST_EFFECTIVE_RANK,
        "features have collapsed, effective_rank {:.1f}",
        "lower learning_rate, or start over",
        is_lowest=True,
    ),
    _Limit(
        "gpu/temperature_celsius",
        HOTTEST_CELSIUS,
        "the GPU is hot, {:.0f} C",
        "it will throttle: check fans and airflow",
    ),
    _speed_is_steady,
)


def _lasts(recent: Sequence[Row], name: str, is_bad: Callable[[float], bool]) -> bool:
    """Return whether all of the newest LONG epochs have the metric, and a bad value of it."""
    values = [number(row, name) for row in recent[-LONG:]]
    return len(values) == LONG and all(value is not None and is_bad(value) for value in values)


def _usual(recent: Sequence[Row], name: str) -> float | None:
    """Return the median of the epochs before the newest; None where they are few, or it is not above zero."""
    values = [value for row in recent[:-1] if (value := number(row, name)) is not None]
    usual = statistics.median(values) if len(values) >= NEEDED_FOR_USUAL else 0.0
    return usual if usual > 0 else None


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False
