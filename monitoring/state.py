"""What the dashboard shows, kept by the training and read by whoever draws: any thread may write or read.

Knows no terminal. ``Cockpit.view`` returns an unchanging picture of the moment.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monitoring import health
from monitoring.machine import Disk, Machine

Row = Mapping[str, Any]

KEPT_EPOCHS = 500
KEPT_LINES = 1_000  # told on leaving
PACE_EPOCHS = 25
WARNING_SECONDS = 3_600.0  # a warning stays in sight for so long
PHASES = ("data", "rollout", "update", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Plan:
    """What the settings say about the way ahead."""

    epochs: int  # per run
    runs: int | None
    checkpoint_every: int
    keep_checkpoints: int
    device: str  # such as "4 x cuda"


@dataclass(frozen=True)
class Line:
    """One line that was told. ``at``: seconds of time.monotonic."""

    at: float
    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Task:
    """A source's work under way."""

    source: str
    text: str
    share: float | None  # 0 to 1


@dataclass
class Loading:
    """A source's work as it goes on."""

    what: str
    total: int | None
    done: int = 0
    num_bytes: int = 0
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    bar: Any = None  # its progress bar, where it has one

    def line(self) -> str:
        """Say how far it is."""
        total = f" of {self.total:,}" if self.total is not None else ""
        size = f", {self.num_bytes / 1e6:.1f} MB" if self.num_bytes else ""
        left = ""
        if self.total and self.done:
            seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
            left = f", {seconds:.0f} s left"
        return f"{self.done:,}{total} {self.what}{size}{left}"

    def shown(self, source: str) -> Task:
        """Return it as the dashboard shows it now."""
        return Task(source, self.line(), self.done / self.total if self.total else None)


@dataclass(frozen=True)
class View:
    """One moment of the training. Times are seconds of time.monotonic, but for ``newest_ns``."""

    now: float
    now_ns: int  # time of day, for the age of bars
    plan: Plan
    began: float
    run: int
    epoch: int  # finished epochs of the run
    transitions: int
    phase: str
    epoch_began: float
    stopping: str  # what was asked for, in words; "" while nothing was
    history: tuple[Row, ...]  # metrics of the newest epochs, the newest last
    findings: tuple[health.Finding, ...]
    lines: tuple[Line, ...]
    warnings: tuple[Line, ...]  # those of the last hour
    tasks: tuple[Task, ...]
    newest_ns: Mapping[str, int]  # source -> end of its newest bar
    symbols: Mapping[str, int]  # source -> symbols
    machine: Machine = field(default_factory=Machine)
    disk: Disk = field(default_factory=Disk)

    @property
    def metrics(self) -> Row:
        """The newest epoch's figures; empty before there are any."""
        return self.history[-1] if self.history else {}

    def values(self, name: str) -> list[float | None]:
        """Return one figure over the epochs that are kept."""
        return [health.number(row, name) for row in self.history]

    @property
    def pace(self) -> float | None:
        """Seconds that an epoch takes of late, evaluations and checkpoints included; None before the first one."""
        seconds = []
        for row in self.history[-PACE_EPOCHS:]:
            whole, data = (health.number(row, f"perf/{name}_seconds") for name in ("epoch", "data"))
            if whole is not None and not data:  # an epoch that waited for bars waited for compilers, too
                seconds.append(whole)
        if not seconds:
            rollout, update = (health.number(self.metrics, f"perf/{name}_seconds") for name in PHASES[1:3])
            return None if rollout is None or update is None else rollout + update
        return sum(seconds) / len(seconds)

    @property
    def epoch_left(self) -> float | None:
        """Seconds to the end of this epoch, as far as one can tell."""
        return None if self.pace is None else max(0.0, self.pace - (self.now - self.epoch_began))

    def seconds_for(self, epochs: int) -> float | None:
        """Return how long it takes until so many more epochs are finished."""
        if self.pace is None or self.epoch_left is None:
            return None
        return self.epoch_left + max(0, epochs - 1) * self.pace

    @property
    def epochs_to_checkpoint(self) -> int:
        """Epochs until the next one is saved."""
        every = self.plan.checkpoint_every
        return min(every - self.epoch % every, max(1, self.plan.epochs - self.epoch))

    def time_use(self) -> dict[str, float]:
        """Return the seconds per phase and ``other`` over the epochs that are kept and tell their whole time."""
        spent = dict.fromkeys((*PHASES, "other"), 0.0)
        for row in self.history:
            whole = health.number(row, "perf/epoch_seconds")
            if whole is None:
                continue
            parts = {name: health.number(row, f"perf/{name}_seconds") or 0.0 for name in PHASES}
            for name, seconds in parts.items():
                spent[name] += seconds
            spent["other"] += max(0.0, whole - sum(parts.values()))
        return spent


class Cockpit:
    """The training's side. Every method may be called from any thread and returns at once.

    ``plan`` and ``stopping`` (which returns what was asked for, in words, or "") are set before somebody looks.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = Plan(1, None, 1, 1, "")
        self.stopping: Callable[[], str] = lambda: ""
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._clock = clock
        self._began = self._epoch_began = clock()
        self._run = self._epoch = self._transitions = 0
        self._phase = ""
        self._history: deque[Row] = deque(maxlen=KEPT_EPOCHS)
        self._findings: tuple[health.Finding, ...] = ()
        self._lines: deque[Line] = deque(maxlen=KEPT_LINES)
        self._tasks: dict[str, Task] = {}
        self._newest_ns: dict[str, int] = {}
        self._symbols: dict[str, int] = {}
        self._machine, self._disk = Machine(), Disk()

    def begin(self, run: int, epoch: int, transitions: int, history: Iterable[Row] = ()) -> None:
        """Say where the training stands, and what was recorded up to there."""
        with self._lock:
            self._run, self._epoch, self._transitions = run, epoch, transitions
            self._history.extend(history)
            self._epoch_began = self._clock()
        self.changed.set()

    def phase(self, name: str) -> None:
        """Say what the training does now."""
        with self._lock:
            self._phase = name
        self.changed.set()

    def epoch(self, metrics: Row, findings: Sequence[health.Finding]) -> None:
        """Show a finished epoch."""
        with self._lock:
            self._run, self._epoch = int(metrics["run"]), int(metrics["epoch"])
            self._transitions = int(metrics["transitions"])
            while self._history and self._history[-1]["transitions"] >= self._transitions:
                self._history.pop()  # taken back by a return to a checkpoint
            self._history.append(dict(metrics))
            self._findings = tuple(findings)
            self._epoch_began = self._clock()
        self.changed.set()

    def line(self, text: str, is_warning: bool = False) -> None:
        """Show a line."""
        with self._lock:
            self._lines.append(Line(self._clock(), text, is_warning))
        self.changed.set()

    def task(self, source: str, task: Task | None) -> None:
        """Show how far a source's work is; None: it is over."""
        with self._lock:
            if task is None:
                self._tasks.pop(source, None)
            else:
                self._tasks[source] = task
        self.changed.set()

    def sources(self, newest_ns: Mapping[str, int], symbols: Mapping[str, int]) -> None:
        """Show what each source has."""
        with self._lock:
            self._newest_ns, self._symbols = dict(newest_ns), dict(symbols)
        self.changed.set()

    def gauges(self, machine: Machine, disk: Disk) -> None:
        """Show what the machine does."""
        with self._lock:
            self._machine, self._disk = machine, disk

    def recent(self) -> list[Row]:
        """Return the metrics that are kept, the newest last."""
        with self._lock:
            return list(self._history)

    def view(self, now_ns: int | None = None) -> View:
        """Return the picture of this moment."""
        stopping = self.stopping()
        with self._lock:
            now = self._clock()
            warnings = [line for line in self._lines if line.is_warning and now - line.at < WARNING_SECONDS]
            return View(
                now=now,
                now_ns=time.time_ns() if now_ns is None else now_ns,
                plan=self.plan,
                began=self._began,
                run=self._run,
                epoch=self._epoch,
                transitions=self._transitions,
                phase=self._phase,
                epoch_began=self._epoch_began,
                stopping=stopping,
                history=tuple(self._history),
                findings=self._findings,
                lines=tuple(self._lines),
                warnings=tuple(warnings),
                tasks=tuple(self._tasks.values()),
                newest_ns=self._newest_ns,
                symbols=self._symbols,
                machine=self._machine,
                disk=self._disk,
            )
