"""The program itself as a subprocess, small enough to finish in seconds, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("commands", "data_sources", "envs", "evaluation", "models", "monitoring", "runtime", "training")
PATIENCE = float(os.environ.get("PATIENCE", "120"))  # a bound for a busy machine, not an expectation
NAMES_IN_ENV = re.findall(r"^([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), flags=re.M)
SUPERVISED = ("-m", "runtime.supervisor")
ALONE = ("continuous_training.py",)
IN_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

TINY = {
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "envs_per_gpu": 8,
    "context_bars": 8,
    "horizon": 8,
    "episode_bars": 16,
    "batch_size": 32,
    "micro_batch_segments": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "epochs": 8,
    "checkpoint_every": 2,
    # The same bars on every day: what two starts compute can be compared to the last bit.
    "sources": "simulated",
    "end_date": "2026-01-31",
    "simulated_symbols": 2,
    "simulated_bars": 3000,
    "holdout_days": 0,
}
# Segments of an hour, so that an exam of days takes a second.
SEGMENTS_OF_AN_HOUR = {
    "context_bars": 8,
    "horizon": 64,
    "episode_bars": 128,
    "envs_per_gpu": 4,
    "batch_size": 128,
}
TRANSITIONS_PER_EPOCH = 8 * 8  # accounts x horizon, of one rank


def flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as the command line takes them."""
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def tiny_flags(folder: Path, **changes: Any) -> list[str]:
    """Return the flags of a tiny training that keeps everything in ``folder``."""
    folders = {
        "checkpoint_dir": folder / "checkpoints",
        "data_dir": folder / "data",
        "log_dir": folder / "logs",
    }
    return flags(TINY | folders | changes)


def environment(**additions: str) -> dict[str, str]:
    """Return an environment without keys and addresses of the person running the tests."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES_IN_ENV}
    blank = dict.fromkeys(NAMES_IN_ENV, "")  # set, though empty: the checkout's own .env does not count
    own = {"OMP_NUM_THREADS": "1", "NPROC": "1", "COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
    return clean | blank | own | additions


class Start:
    """One start of the program, under way or over. Its output goes to a file and can be read all along."""

    def __init__(
        self,
        log: Path,
        words: Sequence[str | Path],
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        terminal: bool = False,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        command = [sys.executable, *map(str, words)]
        if terminal:
            command = [sys.executable, "-c", IN_A_TERMINAL, *command]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env or environment(),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return CONTROL_SEQUENCE.sub("", self.raw.replace("\r", ""))

    @property
    def raw(self) -> str:
        """What a terminal would get; the newest character may not have arrived as a whole."""
        return self._log.read_bytes().decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    def wait_for(self, text: str) -> Start:
        """Wait until it has printed ``text``."""
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < end, f"it never said {text!r}:\n{self.output}"
            time.sleep(0.005)
        return self

    def ends(self) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=PATIENCE)

    def ends_well(self) -> Start:
        code = self.ends()
        assert code == 0, f"it ended with {code}:\n{self.output}"
        return self

    def worker(self, matches: Callable[[dict[str, str]], bool] = lambda _: True) -> psutil.Process:
        """Find a process of it that trains, by its environment."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            words = process.cmdline()
            if "train" in words and "runtime.torchrun" not in words and matches(process.environ()):
                return process
        raise AssertionError(f"no such worker:\n{self.output}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop everything that it started, then let it continue."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def kill(self) -> None:
        """End what is left of it, its descendants included."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Read what a training recorded, one entry per epoch."""
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def epochs_of(folder: Path) -> list[tuple[int, int]]:
    return [(entry["run"], entry["epoch"]) for entry in metrics(folder)]


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Load a checkpoint as a stranger would: with nothing but torch."""
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def names_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*.pt")}


def written_to(terminal: int) -> str:
    """Read a terminal until no process has it open."""
    written = b""
    with suppress(OSError):  # how Linux signals the end of a terminal
        while part := os.read(terminal, 65_536):
            written += part
    return written.decode(errors="replace")


def is_same(one: Any, other: Any) -> bool:
    """Return whether two nests of tensors and plain values are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other
