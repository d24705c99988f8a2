"""Public projects to compare with: their virtual environment, and contenders in processes of their own.

The peers' processes import this module too, so it needs nothing beyond torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "data_cache" / "peers_venv"
PACKAGES = (
    f"torch=={torch.__version__.partition('+')[0]}",  # the same on both sides
    "numpy",
    "pandas",
    "gymnasium>=1.0",
    "gym-trading-env==0.3.5",
    "gym-anytrading==2.0.0",
    "stable-baselines3==2.9.2",
    "safetensors",  # our trunk imports it
)
# ElegantRL's stock environment does not need gym[box2d], which fails to build on some machines.
WITHOUT_DEPENDENCIES = ("elegantrl==0.3.6", "gym==0.26.2", "gym-notices", "cloudpickle")


def make_venv(folder: Path) -> Path:
    """Install the peers, unless ``folder`` already has these versions; return the Python of their environment."""
    python, installed = folder / "bin" / "python", folder / "peers.txt"
    wanted = "\n".join((*PACKAGES, *WITHOUT_DEPENDENCIES))
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        installed.write_text(wanted, encoding="utf-8")
    return python


class Process:
    """A Python process that answers each line with a line of JSON."""

    def __init__(self, python: Path | str, script: str, *arguments: str, threads: int = 1) -> None:
        self._command = [str(python), str(ROOT / "benchmarks" / script), *arguments]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**kept, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg"},
        )

    def answer(self) -> dict:
        """Return the next line that the process writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(f"exited with {code}; to see why, run: {' '.join(self._command)}")
        return json.loads(line)

    def ask(self, line: str) -> dict:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- both sides of training_peers.py ------------------------------------------------------------------------

NUM_ENVS, HORIZON = 64, 128  # 8,192 transitions per rollout
# For contenders that encode every window again: their cost per transition does not depend on the horizon, and
# with 128 one iteration would take a minute.
SHORT_HORIZON = 32
CONTEXT = 64  # bars that a decision looks back on; ours sees 64 to 191
FEATURES, FEW_FEATURES = 24, 7  # of a bar: ours, and those of an example of gym-trading-env
POSITIONS = (-1.0, 0.0, 1.0)
FEE = 6e-4
WIDTH, LAYERS, HEADS = 64, 2, 4  # of the transformer; the MLP has as many units in each of its layers
PASSES, MINIBATCH = 4, 2_048  # over each rollout; transitions per optimizer step
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
LEARNING_RATE, MAX_GRAD_NORM = 3e-4, 0.5


@dataclass
class Contender:
    """One training to measure."""

    iterate: Callable[[], tuple[float, float]]  # a rollout and its update: seconds of each
    transitions: int  # per iteration
    parameters: int
    flops_per_transition: float = 0.0


def serve(make: Callable[[], Contender], threads: int) -> None:
    """Train one contender in rounds; each line on stdin is the least number of seconds of a round.

    The first line of output describes the contender; then comes one line per round: transitions, seconds, CPU
    seconds, and seconds of rollouts.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with answers
    torch.set_num_threads(threads)
    contender = make()
    contender.iterate()  # allocations and lazy initialisation
    facts = {"parameters": contender.parameters, "flops_per_transition": contender.flops_per_transition}
    answers.write(json.dumps({"torch": torch.__version__, **facts}) + "\n")
    for line in sys.stdin:
        iterations, rollout_seconds = 0, 0.0
        cpu, start = time.process_time(), time.perf_counter()
        while not iterations or time.perf_counter() - start < float(line):
            rollout_seconds += contender.iterate()[0]
            iterations += 1
        figures = {
            "transitions": iterations * contender.transitions,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "rollout_seconds": rollout_seconds,
        }
        answers.write(json.dumps(figures) + "\n")
