"""Telemetry: every epoch's figures for an experiment tracker, sent by the companion and never by the training.

A sink is one tracker. Each has a thread of its own, so that one that is slow or dead delays neither the others nor
the page, and what it missed it gets later: figures are read from ``metrics.jsonl``. Which epochs it has, and in
which of its runs, is in ``telemetry_NAME.json`` of log_dir, so that a restarted training goes on in the same run.

Keys and addresses are the tracker's own variables in ``.env``, read by its package. What it says when it fails may
hold them, so of an error only its kind is shown.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from monitoring.metrics_file import is_finite

Row = Mapping[str, Any]

PROJECT = "continuous-training"
RETRY_SECONDS = 60.0
LONGEST_PARAM, MOST_PARAMS = 500, 100  # of MLflow: characters, and parameters in one request


class Sink(Protocol):
    """One tracker. Its methods may take long and raise whatever they like."""

    def begin(self, run: str, name: str, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on in ``run`` if that is not empty; return its identity."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one epoch's figures after so many transitions."""

    def end(self) -> None:
        """End the run."""


class WandbSink:
    """Weights & Biases."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir

    def begin(self, run: str, name: str, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on in one."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=self._log_dir,
            id=run or None,
            name=name,
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Not its own steps, which may never go back: a training that returns to a checkpoint does.
        self._run.define_metric("transitions")
        self._run.define_metric("*", step_metric="transitions")
        return str(self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one epoch's figures."""
        self._run.log({**figures, "transitions": step})

    def end(self) -> None:
        """Upload what is left."""
        self._run.finish()


class MlflowSink:
    """MLflow: a server, or a file of this machine."""

    def __init__(self, log_dir: Path) -> None:
        pass

    def begin(self, run: str, name: str, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on in one."""
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        if not run:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            run = self._client.create_run(experiment, run_name=name).info.run_id
            params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in config.items()]
            for first in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(run, params=params[first : first + MOST_PARAMS])
        self._client.update_run(run, status="RUNNING")
        self._run = run
        return run

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one epoch's figures."""
        now = int(time.time() * 1_000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


class TrackioSink:
    """Trackio, of this machine or a Hugging Face Space."""

    def __init__(self, log_dir: Path) -> None:
        pass

    def begin(self, run: str, name: str, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on in one."""
        import trackio

        self._run = trackio.init(project=PROJECT, name=run or name, config=dict(config), resume="allow")
        return run or name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one epoch's figures."""
        # "run" is a word of its own, which it would rename with a warning.
        self._run.log({"run number" if n == "run" else n: value for n, value in figures.items()}, step=step)

    def end(self) -> None:
        """Send what is left."""
        self._run.finish()


# By the name of the package that each needs; training/validation.py asks for it.
SINKS: Mapping[str, Callable[[Path], Sink]] = {
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}


class Sender:
    """Sends to one sink, from a thread of its own; nothing waits for it but ``close``, for as long as it is given.

    Args:
        name: of the sink.
        log_dir: of the training; what was sent is noted there.
        run_name: what people see in the tracker.
        config: settings, without secrets.
        report: called with one line when it fails, and again after it has worked.
    """

    def __init__(
        self,
        name: str,
        log_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self.name, self._log_dir, self._run_name, self._config = name, log_dir, run_name, config
        self._report = report
        self._sink: Sink | None = None
        self._rows: Sequence[Row] = ()
        self._wake, self._over = threading.Event(), threading.Event()
        self._has_failed = False
        self._note = log_dir / f"telemetry_{name}.json"
        self._run, self._sent = self._read_note()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def offer(self, rows: Sequence[Row]) -> None:
        """Show it the newest epochs, as in ``metrics.jsonl``; it takes those that it has not sent yet."""
        self._rows = rows
        self._wake.set()

    def finish(self) -> None:
        """Let it send what it has and end; see ``join``."""
        self._over.set()
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait until it has ended, at most so long."""
        self._thread.join(max(0.0, seconds))

    def _work(self) -> None:
        while not (self._over.is_set() and self._is_idle()):
            self._wake.wait()
            self._wake.clear()
            try:
                self._send()
            except Exception as error:  # noqa: BLE001 - of a package that may raise anything
                self._fail(error)
                if self._over.wait(RETRY_SECONDS):
                    break
                self._wake.set()
        if self._sink is not None:
            try:
                self._sink.end()
            except Exception as error:  # noqa: BLE001 - the same
                self._fail(error)

    def _is_idle(self) -> bool:
        return not self._pending()

    def _pending(self) -> list[Row]:
        return [row for row in self._rows if _place_of(row) > self._sent]

    def _send(self) -> None:
        for row in self._pending():
            if self._sink is None:
                sink = SINKS[self.name](self._log_dir)
                self._run = sink.begin(self._run, self._run_name, self._config)
                self._sink = sink
            figures = {key: float(value) for key, value in row.items() if _is_figure(key, value)}
            self._sink.log(int(row["transitions"]), figures)
            self._sent = _place_of(row)
            self._write_note()
            if self._has_failed:
                self._has_failed = False
                self._report(f"{self.name} takes figures again")

    def _fail(self, error: Exception) -> None:
        self._sink = None
        if not self._has_failed:
            self._has_failed = True
            self._report(
                f"{self.name} took no figures: {type(error).__name__}; they are kept and sent later. Its "
                "variables belong in .env"
            )

    def _read_note(self) -> tuple[str, tuple[str, int]]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            return str(note["run"]), (str(note["time"]), int(note["transitions"]))
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or torn: a new run begins
            return "", ("", -1)

    def _write_note(self) -> None:
        moment, transitions = self._sent
        text = json.dumps({"run": self._run, "time": moment, "transitions": transitions})
        self._note.write_text(text, encoding="utf-8")


def _place_of(row: Row) -> tuple[str, int]:
    """Return where an epoch stands: one that is done again after a return to a checkpoint is a later one."""
    return str(row.get("time", "")), int(row["transitions"])


def _is_figure(key: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and is_finite(value) and key != "transitions"
