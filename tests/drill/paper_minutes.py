"""A program: ``paper`` whose minutes are given on standard input, as times in ns; it says "done" after each."""

from __future__ import annotations

import sys
from pathlib import Path

from commands import paper
from continuous_training import Settings
from evaluation import ensemble
from monitoring.console import Console


def main(checkpoint: Path, folder: Path) -> None:
    """Trade on paper in ``folder`` until the input ends."""
    now_ns = 0

    def next_minute(seconds: float = 0.0) -> None:
        nonlocal now_ns
        print("done", flush=True)  # noqa: T201
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt
        now_ns = int(line)

    trained = ensemble.read([checkpoint], Settings)
    next_minute()
    with Console(folder / "logs", to_stderr=True) as console:
        options = paper.PaperOptions(folder=folder / "paper", as_json=True, gross=1.0)
        paper.run(trained, options, console, lambda: now_ns, next_minute)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
