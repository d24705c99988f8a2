"""A training in a few facts, for ``status`` and the page: each a label, a text, and whether it needs attention."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from monitoring import attach, exams
from monitoring.format import age, duration, iso_time, size
from monitoring.state import EXAM, PHASE_LABELS, DashboardState, Line
from runtime.wording import count_of

SHORT_OF_DISK = "no room for two more checkpoints: lower keep_checkpoints or keep_runs"
EPOCH_LINE = re.compile(r"run \d+ epoch +\d+/")
LATE_DAYS = 1.0  # of trade, after which a source counts as dead


@dataclass(frozen=True)
class Fact:
    """One row. ``text`` is plain and may be long."""

    label: str
    text: str
    needs_attention: bool = False


def facts(state: DashboardState) -> list[Fact]:
    """Return what people want to know of a training that is watched, the most important first."""
    return [*_progress(state), *_verdict(state), *_condition(state)]


def facts_beside_verdict(state: DashboardState) -> list[Fact]:
    """Return the facts but those of the verdict."""
    return [*_progress(state), *_condition(state)]


def _progress(state: DashboardState) -> Iterator[Fact]:
    life = attach.describe_life(state)
    is_ill = bool(life) and (state.ended is None or state.has_failed)
    yield Fact("training", life or _position(state), needs_attention=is_ill)
    if life:
        yield Fact("reached", describe_place(state))
    if state.stopping:
        yield Fact("stop", state.stopping, needs_attention=True)
    yield from _since(state, is_over=bool(life))


def _verdict(state: DashboardState) -> Iterator[Fact]:
    verdict = exams.verdict_of(state)
    yield Fact("verdict", f"{verdict.headline}: {verdict.reason}" if verdict.reason else verdict.headline)
    others = (
        ("", verdict.figures),
        ("", verdict.about),
        ("champion", verdict.champion),
        ("record", verdict.record),
    )
    for label, text in others:
        if text:
            yield Fact(label, text)


def _condition(state: DashboardState) -> Iterator[Fact]:
    if state.metrics:
        yield Fact("reward", _reward(state))
    for number, finding in enumerate(state.findings):
        yield Fact("" if number else "health", str(finding), needs_attention=True)
    if state.metrics and not state.findings:
        yield Fact("health", "no metric is outside its range")
    for number, source in enumerate(state.newest_ns):
        yield Fact("" if number else "sources", describe_source(state, source), is_dead(state, source))
    if state.disk.free is not None:
        text = f"{size(state.disk.free)} free; {count_of(state.disk.num_checkpoints, 'checkpoint')}, "
        text += size(state.disk.checkpoints)
        if state.disk.is_short:
            text += f"; {SHORT_OF_DISK}"
        yield Fact("disk", text, state.disk.is_short)


def newest_lines(state: DashboardState, count: int) -> list[Line]:
    """Return the newest lines of train.log but those of epochs, whose figures are shown anyway."""
    return [line for line in state.lines if not EPOCH_LINE.match(line.text)][-count:]


def is_dead(state: DashboardState, source: str) -> bool:
    """Whether a source brought no bars for a day of trade before the newest load."""
    return state.days_late.get(source, 0.0) >= LATE_DAYS


def describe_source(state: DashboardState, source: str) -> str:
    """Return a source, the age of its newest bar, and its symbols in words."""
    old = age((state.now_ns - state.newest_ns[source]) / 1e9)
    symbols = state.symbols.get(source, 0)
    text = f"{source}: newest bar {old} old, {symbols} symbol{'s' if symbols != 1 else ''}"
    if is_dead(state, source):
        text += f"; none came for {state.days_late[source]:.0f} days of trade: see its lines in train.log"
    return text


def _position(state: DashboardState) -> str:
    phase = PHASE_LABELS.get(state.phase, state.phase) or "starting"
    if (exam := state.tasks.get(EXAM)) is not None and exam.total:
        phase += f" ({exam.done / exam.total:.0%})"
    text = f"{describe_place(state)}, {phase}"
    if (left := state.seconds_for(state.epochs - state.epoch)) is not None and state.epoch < state.epochs:
        text += f"; about {duration(left)} left in this run"
    return text


def describe_place(state: DashboardState) -> str:
    """Return the position in run and epochs in words."""
    runs = f" of {state.runs}" if state.runs else ""
    return f"run {state.run}{runs}, epoch {state.epoch} of {state.epochs}, {state.transitions:,} transitions"


def _since(state: DashboardState, is_over: bool) -> Iterator[Fact]:
    seconds = state.now - state.began
    if seconds < 1 and is_over:  # it published nothing
        return
    restarts = f", {state.restarts} restart{'s' if state.restarts != 1 else ''}" if state.restarts else ""
    at = iso_time(state.now_ns - int(seconds * 1e9)).replace("T", " ").replace("Z", " UTC")
    up = "" if is_over else f", for {duration(seconds)}"
    yield Fact("since", f"{at}{up}{restarts}; {state.device or 'no device yet'}", bool(state.restarts))


def _reward(state: DashboardState) -> str:
    reward = state.metrics.get("rollout/reward_bps")
    if not isinstance(reward, int | float):
        return "not finite"
    text = f"{reward:+.3f} bp per bar"
    scale = state.metrics.get("rollout/cost_scale")
    if isinstance(scale, int | float) and scale < 1:
        text += f", with {scale:.0%} of the costs: they still grow"
    return text


def as_json(state: DashboardState, num_lines: int = 20) -> dict[str, Any]:
    """Return everything as plain types; times are ISO 8601 in UTC."""
    return {
        "time": iso_time(state.now_ns),
        "alive": attach.is_alive(state),
        "life": attach.describe_life(state),
        "seconds_since_sign_of_life": round(state.silence, 1),
        "run": state.run,
        "runs": state.runs,
        "epoch": state.epoch,
        "epochs": state.epochs,
        "transitions": state.transitions,
        "phase": state.phase,
        "stopping": state.stopping,
        "device": state.device,
        "began": iso_time(state.now_ns - int((state.now - state.began) * 1e9)),
        "restarts": state.restarts,
        "rollbacks": state.rollbacks,
        "verdict": asdict(exams.verdict_of(state)),
        "exam": dict(state.exams[-1]) if state.exams else None,
        "metrics": dict(state.metrics),
        "findings": [asdict(finding) for finding in state.findings],
        "sources": [
            {
                "source": source,
                "newest": iso_time(newest_ns),
                "symbols": state.symbols.get(source, 0),
                "days_late": round(state.days_late.get(source, 0.0), 2),
            }
            for source, newest_ns in state.newest_ns.items()
        ],
        "disk": asdict(state.disk) | {"is_short": state.disk.is_short},
        "lines": [
            {
                "time": iso_time(int((time.time() - (state.now - line.at)) * 1e9)),
                "text": line.text,
                "is_warning": line.is_warning,
            }
            for line in newest_lines(state, num_lines)
        ],
    }
