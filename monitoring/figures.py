"""Which metrics the dashboard shows, with labels and formats for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Metrics of exams and the record with their labels, the most important first; the verdict has the others.
LABELS = {
    "exam/return_percent": "return, %",
    "exam/buy_and_hold_percent": "buy and hold, %",
    "exam/momentum_percent": "momentum, %",
    "exam/champion_percent": "champion, %",
    "exam/sharpe": "Sharpe, per year",
    "exam/max_drawdown_percent": "deepest fall, %",
    "exam/turnover": "turnover a day",
    "exam/time_in_market": "time in market",
    "exam/costs_percent": "all costs, %",
    "exam/hit_rate": "days with a gain",
    "exam/sharpe_bar": "Sharpe by luck",
    "record/return_percent": "return, %",
    "record/buy_and_hold_percent": "buy and hold, %",
    "record/daily_bps": "mean day, bps",
    "record/daily_bps_low": "at least, bps",
    "record/daily_bps_high": "at most, bps",
    "record/days": "days",
}


@dataclass(frozen=True)
class Figure:
    """A metric of metrics.jsonl on the dashboard."""

    metric: str
    label: str
    form: Callable[[float], str]
    is_occasional: bool = False  # not in every epoch: its newest value stays


REWARD = (
    Figure("rollout/reward_bps", "reward bp/bar", "{:+.3f}".format),
    Figure("rollout/episode_return_percent", "episode return", "{:+.2f} %".format),
    Figure("rollout/turnover", "turnover", "{:.4f}".format),
    Figure("rollout/cost_scale", "share of costs", "{:.0%}".format),
)
LEARNING = (
    Figure("ppo/approx_kl", "policy's change", "{:.4f}".format),
    Figure("ppo/clip_fraction", "choices clipped", "{:.1%}".format),
    Figure("loss/entropy", "indecision", "{:.3f}".format),
    Figure("ppo/explained_variance", "critic explains", "{:+.1%}".format),
    Figure("ppo/grad_norm", "gradient's size", "{:.3g}".format),
    Figure("ppo/skipped_steps", "steps skipped", "{:.0f}".format),
    Figure("ppo/first_kl", "before a step", "{:.1e}".format),
    Figure("learning_rate", "learning rate", "{:.2e}".format),
    Figure("plasticity/dormant_units", "idle units", "{:.1%}".format, is_occasional=True),
    Figure("plasticity/effective_rank", "directions used", "{:.1f}".format, is_occasional=True),
    Figure("plasticity/weight_norm", "weights' size", "{:.4g}".format, is_occasional=True),
)
SPEED = (
    Figure("perf/transitions_per_second", "decisions/s", "{:,.0f}".format),
    Figure("perf/episodes_per_second", "episodes/s", "{:,.1f}".format),
    Figure("perf/mfu", "of peak speed", "{:.0%}".format),
)
