"""Public projects to compare with: their virtual environment, and contenders in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import venv
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
)
OURS = ROOT / "requirements_simple.txt"  # contenders of answer.py play in our environment
# ElegantRL's stock environment does not need gym[box2d], which fails to build on some machines.
WITHOUT_DEPENDENCIES = ("elegantrl==0.3.6", "gym==0.26.2", "gym-notices", "cloudpickle")


def make_venv(folder: Path) -> Path:
    """Install the peers, unless ``folder`` already has these versions; return the Python of their environment."""
    python, installed = folder / "bin" / "python", folder / "peers.txt"
    wanted = "\n".join((*PACKAGES, *WITHOUT_DEPENDENCIES, OURS.read_text(encoding="utf-8")))
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*install, *PACKAGES, "-r", str(OURS)], check=True)
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
