"""Job: everything that one rank's training is wired from, and the steps of the loop in continuous_training.py."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from commands.cli import flags_of
from data_sources.lake.lake import Lake
from envs.market import Market
from evaluation import champion
from evaluation.examiner import Exam, Examiner
from evaluation.recorder import Recorder
from monitoring.console import Console
from runtime.control import (
    EXIT_DOES_NOT_FIT,
    EXIT_SETTING,
    STOP_AT_EPOCH_END,
    STOP_NOW,
    Control,
    ExitProgram,
    heartbeat_thread,
)
from training import checkpoint, distributed, early_stop, environments, prefetch, validation
from training.checkpoint import Checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.data_feed import BarsOfRun, fresh_bars, holdout_start_ns, make_market, refresh_command
from training.distributed import agreed_stop
from training.integrity import Inspections
from training.memory import plan_memory
from training.metrics import Phases
from training.mirror import Mirror
from training.progress import CheckpointSchedule, Summary, TrainingProgress
from training.trainer import Trainer

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

COMPILER_SECONDS = 3600.0  # a compiler that takes longer counts as hanging


class Job:
    """One rank's training: ranks, folder lock, console, data, trainer, examiner, checkpoint writer.

    A context manager. Methods marked (all ranks) are collective: every rank calls them at the same point.
    """

    def __init__(self, settings: Settings, control: Control, bars_of_run: BarsOfRun = fresh_bars) -> None:
        self._bars_of_run, self.settings = bars_of_run, settings
        self.control = control
        self.stopping = False
        self._folder = Path(settings.checkpoint_dir)
        self._trainer: Trainer | None = None
        self._inspections = Inspections()
        self._exam, self._exam_at = Exam(), (0, 0)  # the newest, and the run and epoch of its weights
        self._schedule = CheckpointSchedule(settings)

    def __enter__(self) -> Job:
        """Join the ranks, lock the checkpoint folder, open the console, and find the newest checkpoint.

        Raises:
            FolderInUse: another daemon trains in this folder.
            ExitProgram: the newest checkpoint does not fit the settings; nothing is overwritten.
        """
        settings = self.settings
        with ExitStack() as stack:
            enter = stack.enter_context
            self.ranks = ranks = enter(distributed.start(wanted=settings.device))
            enter(checkpoint.exclusive(self._folder, ranks.is_first))
            self.control.listen()
            self.console = enter(Console.of_training(settings, self.control, ranks.is_first))
            self._phases = Phases(self.console.phase)
            command = refresh_command(settings, flags_of(settings)) if ranks.is_first else None
            self._prefetch = enter(prefetch.Prefetch(command))
            mirror = enter(Mirror(settings, ranks.is_first))  # fills an empty folder: before it is looked at
            self.progress, self._saved = self._find_checkpoint()
            on_saved = mirror.after(partial(champion.apply_decision, pending=[]))
            keep, runs = settings.keep_checkpoints, settings.keep_runs
            self._writer = enter(CheckpointWriter(self._folder, keep, ranks.is_first, on_saved, runs))
            terms = self._folder, ranks, self.control, 60 * settings.exam_minutes
            self._examiner = Examiner(*terms, settings.exam_on_stop, self.console.show_exam)
            self._recorder = Recorder(*terms)
            self._summary = Summary(self.progress.transitions, settings.sources == ("simulated",))
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    @property
    def trainer(self) -> Trainer:
        """The trainer, from the first ``begin_run`` on."""
        assert self._trainer is not None
        return self._trainer

    def begin_run(self) -> bool:
        """Put this run's bars on the device and hand them to the trainer; False when training ends (all ranks).

        Raises:
            ExitProgram: there are no bars.
            DoesNotFit: training does not fit into the GPU's memory.
        """
        settings, progress = self.settings, self.progress
        if self.stopping or progress.is_past(settings.runs):
            return False
        lake = Lake(Path(settings.data_dir), self.console)
        with self._phases.during("data"):
            data = self._bars_of_run(
                lake, settings, progress, self.ranks, self.control, self.console, self._prefetch
            )
            if data is None:  # asked to stop while bars were loading
                return False
            self.console.show_data(data, progress.cutoff_ns)
            scaled = self._trainer.env.market if self._trainer else self._saved
            statistics = scaled.statistics if scaled else None
            market = make_market(settings, data.bars, self.ranks, statistics, data.copy)
        with self._phases.during("evaluation"):  # before anything is trained or chosen on these bars
            self._recorder.update(market, settings, progress.cutoff_ns, data.fingerprint)
        progress.trained_until_ns = max(progress.trained_until_ns, holdout_start_ns(settings, data.bars))
        self._fingerprint = data.fingerprint
        if self._trainer:
            self._trainer.set_market(market)
        else:
            self._trainer, self._saved = self._make_trainer(market), None  # a checkpoint takes gigabytes
        log.info(progress.describe_run(settings.cost_ramp, settings.epochs))
        self.console.begin_run(settings, progress, str(self.ranks), self.control)
        return True

    def end_run(self) -> None:
        """Count the run if it is complete; where exams ended it, the next has its best weights (all ranks)."""
        if self.progress.got_worse(self.settings) and not self.stopping:
            self.return_to_checkpoint()
        elif self.progress.epoch == self.settings.epochs:
            log.info(f"Run {self.progress.run} is complete")
            self.progress.next_run()

    def finish(self) -> None:
        """Wait for the last checkpoint and log the summary (all ranks).

        Raises:
            ExitProgram: the last checkpoint could not be written.
        """
        for line in self._summary.lines(self.progress, self._writer.finish()):
            log.info(line)
        if self.ranks.any(self._writer.last_save_failed):
            raise ExitProgram(EXIT_DOES_NOT_FIT, self._writer.describe_failure())

    def agree_on_stop(self, level: int = STOP_AT_EPOCH_END) -> bool:
        """Set ``stopping`` if any rank was asked to stop at this level or above, and return that (all ranks)."""
        self.stopping |= (stop := agreed_stop(level, self.ranks, self.control))
        return stop

    def stop_now(self) -> bool:
        """Return whether any rank was asked to stop at once (all ranks)."""
        return self.agree_on_stop(STOP_NOW)

    def checkpoint_is_due(self) -> bool:
        """Return whether to save now: once in a while, at the end, and after a failed save (all ranks)."""
        wants = self._writer.last_save_failed or (self.ranks.is_first and self._schedule.is_late())
        return self.stopping or self._schedule.is_due_at(self.progress.epoch) or self.ranks.any(wants)

    def is_corrupt(self) -> bool:
        """Whether a rank's numbers are wrong, which a warning names; they are not to be saved (all ranks)."""
        with self._phases.during("checkpoint"):
            return self._inspections.is_corrupt(self.trainer.learner.find_corruption)

    def examine(self) -> dict[str, float]:
        """Score the policy on held-out days, unless asked to stop; return its metrics (all ranks)."""
        self._exam, self._exam_at = Exam(), (self.progress.run, self.progress.epoch)
        if not self.agree_on_stop(self._examiner.ends_at):
            with self._phases.during("evaluation"), self._schedule.time_exam():
                self._exam = self._examiner.examine(self.trainer, self._fingerprint, self._writer)
            self.agree_on_stop(self._examiner.ends_at)  # a request meanwhile has interrupted the exam
        early_stop.count_exam(self.progress, self.settings, self.ranks, self._exam.figures)
        return self._exam.figures

    def _exam_of_weights(self) -> Exam:
        """Return the exam of the weights as they are; empty if they were not examined."""
        return self._exam if self._exam_at == (self.progress.run, self.progress.epoch) else Exam()

    def log(self, metrics: dict[str, Any]) -> None:
        """Show and record one epoch; the seconds of its phases are added to ``metrics``."""
        metrics |= self._recorder.figures | self._phases.figures()
        self.console.show_epoch(metrics, self.settings.epochs)
        for line in self._exam_of_weights().lines:
            log.info(line)
        self._summary.count(metrics["rollout/reward_bps"], metrics["rollout/cost_scale"])

    def save(self, metrics: Mapping[str, Any]) -> None:
        """Write a checkpoint in the background, with the exam of these weights if there was one (all ranks)."""
        with self._phases.during("checkpoint"):
            saved = self.trainer.checkpoint(self._fingerprint, metrics, self._exam_of_weights().record)
            self._writer.save(saved)
        self._schedule.restart()

    def end_epoch(self) -> None:
        """Record that training progresses, and fetch the next run's bars ahead when it is time."""
        self.control.report_epoch()
        is_last_run = self.stopping or self.progress.run == self.settings.runs
        self._prefetch.after_epoch(0 if is_last_run else self.settings.epochs - self.progress.epoch)

    def roll_back(self) -> None:
        """Return to the newest checkpoint, at half the learning rate until the run ends (all ranks)."""
        rollbacks = self.progress.count_rollback()
        self.return_to_checkpoint()
        self.progress.rollbacks = rollbacks

    def return_to_checkpoint(self) -> None:
        """Make the next ``begin_run`` resume from the newest checkpoint (all ranks)."""
        self._writer.finish()
        self.progress, self._saved = self._find_checkpoint()
        self._exam, self._trainer = Exam(), None
        gc.collect()  # compiled code refers to the weights in a circle
        torch.cuda.empty_cache()

    def _find_checkpoint(self) -> tuple[TrainingProgress, Checkpoint | None]:
        """Return the training's progress and its newest checkpoint, None at its beginning (all ranks)."""
        settings, saved = self.settings, checkpoint.newest_for_all(self._folder, self.ranks)
        validation.check_shorts(settings, saved.path if saved else None)
        if saved is None:
            return TrainingProgress(), None
        if mismatch := saved.mismatch(settings):
            raise ExitProgram(EXIT_SETTING, mismatch)
        progress = TrainingProgress.of(saved)
        if self.ranks.is_first:  # the last start may have ended between its checkpoint and the ledger
            champion.apply_decision(saved)
        saved = early_stop.with_best_weights(saved, progress, settings, self.ranks)
        if progress.is_over(settings):
            progress.next_run()
        log.info(f"Resuming from {saved.path} ({progress.transitions:,} transitions)")
        if progress.is_past(settings.runs):
            log.info(f"All of --runs {settings.runs} are done: raise it, or use another --checkpoint-dir")
        return progress, saved

    def _make_trainer(self, market: Market) -> Trainer:
        with heartbeat_thread(COMPILER_SECONDS):
            plan = plan_memory(self.settings, environments.bytes_of_bars(market, self.settings), self.ranks)
            trainer = Trainer(market, self.settings, self.ranks, plan, self.progress, self._saved)
        trainer.on_phase = self._phases.now
        trainer.log_sizes()
        return trainer
