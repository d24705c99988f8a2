"""The only place that prints. Rank 0 writes to the terminal and records metrics; other ranks are quiet.

On a terminal: colours, progress bars while data load, then the dashboard. Redirected or under nohup: plain ASCII
lines. A terminal that goes away never ends the training.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_sources.bars import MINUTE_NS
from data_sources.refresh import LoadedData
from monitoring import health, state
from monitoring.dashboard import Painter
from monitoring.exporters import Telemetry, read_metrics
from monitoring.machine import Disk, Gauges, disk
from monitoring.screen import Screen
from monitoring.state import Cockpit, Loading, Plan
from runtime.control import STOP_AT_EPOCH_END, STOP_NOW, Control, heartbeat
from training.progress import TrainingProgress

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

Row = Mapping[str, Any]

GAUGES_SECONDS = 1.0
DISK_SECONDS = 10.0
HEALTH_EPOCHS = 50  # that say what is usual
STOPPING = {
    STOP_AT_EPOCH_END: "Stopping after this epoch, with checkpoint and summary. Ctrl+C again ends at once.",
    STOP_NOW: "Saving at the next safe point, then exit.",
}
# A redirected refresh tells where it is every so often, not at every file.
PLAIN_PROGRESS_SECONDS = 15.0


class Console:
    """Log records, tables, progress, metrics and the dashboard. Implements data_sources.progress.Progress.

    A context manager: on exit, the terminal is restored, files are closed, and records are shown no longer.

    Args:
        log_dir: where metrics are recorded; None for ranks that neither print nor record.
        to_stderr: leave standard output to ``emit``.
        log_level: a level of ``logging`` in lower case; less urgent records are not shown.
        prometheus_port: where the newest metrics can be asked for; None: nowhere.
    """

    def __init__(
        self,
        log_dir: Path | None,
        to_stderr: bool = False,
        log_level: str = "info",
        prometheus_port: int | None = None,
    ) -> None:
        self.quiet = log_dir is None
        self._log_dir = log_dir
        self._level = logging.getLevelNamesMapping()[log_level.upper()]
        # Redirected, tables may be wide, and a line stays one line however long it is.
        self._stream = sys.stderr if to_stderr else sys.stdout
        width = None if self._stream.isatty() else 200
        self._rich = RichConsole(highlight=False, width=width, stderr=to_stderr)
        self._bars: Progress | None = None
        self._tasks: dict[str, Loading] = {}
        self._lock = threading.Lock()
        self._data_shown = False
        self._cockpit = Cockpit()
        self._screen: Screen | None = None
        self._watch = health.Watch()
        self._handler = _Handler(self)
        log.addHandler(self._handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False  # a library that configures the root logger would print every line again
        self._telemetry = Telemetry(log_dir, prometheus_port) if log_dir else None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave_screen()
        with self._lock:  # bars of work that failed or was interrupted
            self._tasks.clear()
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
        if self._telemetry:
            self._telemetry.close()
        log.removeHandler(self._handler)
        log.setLevel(logging.NOTSET)
        log.propagate = True

    # ------------------------------------------------------------------------------------------ lines

    def line(self, text: str, style: str = "", level: int = logging.INFO) -> None:
        """Print one line, unless its level is below that of the console."""
        heartbeat()
        if level < self._level or self.quiet:
            return
        on_screen = self._on_screen()
        self._cockpit.line(text, is_warning=level >= logging.WARNING)
        if on_screen:
            return
        if self._rich.is_terminal:
            self._print(escape(text), style)
        else:
            self._print(escape(text.encode("ascii", "backslashreplace").decode()))

    def emit(self, text: str) -> None:
        """Write text for machines to standard output, exactly as it is."""
        print(text, flush=True)

    @property
    def width(self) -> int:
        """How many characters a line of a table can have."""
        return self._rich.width

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """Print a table; numbers to the right."""
        if self._on_screen():
            log.info(title)
            return
        table = Table(
            title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False, header_style="bold"
        )
        listed = [[str(cell) for cell in row] for row in rows]
        for number, column in enumerate(columns):
            numeric = all(_is_number(row[number]) for row in listed)
            table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        for row in listed:
            table.add_row(*map(escape, row))
        self._print(table)

    def data(self, data: LoadedData) -> None:
        """Show what was loaded: one row per symbol the first time, then a line; what was dropped, and why."""
        columns = ("symbol", "sources", "bars", "first", "last, UTC", "coverage", "gaps", "rejected")
        rows = [
            (
                row.symbol,
                "+".join(row.sources),
                f"{row.num_bars:,}",
                _utc(row.first_ns, "%Y-%m-%d"),
                _utc(row.last_ns, "%m-%d %H:%M"),
                "" if row.coverage is None else f"{row.coverage:.1%}",
                row.num_gaps,
                sum(row.rejected.values()),
            )
            for row in data.rows
            if not row.dropped
        ]
        self._cockpit.sources(*_newest(data))
        title = f"{len(rows)} symbols, {sum(map(len, data.bars)):,} bars, data {data.fingerprint}"
        if rows and not self._data_shown:
            self.table(title, columns, rows)
            self._data_shown = True
        elif rows:
            log.info(title)
        self.data_warnings(data)

    def data_warnings(self, data: LoadedData) -> None:
        """Tell what was noticed about the bars, and which symbols were dropped."""
        for row in data.rows:
            for flag in row.flags:
                log.warning(f"{row.symbol}: {flag}")
        for reason in dict.fromkeys(data.dropped.values()):
            symbols = [symbol for symbol, why in data.dropped.items() if why == reason]
            log.warning(f"dropped, {reason}: {', '.join(symbols)}")

    def _print(self, thing: Any, style: str = "") -> None:
        heartbeat()
        if self.quiet:
            return
        try:
            one_line = isinstance(thing, str) and not self._rich.is_terminal
            self._rich.print(thing, style=style, soft_wrap=one_line)
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        """The terminal or the pipe is gone. Training goes on; metrics.jsonl still tells."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for the rest of its life

    # -------------------------------------------------------------------------------------- dashboard

    def begin(self, settings: Settings, progress: TrainingProgress, device: str, control: Control) -> None:
        """Begin a run; on a terminal the dashboard opens with the first one, unless it is not wanted."""
        if self._log_dir is None:
            return
        history: list[Row] = []
        if not self._cockpit.recent():  # a start that goes on shows what was before
            history = list(read_metrics(self._log_dir, state.KEPT_EPOCHS, progress.transitions))
        self._cockpit.begin(progress.run, progress.epoch, progress.transitions, history)
        is_able = self._stream.isatty() and not (self._rich.is_dumb_terminal or self._rich.legacy_windows)
        if not settings.dashboard or self.quiet or self._screen or not is_able:
            return
        self._cockpit.plan = Plan(
            settings.epochs, settings.runs, settings.checkpoint_every, settings.keep_checkpoints, device
        )
        self._cockpit.stopping = lambda: STOPPING.get(control.stop_level, "")
        draw = _Drawing(self._cockpit, Painter(self._rich), Path(settings.checkpoint_dir))
        self._screen = Screen(self._stream, draw, self._cockpit.changed, control.screen)
        try:
            self._screen.open()
        except OSError:
            self._fall_silent()

    def phase(self, name: str) -> None:
        """Show on the dashboard what the training does now."""
        self._cockpit.phase(name)

    def _on_screen(self) -> bool:
        """Tell whether the dashboard is up; one that has died gives the terminal back first."""
        if self._screen is not None and not self._screen.is_on:
            self._leave_screen()
        return self._screen is not None

    def _leave_screen(self) -> None:
        """Give the terminal back, with all that was told meanwhile."""
        screen, self._screen = self._screen, None
        if screen is None:
            return
        try:
            screen.close()
        except OSError:
            self._fall_silent()
        for line in self._cockpit.view().lines:
            if line.at > screen.opened:
                self._print(escape(line.text), "yellow" if line.is_warning else "")

    # --------------------------------------------------------------------------------------- progress

    def start(self, source: str, what: str, total: int | None) -> None:
        """Begin to show the progress of one source."""
        with self._lock:
            old = self._tasks.pop(source, None)
            task = self._tasks[source] = Loading(what, total)
            if self._screen is not None:
                self._cockpit.task(source, task.shown(source))
            elif self._rich.is_terminal and not self.quiet:
                if self._bars is None:
                    self._bars = Progress(
                        TextColumn("{task.description:<10}"),
                        BarColumn(bar_width=30),
                        MofNCompleteColumn(),
                        TextColumn("{task.fields[what]}"),
                        TimeRemainingColumn(),
                        console=self._rich,
                        transient=True,
                    )
                    self._bars.start()
                if old and old.bar is not None:
                    self._bars.remove_task(old.bar)
                task.bar = self._bars.add_task(source, total=total, what=what)

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Show that more is done."""
        heartbeat()
        told = None
        with self._lock:
            task = self._tasks.get(source)
            if task is None:
                return
            task.done += units
            task.num_bytes += num_bytes
            if self._screen is not None:
                self._cockpit.task(source, task.shown(source))
            elif self._bars is not None and task.bar is not None:
                size = f", {task.num_bytes / 1e6:.1f} MB" if task.num_bytes else ""
                self._bars.update(task.bar, completed=task.done, what=task.what + size)
            elif time.monotonic() - task.told > PLAIN_PROGRESS_SECONDS:
                task.told = time.monotonic()
                told = task.line()
        if told:
            log.info(f"{source}: {told}")

    def finish(self, source: str, summary: str) -> None:
        """Take the source's bar away and say how it went."""
        with self._lock:
            task = self._tasks.pop(source, None)
            self._cockpit.task(source, None)
            if self._bars is not None and task is not None and task.bar is not None:
                self._bars.remove_task(task.bar)
            if self._bars is not None and not self._tasks:
                self._bars.stop()
                self._bars = None
        log.info(f"{source}: {summary}")

    def warn(self, source: str, message: str) -> None:
        """Say that something was skipped; a message may begin with the source's name itself."""
        log.warning(message if message.lower().startswith(source) else f"{source}: {message}")

    # ---------------------------------------------------------------------------------------- metrics

    def epoch(self, metrics: Row, epochs: int) -> None:
        """Record one epoch's metrics and tell them: a line, or the dashboard; what is newly wrong is a warning."""
        if self.quiet and self._telemetry is None:
            heartbeat()
            return
        self.record(metrics)
        found = health.findings([*self._cockpit.recent()[-HEALTH_EPOCHS:], metrics])
        self._cockpit.epoch(metrics, found)
        new = self._watch.new(found)
        if self._on_screen():
            heartbeat()
            for finding in new:  # the figures are on the dashboard, and what is wrong for as long as it is
                self._cockpit.line(str(finding))
            return
        log.info(_line_of(metrics, epochs))
        log.debug("  ".join(f"{k}={_short(v)}" for k, v in metrics.items() if "/" in k))
        for finding in new:
            log.warning(str(finding))

    def record(self, metrics: Row) -> None:
        """Keep one epoch's figures where programs read them."""
        if self._telemetry:
            self._telemetry.record(metrics)


class _Handler(logging.Handler):
    """Shows log records on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._console.line(f"Warning: {text}", "yellow", record.levelno)
        else:
            self._console.line(text, "", record.levelno)


def _line_of(metrics: Row, epochs: int) -> str:
    parts = [
        f"run {metrics['run']} epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}",
        f"reward {metrics['rollout/reward_bps']:+.3f} bp/bar",
        f"return {metrics['rollout/episode_return_percent']:+.2f}%",
        f"loss {metrics['loss/policy']:+.4f}/{metrics['loss/value']:.4f}",
        f"kl {metrics['ppo/approx_kl']:.4f}",
        f"clip {metrics['ppo/clip_fraction']:.2f}",
        f"entropy {metrics['loss/entropy']:.3f}",
        f"ev {metrics['ppo/explained_variance']:+.2f}",
        f"{metrics['perf/transitions_per_second']:,.0f} transitions/s",
        f"{metrics['perf/episodes_per_second']:.1f} episodes/s",
        f"mfu {metrics['perf/mfu']:.0%}",
    ]
    if "gpu/utilization_percent" in metrics:
        parts.append(f"gpu {metrics['gpu/utilization_percent']:.0f}% {metrics['gpu/memory_gb']:.1f} GB")
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


class _Drawing:
    """Looks at the machine now and then, and paints the cockpit; called by the screen's thread alone."""

    def __init__(self, cockpit: Cockpit, painter: Painter, checkpoint_dir: Path) -> None:
        self._cockpit = cockpit
        self._painter = painter
        self._checkpoint_dir = checkpoint_dir
        self._gauges: Gauges | None = None
        self._disk = Disk()
        self._read = self._read_disk = -math.inf

    def __call__(self, width: int, height: int) -> list[str]:
        now = time.monotonic()
        if now - self._read >= GAUGES_SECONDS:
            if now - self._read_disk >= DISK_SECONDS:
                self._disk, self._read_disk = disk(self._checkpoint_dir), now
            self._gauges = self._gauges or Gauges()
            self._cockpit.gauges(self._gauges.read(), self._disk)
            self._read = now
        return self._painter(self._cockpit.view(), width, height)


def _newest(data: LoadedData) -> tuple[dict[str, int], dict[str, int]]:
    """Return, by source, the end of its newest bar and how many symbols it has bars of."""
    newest: dict[str, int] = {}
    symbols: dict[str, int] = {}
    for row in data.rows:
        for each in () if row.dropped else row.by_source:
            if each.last_ns is not None:
                newest[each.source] = max(newest.get(each.source, 0), each.last_ns + MINUTE_NS)
                symbols[each.source] = symbols.get(each.source, 0) + 1
    return newest, symbols


def _utc(time_ns: int | None, form: str) -> str:
    return "" if time_ns is None else datetime.fromtimestamp(time_ns // 10**9, UTC).strftime(form)


def _is_number(text: str) -> bool:
    digits = text.replace(",", "").replace(".", "").replace("%", "").replace("-", "").replace("+", "")
    return digits.isdigit() or not text
