"""What a healthy training looks like, in plain words: rules over metrics, each with its threshold and its remedy.

The one place of these thresholds: the dashboard and the plain lines ask here, and docs/metrics.md tells the same
(a test compares them). Pure functions of recorded figures; a figure that is missing or not finite breaks no rule,
except that of the losses, which must be finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

LONG = 10  # epochs in a row that make a figure a habit
NEEDED_FOR_PACE = 5  # earlier epochs that say what is usual
HIGHEST_KL = 0.1
HIGHEST_FIRST_KL = 1e-3
HIGHEST_CLIP_FRACTION = 0.5
LOWEST_EXPLAINED_VARIANCE = -0.1
HIGHEST_VALUE_LOSS = 10.0
DECIDED = 0.999  # share of the decisions that are for one position
HIGHEST_RUINED_SHARE = 0.05  # of the episodes that ended
GRADIENT_JUMP = 20.0  # times the usual norm
SLOW = 0.5  # of the usual speed
HOTTEST_CELSIUS = 85.0
HIGHEST_DORMANT_SHARE = 0.25
LOWEST_EFFECTIVE_RANK = 2.0


@dataclass(frozen=True)
class Finding:
    """One figure that asks for attention. ``metric`` names its row in docs/metrics.md."""

    metric: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def findings(recent: Sequence[Row]) -> list[Finding]:
    """Judge the newest epoch.

    Args:
        recent: metrics of the newest epochs, the newest last; those before it say what is usual and what lasts.

    Returns:
        What is not as it should be, the gravest first; nothing for no epoch.
    """
    if not recent:
        return []
    return [finding for rule in RULES if (finding := rule(recent)) is not None]


class Watch:
    """Tells each finding once: again only when it has been gone for ``LONG`` epochs."""

    def __init__(self) -> None:
        self._epochs_gone: dict[str, int] = {}

    def new(self, found: Sequence[Finding]) -> list[Finding]:
        """Count one epoch with these findings, and return those that were not there before."""
        new = [finding for finding in found if finding.metric not in self._epochs_gone]
        gone = {metric: epochs + 1 for metric, epochs in self._epochs_gone.items() if epochs + 1 < LONG}
        self._epochs_gone = gone | dict.fromkeys((finding.metric for finding in found), 0)
        return new


def number(row: Row, name: str) -> float | None:
    """Return a figure; None where it is missing, no number, or not finite."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _losses_are_finite(recent: Sequence[Row]) -> Finding | None:
    for name in ("loss/policy", "loss/value"):
        if name in recent[-1] and number(recent[-1], name) is None:
            return Finding(name, f"{name} is not finite", "lower learning_rate, or try --precision fp32")
    return None


def _steps_are_taken(recent: Sequence[Row]) -> Finding | None:
    skipped = number(recent[-1], "ppo/skipped_steps")
    if not skipped:
        return None
    what = f"{skipped:.0f} optimizer steps were skipped, their gradient was not finite"
    return Finding("ppo/skipped_steps", what, "lower learning_rate, or try --precision fp32")


def _is_below(recent: Sequence[Row], name: str, highest: float, what: str, advice: str) -> Finding | None:
    value = number(recent[-1], name)
    if value is None or value <= highest:
        return None
    return Finding(name, f"{what.format(value)} is above {highest:g}", advice)


def _rollout_and_update_agree(recent: Sequence[Row]) -> Finding | None:
    what = "rollout and update disagree, first KL {:.2g}"
    return _is_below(recent, "ppo/first_kl", HIGHEST_FIRST_KL, what, "a defect, please report it")


def _updates_are_small(recent: Sequence[Row]) -> Finding | None:
    what = "the policy moves far in one update, KL {:.2f}"
    return _is_below(recent, "ppo/approx_kl", HIGHEST_KL, what, "lower learning_rate or update_passes")


def _few_ratios_are_clipped(recent: Sequence[Row]) -> Finding | None:
    what = "most of the update is clipped away, clip fraction {:.2f}"
    advice = "lower learning_rate or update_passes"
    return _is_below(recent, "ppo/clip_fraction", HIGHEST_CLIP_FRACTION, what, advice)


def _critic_foresees(recent: Sequence[Row]) -> Finding | None:
    name = "ppo/explained_variance"
    if not _lasts(recent, name, lambda value: value < LOWEST_EXPLAINED_VARIANCE):
        return None
    what = (
        f"the critic is worse than a constant, explained variance below {LOWEST_EXPLAINED_VARIANCE:g} "
        f"for {LONG} epochs"
    )
    return Finding(name, what, "lower learning_rate, or raise value_coef")


def _value_loss_is_bounded(recent: Sequence[Row]) -> Finding | None:
    loss = number(recent[-1], "loss/value")
    if loss is None or loss <= HIGHEST_VALUE_LOSS:
        return None
    what = f"the critic's error {loss:.3g} is above {HIGHEST_VALUE_LOSS:g}"
    return Finding("loss/value", what, "lower learning_rate")


def _policy_still_decides(recent: Sequence[Row]) -> Finding | None:
    for name in recent[-1]:
        if name.startswith("rollout/in_position_") and _lasts(recent, name, lambda share: share >= DECIDED):
            position = name.removeprefix("rollout/in_position_")
            what = f"the policy has chosen position {position} only, for {LONG} epochs"
            flat = number({"": _as_number(position)}, "") == 0.0
            remedy = (
                "there may be no edge after costs; or raise entropy_coef" if flat else "raise entropy_coef"
            )
            return Finding("rollout/in_position_X", what, remedy)
    return None


def _accounts_live(recent: Sequence[Row]) -> Finding | None:
    ruined, ended = (number(recent[-1], f"rollout/{name}") for name in ("ruined_episodes", "episodes"))
    if not ruined or not ended or ruined / ended <= HIGHEST_RUINED_SHARE:
        return None
    what = f"{ruined:.0f} of {ended:.0f} episodes ended in ruin, more than {HIGHEST_RUINED_SHARE:.0%}"
    return Finding("rollout/ruined_episodes", what, "use smaller positions, or look at the costs")


def _gradients_are_steady(recent: Sequence[Row]) -> Finding | None:
    norm, usual = number(recent[-1], "ppo/grad_norm"), _usual(recent, "ppo/grad_norm")
    if norm is None or usual is None or norm <= GRADIENT_JUMP * usual:
        return None
    what = f"the gradient jumped to {norm / usual:.0f} times its usual norm, more than {GRADIENT_JUMP:g}"
    return Finding("ppo/grad_norm", what, "look whether it comes again; if so, lower learning_rate")


def _speed_is_steady(recent: Sequence[Row]) -> Finding | None:
    name = "perf/transitions_per_second"
    speed, usual = number(recent[-1], name), _usual(recent, name)
    if speed is None or usual is None or speed >= SLOW * usual:
        return None
    what = f"training runs at {speed / usual:.0%} of its usual speed, below {SLOW:.0%}"
    return Finding(name, what, "look for another program on this machine, or for heat")


def _gpu_is_cool(recent: Sequence[Row]) -> Finding | None:
    heat = number(recent[-1], "gpu/temperature_celsius")
    if heat is None or heat <= HOTTEST_CELSIUS:
        return None
    what = f"the GPU is hot, {heat:.0f} C is above {HOTTEST_CELSIUS:.0f}"
    return Finding("gpu/temperature_celsius", what, "it slows itself down: look at fans and air")


def _units_are_alive(recent: Sequence[Row]) -> Finding | None:
    share = number(recent[-1], "plasticity/dormant_units")
    if share is None or share <= HIGHEST_DORMANT_SHARE:
        return None
    what = f"{share:.0%} of the transformer's units are dormant, more than {HIGHEST_DORMANT_SHARE:.0%}"
    return Finding(
        "plasticity/dormant_units", what, "it learns less and less: lower learning_rate, or start anew"
    )


def _features_have_rank(recent: Sequence[Row]) -> Finding | None:
    rank = number(recent[-1], "plasticity/effective_rank")
    if rank is None or rank >= LOWEST_EFFECTIVE_RANK:
        return None
    what = f"the transformer tells bars hardly apart, effective rank {rank:.1f} is below {LOWEST_EFFECTIVE_RANK:g}"
    return Finding("plasticity/effective_rank", what, "lower learning_rate, or start anew")


# The gravest first.
RULES: tuple[Callable[[Sequence[Row]], Finding | None], ...] = (
    _losses_are_finite,
    _steps_are_taken,
    _rollout_and_update_agree,
    _updates_are_small,
    _few_ratios_are_clipped,
    _critic_foresees,
    _value_loss_is_bounded,
    _policy_still_decides,
    _accounts_live,
    _gradients_are_steady,
    _units_are_alive,
    _features_have_rank,
    _gpu_is_cool,
    _speed_is_steady,
)


def _lasts(recent: Sequence[Row], name: str, is_bad: Callable[[float], bool]) -> bool:
    """Tell whether each of the newest LONG epochs has the figure, and all of them are bad."""
    values = [number(row, name) for row in recent[-LONG:]]
    return len(values) == LONG and all(value is not None and is_bad(value) for value in values)


def _usual(recent: Sequence[Row], name: str) -> float | None:
    """Return the median of the epochs before the newest; None where there are few, or it is not above zero."""
    values = [value for row in recent[:-1] if (value := number(row, name)) is not None]
    usual = statistics.median(values) if len(values) >= NEEDED_FOR_PACE else 0.0
    return usual if usual > 0 else None


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
