"""``walkforward``: the daemon's life over stored bars, window by window, traded on bars that came after each."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from commands.walkforward.book import FIRST, Book
from commands.walkforward.champions import Champions
from commands.walkforward.costs import Costs, free_in, measure_costs
from commands.walkforward.jobs import Jobs
from commands.walkforward.out_of_sample import Contestants, trade
from commands.walkforward.report import clock, describe, how_it_was_made, notes_of, render_files, table
from commands.walkforward.schedule import Window, choose_windows, stored_days, windows_of
from commands.walkforward.training import (
    Train,
    begin_with,
    exams_in,
    keep_champion,
    newest_in,
    train_window,
    training_in,
)
from data_sources.bars import DAY_NS
from data_sources.calendar import date_ns
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.refresh import refresh
from envs.config import EnvConfig
from evaluation.forecasts import import_lightgbm
from evaluation.provenance import minute_of
from evaluation.report import file_name, write_folder
from evaluation.walk_summary import summarize
from models.embedding import FIRST_ENCODING
from monitoring.console import Console
from runtime.control import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_DOES_NOT_FIT,
    EXIT_LOCKED,
    EXIT_NO_DATA,
    EXIT_SETTING,
    ExitProgram,
)
from runtime.files import sha256_of
from runtime.locking import FolderHeld, FolderLock, FolderLockError
from runtime.wording import count_of
from training import devices, validation
from training.checkpoint import Checkpoint, CheckpointError, FolderInUse, read_complete
from training.checkpoint_names import RESUME
from training.data_feed import data_request
from training.memory import DoesNotFit
from training.progress import TrainingProgress
from training.setting_types import NOT_PASSED_ON

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

TASK = "walk"  # label of the progress bar
# Settings that change no figure: where things are kept and shown, and how long a clock waits.
FREE = {
    *("checkpoint_dir", "data_dir", "log_dir", "report_dir", "mirror", "device", "compile", "end_date"),
    *("runs", "checkpoint_minutes", "exam_minutes", "exam_on_stop", "keep_checkpoints", "keep_runs"),
    *("dashboard", "log_level", "prometheus_port", "web_port", "web_host", "notify"),
    *NOT_PASSED_ON,
}


@dataclass(frozen=True)
class WalkOptions:
    """The command line's options. An empty day means: as the stored bars suggest."""

    step: int = 7
    first_day: str = ""  # YYYY-MM-DD, UTC
    last_day: str = ""  # inclusive
    fresh: bool = False
    jobs: int = 1
    ensemble: int = 1  # so many champions decide together, the newest ones
    costs_bps: tuple[float, ...] = (0.0, 1.0, 2.0, 5.0, 10.0)
    trees: bool = False
    start_from: Path | None = None
    allow_overlap: bool = False
    max_hours: float = 24.0
    output: Path = Path("walkforward")
    refresh: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.jobs > 1 and not self.fresh:
            raise ValueError(
                f"--jobs {self.jobs} needs --fresh: a training that is carried from window to window has to wait "
                "for the one before"
            )
        if self.start_from and self.fresh:
            raise ValueError(
                "--start-from cannot go with --fresh, whose windows begin with nothing; drop one of them"
            )
        if self.trees and import_lightgbm() is None:
            raise ValueError("--trees needs lightgbm, which is not installed: .venv/bin/pip install lightgbm")
        if not all(0 <= cost < math.inf for cost in self.costs_bps):
            raise ValueError("--costs must be basis points of 0 or more, such as 0,1,2,5,10")


def command(settings: Settings, train: Train, options: WalkOptions, console: Console) -> None:
    """Walk, or go on with a walk, and write its page.

    Args:
        settings: of the training.
        train: the main loop.
        options: what to walk.
        console: shows progress.

    Raises:
        ExitProgram: it cannot be walked, or was stopped; what is done stays.
        FeatureError: a feature of one's own looks ahead, or cannot be used.
    """
    walk: Walk | None = None
    try:
        with FolderLock(options.output).hold():
            walk = Walk(settings, train, options, console)
            walk.run()
    except FolderHeld as error:
        text = f"{options.output} is being walked by {error.holder}: wait for it, or use another --output"
        raise ExitProgram(EXIT_LOCKED, text) from error
    except KeyboardInterrupt:
        where = f" in {walk.place}" if walk else ""
        raise ExitProgram(EXIT_ABORTED, f"Stopped{where}; the same command goes on from there") from None
    except (FolderLockError, CheckpointError, FolderInUse) as error:
        raise ExitProgram(EXIT_SETTING, str(error)) from error
    except LakeError as error:
        raise ExitProgram(EXIT_NO_DATA, f"{error}: look at the disk, or use another --data-dir") from error
    except DoesNotFit as error:
        raise ExitProgram(EXIT_DOES_NOT_FIT, f"This training does not fit: {error}") from error
    except OSError as error:
        place = error.filename or options.output
        text = f"{place}: {error.strerror}; nothing is lost, the same command goes on"
        raise ExitProgram(EXIT_CRASH, text) from error


class Walk:
    """A walk under way: its folder, its windows, and what trades in them."""

    def __init__(self, settings: Settings, train: Train, options: WalkOptions, console: Console) -> None:
        """Read the folder, and choose the windows where it has none.

        Raises:
            ExitProgram: the options do not fit the stored bars, or the folder.
        """
        self._settings, self._train, self._options, self._console = settings, train, options, console
        self._folder = options.output
        self._device = devices.of_rank(settings.device, local_rank=0)
        self._lake = Lake(Path(settings.data_dir), console)
        try:
            validation.check_training(settings, 1)
            EnvConfig.from_settings(settings).require_flat_costs(options.costs_bps)
            self.windows = self._choose_windows()
            self._began_with, stamp = self._read_start()
        except ValueError as error:
            raise ExitProgram(EXIT_SETTING, f"Invalid setting: {error}") from error
        defaults = {f.name: f.default for f in fields(settings) if f.name not in FREE}
        defaults["feature_encoding"] = FIRST_ENCODING
        later = {"ensemble": WalkOptions.ensemble, "settings": defaults}
        self.book = Book.open(self._folder, self._plan(stamp), later)
        self._champions = Champions(self._folder, options.ensemble, options.fresh)
        self._stamp = stamp
        # The run that the first window's training ends with, less one.
        self._warned: set[str] = set()
        self._runs_before = 0
        if saved := self._began_with:
            begun = TrainingProgress.of(read_complete(saved.path.parent, saved.path.name) or saved)
            self._runs_before = saved.run - (not begun.is_over(settings))

    def _choose_windows(self) -> list[Window]:
        options, settings, now_ns = self._options, self._settings, time.time_ns()
        known = Book.plan_in(self._folder)
        if known and not (options.first_day or options.last_day):  # bars may have come since
            return windows_of(known["windows"])
        if options.refresh:
            refresh(self._lake, data_request(settings, now_ns), now_ns, self._console)
        days = stored_days(self._lake, settings, now_ns)
        return choose_windows(days, settings, options.step, options.first_day, options.last_day)

    def _read_start(self) -> tuple[Checkpoint | None, str]:
        """Read the checkpoint to begin with, and say why a walk from it is none, if it has seen its days.

        Raises:
            ValueError: it has, and that is not allowed; or it does not fit the settings.
        """
        path = self._options.start_from
        if path is None:
            return None, ""
        saved = Checkpoint.read(path)
        if mismatch := saved.mismatch(self._settings):
            raise ValueError(mismatch)
        until_ns = saved.data_cutoff_ns  # it was trained, or chosen, on bars up to then
        if last_day := saved.config.get("end_date"):
            until_ns = min(until_ns, date_ns(last_day) + DAY_NS)
        until_ns = max(until_ns, saved.trained_until_ns)
        if until_ns <= self.windows[0].start_ns:
            return saved, ""
        if not self._options.allow_overlap:
            raise ValueError(
                f"{path} was trained or chosen on bars up to {minute_of(until_ns)} UTC, and the walk begins on "
                f"{minute_of(self.windows[0].start_ns)}: begin later with --from; --allow-overlap walks all the "
                "same, and stamps the page"
            )
        return saved, f"it began with {saved.name}, which had seen bars up to {minute_of(until_ns)} UTC"

    def _plan(self, stamp: str) -> dict[str, Any]:
        settings, options, saved = self._settings, self._options, self._began_with
        values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE}
        return {
            "step": options.step,
            "fresh": options.fresh,
            "ensemble": options.ensemble,
            "costs_bps": options.costs_bps,
            "trees": options.trees,
            "start_from": None if saved is None else f"{saved.name} {sha256_of(saved.path)[:16]}",
            "stamp": stamp,
            "settings": values,
            "windows": [[window.start_ns, window.end_ns] for window in self.windows],
        }

    @property
    def place(self) -> str:
        """Where the walk is."""
        done, of = len(self.book.results), len(self.windows)
        return f"window {done + 1} of {of}" if done < of else "its page"

    def run(self) -> None:
        """Walk what is left, and write the page.

        Raises:
            ExitProgram: it would take too long, or cannot be trained.
            OSError: a file cannot be written.
        """
        left = self.windows[len(self.book.results) :]
        if left:
            costs = measure_costs(self._settings, left[0], self._lake, self._device, self._options.ensemble)
            gc.collect()  # of the training that was timed; compiled code refers to the weights in a circle
            torch.cuda.empty_cache()
            self._check_costs(costs, left)
            self.book.begin()
            if self._began_with:
                begin_with(self._began_with, self._folder)
            self._walk(left)
        self._show()

    def _check_costs(self, costs: Costs, left: Sequence[Window]) -> None:
        """Say what the walk will take; refuse what would take too long, or more room than there is."""
        settings, options = self._settings, self._options
        exams = len(left) * math.ceil(settings.epochs / settings.checkpoint_every)
        days = sum(window.end_ns - window.start_ns for window in left) // DAY_NS
        jobs = min(options.jobs, len(left))
        work = (len(left) * settings.epochs, exams, len(left), days)
        # Cores are shared, and one training uses them all: only further GPUs make it quicker.
        speedup = min(jobs, len(self._devices())) if self._device.type == "cuda" else 1
        hours = costs.seconds(*work, is_warm=not options.fresh) / 3600 / speedup
        needed = costs.disk_bytes(jobs + (jobs > 1), options.ensemble)
        free = free_in(self._folder)
        log.info(
            f"Plan: {count_of(len(left), 'window')} of {count_of(options.step, 'day')}, {left[0]} ... {left[-1]}, "
            f"{'fresh' if options.fresh else 'warm'}; {exams:,} exams; about {clock(3600 * hours)} hours "
            f"({costs.epoch_seconds:.2g} s an epoch, {costs.exam_seconds:.2g} s an exam), {needed / 1e9:.2g} GB "
            f"of disk{'; boosted trees come on top' if options.trees else ''}"
        )
        if hours > options.max_hours:
            raise ExitProgram(
                EXIT_DOES_NOT_FIT,
                f"The walk would take about {hours:.3g} hours, more than --max-hours {options.max_hours:g}: raise "
                "that, lower epochs or the model, or walk fewer days with --from",
            )
        if needed > free:
            raise ExitProgram(
                EXIT_DOES_NOT_FIT,
                f"The walk needs {needed / 1e9:.2g} GB in {self._folder}, and {free / 1e9:.2g} GB are free: make "
                "room, or use an --output on another disk",
            )

    def _devices(self) -> list[str]:
        if self._device.type != "cuda":
            return [self._settings.device if self._settings.device != "auto" else "cpu"]
        if self._settings.device in ("auto", "cuda"):
            return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return [self._settings.device]

    def _walk(self, left: Sequence[Window]) -> None:
        epochs, began = self._settings.epochs, time.monotonic()
        for window in self.windows[: -len(left)]:
            self._drop_weights(window)  # a kill may have kept them
        self._console.start(TASK, "epochs", len(left) * epochs)
        with ExitStack() as stack:
            jobs = stack.enter_context(self._jobs(left)) if self._options.jobs > 1 else None
            for number, window in enumerate(left, 1):
                jobs.wait_for(window) if jobs else self._train_here(window)
                row = self._trade(window)
                seconds = (time.monotonic() - began) / number * (len(left) - number)
                log.info(f"{describe(row, window, len(self.windows))}; {clock(seconds)} hours left")
        self._console.finish(TASK, f"{count_of(len(left), 'window')} walked")

    def _jobs(self, left: Sequence[Window]) -> Jobs:
        return Jobs(
            self._train,
            self._settings,
            left,
            self._folder_of,
            self._options.jobs,
            self._devices(),
            partial(self._console.advance, TASK),
        )

    def _train_here(self, window: Window) -> None:
        counted = 0

        def count() -> None:
            nonlocal counted
            counted += 1
            self._console.advance(TASK)

        def warn(text: str) -> None:
            if text in self._warned:  # what is wrong with a symbol is so in every window
                return
            self._warned.add(text)
            line = f"Warning: window {window.number}: {text}"
            self._console.print_line(line, "yellow", logging.WARNING)

        runs = 1 if self._options.fresh else self._runs_before + window.number
        train_window(self._train, self._settings, window, self._folder_of(window), runs, warn, count)
        self._console.advance(TASK, self._settings.epochs - counted)  # of an earlier start

    def _folder_of(self, window: Window) -> Path:
        return self._folder / f"{window.number:04d}" if self._options.fresh else self._folder

    def _trade(self, window: Window) -> dict[str, Any]:
        options, folder = self._options, self._folder_of(window)
        keep_champion(folder, self._folder / FIRST)
        newest = newest_in(folder)
        assert newest is not None
        first = Checkpoint.read(self._folder / FIRST) if (self._folder / FIRST).exists() else None
        champions = self._champions.of(window.number, folder, self.book.results)
        former = tuple(champions[1:]) if options.ensemble > 1 else None
        who = Contestants(newest, champions[0] if champions else None, first, former)
        row, accounts = trade(
            window,
            who,
            self._lake,
            self._settings,
            self._device,
            self.book.accounts,
            options.costs_bps,
            options.trees,
        )
        exams = exams_in(folder, newest.run)
        row |= {"exams": len(exams), "edges": sum(exam["verdict"] == "edge" for exam in exams)}
        self.book.append(row, accounts)
        self._drop_weights(window)
        self._champions.drop_others(self.book.results)
        return self.book.results[-1]

    def _drop_weights(self, window: Window) -> None:
        """Remove the weights of a window that is done, where no other window goes on from them."""
        if self._options.fresh:
            folder = training_in(self._folder_of(window))
            for path in folder.glob("*.pt"):
                path.unlink()
            shutil.rmtree(folder / RESUME, ignore_errors=True)

    def _show(self) -> None:
        """Print what was found, and write the page."""
        settings, options, results = self._settings, self._options, self.book.results
        notes = notes_of(settings, self.windows, results)
        summary = summarize(results, options.costs_bps, self._stamp, notes)
        if summary is None:
            raise ExitProgram(
                EXIT_NO_DATA,
                f"Nothing was traded: no window of {self._folder} has {count_of(3, 'bar')} in a row",
            )
        content = summary.as_json()
        if options.as_json:
            self._console.emit(json.dumps(content, indent=1, allow_nan=False))
        else:
            self._console.table(*table(summary))
        name = f"walkforward_{file_name(self._folder.resolve().name)}"
        folder = Path(settings.report_dir) / name
        began_with = self._began_with.name if self._began_with else "random weights"
        made = how_it_was_made(settings, self.windows, options, began_with)
        write_folder(folder, render_files(summary, content, made))
        log.info(summary.headline)
        log.info(f"Because: {summary.verdict.reason}")
        log.info(summary.result)
        log.info(f"Its trades: {summary.margin}")
        log.info(f"Wrote {folder / 'walkforward.html'}")
