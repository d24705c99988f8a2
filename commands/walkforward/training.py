"""The training of one window: the daemon's own main loop, on bars as they were known at the window's start."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.walkforward.schedule import Window
from evaluation import ledger
from runtime.control import EXIT_DOES_NOT_FIT, Control, ExitProgram
from runtime.files import make_folder, move_over, sync_folder
from runtime.train_log import keep_log
from training import checkpoint
from training.checkpoint import BEST, Checkpoint, read_complete
from training.checkpoint_names import RESUME
from training.data_feed import stored_bars
from training.progress import TrainingProgress

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

Train = Callable[..., None]  # the main loop, continuous_training.train
NEVER_MINUTES = 1e5  # nothing may depend on a clock: a walk that was killed must end like one that was not


class _Life(Control):
    """The stop requests and the progress of a training within a walk.

    Signals keep their usual effect: a walk that is stopped goes on from the newest checkpoint, so that it ends as
    if it had never been stopped. The checkpoint of a training that is asked to stop has no exam.
    """

    def __init__(self, on_epoch: Callable[[], None]) -> None:
        super().__init__()
        self._on_epoch = on_epoch

    def listen(self) -> None:
        """Leave signals as they are."""

    def report_epoch(self) -> None:
        """Report a finished epoch to the walk, too."""
        super().report_epoch()
        self._on_epoch()


def train_window(
    train: Train,
    settings: Settings,
    window: Window,
    folder: Path,
    runs: int,
    warn: Callable[[str], None],
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train until ``runs`` runs are done, on bars up to the window's start; goes on where an earlier start ended.

    Args:
        train: the main loop.
        settings: of the walk.
        window: its start is the last run's cutoff.
        folder: has the training, and its logs.
        runs: that the training has at the end.
        warn: called with every warning of the training; all its lines are in ``logs/train.log``.
        on_epoch: called after every epoch.

    Raises:
        ExitProgram: it cannot be trained, or its checkpoint or ledger was not written.
        CheckpointError, FeatureError, DoesNotFit: as in a training.
    """
    own = replace(
        settings,
        runs=runs,
        checkpoint_dir=str(training_in(folder)),
        log_dir=str(folder / "logs"),
        checkpoint_minutes=NEVER_MINUTES,
        exam_minutes=NEVER_MINUTES,
        exam_on_stop=False,
        keep_checkpoints=2,
        keep_runs=1,
        mirror=None,
        notify=(),
        web_port=None,
        prometheus_port=None,
        dashboard=False,
        log_level="warning",
    )
    with keep_log(folder / "logs", "info"), _only_warnings(warn) as shown:
        train(own, _Life(shown(on_epoch)), bars_of_run=stored_bars(window.start_ns))
    _check(folder, own, runs)


def _check(folder: Path, settings: Settings, runs: int) -> None:
    newest = newest_in(folder)
    whole = newest and read_complete(training_in(folder), newest.name)
    # Exams may have ended it before its last epoch.
    if not whole or whole.run != runs or not TrainingProgress.of(whole).is_over(settings):
        raise ExitProgram(
            EXIT_DOES_NOT_FIT,
            f"{training_in(folder)} has no checkpoint of the end of run {runs}: start again",
        )
    if whole.exam:
        path = training_in(folder) / ledger.NAME
        if ledger.key_of(whole.exam["line"]) not in map(ledger.key_of, ledger.read(path)):
            raise ExitProgram(EXIT_DOES_NOT_FIT, f"{path} was not written: check the disk, then start again")


def training_in(folder: Path) -> Path:
    """Return the checkpoint folder of a training."""
    return folder / "training"


def newest_in(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a training, without its resume state."""
    paths = checkpoint.existing(training_in(folder))
    return Checkpoint.read(paths[0]) if paths else None


def champion_in(folder: Path) -> Checkpoint | None:
    """Return the champion of a training as it is now."""
    path = training_in(folder) / BEST
    return Checkpoint.read(path) if path.exists() else None


def exams_in(folder: Path, run: int) -> list[dict[str, Any]]:
    """Return the exams of a run, oldest first."""
    return [line for line in ledger.read(training_in(folder) / ledger.NAME) if line["run"] == run]


def titles_lost_in(folder: Path) -> set[str]:
    """Return the champions of a training that lost their title by the record."""
    lines = ledger.read(training_in(folder) / ledger.NAME)
    return {line["dethroned"] for line in lines if line.get("dethroned")}


def keep_champion(folder: Path, path: Path) -> None:
    """Keep the champion of a training, if there is one, as another file, unless that is there."""
    best = training_in(folder) / BEST
    if path.exists() or not best.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    make_folder(path.parent)
    temporary.unlink(missing_ok=True)
    try:
        os.link(best, temporary)  # a second name takes no room
    except OSError:
        shutil.copyfile(best, temporary)
    move_over(temporary, path)
    sync_folder(path.parent)


def begin_with(saved: Checkpoint, folder: Path) -> None:
    """Let a training begin with a checkpoint of another one: its weights, its optimizer and its scale of features.

    Raises:
        CheckpointError: it has no resume state.
        OSError: it cannot be copied.
    """
    target = training_in(folder) / saved.name
    if checkpoint.existing(training_in(folder)):
        return
    saved.with_resume()  # whole, or an error
    make_folder(target.parent / RESUME)
    # The state first, as checkpoints are written: weights in place mean that both are whole.
    for source, copy in (
        (saved.path.parent / RESUME / saved.name, target.parent / RESUME / saved.name),
        (saved.path, target),
    ):
        temporary = copy.with_name(f".{copy.name}.tmp")
        shutil.copyfile(source, temporary)
        move_over(temporary, copy)


@contextmanager
def _only_warnings(
    warn: Callable[[str], None],
) -> Iterator[Callable[[Callable[[], None]], Callable[[], None]]]:
    """Show no line of a training; pass its warnings on. Yields what lets a function show its own lines."""
    is_training = True

    def hide(record: logging.LogRecord) -> bool:
        if is_training:
            record.is_shown = False
            if record.levelno >= logging.WARNING:
                warn(record.getMessage())
        return True

    def shown(call: Callable[[], None]) -> Callable[[], None]:
        def show() -> None:
            nonlocal is_training
            is_training = False
            call()
            is_training = True

        return show

    level, propagates = log.level, log.propagate  # which the training's console resets at its end
    log.addFilter(hide)
    try:
        yield shown
    finally:
        log.removeFilter(hide)
        log.setLevel(level)
        log.propagate = propagates
