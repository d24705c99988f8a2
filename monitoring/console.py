"""The only place that prints. Rank 0 writes to the terminal and records metrics; other ranks are quiet.

On a terminal: colours, progress bars while data load, then the dashboard. Redirected or under nohup: plain ASCII
lines. A terminal that goes away never ends the training.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_sources.bars import MINUTE_NS
from data_sources.coverage import days_late
from data_sources.load import LoadedData
from monitoring import health
from monitoring.attach import FolderReader
from monitoring.dashboard import Painter, can_be_drawn_on
from monitoring.exporters import Telemetry
from monitoring.format import epoch_line, short, utc_time
from monitoring.live import Frame
from monitoring.metrics_file import read_metrics
from monitoring.published import Publisher, describe_stop, describe_training
from monitoring.screen import Screen
from monitoring.state import EXAM, HEALTH_EPOCHS, KEPT_EPOCHS, DashboardState, Task
from monitoring.tables import fit, lay_out
from runtime.control import Control, heartbeat
from training.progress import TrainingProgress
from training.retention import most_files
from training.setting_types import recorded

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

Row = Mapping[str, Any]

# Redirected, a refresh logs its progress now and then, not at every file.
PLAIN_PROGRESS_SECONDS = 15.0


class Console:
    """Log records, tables, progress, metrics and the dashboard. Implements data_sources.progress.Progress.

    A context manager: on exit it restores the terminal, closes files, and no longer shows log records.

    Args:
        log_dir: where metrics are recorded; None for ranks that neither print nor record.
        to_stderr: leave standard output to ``emit``.
        log_level: a level of ``logging`` in lower case; less urgent records are not shown.
        prometheus_port: serves the newest metrics; None: no endpoint.
        settings: of a training, for those who compare trainings.
    """

    def __init__(
        self,
        log_dir: Path | None,
        to_stderr: bool = False,
        log_level: str = "info",
        prometheus_port: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.quiet = log_dir is None
        self._log_dir = log_dir
        self._level = logging.getLevelNamesMapping()[log_level.upper()]
        # Redirected, tables may be wide, and a line stays one line however long it is.
        self._stream = sys.stderr if to_stderr else sys.stdout
        self._is_terminal = _is_terminal(self._stream)
        width = None if self._is_terminal else 200
        # Forced either way: FORCE_COLOR would put colours and moving bars into files.
        self._rich = _Rich(highlight=False, width=width, stderr=to_stderr, force_terminal=self._is_terminal)
        self._bars: Progress | None = None
        self._data_shown = False
        self._state = DashboardState()
        self._screen: Screen | None = None
        self._watch = health.Watch()
        self._telemetry = Telemetry(log_dir, prometheus_port, settings) if log_dir else None
        self._publisher: Publisher | None = None
        self._handler = _Handler(self)
        log.addHandler(self._handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False  # a library that configures the root logger would print every line again

    @classmethod
    def of_training(cls, settings: Settings, control: Control, is_first: bool) -> Console:
        """Return the console of a rank; that of the first one publishes how the training goes (published.py)."""
        console = cls(
            Path(settings.log_dir) if is_first else None,
            log_level=settings.log_level,
            prometheus_port=settings.prometheus_port if is_first else None,
            settings=recorded(settings) if is_first else None,
        )
        if is_first:
            describe_training(console._state, settings, most_files(settings), control)
            console._publisher = Publisher(Path(settings.log_dir), console._state, control)
        return console

    def __enter__(self) -> Console:
        if self._publisher:
            self._publisher.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._publisher:
            self._publisher.__exit__(*error)
        self._leave_screen()
        with self._state.lock:  # work that failed or was interrupted
            self._state.tasks.clear()
            self._stop_bars()
        if self._telemetry:
            self._telemetry.close()
        log.removeHandler(self._handler)
        log.setLevel(logging.NOTSET)
        log.propagate = True

    # ------------------------------------------------------------------------------- lines and tables

    def print_line(self, text: str, style: str = "", level: int = logging.INFO) -> None:
        """Print one line, unless its level is below that of the console."""
        heartbeat()
        if level < self._level or self.quiet:
            return
        on_screen = self._on_screen()
        self._state.add_line(text, is_warning=level >= logging.WARNING)
        if on_screen:
            return
        if self._rich.is_terminal:
            self._print(escape(text), style)
        else:
            self._print(escape(text.encode("ascii", "backslashreplace").decode()))

    def emit(self, text: str) -> None:
        """Write text for machines to standard output, exactly as it is."""
        try:
            print(text, flush=True)
        except (OSError, ValueError):
            self._fall_silent()

    @property
    def width(self) -> int:
        """Columns that a table can have."""
        return self._rich.width

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Iterable[Any]],
        spare: Iterable[str] = (),
        summary: str = "",
    ) -> None:
        """Print a table, unless only more urgent lines are shown; only its title where the dashboard is on.

        Args:
            title: a line above it.
            columns: their names.
            rows: of cells.
            spare: columns that may be left out, in this order, where the terminal is narrow. No cell is cut.
            summary: a second line above it, broken where it is long.
        """
        if self._level > logging.INFO:
            return
        if self._on_screen():
            log.info(title)
            return
        cells = [[str(cell) for cell in row] for row in rows]
        heading, *lines = lay_out(*fit(columns, cells, self.width, spare))
        for text, style in ((title, "italic"), (summary, ""), (heading, "bold")):
            if text:
                self._print(escape(text), style)
        for line in lines:
            self._print(escape(line))

    def show_data(self, data: LoadedData, end_ns: int) -> None:
        """Show what was loaded, up to ``end_ns``, as a table the first time, then as a line; and warnings."""
        columns = ("symbol", "sources", "bars", "first", "last, UTC", "coverage", "gaps", "rejected")
        used = [row for row in data.rows if not row.dropped]
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
            for row in used
        ]
        newest_ns: dict[str, int] = {}
        symbols: Counter[str] = Counter()
        for row in used:
            for extent in row.by_source:
                if extent.last_ns is not None:
                    end_ns = extent.last_ns + MINUTE_NS
                    newest_ns[extent.source] = max(newest_ns.get(extent.source, 0), end_ns)
                    symbols[extent.source] += 1
        self._state.newest_ns, self._state.symbols = newest_ns, symbols
        self._state.days_late = days_late(used, end_ns)
        title = f"{len(rows)} symbols, {sum(map(len, data.bars)):,} bars, data {data.fingerprint}"
        if rows and not self._data_shown:
            self.table(title, columns, rows, spare=("first", "gaps", "sources", "rejected", "coverage"))
            self._data_shown = True
        elif rows:
            log.info(title)
        self.show_data_warnings(data)

    def show_data_warnings(self, data: LoadedData) -> None:
        """Warn about flags of symbols, and list the symbols that were dropped."""
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
            is_one_line = isinstance(thing, str) and not self._rich.is_terminal
            self._rich.print(thing, style=style, soft_wrap=is_one_line)
        except (OSError, ValueError):
            self._fall_silent()

    def _fall_silent(self) -> None:
        """Print nothing more, since the terminal or the pipe is gone. Training and metrics.jsonl continue."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until the process ends

    # -------------------------------------------------------------------------------------- dashboard

    def begin_run(
        self, settings: Settings, progress: TrainingProgress, device: str, control: Control
    ) -> None:
        """Begin a run. On a terminal the first one opens the dashboard, unless the settings disable it."""
        if self._log_dir is None:
            return
        state = self._state
        history: list[dict[str, Any]] = []
        if not state.history:  # a resumed training shows the epochs before
            history = read_metrics(self._log_dir, KEPT_EPOCHS, progress.transitions)
        state.begin(progress.run, progress.epoch, progress.transitions, history)
        state.device, state.rollbacks = device, progress.rollbacks
        is_able = self._is_terminal and can_be_drawn_on(self._rich)
        if not settings.dashboard or self.quiet or self._screen or not is_able:
            return
        frame = Frame(_OwnState(state, control), Painter(self._rich))
        screen = Screen(self._stream, frame, control.report_screen)
        try:
            screen.open()
        except OSError as error:
            log.warning(f"no dashboard: {error}")
            return
        self._screen = screen

    def phase(self, name: str) -> None:
        """Show the training's phase on the dashboard."""
        self._state.phase, self._state.phase_began = name, time.monotonic()
        with self._state.lock:
            self._state.tasks.pop(EXAM, None)  # one that was given up

    def show_exam(self, done: int, total: int) -> None:
        """Show how many segments of an exam are done, read and walked."""
        with self._state.lock:
            if EXAM not in self._state.tasks:
                self._state.tasks[EXAM] = Task(EXAM, "segments", total)
            self._state.tasks[EXAM].done = done

    def _on_screen(self) -> bool:
        """Return whether the dashboard is on; restore the terminal of one that has died."""
        if self._screen is not None and not self._screen.is_on:
            self._leave_screen()
        return self._screen is not None

    def _leave_screen(self) -> None:
        """Close the dashboard, and print the lines that were logged meanwhile."""
        screen, self._screen = self._screen, None
        if screen is None:
            return
        try:
            screen.close()
        except OSError:
            self._fall_silent()
        for line in self._state.snapshot().lines:
            if line.at > screen.opened:
                self._print(escape(line.text), "yellow" if line.is_warning else "")

    # --------------------------------------------------------------------------------------- progress

    def start(self, source: str, what: str, total: int | None) -> None:
        """Show the progress of a source."""
        task = Task(source, what, total)
        with self._state.lock:
            previous = self._state.tasks.get(source)
            self._state.tasks[source] = task
            if self._screen is not None or self.quiet or not self._rich.is_terminal:
                return
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
            if previous and previous.bar is not None:
                self._bars.remove_task(previous.bar)
            task.bar = self._bars.add_task(source, total=total, what=what)

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Count work that is done."""
        heartbeat()
        text = ""
        with self._state.lock:
            task = self._state.tasks.get(source)
            if task is None:
                return
            task.done += units
            task.num_bytes += num_bytes
            if self._bars is not None and task.bar is not None:
                size = f", {task.num_bytes / 1e6:.1f} MB" if task.num_bytes else ""
                self._bars.update(task.bar, completed=task.done, what=task.unit + size)
            elif self._screen is None and time.monotonic() - task.last_line > PLAIN_PROGRESS_SECONDS:
                task.last_line = time.monotonic()
                text = task.text
        if text:
            log.info(f"{source}: {text}")

    def finish(self, source: str, summary: str) -> None:
        """Replace a source's progress by its summary."""
        with self._state.lock:
            task = self._state.tasks.pop(source, None)
            if self._bars is not None and task is not None and task.bar is not None:
                self._bars.remove_task(task.bar)
            if not self._state.tasks:
                self._stop_bars()
        log.info(f"{source}: {summary}")

    def warn(self, source: str, message: str) -> None:
        """Log a source's warning, with its name in front unless the message begins with it."""
        log.warning(message if message.lower().startswith(source) else f"{source}: {message}")

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    # ---------------------------------------------------------------------------------------- metrics

    def show_epoch(self, metrics: Row, epochs: int) -> None:
        """Record an epoch's metrics, show them as a line or on the dashboard, and warn about new findings."""
        if self.quiet and self._telemetry is None:
            heartbeat()
            return
        self.record(metrics)
        found = health.findings([*self._state.history[-HEALTH_EPOCHS:], metrics])
        self._state.add_epoch(metrics, found)
        new = self._watch.new(found)
        if self._on_screen():
            heartbeat()
            log.info(epoch_line(metrics, epochs), extra={"is_shown": False})  # the dashboard has its figures
            for finding in new:  # no warnings: the dashboard shows a finding for as long as it lasts
                log.info(str(finding))
            return
        log.info(epoch_line(metrics, epochs))
        log.debug("  ".join(f"{k}={short(v)}" for k, v in metrics.items() if "/" in k))
        for finding in new:
            log.warning(str(finding))

    def record(self, metrics: Row) -> None:
        """Write an epoch's metrics to the exporters."""
        if self._telemetry:
            self._telemetry.record(metrics)


class _Rich(RichConsole):
    """Rich's console, which would end the program with SystemExit when the reader of its output is gone."""

    def on_broken_pipe(self) -> None:
        raise


class _Handler(logging.Handler):
    """Shows log records on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not getattr(record, "is_shown", True):
            return
        if record.levelno >= logging.WARNING:
            self._console.print_line(f"Warning: {text}", "yellow", record.levelno)
        else:
            self._console.print_line(text, "", record.levelno)


class _OwnState:
    """Reads the state of this process's training."""

    def __init__(self, state: DashboardState, control: Control) -> None:
        self._state, self._control = state, control
        self._folder = FolderReader()

    def __call__(self) -> DashboardState:
        self._state.stopping = describe_stop(self._control)
        self._folder.read(self._state)
        return self._state.snapshot()


def _utc(time_ns: int | None, form: str) -> str:
    return "" if time_ns is None else utc_time(time_ns, form)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):  # closed
        return False
