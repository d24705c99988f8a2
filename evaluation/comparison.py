"""Two checkpoints on the same days: who earned more, paired by day, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.exam import Walk
from evaluation.measures import daily_returns, interval_of_mean
from evaluation.trained_policy import TrainedPolicy
from evaluation.uncertainty import LEAST_DAYS, NORMAL, Interval, score
from evaluation.verdict import CERTAINTY
from training.checkpoint import BEST, WEIGHTS_DEPEND_ON

if TYPE_CHECKING:
    from continuous_training import Settings


@dataclass(frozen=True)
class Comparison:
    """A policy's days less those of another; None with too few days."""

    other: str  # which checkpoint
    num_days: int
    mean_difference: float  # of daily returns
    interval: Interval | None  # 95 %, by bootstrap over the differences of days
    certainty: float | None  # that the policy's true mean day is higher
    days_ahead: int
    correlation: float | None  # of their days

    def as_json(self) -> dict[str, Any]:
        """Return it as plain types."""
        return asdict(self) | {"verdict": str(self)}

    def __str__(self) -> str:
        mean = f"{1e4 * self.mean_difference:+.1f} bps a day"
        if self.interval is None or self.certainty is None:
            few = f"{self.num_days} days are too few to tell, {LEAST_DAYS} are needed"
            return f"{mean} against {self.other}; {few}"
        low, high = (1e4 * end for end in self.interval)
        text = f"{mean} [{low:+.1f}, {high:+.1f}] against {self.other}"
        if low > 0 and self.certainty >= CERTAINTY:
            return f"Better: {text}, with {self.certainty:.1%} certainty"
        if high < 0 and self.certainty <= 1 - CERTAINTY:
            return f"Worse: {text}, with {1 - self.certainty:.1%} certainty"
        return f"Not told apart: {text}; better with {self.certainty:.1%} certainty"


def compare(own: Sequence[Walk], others: Sequence[Walk], name: str) -> Comparison:
    """Compare the days of two pools.

    Raises:
        ValueError: they did not act at the same bars.
    """
    same = len(own) == len(others) and all(
        np.array_equal(walk.time, other.time) for walk, other in zip(own, others, strict=False)
    )
    if not same:
        raise ValueError(
            f"{name} cannot be compared: it acts on other bars, as its context_bars or its symbols are others"
        )
    first, second = daily_returns(own)[0], daily_returns(others)[0]
    difference = first - second
    enough, differ = len(difference) >= LEAST_DAYS, bool(difference.any())
    can_correlate = enough and min(first.std(), second.std()) > 1e-12
    return Comparison(
        other=name,
        num_days=len(difference),
        mean_difference=float(difference.mean()),
        interval=interval_of_mean(difference),
        certainty=(NORMAL.cdf(float(score(difference))) if differ else 0.5) if enough else None,
        days_ahead=int((difference > 0).sum()),
        correlation=float(np.corrcoef(first, second)[0, 1]) if can_correlate else None,
    )


def read_other(path: Path, settings: Settings, device: Any) -> TrainedPolicy:
    """Read another checkpoint, or ``best``, to act on the same bars at the same costs.

    Raises:
        CheckpointError: it cannot be used.
        ValueError: it was trained with a shorter horizon.
    """
    if path.name == "best" and not path.exists():
        path = Path(settings.checkpoint_dir) / BEST
    own = (*WEIGHTS_DEPEND_ON, "features", "device")
    terms = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in own}
    return TrainedPolicy.read(path, type(settings), device, **terms)
