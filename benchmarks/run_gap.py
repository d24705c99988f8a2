"""How long training stands still between two runs and for a checkpoint, each with and without its background.

    python benchmarks/run_gap.py --data-dir FOLDER [--pairs 4] [--epochs 4] [--sources binance,yahoo]

A small model trains on the default stocks and pairs over two years, from whatever the environment points to:
meant for stand-ins on loopback (POLYGON_S3_ENDPOINT, BINANCE_API_URL, BINANCE_ARCHIVE_URL and YAHOO_BASE_URL, and
keys) and a FOLDER that is brought up to date first, however long that takes. Runs take turns: after one, the next
run's bars have been refreshed in the background, which is given the time that it needs, as in a run of an hour;
after the other they are not, and the next run fetches them itself.

The gap is the time from a run's last figures to the next run's first rollout: the last save, the bars (fetched, or
found ready), their features and way to the device. For a checkpoint it is the time that training waits in a save,
beside the time until the save is on disk. Ratios belong in RESULTS.md; seconds to one machine, disk and network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import continuous_training as program
from continuous_training import PRESETS, Settings
from runtime.control import Control
from training.checkpoint_writer import BackgroundWriter
from training.data_feed import Prefetch
from training.trainer import Session


class Measured:
    """What the program does, with a stopwatch beside it; and every second run without a background refresh."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.run = 1
        self.ended: float | None = None  # when the last figures of the run before were known
        self.began = 0.0
        self.gaps: dict[bool, list[float]] = {True: [], False: []}  # by: was there a background?
        self.bars: dict[bool, list[float]] = {
            True: [],
            False: [],
        }  # what of the gaps was spent on getting bars
        self.epoch_seconds: list[float] = []
        self.stalls: list[float] = []
        self.writes: list[float] = []
        self._replace(Session, "collect", self._collect)
        self._replace(Session, "metrics", self._metrics)
        self._replace(Prefetch, "after_epoch", self._after_epoch)
        self._replace(BackgroundWriter, "_write", self._write)
        self._save, self._fresh_bars = program.save, program.fresh_bars
        program.save = self._timed_save  # type: ignore[assignment]
        program.fresh_bars = self._timed_bars  # type: ignore[assignment]

    @staticmethod
    def _replace(owner: type, name: str, method: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda self, *arguments: method(original, self, *arguments))

    @property
    def _has_background(self) -> bool:
        return self.run % 2 == 1

    def _collect(self, original: Callable[..., Any], *arguments: Any) -> Any:
        self.began = time.perf_counter()
        if self.ended is not None:
            self.gaps[self._has_background].append(self.began - self.ended)
            self.ended = None
            self.run += 1
        return original(*arguments)

    def _metrics(self, original: Callable[..., Any], session: Session, clock: Any, *arguments: Any) -> Any:
        figures = original(session, clock, *arguments)
        now = time.perf_counter()
        self.epoch_seconds.append(now - self.began)
        if clock.epoch == self.epochs:
            self.ended = now
        return figures

    def _after_epoch(self, original: Callable[..., Any], prefetch: Prefetch, epochs_left: int) -> None:
        if not self._has_background:
            return
        original(prefetch, epochs_left)
        if epochs_left == 1 and prefetch._child is not None:
            prefetch._child.wait()

    def _timed_save(self, *arguments: Any) -> None:
        began = time.perf_counter()
        self._save(*arguments)
        self.stalls.append(time.perf_counter() - began)

    def _timed_bars(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        data = self._fresh_bars(*arguments)
        if self.ended is not None:
            self.bars[self._has_background].append(time.perf_counter() - began)
        return data

    def _write(self, original: Callable[..., Any], *arguments: Any) -> None:
        began = time.perf_counter()
        original(*arguments)
        self.writes.append(time.perf_counter() - began)


def told(seconds: list[float]) -> str:
    return (
        f"{statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g}, {len(seconds)} times)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sources", default=",".join(Settings.sources))
    parser.add_argument("--pairs", type=int, default=4, help="gaps of either kind")
    parser.add_argument("--epochs", type=int, default=4, help="of a run, at least 2")
    parser.add_argument("--d-model", type=int, default=256)
    options = parser.parse_args()
    measured = Measured(options.epochs)
    with tempfile.TemporaryDirectory() as name:
        settings = replace(
            Settings(**PRESETS["small"]),
            sources=tuple(options.sources.split(",")),
            d_model=options.d_model,
            epochs=options.epochs,
            runs=2 * options.pairs + 1,
            checkpoint_every=1,
            holdout_days=0,  # no exams, which would be held in the gap
            data_dir=str(options.data_dir),
            checkpoint_dir=f"{name}/checkpoints",
            log_dir=f"{name}/logs",
        )
        program.train(settings, Control())
    epoch = statistics.median(measured.epoch_seconds)
    print(
        f"torch {torch.__version__}, {'cuda' if torch.cuda.is_available() else 'cpu'}; an epoch: {epoch:.3g} s"
    )
    print("| standing still | with the background | without | ratio |")
    print("|---|---|---|---|")
    print(f"| for the next run's bars | {row(measured.bars[True], measured.bars[False])} |")
    print(f"| between runs in all | {row(measured.gaps[True], measured.gaps[False])} |")
    # The first save asks for memory that is kept; without the background training would wait for the disk too.
    print(f"| for a checkpoint | {row(measured.stalls[1:], measured.writes[1:])} |")


def row(ahead: list[float], itself: list[float]) -> str:
    return f"{told(ahead)} | {told(itself)} | {statistics.median(ahead) / statistics.median(itself):.2g}"


if __name__ == "__main__":
    main()
