"""How long a start takes: to a demo's first epoch, and some commands; beside another commit.

    python benchmarks/start.py [--other FOLDER] [--rounds 5]

``demo`` runs from ``python -m runtime.supervisor --demo``, what START_CONTINUOUS.sh becomes, to the line of the
first epoch, and is stopped there. ``signals`` takes a checkpoint that a demo of one epoch wrote. Both commits
have their own folders and take turns. CPU seconds are of all processes until then, so that a busy machine
spoils less.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--epochs", "1", "--simulated-symbols", "4", "--simulated-bars", "30000", "--no-dashboard")


def folders(folder: Path) -> list[str]:
    """Return the flags that keep a program within a folder."""
    return [f"--{name}-dir={folder / name}" for name in ("checkpoint", "log", "data", "report")]


def cpu_seconds(process: psutil.Process) -> float:
    """Return what a process and its descendants have used, those that have ended included."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            times = each.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def start_demo(root: Path, folder: Path) -> tuple[float, float]:
    """Return CPU seconds and seconds to the first epoch's line of a demo in a new folder."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "runtime.supervisor", "--demo", "--no-dashboard", *folders(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=root, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "epoch" in line and "transitions/s" in line:
                break
        used = cpu_seconds(psutil.Process(process.pid)), time.monotonic() - begin
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1.2)
        process.communicate()
    return used


def run_command(root: Path, words: list[str]) -> tuple[float, float]:
    """Return CPU seconds and seconds of one command."""
    begin, before = time.monotonic(), os.times()
    command = [sys.executable, "continuous_training.py", *words]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, time.monotonic() - begin


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="folder of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    roots = [*([options.other] if options.other else []), ROOT]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        trained = {root: Path(temporary) / str(number) for number, root in enumerate(roots)}
        for root, folder in trained.items():
            run_command(root, ["train", "--demo", *SMALL, *folders(folder)])
        for number in range(options.rounds):
            for root, folder in trained.items():
                checkpoint = str(folder / "checkpoint" / "run1_epoch1.pt")
                # The data of a checkpoint's training is kept where it was.
                commands = {
                    "--help": ["--help"],
                    "check --offline": ["check", "--offline", "--demo", *folders(folder)],
                    "signals": ["signals", checkpoint, "--no-refresh"],
                }
                new = Path(temporary) / f"{len(found)}-{number}"
                found.setdefault(("demo", root), []).append(start_demo(root, new))
                for name, words in commands.items():
                    found.setdefault((name, root), []).append(run_command(root, words))
    print("| | " + " | ".join(["before", "after"][-len(roots) :]) + " |")
    print("|---|" + "---|" * len(roots))
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for root in roots:
            cpu, wall = zip(*found[name, root], strict=True)
            cells.append(f"{statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}), {min(wall):.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
