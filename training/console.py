"""The only place that prints. Rank 0 writes to the terminal and to ``metrics.jsonl``; other ranks are quiet.

On a terminal: colours, and progress bars while data load. Redirected or under nohup: plain ASCII lines. A
terminal that goes away never ends the training.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_sources.refresh import LoadedData

Row = Mapping[str, Any]
# A redirected refresh tells where it is every so often, not at every file.
PLAIN_PROGRESS_SECONDS = 15.0


@dataclass
class _Task:
    """One source's work under way."""

    what: str
    total: int | None
    done: int = 0
    num_bytes: int = 0
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    bar: TaskID | None = None

    def line(self) -> str:
        total = f" of {self.total:,}" if self.total is not None else ""
        size = f", {self.num_bytes / 1e6:.1f} MB" if self.num_bytes else ""
        left = ""
        if self.total and self.done:
            seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
            left = f", {seconds:.0f} s left"
        return f"{self.done:,}{total} {self.what}{size}{left}"


class Console:
    """Lines, tables, progress and metrics. Implements data_sources.progress.Progress.

    Args:
        log_dir: where ``metrics.jsonl`` grows; None for ranks that neither print nor record.
        on_activity: called with every sign of life, for a watchdog.
        to_stderr: leave standard output to ``emit``.
    """

    def __init__(
        self,
        log_dir: Path | None,
        on_activity: Callable[[], None] | None = None,
        to_stderr: bool = False,
    ) -> None:
        self.quiet = log_dir is None
        self.metrics_path = log_dir / "metrics.jsonl" if log_dir else None
        self._on_activity = on_activity or (lambda: None)
        # Redirected, tables may be wide, and a line stays one line however long it is.
        stream = sys.stderr if to_stderr else sys.stdout
        width = None if stream.isatty() else 200
        self._rich = RichConsole(highlight=False, width=width, stderr=to_stderr)
        self._bars: Progress | None = None
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()
        self._data_shown = False

    # ------------------------------------------------------------------------------------------ lines

    def line(self, text: str, style: str = "") -> None:
        """Print one line."""
        self._print(escape(text), style=style)

    def warning(self, text: str) -> None:
        """Print one line that asks for attention."""
        self._print(escape(f"Warning: {text}"), style="yellow")

    def lines(self, texts: Iterable[str]) -> None:
        """Print several lines."""
        for text in texts:
            self.line(text)

    def emit(self, text: str) -> None:
        """Write text for machines to standard output, exactly as it is."""
        print(text, flush=True)

    @property
    def width(self) -> int:
        """How many characters a line of a table can have."""
        return self._rich.width

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """Print a table; numbers to the right."""
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
        title = f"{len(rows)} symbols, {sum(map(len, data.bars)):,} bars, data {data.fingerprint}"
        if rows and not self._data_shown:
            self.table(title, columns, rows)
            self._data_shown = True
        elif rows:
            self.line(title)
        self.data_warnings(data)

    def data_warnings(self, data: LoadedData) -> None:
        """Tell what was noticed about the bars, and which symbols were dropped."""
        for row in data.rows:
            for flag in row.flags:
                self.warning(f"{row.symbol}: {flag}")
        for reason in dict.fromkeys(data.dropped.values()):
            symbols = [symbol for symbol, why in data.dropped.items() if why == reason]
            self.warning(f"dropped, {reason}: {', '.join(symbols)}")

    def _print(self, thing: Any, style: str = "") -> None:
        self._on_activity()
        if self.quiet:
            return
        try:
            one_line = isinstance(thing, str) and not self._rich.is_terminal
            self._rich.print(thing, style=style, soft_wrap=one_line)
        except OSError:
            # The terminal or the pipe is gone. Training goes on; metrics.jsonl still tells.
            self.quiet = True
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for the rest of its life

    # --------------------------------------------------------------------------------------- progress

    def start(self, source: str, what: str, total: int | None) -> None:
        """Begin to show the progress of one source."""
        with self._lock:
            old = self._tasks.pop(source, None)
            task = self._tasks[source] = _Task(what, total)
            if self._rich.is_terminal and not self.quiet:
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
        self._on_activity()
        told = None
        with self._lock:
            task = self._tasks.get(source)
            if task is None:
                return
            task.done += units
            task.num_bytes += num_bytes
            if self._bars is not None and task.bar is not None:
                size = f", {task.num_bytes / 1e6:.1f} MB" if task.num_bytes else ""
                self._bars.update(task.bar, completed=task.done, what=task.what + size)
            elif time.monotonic() - task.told > PLAIN_PROGRESS_SECONDS:
                task.told = time.monotonic()
                told = task.line()
        if told:
            self.line(f"{source}: {told}")

    def finish(self, source: str, summary: str) -> None:
        """Take the source's bar away and say how it went."""
        with self._lock:
            task = self._tasks.pop(source, None)
            if self._bars is not None and task is not None and task.bar is not None:
                self._bars.remove_task(task.bar)
            if self._bars is not None and not self._tasks:
                self._bars.stop()
                self._bars = None
        self.line(f"{source}: {summary}")

    def break_off(self) -> None:
        """Take away what shows the progress of work that ended before its time."""
        with self._lock:
            self._tasks.clear()
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    def warn(self, source: str, message: str) -> None:
        """Say that something was skipped; a message may begin with the source's name itself."""
        self.warning(message if message.lower().startswith(source) else f"{source}: {message}")

    # ---------------------------------------------------------------------------------------- metrics

    def epoch(self, metrics: Row, epochs: int) -> None:
        """Print the line of one epoch and append its metrics to ``metrics.jsonl``."""
        self.record(metrics)
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
        self.line("  ".join(parts))
        if metrics["ppo/skipped_steps"] > 0:
            skipped = f"{metrics['ppo/skipped_steps']:.0f} optimizer steps were skipped"
            self.warning(f"{skipped}: their gradient was not finite")

    def record(self, metrics: Row) -> None:
        """Append one JSON object to ``metrics.jsonl``; a full disk is a warning, not an end."""
        if self.metrics_path is None:
            return
        # JSON has no word for what is not finite, and most readers refuse Python's.
        told = {name: value if _is_finite(value) else None for name, value in metrics.items()}
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **told}
        try:
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stamped, allow_nan=False) + "\n")
        except OSError as error:
            self.warning(f"{self.metrics_path} was not written: {error.strerror}")


def _utc(time_ns: int | None, form: str) -> str:
    return "" if time_ns is None else datetime.fromtimestamp(time_ns // 10**9, UTC).strftime(form)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _is_number(text: str) -> bool:
    digits = text.replace(",", "").replace(".", "").replace("%", "").replace("-", "").replace("+", "")
    return digits.isdigit() or not text


class StopRequested(KeyboardInterrupt):
    """A stop was asked for while bars were loading. An interrupt, which no source takes for its own fault."""


class Interruptible:
    """A data_sources.progress.Progress that passes everything on, and ends the work when asked to stop.

    Raises:
        StopRequested: from ``advance`` once ``stop_now`` says so; what has arrived stays in the lake.
    """

    def __init__(self, console: Console, stop_now: Callable[[], bool]) -> None:
        self._stop_now = stop_now
        self.start, self.finish, self.warn = console.start, console.finish, console.warn
        self._advance = console.advance

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        """Pass it on, unless the work is to end."""
        self._advance(source, units, num_bytes)
        if self._stop_now():
            raise StopRequested
