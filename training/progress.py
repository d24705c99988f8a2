"""Training progress: run, epoch, and totals since the first start."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.control import EXIT_SETTING, ExitProgram
from runtime.surroundings import START
from runtime.wording import count_of
from training.checkpoint import Checkpoint, name_of, same_version

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

MAX_ROLLBACKS = 3  # in one run


@dataclass
class TrainingProgress:
    """Counters that survive restarts. ``epoch`` counts finished epochs of ``run``."""

    run: int = 1
    epoch: int = 0
    transitions: int = 0  # over all ranks, since the very first start
    cutoff_ns: int = 0  # this run's bars end here; 0: not chosen yet
    trained_until_ns: int = 0  # no bar that opens at or after it was ever trained on, in this run or before
    rollbacks: int = 0  # in this run: returns to a checkpoint since gradients were not finite
    # That this run began with, by symbol; {}: not loaded.
    num_bars: dict[str, int] = field(default_factory=dict)
    # Of this run's exams at full costs, while exam_patience is set: the checkpoint that earned most a bar, net,
    # and how many exams in a row since then earned less.
    best_exam: str = ""
    best_net_bps: float = 0.0
    worse_exams: int = 0

    @staticmethod
    def of(saved: Checkpoint) -> TrainingProgress:
        """Return the progress that a checkpoint was saved with."""
        progress = TrainingProgress(saved.run, saved.epoch, saved.transitions)
        if saved.resume:
            with same_version(saved.path):
                progress = TrainingProgress(**saved.resume.clock)
        if progress.cutoff_ns and not progress.num_bars:  # written before they were counted
            progress.num_bars = dict.fromkeys(saved.symbols, 0)
        progress.trained_until_ns = max(progress.trained_until_ns, saved.trained_until_ns)
        return progress

    def tick(self, transitions: int) -> None:
        """Count one finished epoch."""
        self.epoch += 1
        self.transitions += transitions

    def cost_scale(self, cost_ramp: float, epochs: int) -> float:
        """Return the share of trading costs to charge in the epoch that comes: rising over the first run.

        With full costs from the start every exploratory trade loses first, and the policy learns to stay
        flat before it has seen what there is to earn (measured: docs/LOG.md).
        """
        if self.run > 1 or cost_ramp == 0:
            return 1.0
        return min(1.0, self.epoch / (cost_ramp * epochs))

    def describe_run(self, cost_ramp: float, epochs: int) -> str:
        """Return the run's number and epochs, and over which of them costs grow."""
        text = f"Run {self.run}: epochs {self.epoch + 1} to {epochs}"
        if self.cost_scale(cost_ramp, epochs) < 1:
            last = math.ceil(cost_ramp * epochs)
            text += f"; costs grow from zero to full by epoch {last + 1}, and the reward falls by them"
        return text

    def is_past(self, runs: int | None) -> bool:
        """Whether this many runs are done; never, when no number is set."""
        return runs is not None and self.run > runs

    def next_run(self) -> None:
        """Begin the next run, which chooses fresh bars."""
        self.run += 1
        self.epoch = 0
        self.cutoff_ns = 0
        self.rollbacks = 0
        self.num_bars = {}
        self.best_exam, self.best_net_bps, self.worse_exams = "", 0.0, 0

    def count_exam(self, net_bps: float) -> None:
        """Compare the exam of the weights now with the best one of this run."""
        if self.best_exam and net_bps < self.best_net_bps:
            self.worse_exams += 1
        else:
            self.best_exam, self.best_net_bps = name_of(self.run, self.epoch), net_bps
            self.worse_exams = 0

    def got_worse(self, settings: Settings) -> bool:
        """Whether ``exam_patience`` exams in a row were below the run's best."""
        return settings.exam_patience is not None and self.worse_exams >= settings.exam_patience

    def is_over(self, settings: Settings) -> bool:
        """Whether the run has no epochs left."""
        return self.epoch >= settings.epochs or self.got_worse(settings)

    def count_rollback(self) -> int:
        """Log that most gradients were not finite; return the number of this rollback in the run.

        Raises:
            ExitProgram: there were MAX_ROLLBACKS already.
        """
        reason = f"run {self.run} epoch {self.epoch}: most gradients are not finite"
        if self.rollbacks == MAX_ROLLBACKS:
            raise ExitProgram(EXIT_SETTING, f"{reason}, after {MAX_ROLLBACKS} rollbacks: lower learning_rate")
        rate = 0.5 ** (self.rollbacks + 1)
        log.warning(f"{reason}; back to the newest checkpoint, at {rate:.3g} of the learning rate")
        return self.rollbacks + 1

    @property
    def rate_scale(self) -> float:
        """Factor of the learning rate: halved by each rollback, 1 again in a new run."""
        return 0.5**self.rollbacks

    def state_dict(self) -> dict[str, Any]:
        """Return plain counters."""
        return asdict(self)


class CheckpointSchedule:
    """When a checkpoint is due: by epochs, and by the clock, since on slow hardware 25 epochs take hours.

    Exams that are due by the clock alone take a tenth of the time at most.
    """

    def __init__(self, settings: Settings) -> None:
        self._every, self._epochs = settings.checkpoint_every, settings.epochs
        self._seconds = 60 * settings.checkpoint_minutes
        self._exam_seconds = 0.0  # of the newest, given up or not
        self.restart()

    def restart(self) -> None:
        """Let the clock begin: a checkpoint was saved."""
        self._began = time.monotonic()

    @contextmanager
    def time_exam(self) -> Iterator[None]:
        """Time an exam."""
        began = time.monotonic()
        yield
        self._exam_seconds = time.monotonic() - began

    def is_due_at(self, epoch: int) -> bool:
        """Whether one is due when this epoch of a run is done."""
        return epoch % self._every == 0 or epoch == self._epochs

    def is_late(self) -> bool:
        """Whether one is due by this process's clock."""
        return time.monotonic() - self._began >= max(self._seconds, 9 * self._exam_seconds)


@dataclass
class Summary:
    """Totals of this start of the program, logged at its end."""

    first_transitions: int
    is_simulated: bool = False  # then real bars come next
    began: float = field(default_factory=time.monotonic)
    epochs: int = 0
    rewards: list[float] = field(default_factory=list)  # bp per bar, one an epoch
    cost_scales: list[float] = field(default_factory=list)

    def count(self, reward_bps: float, cost_scale: float) -> None:
        """Count one finished epoch."""
        self.epochs += 1
        self.rewards.append(reward_bps)
        self.cost_scales.append(cost_scale)

    def lines(self, progress: TrainingProgress, newest_checkpoint: str) -> list[str]:
        """Return it as lines for the user."""
        hours, rest = divmod(int(time.monotonic() - self.began), 3600)
        lines = [
            f"Summary: {count_of(self.epochs, 'epoch')} in {hours}:{rest // 60:02d}:{rest % 60:02d}, "
            f"{progress.transitions - self.first_transitions:,} transitions, now at run {progress.run}"
        ]
        if self.rewards:
            tenth = max(1, len(self.rewards) // 10)
            first, last = self.rewards[:tenth], self.rewards[-tenth:]
            lines.append(
                f"Reward: {sum(first) / tenth:+.3f} bp/bar over the first {count_of(tenth, 'epoch')}, "
                f"{sum(last) / tenth:+.3f} over the last {tenth}, best {max(self.rewards):+.3f}"
            )
            scales = self.cost_scales[0], self.cost_scales[-1]
            if scales[0] < scales[1]:
                lines[-1] += (
                    f"; costs grew from {scales[0]:.0%} to {scales[1]:.0%} of their full size meanwhile"
                )
        lines.append(f"Newest checkpoint: {newest_checkpoint}")
        if self.is_simulated and newest_checkpoint.endswith(".pt"):
            lines += [
                f"Next: {START} evaluate {newest_checkpoint} writes a report of it",
                f"Then real bars, without keys: {START} --preset small --sources binance --positions 0,1",
            ]
        return lines
