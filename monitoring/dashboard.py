"""The layout of the dashboard: a snapshot of its state as lines of a given width and height. Does no output.

Sections lie in two columns from 76 columns on. What does not fit a small terminal is dropped row by row, the
least important first; no line is ever longer than the terminal is wide.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import zip_longest
from typing import TextIO

from rich.console import Console as RichConsole
from rich.text import Text

from monitoring import attach, exams
from monitoring.figures import LABELS, LEARNING, REWARD, SPEED, Figure
from monitoring.format import age, duration, printable, size, sparkline, wrap
from monitoring.health import HOTTEST_CELSIUS, number
from monitoring.machine import Gpu
from monitoring.state import PHASE_LABELS, DashboardState

TWO_COLUMNS = 76
GAP = 3
LABEL, VALUE = 17, 10  # columns
FEWEST_LOG_LINES = 3
MOST_ATTENTION_LINES = 6
MOST_EXAM_ROWS = 8
LONG_PHASE_SECONDS = 10.0  # from which on it is said for how long
DIGITS = re.compile(r"[\d.]+")
ACCENT, DIM, WARNING, STRONG = "cyan", "dim", "yellow", "bold"


@dataclass(frozen=True)
class Glyphs:
    """The characters of bars, curves and marks."""

    full: str
    track: str
    curve: str  # low to high
    rule: str
    dot: str
    alert: str


UNICODE = Glyphs("━", "─", "▁▂▃▄▅▆▇█", "─", " · ", "▲")
ASCII = Glyphs("#", "-", "_.-:=+*#", "-", ", ", "!")


@dataclass
class Section:
    """A title and its rows, the most important first; the section of the lowest ``weight`` is dropped first."""

    title: str
    weight: int
    rows: list[Text] = field(default_factory=list)


def render(state: DashboardState, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """Return at most ``height`` lines of at most ``width`` columns."""
    width, height = max(1, width), max(1, height)
    inner = max(1, width - 2)
    page = _Page(state, inner, glyphs)
    head, attention = page.head(), page.attention()
    verdict = page.verdict()
    del verdict[max(0, height // 4) :]  # of a small terminal
    head += verdict
    room = height - len(head) - len(attention) - FEWEST_LOG_LINES - 1
    if inner < TWO_COLUMNS:
        body = _stack([*page.left(inner), *page.right(inner)], inner, room, glyphs)
    else:
        column = (inner - GAP) // 2
        left = _stack(page.left(column), column, room, glyphs)
        right = _stack(page.right(inner - GAP - column), inner - GAP - column, room, glyphs)
        body = _beside(left, right, column)
    if len(head) + len(body) + len(attention) + FEWEST_LOG_LINES + 2 < height:
        head.append(Text())
    lines = [*head, *body, *attention]
    lines += page.log(height - len(lines))
    for line in lines:
        line.truncate(inner, overflow="ellipsis" if glyphs is UNICODE else "crop")
        line.pad_left(1 if width > 2 else 0)
    return lines[:height]


class Painter:
    """Renders the state as strings for a terminal: its colours, its character set."""

    def __init__(self, terminal: RichConsole) -> None:
        self._color_system = terminal.color_system
        self._glyphs = UNICODE if (terminal.encoding or "").lower().startswith("utf") else ASCII

    @staticmethod
    def of(stream: TextIO) -> Painter | None:
        """Return a painter for a stream, None where it is no terminal that can be drawn on."""
        terminal = RichConsole(file=stream)
        return Painter(terminal) if stream.isatty() and can_be_drawn_on(terminal) else None

    def __call__(self, state: DashboardState, width: int, height: int) -> list[str]:
        """Return the lines, without line ends."""
        text = io.StringIO()
        console = RichConsole(
            file=text,
            force_terminal=True,
            color_system=self._color_system,  # type: ignore[arg-type]
            width=width + 1,
            height=height,
            legacy_windows=False,
            highlight=False,
        )
        console.print(Text("\n").join(render(state, width, height, self._glyphs)), no_wrap=True, end="")
        return text.getvalue().split("\n")


def can_be_drawn_on(terminal: RichConsole) -> bool:
    """Whether a terminal knows the sequences that a dashboard needs."""
    return not (terminal.is_dumb_terminal or terminal.legacy_windows)


class _Page:
    """The parts of one frame."""

    def __init__(self, state: DashboardState, width: int, glyphs: Glyphs) -> None:
        self.state = state
        self.width = width
        self.glyphs = glyphs
        self.alarming = {finding.metric for finding in state.findings}

    # ------------------------------------------------------------------------------------- above and below

    def head(self) -> list[Text]:
        """Title, progress of the run, and the time left."""
        state = self.state
        title = Text("Continuous Training", STRONG)
        restarts = f", {state.restarts} restart{'s' if state.restarts > 1 else ''}" if state.restarts else ""
        up = f"up {duration(state.now - state.began)}{restarts}"
        about = Text(f"{state.device}{self.glyphs.dot}{up}", DIM)
        share = state.share_done
        percent = f" {share:4.0%}"
        position = [
            Text(f"run {state.run}{f' of {state.runs}' if state.runs else ''}", STRONG),
            Text(f"epoch {state.epoch}/{state.epochs}", STRONG),
            Text(f"{state.transitions:,} transitions"),
        ]
        doing = PHASE_LABELS.get(state.phase, state.phase) or "starting"
        if (lasts := state.now - state.phase_began) > LONG_PHASE_SECONDS:
            doing += f" for {duration(lasts)}"
        ahead = [Text(doing, ACCENT)]
        left, to_save = state.epochs - state.epoch, state.epochs_to_checkpoint
        life = attach.describe_life(state)
        if left > 0 and not life and state.pace is not None:
            epochs = "1 epoch" if to_save == 1 else f"{to_save} epochs"
            this, run, saved = (state.seconds_for(count) for count in (1, left, to_save))
            ahead.append(
                Text("epoch takes longer than usual" if this is None else f"epoch {duration(this)} left")
            )
            ahead += [Text(f"run {duration(run)} left")] if run is not None else []
            ahead.append(Text(f"checkpoint in {epochs}{'' if saved is None else f', {duration(saved)}'}"))
        lines = [
            _spread(title, about, self.width),
            self.bar(share, self.width - len(percent)).append(percent),
            *self._flow(position),
            *(() if life else self._flow(ahead)),
        ]
        for notice in filter(None, (state.stopping, life)):
            lines += [Text(part, f"{STRONG} {WARNING}") for part in wrap(notice, self.width)]
        return lines

    def verdict(self) -> list[Text]:
        """What people ask first: whether there is an edge, by how much, and who is the champion."""
        if not self.state.exams:
            return []
        verdict = exams.verdict_of(self.state)
        style = ACCENT if verdict.is_edge else WARNING
        texts = [
            (f"{verdict.headline}: {verdict.reason}" if verdict.reason else verdict.headline, style),
            (verdict.figures, ""),
            (f"Champion: {verdict.champion}", ""),
            (f"Record: {verdict.record}" if verdict.record else "", ""),
            (verdict.about, DIM),
        ]
        return [Text(part, style) for text, style in texts if text for part in wrap(text, self.width)]

    def attention(self) -> list[Text]:
        """Findings about the training's health, then the warnings of the last hour, the newest first."""
        texts = [str(finding) for finding in self.state.findings]
        texts += [line.text.removeprefix("Warning: ") for line in reversed(self.state.warnings)]
        if self.state.disk.is_short:
            texts.insert(
                0,
                "the disk is nearly full: no room for two more checkpoints; lower keep_checkpoints or keep_runs",
            )
        lines: list[Text] = []
        unlike: dict[str, str] = {}  # of texts that differ in figures alone the first, which is the newest
        for text in texts:
            unlike.setdefault(DIGITS.sub("", text), text)
        for text in unlike.values():
            wrapped = wrap(text, self.width - 2)[:2]
            if len(lines) + len(wrapped) > MOST_ATTENTION_LINES:
                break
            marks = (f"{self.glyphs.alert} ", *["  "] * len(wrapped))
            lines += [Text(mark + part, WARNING) for mark, part in zip(marks, wrapped, strict=False)]
        return [_title("Attention", self.width, self.glyphs), *lines] if lines else []

    def log(self, height: int) -> list[Text]:
        """The newest lines that fit."""
        if height < 2:
            return []
        lines = [_title("Log", self.width, self.glyphs)]
        for line in self.state.lines[-(height - 1) :]:
            seconds = self.state.now_ns / 1e9 - (self.state.now - line.at)
            at = datetime.fromtimestamp(seconds).strftime("%H:%M:%S")  # noqa: DTZ006 - the reader's clock
            style = WARNING if line.is_warning else ""
            lines.append(Text.assemble((f"{at}  ", DIM), (printable(line.text), style)))
        return lines

    # -------------------------------------------------------------------------------------------- sections

    def left(self, width: int) -> list[Section]:
        """Reward, exam, learning, speed."""
        scale = number(self.state.metrics, "rollout/cost_scale")
        share = f", at {scale:.0%} of the costs" if scale is not None and scale < 1 else ""
        reward = Section(f"Reward{share}", 5, self._rows(width, REWARD))
        sections = [reward, self._exam(width), self._record(width)]
        sections.append(Section("Learning", 4, self._rows(width, LEARNING)))
        sections.append(Section("Speed", 3, self._rows(width, SPEED)))
        return [section for section in sections if section.rows]

    def right(self, width: int) -> list[Section]:
        """Downloads, time, machine, data and disk."""
        sections = [self._tasks(width), self._time(width), self._machine(width), self._data(width)]
        return [section for section in sections if section.rows]

    def _rows(self, width: int, figures: Sequence[Figure]) -> list[Text]:
        rows = []
        for figure in figures:
            values = self.state.values(figure.metric)
            if not values or not (figure.is_occasional or figure.metric in self.state.metrics):
                continue
            value = "not finite" if values[-1] is None else figure.form(values[-1])
            style = WARNING if figure.metric in self.alarming else ""
            rows.append(self.row(figure.label, value, self.curve(values, width - LABEL - VALUE - 2), style))
        return rows

    def _exam(self, width: int) -> Section:
        """Metrics on held-out days: they come with checkpoints only."""
        return Section("Exam, on held-out days", 4, self._newest(width, "exam/")[:MOST_EXAM_ROWS])

    def _record(self, width: int) -> Section:
        """What the champions earned on bars that were not there when they were saved."""
        return Section("Record, on bars that came later", 3, self._newest(width, "record/"))

    def _newest(self, width: int, prefix: str) -> list[Text]:
        """Metrics with this prefix, of the newest epoch that has them."""
        rows_with = (
            [name for name in row if name.startswith(prefix)] for row in reversed(self.state.history)
        )
        names = next(filter(None, rows_with), [])
        rows = []
        for name in dict.fromkeys([*(name for name in LABELS if name in names), *names]):
            values = [value for value in self.state.values(name) if value is not None]
            if values:
                label = LABELS.get(name) or name.removeprefix(prefix).replace("_", " ")
                curve = self.curve(values, width - LABEL - VALUE - 2)
                rows.append(self.row(label, f"{values[-1]:+.4g}", curve))
        return rows

    def _time(self, width: int) -> Section:
        spent = self.state.time_use()
        total, epochs = sum(spent.values()), len(self.state.history)
        if not total:
            return Section("Time", 3)
        rows = []
        for name, seconds in spent.items():
            share = seconds / total
            bar = self.bar(share, width - LABEL - VALUE - 8)
            rest = Text(f"{share:5.0%} ").append_text(bar) if bar else None
            rows.append(self.row(name, f"{seconds / epochs:.2f} s", rest))
        return Section(f"Time per epoch, mean of {epochs}", 3, rows)

    def _machine(self, width: int) -> Section:
        machine = self.state.machine
        if not machine.memory_total:
            return Section("Machine", 2)
        rows = [self._gpu(gpu, width) for gpu in machine.gpus]
        memory = f"{machine.memory_used / 1e9:.0f}/{machine.memory_total / 1e9:.0f} GB"
        for label, share, note in (
            ("CPU", machine.cpu, f"{machine.num_cores} cores"),
            ("memory", machine.memory_used / machine.memory_total, memory),
        ):
            room = width - LABEL - VALUE - 2
            rest = self.note(width, f"{note:>9}", note)
            if room > 2 + rest.cell_len + 2:
                rest = self.bar(share, room - 2 - rest.cell_len).append("  ").append_text(rest)
            rows.append(self.row(label, f"{share:.0%}", rest))
        return Section("Machine", 2, rows)

    def _gpu(self, gpu: Gpu, width: int) -> Text:
        notes = []
        if gpu.memory_used is not None and gpu.memory_total is not None:
            notes.append(Text(f"{gpu.memory_used / 1e9:.0f}/{gpu.memory_total / 1e9:.0f} GB"))
        if gpu.power is not None:
            notes.append(Text(f"{gpu.power:.0f} W"))
        if gpu.temperature is not None:
            style = WARNING if gpu.temperature > HOTTEST_CELSIUS else ""
            notes.append(Text(f"{gpu.temperature:.0f} C", style))
        while notes and len(Text("  ").join(notes)) > width - LABEL - VALUE - 2:
            notes.pop()
        rest = Text("  ").join(notes)
        room = width - LABEL - VALUE - 4 - rest.cell_len
        if room >= 4 and gpu.utilization is not None:
            rest = self.bar(gpu.utilization, room).append("  ").append_text(rest)
        short = gpu.name.replace("NVIDIA ", "").split()[0] if gpu.name else ""
        value = "" if gpu.utilization is None else f"{gpu.utilization:.0%}"
        return self.row(f"GPU {gpu.index} {short}", value, rest)

    def _data(self, width: int) -> Section:
        rows = []
        for source, newest_ns in self.state.newest_ns.items():
            old = age((self.state.now_ns - newest_ns) / 1e9)
            count = self.state.symbols.get(source, 0)
            note = self.note(width, f"old, {count} symbols", f"{count} symbols", f"of {count}")
            rows.append(self.row(source, old, note))
        disk = self.state.disk
        if disk.free is not None:
            needed = disk.needed(self.state.keep_checkpoints)
            is_tight = disk.free + disk.checkpoints < needed
            style = WARNING if disk.is_short or is_tight else ""
            saved = ["none yet"]
            if needed:
                kept = str(disk.num_checkpoints)
                saved = [f"{kept}, up to {size(max(needed, disk.checkpoints))}", f"in {kept}"]
            rows.append(self.row("disk free", size(disk.free), None, style))
            rows.append(self.row("checkpoints", size(disk.checkpoints), self.note(width, *saved)))
        return Section("Newest bars, disk", 2, rows)

    def _tasks(self, width: int) -> Section:
        rows = []
        for task in self.state.tasks.values():
            value = f"{task.done / task.total:.0%}" if task.total else ""
            rows.append(self.row(task.source, value, Text(task.text, DIM)))
        return Section("Under way", 5, rows)

    # ---------------------------------------------------------------------------------------------- pieces

    def row(self, label: str, value: str, rest: Text | None = None, style: str = "") -> Text:
        """A label, a value aligned right, and a bar, curve or note."""
        text = Text.assemble((f"{label[: LABEL - 1]:<{LABEL}}", style or DIM), (f"{value:>{VALUE}}", style))
        return text.append("  ").append_text(rest) if rest else text

    def note(self, width: int, *variants: str) -> Text:
        """The first of these that fits beside label and value, else none: a number that is cut is another one."""
        room = width - LABEL - VALUE - 2
        return Text(next((text for text in variants if len(text) <= room), ""), DIM)

    def bar(self, share: float, width: int) -> Text:
        """A bar of ``width`` columns, filled up to a share of 0 to 1."""
        width = max(0, width)
        full = min(width, max(0, round(share * width)))
        return Text.assemble((self.glyphs.full * full, ACCENT), (self.glyphs.track * (width - full), DIM))

    def curve(self, values: Sequence[float | None], width: int) -> Text:
        """A sparkline in at most ``width`` columns."""
        return Text(sparkline(values, min(60, width), self.glyphs.curve), ACCENT)

    def _flow(self, parts: Iterable[Text]) -> list[Text]:
        """Join parts into lines, as few as they fit in."""
        lines: list[Text] = []
        for part in parts:
            if lines and lines[-1].cell_len + len(self.glyphs.dot) + part.cell_len <= self.width:
                lines[-1].append(self.glyphs.dot, DIM).append_text(part)
            else:
                lines.append(Text().append_text(part))
        return lines


def _stack(sections: list[Section], width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """Stack sections in at most ``height`` lines: rows are dropped first, then whole sections."""

    def num_lines() -> int:
        return sum(len(section.rows) + 1 for section in sections)

    while sections and num_lines() > height:
        long = [section for section in sections if len(section.rows) > 3]
        if long:
            max(long, key=lambda section: (len(section.rows), -section.weight)).rows.pop()
        else:
            sections.remove(min(sections, key=lambda section: section.weight))
    stacked: list[Text] = []
    spare = height - num_lines() >= len(sections)
    for section in sections:
        stacked += [_title(section.title, width, glyphs), *section.rows]
        if spare:
            stacked.append(Text())
    return stacked


def _beside(left: list[Text], right: list[Text], column: int) -> list[Text]:
    lines = []
    for ours, theirs in zip_longest(left, right, fillvalue=Text()):
        line = ours.copy()
        line.truncate(column, pad=True)
        lines.append(line.append(" " * GAP).append_text(theirs))
    return lines


def _title(title: str, width: int, glyphs: Glyphs) -> Text:
    rule = glyphs.rule * max(0, width - len(title) - 1)
    return Text.assemble((title, STRONG), " ", (rule, DIM))


def _spread(left: Text, right: Text, width: int) -> Text:
    space = width - left.cell_len - right.cell_len
    return left.append(" " * space).append_text(right) if space > 0 else left
