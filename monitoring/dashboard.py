"""The dashboard: one view of the cockpit as lines of a given width and height. Pure: draws nothing by itself.

Two columns from 76 columns on, one below. What does not fit a small terminal is left out row by row, the least
important first; no line is ever longer than the terminal is wide.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console as RichConsole
from rich.text import Text

from monitoring.format import age, clock, size, sparkline
from monitoring.health import HOTTEST_CELSIUS
from monitoring.machine import Gpu
from monitoring.state import View

TWO_COLUMNS = 76
GAP = 3
LABEL, VALUE = 18, 11  # columns
FEWEST_LOG_LINES = 3
MOST_ATTENTION_LINES = 6
MOST_EXAM_ROWS = 8
# What of an exam comes before the rest of its figures.
EXAM_FIRST = tuple(
    f"exam/{name}"
    for name in (
        "return_percent",
        "buy_and_hold_percent",
        "momentum_percent",
        "champion_percent",
        "sharpe",
        "max_drawdown_percent",
        "edge",
    )
)
ACCENT, DIM, WARNING, STRONG = "cyan", "dim", "yellow", "bold"
PHASES = {
    "data": "loading bars",
    "rollout": "playing",
    "update": "learning",
    "evaluation": "evaluating",
    "checkpoint": "saving",
}


@dataclass(frozen=True)
class Glyphs:
    """What bars and curves are made of."""

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
    """A title and its rows, the most important first; ``weight`` says how dear the section is."""

    title: str
    weight: int
    rows: list[Text] = field(default_factory=list)


def render(view: View, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """Lay the view out: at most ``height`` lines of at most ``width`` columns."""
    width, height = max(1, width), max(1, height)
    inner = max(1, width - 2)
    page = _Page(view, inner, glyphs)
    head, attention = page.head(), page.attention()
    room = height - len(head) - len(attention) - FEWEST_LOG_LINES - 1
    if inner < TWO_COLUMNS:
        body = _stacked([*page.left(inner), *page.right(inner)], inner, room, glyphs)
    else:
        column = (inner - GAP) // 2
        left = _stacked(page.left(column), column, room, glyphs)
        right = _stacked(page.right(inner - GAP - column), inner - GAP - column, room, glyphs)
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
    """Turns views into strings for a terminal of a given kind."""

    def __init__(self, terminal: RichConsole) -> None:
        self._color_system = terminal.color_system
        self._glyphs = UNICODE if (terminal.encoding or "").lower().startswith("utf") else ASCII

    def __call__(self, view: View, width: int, height: int) -> list[str]:
        """Return the lines, with colours, without line ends."""
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
        console.print(Text("\n").join(render(view, width, height, self._glyphs)), no_wrap=True, end="")
        return text.getvalue().split("\n")


class _Page:
    """The parts of one view."""

    def __init__(self, view: View, width: int, glyphs: Glyphs) -> None:
        self.view = view
        self.width = width
        self.glyphs = glyphs
        self.alarming = {finding.metric for finding in view.findings}

    # ------------------------------------------------------------------------------------- above and below

    def head(self) -> list[Text]:
        """What it is, how far, and for how long still."""
        view, dot = self.view, self.glyphs.dot
        name = Text("Continuous Training", STRONG)
        about = Text(dot.join(each for each in (view.plan.device, f"up {clock(view.now - view.began)}")), DIM)
        share = min(1.0, view.epoch / view.plan.epochs)
        percent = f" {share:4.0%}"
        of_runs = f" of {view.plan.runs}" if view.plan.runs else ""
        where = [
            Text(f"run {view.run}{of_runs}", STRONG),
            Text(f"epoch {view.epoch}/{view.plan.epochs}", STRONG),
            Text(f"{view.transitions:,} transitions"),
        ]
        left = view.plan.epochs - view.epoch
        ahead = [Text(PHASES.get(view.phase, view.phase) or "starting", ACCENT)]
        if left and view.pace is not None:
            ahead += [
                Text(f"epoch {clock(view.epoch_left)} left"),
                Text(f"run {clock(view.seconds_for(left))} left"),
            ]
            to_save = view.epochs_to_checkpoint
            epochs = "1 epoch" if to_save == 1 else f"{to_save} epochs"
            ahead.append(Text(f"checkpoint in {epochs}, {clock(view.seconds_for(to_save))}"))
        lines = [
            _spread(name, about, self.width),
            self.bar(share, self.width - len(percent)).append(percent),
            *self._flowing(where),
            *self._flowing(ahead),
        ]
        if view.stopping:
            lines.append(Text(view.stopping, f"{STRONG} {WARNING}"))
        return lines

    def attention(self) -> list[Text]:
        """Findings of health, then warnings of the last hour: the newest, each once."""
        told = [str(finding) for finding in self.view.findings]
        newest_first = (line.text.removeprefix("Warning: ") for line in reversed(self.view.warnings))
        warned = list(dict.fromkeys(newest_first))
        told += [text for text in warned if text not in told]
        if self.view.disk.is_short:
            told.insert(0, "the disk is nearly full: two more checkpoints do not fit; lower keep_checkpoints")
        lines: list[Text] = []
        for text in told:
            wrapped = _wrapped(text, self.width - 2)[:2]
            if len(lines) + len(wrapped) > MOST_ATTENTION_LINES:
                break
            marks = (f"{self.glyphs.alert} ", *["  "] * len(wrapped))
            lines += [Text(mark + part, WARNING) for mark, part in zip(marks, wrapped, strict=False)]
        return [self._titled("Attention", self.width), *lines] if lines else []

    def log(self, height: int) -> list[Text]:
        """The newest lines, as many as there is room for."""
        if height < 2:
            return []
        lines = [self._titled("Log", self.width)]
        for line in self.view.lines[-(height - 1) :]:
            seconds = self.view.now_ns / 1e9 - (self.view.now - line.at)
            at = datetime.fromtimestamp(seconds).strftime("%H:%M:%S")  # noqa: DTZ006 - the reader's clock
            style = WARNING if line.is_warning else ""
            lines.append(Text.assemble((f"{at}  ", DIM), (_printable(line.text), style)))
        return lines

    # -------------------------------------------------------------------------------------------- sections

    def left(self, width: int) -> list[Section]:
        """Reward, exam, learning, speed."""
        sections = [Section("Reward", 5, self._rows(width, REWARD)), self._exam(width)]
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
            if figure.metric not in self.view.metrics:
                continue
            values = self.view.values(figure.metric)
            newest = values[-1] if values else None
            value = "not finite" if newest is None else figure.form(newest)
            style = WARNING if figure.metric in self.alarming else ""
            rows.append(self.row(figure.label, value, self.curve(values, width - LABEL - VALUE - 2), style))
        return rows

    def _exam(self, width: int) -> Section:
        """Held-out figures; they come with checkpoints only, so the newest that there are."""
        examined = [row for row in self.view.history if any(name.startswith("exam/") for name in row)]
        names = [name for name in examined[-1] if name.startswith("exam/")] if examined else []
        first = [name for name in EXAM_FIRST if name in names]
        rows = []
        for name in [*first, *(name for name in names if name not in first)]:
            values = [value for value in self.view.values(name) if value is not None]
            if values:
                label = (
                    name.removeprefix("exam/").replace("_percent", " %").replace("_", " ").replace("/", " ")
                )
                rows.append(
                    self.row(label, f"{values[-1]:+.4g}", self.curve(values, width - LABEL - VALUE - 2))
                )
        return Section("Exam, on held-out days", 4, rows[:MOST_EXAM_ROWS])

    def _time(self, width: int) -> Section:
        spent = self.view.time_use()
        whole = sum(spent.values())
        if not whole:
            return Section("Time", 3)
        epochs = len(self.view.history)
        rows = []
        for name, seconds in spent.items():
            share = seconds / whole
            bar = self.bar(share, width - LABEL - VALUE - 8)
            rows.append(self.row(name, f"{seconds / epochs:.2f} s", Text(f"{share:5.0%} ").append_text(bar)))
        return Section(f"Time per epoch, mean of {epochs}", 3, rows)

    def _machine(self, width: int) -> Section:
        machine = self.view.machine
        if not machine.memory_total:
            return Section("Machine", 2)
        rows = [self._gpu(gpu, width) for gpu in machine.gpus]
        shares = {
            "CPU": (machine.cpu, f"{machine.num_cores} cores"),
            "memory": (
                machine.memory_used / machine.memory_total,
                f"{machine.memory_used / 1e9:.0f}/{machine.memory_total / 1e9:.0f} GB",
            ),
        }
        for label, (share, told) in shares.items():
            rest = Text(f"  {told:>9}", DIM)
            bar = self.bar(share, width - LABEL - VALUE - 2 - rest.cell_len)
            rows.append(self.row(label, f"{share:.0%}", bar.append_text(rest)))
        return Section("Machine", 2, rows)

    def _gpu(self, gpu: Gpu, width: int) -> Text:
        told = []
        if gpu.memory_used is not None and gpu.memory_total is not None:
            told.append((f"{gpu.memory_used / 1e9:.0f}/{gpu.memory_total / 1e9:.0f} GB", ""))
        if gpu.power is not None:
            told.append((f"{gpu.power:.0f} W", ""))
        if gpu.temperature is not None:
            told.append((f"{gpu.temperature:.0f} C", WARNING if gpu.temperature > HOTTEST_CELSIUS else ""))
        rest = Text("  ").join(Text(text, style) for text, style in told)
        room = width - LABEL - VALUE - 4 - rest.cell_len
        if room >= 4 and gpu.utilization is not None:
            rest = self.bar(gpu.utilization, room).append("  ").append_text(rest)
        short = gpu.name.replace("NVIDIA ", "").split()[0] if gpu.name else ""
        value = "" if gpu.utilization is None else f"{gpu.utilization:.0%}"
        return self.row(f"GPU {gpu.index} {short}", value, rest)

    def _data(self, width: int) -> Section:
        rows = []
        for source, newest_ns in self.view.newest_ns.items():
            old = age((self.view.now_ns - newest_ns) / 1e9)
            symbols = f"old, {self.view.symbols.get(source, 0)} symbols"
            rows.append(self.row(source, old, Text(symbols, DIM)))
        disk = self.view.disk
        if disk.free is not None:
            needed = disk.needed(self.view.plan.keep_checkpoints)
            is_tight = disk.free + disk.checkpoints < needed
            style = WARNING if disk.is_short or is_tight else ""
            saved = (
                f"{disk.num_checkpoints}, up to {size(max(needed, disk.checkpoints))}"
                if needed
                else "none yet"
            )
            rows.append(self.row("disk free", size(disk.free), None, style))
            rows.append(self.row("checkpoints", size(disk.checkpoints), Text(saved, DIM)))
        return Section("Newest bars, disk", 2, rows)

    def _tasks(self, width: int) -> Section:
        rows = []
        for task in self.view.tasks:
            value = "" if task.share is None else f"{task.share:.0%}"
            rows.append(self.row(task.source, value, Text(task.text, DIM)))
        return Section("Refreshing", 5, rows)

    # ---------------------------------------------------------------------------------------------- pieces

    def row(self, label: str, value: str, rest: Text | None = None, style: str = "") -> Text:
        """Label, value to the right, and what illustrates it."""
        text = Text.assemble((f"{label[: LABEL - 1]:<{LABEL}}", style or DIM), (f"{value:>{VALUE}}", style))
        return text.append("  ").append_text(rest) if rest is not None else text

    def bar(self, share: float, width: int) -> Text:
        """A share, 0 to 1, of ``width`` columns."""
        width = max(0, width)
        full = min(width, max(0, round(share * width)))
        return Text.assemble((self.glyphs.full * full, ACCENT), (self.glyphs.track * (width - full), DIM))

    def curve(self, values: Sequence[float | None], width: int) -> Text:
        """The course of a figure in at most ``width`` columns, from its lowest to its highest."""
        return Text(sparkline(values, min(60, width), self.glyphs.curve), ACCENT)

    def _titled(self, title: str, width: int) -> Text:
        return _title(title, width, self.glyphs)

    def _flowing(self, parts: Iterable[Text]) -> list[Text]:
        """Set parts one after the other, in as many lines as they need."""
        lines: list[Text] = []
        for part in parts:
            if lines and lines[-1].cell_len + len(self.glyphs.dot) + part.cell_len <= self.width:
                lines[-1].append(self.glyphs.dot, DIM).append_text(part)
            else:
                lines.append(Text().append_text(part))
        return lines


@dataclass(frozen=True)
class Figure:
    """A metric on the dashboard: its name in metrics.jsonl, its label, how it is written."""

    metric: str
    label: str
    form: Callable[[float], str]


REWARD = (
    Figure("rollout/reward_bps", "reward bp/bar", "{:+.3f}".format),
    Figure("rollout/episode_return_percent", "episode return", "{:+.2f} %".format),
    Figure("rollout/turnover", "turnover", "{:.4f}".format),
    Figure("rollout/cost_scale", "share of costs", "{:.0%}".format),
)
LEARNING = (
    Figure("ppo/approx_kl", "KL", "{:.4f}".format),
    Figure("ppo/clip_fraction", "clip fraction", "{:.3f}".format),
    Figure("loss/entropy", "entropy", "{:.3f}".format),
    Figure("ppo/explained_variance", "explained var.", "{:+.3f}".format),
    Figure("ppo/grad_norm", "gradient norm", "{:.3g}".format),
    Figure("ppo/skipped_steps", "skipped steps", "{:.0f}".format),
    Figure("ppo/first_kl", "first KL", "{:.1e}".format),
    Figure("learning_rate", "learning rate", "{:.2e}".format),
    Figure("plasticity/dormant_units", "dormant units", "{:.1%}".format),
    Figure("plasticity/effective_rank", "effective rank", "{:.1f}".format),
    Figure("plasticity/weight_norm", "weight norm", "{:.4g}".format),
)
SPEED = (
    Figure("perf/transitions_per_second", "transitions/s", "{:,.0f}".format),
    Figure("perf/episodes_per_second", "episodes/s", "{:,.1f}".format),
    Figure("perf/mfu", "MFU", "{:.0%}".format),
)


def _stacked(sections: list[Section], width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """Set sections under each other in at most ``height`` lines: rows go first, then whole sections."""
    sections = [Section(each.title, each.weight, list(each.rows)) for each in sections]

    def lines() -> int:
        return sum(len(section.rows) + 1 for section in sections)

    while sections and lines() > height:
        long = [section for section in sections if len(section.rows) > 3]
        if long:
            max(long, key=lambda section: (len(section.rows), -section.weight)).rows.pop()
        else:
            sections.remove(min(sections, key=lambda section: section.weight))
    stacked: list[Text] = []
    spare = height - lines() >= len(sections)
    for section in sections:
        stacked += [_title(section.title, width, glyphs), *section.rows]
        if spare:
            stacked.append(Text())
    return stacked


def _beside(left: list[Text], right: list[Text], column: int) -> list[Text]:
    lines = []
    for number in range(max(len(left), len(right))):
        line = left[number].copy() if number < len(left) else Text()
        line.truncate(column, pad=True)
        lines.append(line.append(" " * GAP).append_text(right[number] if number < len(right) else Text()))
    return lines


def _title(title: str, width: int, glyphs: Glyphs) -> Text:
    rule = glyphs.rule * max(0, width - len(title) - 1)
    return Text.assemble((title, STRONG), " ", (rule, DIM))


def _spread(left: Text, right: Text, width: int) -> Text:
    space = width - left.cell_len - right.cell_len
    return left.append(" " * space).append_text(right) if space > 0 else left


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text.strip())


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in _printable(text).split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > max(1, width):
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
