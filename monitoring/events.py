"""What is worth a message: found by comparing what a training has published with what it had published before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from monitoring import exams
from monitoring.state import DashboardState
from monitoring.summary import SHORT_OF_DISK, describe_source, is_dead

# The kinds, and their titles.
TITLES = {
    "gave_up": "Training has given up",
    "killed": "Training is gone",
    "restarted": "Training was restarted",
    "champion": "New champion",
    "edge_found": "Edge found",
    "edge_lost": "Edge lost",
    "source_dead": "A source brings no bars",
    "disk_short": "The disk is nearly full",
    "rollback": "Training went back to a checkpoint",
    "run_complete": "A run is complete",
    "test": "A test message",
}


@dataclass(frozen=True)
class Event:
    """Something that happened. ``kind`` is one of TITLES."""

    kind: str
    text: str
    count: int = 1

    @property
    def title(self) -> str:
        """The headline of its message."""
        return TITLES[self.kind]


class Watcher:
    """Finds events in states that are read one after another; what the first one has is known already."""

    def __init__(self, state: DashboardState) -> None:
        self._dead = {source for source in state.newest_ns if is_dead(state, source)}
        self._is_short = state.disk.is_short
        self._know_training(state)

    def _know_training(self, state: DashboardState) -> None:
        self._has_begun = state.run > 0  # before, its checkpoint has not been read
        self._num_exams = len(state.exams)
        self._verdict = state.exams[-1]["verdict"] if state.exams else "no edge"
        self._rollbacks = state.run, state.rollbacks
        self._complete = self._last_complete(state)

    def new(self, state: DashboardState) -> list[Event]:
        """Return what has happened since the last call."""
        if not self._has_begun:
            self._know_training(state)
        return [*self._of_exams(state), *self._of_sources(state), *self._of_training(state)]

    def _of_exams(self, state: DashboardState) -> Iterator[Event]:
        fresh = state.exams[self._num_exams :]
        self._num_exams = len(state.exams)
        for exam in fresh:
            verdict = exams.describe([exam])
            what = f"{verdict.headline}: {verdict.reason}. {verdict.figures} ({verdict.about})"
            if exam.get("decision") == "promoted":
                yield Event("champion", f"{exams.name_of(exam)}, {exam.get('reason', '')}. {what}")
            if exam["verdict"] != self._verdict:
                yield Event("edge_found" if verdict.is_edge else "edge_lost", what)
            self._verdict = exam["verdict"]

    def _of_sources(self, state: DashboardState) -> Iterator[Event]:
        dead = {source for source in state.newest_ns if is_dead(state, source)}
        for source in sorted(dead - self._dead):
            yield Event("source_dead", describe_source(state, source))
        self._dead = dead

    def _of_training(self, state: DashboardState) -> Iterator[Event]:
        if state.disk.is_short and not self._is_short:
            yield Event("disk_short", SHORT_OF_DISK)
        self._is_short = state.disk.is_short
        rollbacks = state.run, state.rollbacks
        if rollbacks > self._rollbacks and state.rollbacks:
            rate = 0.5**state.rollbacks
            text = f"Run {state.run}: most gradients were not finite; {rate:.3g} of the learning rate from now on"
            yield Event("rollback", text, state.rollbacks)
        self._rollbacks = rollbacks
        complete = self._last_complete(state)
        if complete > self._complete:
            verdict = exams.verdict_of(state)
            reason = f": {verdict.reason}" if verdict.reason else ""
            yield Event(
                "run_complete", f"Run {complete} of {state.epochs} epochs. {verdict.headline}{reason}"
            )
        self._complete = max(self._complete, complete)

    @staticmethod
    def _last_complete(state: DashboardState) -> int:
        return state.run if state.epoch >= state.epochs else state.run - 1
