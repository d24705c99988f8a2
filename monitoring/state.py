"""What the dashboard shows: written by the training and the data sources, drawn from snapshots."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monitoring.format import duration
from monitoring.health import Finding, number
from monitoring.machine import Disk, Machine

Row = Mapping[str, Any]

KEPT_EPOCHS = 500
HEALTH_EPOCHS = 50  # that define what is usual
KEPT_LINES = 1_000  # printed when the dashboard closes
PACE_EPOCHS = 25
PACE_EXAMS = 3
WARNING_SECONDS = 3_600.0  # a warning stays visible for this long
PHASE_LABELS = {
    "data": "loading bars",
    "rollout": "collecting",
    "update": "learning",
    "evaluation": "examining",
    "checkpoint": "saving",
}
PHASES = tuple(PHASE_LABELS)
EXAM = "exam"  # the task that is an exam under way


@dataclass(frozen=True)
class Line:
    """A logged line. ``at``: seconds of time.monotonic."""

    at: float
    text: str
    is_warning: bool = False


@dataclass
class Task:
    """Work of a data source in progress."""

    source: str
    unit: str  # such as "month files"
    total: int | None
    done: int = 0
    num_bytes: int = 0
    began: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)  # redirected output has a line now and then
    bar: Any = None  # of rich, where one is shown

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at the pace so far; None before there is one."""
        if not self.total or not self.done:
            return None
        return (time.monotonic() - self.began) / self.done * (self.total - self.done)

    @property
    def text(self) -> str:
        """How far it is."""
        if not self.done and self.total is None:
            return self.unit
        total = f" of {self.total:,}" if self.total is not None else ""
        size = f", {self.num_bytes / 1e6:.1f} MB" if self.num_bytes else ""
        seconds = self.seconds_left
        left = "" if seconds is None else f", {duration(seconds)} left"
        return f"{self.done:,}{total} {self.unit}{size}{left}"


@dataclass
class DashboardState:
    """Any thread may write: in plain assignments, or under ``lock`` where a list or dict changes in place.

    Times are seconds of time.monotonic, except those in nanoseconds, which are UTC.
    """

    epochs: int = 1  # per run
    runs: int | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 1
    device: str = ""  # such as "4 x cuda"
    run: int = 0
    epoch: int = 0  # finished epochs of the run
    transitions: int = 0
    phase: str = ""  # one of PHASES
    rollbacks: int = 0  # of the run
    stopping: str = ""  # the stop request, in words
    history: list[Row] = field(default_factory=list)  # metrics of the newest epochs, the newest last
    findings: Sequence[Finding] = ()
    lines: list[Line] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)  # by source
    newest_ns: Mapping[str, int] = field(default_factory=dict)  # source -> end of its newest bar
    symbols: Mapping[str, int] = field(default_factory=dict)  # source -> number of symbols
    days_late: Mapping[str, float] = field(
        default_factory=dict
    )  # source -> days of trade, when bars were loaded
    exams: Sequence[Row] = ()  # lines of the ledger, the newest last
    host: str = ""
    checkpoint_dir: str = ""
    report_dir: str = ""
    silence: float = 0.0  # seconds since a training that is watched from elsewhere published anything
    ended: float | None = None  # when it ended, in seconds since 1970
    has_failed: bool = False  # it ended by an error
    machine: Machine = field(default_factory=Machine)
    disk: Disk = field(default_factory=Disk)
    restarts: int = 0  # by the supervisor
    began: float = field(default_factory=time.monotonic)  # of the supervisor, or without one of this process
    epoch_began: float = field(default_factory=time.monotonic)
    phase_began: float = field(default_factory=time.monotonic)
    now: float = field(default_factory=time.monotonic)
    now_ns: int = field(default_factory=time.time_ns)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def begin(self, run: int, epoch: int, transitions: int, history: Iterable[Row] = ()) -> None:
        """Set the training's position, and the metrics recorded up to there."""
        with self.lock:
            self.run, self.epoch, self.transitions = run, epoch, transitions
            self.history += history
            self.epoch_began = time.monotonic()

    def add_epoch(self, metrics: Row, findings: Sequence[Finding]) -> None:
        """Add a finished epoch; after a return to a checkpoint it replaces the epochs that are done again."""
        with self.lock:
            self.run, self.epoch = int(metrics["run"]), int(metrics["epoch"])
            self.transitions = int(metrics["transitions"])
            while self.history and self.history[-1]["transitions"] >= self.transitions:
                self.history.pop()
            self.history.append(dict(metrics))
            del self.history[:-KEPT_EPOCHS]
            self.findings = findings
            self.epoch_began = time.monotonic()

    def add_line(self, text: str, is_warning: bool = False) -> None:
        """Add a logged line."""
        with self.lock:
            self.lines.append(Line(time.monotonic(), text, is_warning))
            del self.lines[:-KEPT_LINES]

    def snapshot(self) -> DashboardState:
        """Return a copy of this moment, which nothing else changes."""
        with self.lock:
            return replace(
                self,
                history=[*self.history],
                lines=[*self.lines],
                tasks={source: replace(task) for source, task in self.tasks.items()},
                now=time.monotonic(),
                now_ns=time.time_ns(),
            )

    @property
    def metrics(self) -> Row:
        """The newest epoch's metrics; empty before the first one."""
        return self.history[-1] if self.history else {}

    @property
    def warnings(self) -> list[Line]:
        """Warnings of the last hour."""
        return [line for line in self.lines if line.is_warning and self.now - line.at < WARNING_SECONDS]

    def values(self, name: str) -> list[float | None]:
        """Return one metric over the epochs in ``history`` that have it; None where it is not finite."""
        return [number(row, name) for row in self.history if name in row]

    @property
    def pace(self) -> float | None:
        """Seconds per recent epoch, checkpoints included and exams not; None before the first epoch."""
        seconds = []
        for row in self.history[-PACE_EPOCHS:]:
            total, data = number(row, "perf/epoch_seconds"), number(row, "perf/data_seconds")
            if total is not None and not data:  # an epoch that waited for bars waited for compilers, too
                seconds.append(total - (number(row, "perf/evaluation_seconds") or 0.0))
        if seconds:
            return sum(seconds) / len(seconds)
        rollout, update = (number(self.metrics, f"perf/{name}_seconds") for name in ("rollout", "update"))
        return None if rollout is None or update is None else rollout + update

    @property
    def exam_seconds(self) -> float:
        """Seconds of a recent exam; 0 before the first one."""
        seconds = [number(row, "perf/evaluation_seconds") or 0.0 for row in self.history]
        held = [spent for spent in seconds if spent][-PACE_EXAMS:]
        return sum(held) / len(held) if held else 0.0

    def seconds_for(self, epochs: int) -> float | None:
        """Estimate the seconds until this many more epochs are finished, with the exams among them.

        None before the first epoch, and where the one that is left takes longer than it should.
        """
        if self.pace is None:
            return None
        left = self._left_of_epoch(self.pace)
        if left is None:
            if epochs == 1:
                return None
            left = 0.0
        others = self._exams_within(epochs) - self._exams_within(1)
        return left + (epochs - 1) * self.pace + others * self.exam_seconds

    def _left_of_epoch(self, pace: float) -> float | None:
        exam = self.tasks.get(EXAM)
        if exam is not None and exam.seconds_left is not None:  # at the pace of this exam, not of others
            return exam.seconds_left
        left = pace + self.exam_seconds * self._exams_within(1) - (self.now - self.epoch_began)
        return left if left > 0 else None

    @property
    def share_done(self) -> float:
        """How much of the run is done, from 0 to 1: of its time, exams included, as far as that is known."""
        epochs, left = self.epochs - self.epoch, self.seconds_for(max(1, self.epochs - self.epoch))
        if self.pace is None or left is None or epochs <= 0:
            return min(1.0, self.epoch / self.epochs)
        before = self.epoch // self.checkpoint_every
        total = self.epochs * self.pace + (before + self._exams_within(epochs)) * self.exam_seconds
        return min(1.0, max(0.0, 1 - left / total))

    def _exams_within(self, epochs: int) -> int:
        """Count the exams that are due in this many next epochs of the run."""
        last = min(self.epoch + epochs, self.epochs)
        due = last // self.checkpoint_every - self.epoch // self.checkpoint_every
        return due + int(last == self.epochs and self.epochs % self.checkpoint_every != 0)

    @property
    def epochs_to_checkpoint(self) -> int:
        """Epochs until the next checkpoint."""
        every = self.checkpoint_every
        return min(every - self.epoch % every, max(1, self.epochs - self.epoch))

    def time_use(self) -> dict[str, float]:
        """Return the seconds per phase, and ``other``, over the epochs whose total was recorded."""
        spent = dict.fromkeys((*PHASES, "other"), 0.0)
        for row in self.history:
            total = number(row, "perf/epoch_seconds")
            if total is None:
                continue
            parts = {name: number(row, f"perf/{name}_seconds") or 0.0 for name in PHASES}
            for name, seconds in parts.items():
                spent[name] += seconds
            spent["other"] += max(0.0, total - sum(parts.values()))
        return spent
