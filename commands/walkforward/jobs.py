"""Windows that depend on nothing before them, trained side by side: one process each, on a GPU or some cores."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from commands.walkforward.schedule import Window
from commands.walkforward.training import Train, train_window
from runtime.control import EXIT_CRASH, EXIT_DOES_NOT_FIT, EXIT_SETTING, ExitProgram

if TYPE_CHECKING:
    from continuous_training import Settings

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Running:
    process: SpawnProcess
    epochs: Any  # a shared counter


class Jobs:
    """Trains windows in processes of their own, so many at once. A context manager, which ends those left."""

    def __init__(
        self,
        train: Train,
        settings: Settings,
        windows: Sequence[Window],
        folder_of: Callable[[Window], Path],
        jobs: int,
        devices: Sequence[str],
        on_epochs: Callable[[int], None],
    ) -> None:
        """``devices`` are dealt out in turn; ``on_epochs`` is called with the number that were finished since."""
        self._train, self._settings, self._folder_of = train, settings, folder_of
        self._waiting, self._jobs, self._devices, self._on_epochs = list(windows), jobs, devices, on_epochs
        self._running: dict[int, _Running] = {}
        self._started = self._counted = 0
        self._done: set[int] = set()
        self._finished_epochs = 0
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            running.process.kill()
        for running in self._running.values():
            running.process.join()

    def wait_for(self, window: Window) -> None:
        """Wait until a window is trained, and keep the processes busy meanwhile.

        Raises:
            ExitProgram: a training ended with an error, which it has printed.
        """
        while True:
            self._fill()
            self._collect()
            if window.number in self._done:
                self._fill()
                return
            time.sleep(POLL_SECONDS)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._jobs:
            window = self._waiting.pop(0)
            device = self._devices[self._started % len(self._devices)]
            settings = replace(self._settings, device=device)
            epochs = self._context.Value(ctypes.c_long, 0)
            cores = (
                max(1, len(os.sched_getaffinity(0)) // self._jobs) if hasattr(os, "sched_getaffinity") else 1
            )
            arguments = (self._train, settings, window, self._folder_of(window), epochs)
            process = self._context.Process(target=_train_in_process, args=arguments, daemon=True)
            with _environment({"OMP_NUM_THREADS": str(cores)} if device == "cpu" else {}):
                process.start()
            self._running[window.number] = _Running(process, epochs)
            self._started += 1

    def _collect(self) -> None:
        for number, running in list(self._running.items()):
            code = running.process.exitcode
            if code is None:
                continue
            del self._running[number]
            self._finished_epochs += running.epochs.value
            if code:
                raise ExitProgram(
                    code if code > 0 else EXIT_CRASH,
                    f"The training of window {number} ended with code {code}",
                )
            self._done.add(number)
        total = self._finished_epochs + sum(running.epochs.value for running in self._running.values())
        if total > self._counted:
            self._on_epochs(total - self._counted)
            self._counted = total


def _train_in_process(train: Train, settings: Settings, window: Window, folder: Path, epochs: Any) -> None:
    """Train a window; the process ends with the walk's, whatever ends that."""
    Thread(target=_end_with_parent, daemon=True).start()

    import torch

    from envs.feature_errors import FeatureError
    from training.checkpoint import CheckpointError, FolderInUse
    from training.memory import DoesNotFit

    def count() -> None:
        epochs.value += 1

    def say(text: str) -> None:
        sys.stderr.write(f"Window {window.number}: {text}\n")

    try:
        train_window(train, settings, window, folder, 1, lambda text: say(f"Warning: {text}"), count)
    except ExitProgram as reason:
        say(str(reason))
        sys.exit(reason.code)
    except (CheckpointError, FolderInUse, FeatureError) as reason:
        say(str(reason))
        sys.exit(EXIT_SETTING)
    except (DoesNotFit, torch.OutOfMemoryError) as error:
        say(f"it does not fit: {str(error).splitlines()[0]}")
        sys.exit(EXIT_DOES_NOT_FIT)
    except KeyboardInterrupt:
        sys.exit(EXIT_CRASH)  # the walk itself says so


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_CRASH)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that a process inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
