"""Train on two ranks while processes are killed and stopped at random, and compare with undisturbed training.

    python -m tests.drill.soak --minutes 30
    python -m tests.drill.soak --kills 50 --shortest 1 --longest 15

Exits with 0 if weights and states are the same to the last bit, no acknowledged epoch was lost, no process is
left behind, and memory and open files stayed flat.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.drill.programs import SUPERVISED_WITH_FAULTS, VICTIMS, find, living
from tests.program import PATIENCE, SUPERVISED, Start, checkpoint, environment, is_same, tiny_flags
from training import checkpoint as files

# Free trades and high entropy: gradients of a policy that becomes certain vanish, and weights that do not move
# are the same whatever happens.
SETTINGS = {
    "batch_size": 64,
    "epochs": 50,
    "checkpoint_every": 2,
    "learning_rate": 3e-4,
    "entropy_coef": 0.3,
    "crypto_fee_bps": 0,
    "slippage_bps": 0,
    "borrow_rate": 0,
}
STOPS = {"Ctrl+C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
MOST_KILLS = 3  # before an epoch must be finished: after five crashes without one the supervisor gives up
PAUSE = "0.5"  # seconds per epoch, so that the undisturbed training takes a fraction of the time


def say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def resume_state(folder: Path, name: str) -> dict[str, Any]:
    """Load the resume state, without the time of day at which its run began."""
    state = checkpoint(folder, f"resume/{name}")
    state["clock"].pop("cutoff_ns")
    return state


# A process imports, loads and saves before its memory is flat. In epochs, since machines differ in speed.
WARM_EPOCHS = 10


def stamp(path: Path) -> int:
    """Return a number that changes with the file; 0 while there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def listens(pid: int) -> bool:
    """Return whether a process handles SIGTERM, or has ended."""
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
        return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True


class Usage:
    """Memory and open files over time of the processes in one role, each from its tenth epoch on."""

    def __init__(self, folder: Path) -> None:
        self.samples: list[tuple[int, int]] = []  # bytes, open files
        self._metrics = folder / "logs" / "metrics.jsonl"
        self._first: dict[psutil.Process, int] = {}  # epochs logged when it was first seen

    def measure(self, process: psutil.Process | None) -> None:
        if process is None:
            return
        epochs = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        if epochs < self._first.setdefault(process, epochs) + WARM_EPOCHS:
            return
        with contextlib.suppress(psutil.Error):  # it has ended
            self.samples.append((process.memory_info().rss, process.num_fds()))

    def summary(self, role: str) -> tuple[str, bool]:
        """Return a line, and whether usage grew from the first tenth to the last."""
        if not self.samples:
            return f"{role}: never lived for {WARM_EPOCHS} epochs", False
        tenth = max(1, len(self.samples) // 10)
        (memory, files), (memory_end, files_end) = (
            [sum(column) / tenth for column in zip(*part, strict=True)]
            for part in (self.samples[:tenth], self.samples[-tenth:])
        )
        line = (
            f"{role}, first and last tenth of {len(self.samples)} samples: {memory / 1e6:.1f} and "
            f"{memory_end / 1e6:.1f} MB, {files:.1f} and {files_end:.1f} open files"
        )
        return line, memory_end > 1.1 * memory or files_end > files + 2


class Soak:
    """One disturbed training: what is done to it, and the faults found."""

    def __init__(self, folder: Path, generator: random.Random, choices: Sequence[str]) -> None:
        self.folder = folder
        self.choices = choices
        self.generator = generator
        self.kills: Counter[str] = Counter()
        self.faults: list[str] = []
        self.usage = {role: Usage(folder) for role in ("rank 0", "supervisor")}
        self.began = time.monotonic()
        self.starts = 0
        self.kills_of_group = 0  # since an epoch was finished
        self.killed_last = False  # and not stopped
        self.start = self._start()

    def _start(self, runs: int | None = None) -> Start:
        self.starts += 1
        settings = SETTINGS | ({"runs": runs} if runs else {})
        env = environment(NPROC="2", **({} if runs else {"PAUSE": PAUSE}))
        words = [*SUPERVISED_WITH_FAULTS, "train", *tiny_flags(self.folder, **settings)]
        return Start(self.folder / f"out{self.starts}", words, env)

    def newest(self) -> tuple[int, ...]:
        """Return run, epoch (and step) of the newest checkpoint on disk."""
        found = files.existing(self.folder / "checkpoints")
        return numbers(found[0].name) if found else (0, 0)

    def acknowledged(self) -> tuple[int, ...]:
        """Return run, epoch (and step) of the newest checkpoint that the program reported as saved."""
        saved = [(0, 0)]
        for path in self.folder.glob("out*"):
            saved += map(numbers, re.findall(r"^Saved .*/(run\S+)$", path.read_text(), re.M))
        return max(saved)

    def measure(self) -> None:
        for role, usage in self.usage.items():
            usage.measure(find(self.start, role))

    def disturb(self) -> None:
        """Kill one process, or stop all and restart the training, as systemd would."""
        victim = self.generator.choice(self.choices)
        if victim in STOPS:
            self.stop(victim)
            self.start = self._start()
        else:
            self.kill(victim)

    def kill(self, victim: str) -> None:
        """Kill one process with SIGKILL; a supervisor is restarted."""
        if self.kills_of_group == MOST_KILLS:
            self.wait_for_epoch()
        process = find(self.start, victim)
        if process is None:
            return  # between two groups
        process.kill()
        self.kills_of_group += 1
        self.killed_last = True
        self.kills[victim] += 1
        if victim == "supervisor":
            self.start.ends()
            end = time.monotonic() + 30
            while left := living(self.folder):
                if time.monotonic() > end:
                    self.faults.append(f"left behind by a killed supervisor: {left}")
                    break
                time.sleep(0.1)
            self.start = self._start()
        elif self.start.process.poll() is not None:
            self.faults.append(f"it ended by itself: {self.start.output[-500:]}")
            self.start = self._start()
        if self.newest() < self.acknowledged():
            self.faults.append(f"{self.acknowledged()} was saved, {self.newest()} is there")
        say(f"killed {victim}; newest checkpoint {self.newest()}")

    def wait_for_epoch(self) -> None:
        """Wait for another finished epoch, however slow the machine is."""
        metrics = self.folder / "logs" / "metrics.jsonl"
        end = time.monotonic() + PATIENCE
        for _ in range(2):  # when the second is logged, the first is saved
            before = stamp(metrics)
            while stamp(metrics) == before:
                if time.monotonic() > end:
                    raise TimeoutError(f"no epoch in {PATIENCE:.0f} s: {self.start.output[-500:]}")
                time.sleep(0.1)
        self.kills_of_group = 0

    def stop(self, name: str) -> None:
        """Request a stop at a random moment, and wait for the end."""
        while not listens(self.start.process.pid):  # before, nothing runs that could be lost
            time.sleep(0.01)
        self.start.process.send_signal(STOPS[name])
        code = self.start.ends()
        # A rank that was killed just before cannot save, and the exit code is not 0.
        cannot_save = self.killed_last and "Training died while stopping" in self.start.output
        if code and not (code == 1 and cannot_save):
            self.faults.append(f"{name} ended it with {code}: {self.start.output[-500:]}")
        self.kills[name] += 1
        self.killed_last = False
        if left := living(self.folder):
            self.faults.append(f"left behind by {name}: {left}")
        if self.newest() < self.acknowledged():
            self.faults.append(f"{self.acknowledged()} was saved, {self.newest()} is there")
        say(f"{name}; newest checkpoint {self.newest()}")

    def finish(self) -> int:
        """Stop it, let it finish its run undisturbed, and return the number of runs."""
        self.stop("SIGTERM")
        runs = max(1, self.newest()[0])
        self._start(runs=runs).ends_well()
        if left := living(self.folder):
            self.faults.append(f"left behind: {left}")
        return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kills", type=int, help="end after this many kill -9, with no other fault")
    parser.add_argument("--shortest", type=float, default=20.0, help="seconds between kills")
    parser.add_argument("--longest", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        disturbed, undisturbed = Path(name) / "disturbed", Path(name) / "undisturbed"
        soak = Soak(disturbed, generator, VICTIMS if options.kills else (*VICTIMS, *STOPS))
        try:
            end = soak.began + 60 * options.minutes
            while time.monotonic() < end and (not options.kills or soak.kills.total() < options.kills):
                until = min(end, time.monotonic() + generator.uniform(options.shortest, options.longest))
                while time.monotonic() < until:
                    time.sleep(min(2.0, max(0.0, until - time.monotonic())))
                    soak.measure()
                if time.monotonic() < end:
                    soak.disturb()
            minutes = (time.monotonic() - soak.began) / 60
            runs = soak.finish()
        finally:
            soak.start.kill()
        say(f"the same {runs} runs of {SETTINGS['epochs']} epochs, undisturbed")
        words = [*SUPERVISED, "train", *tiny_flags(undisturbed, **SETTINGS, runs=runs)]
        start = Start(undisturbed / "out", words, environment(NPROC="2"))
        undisturbed_usage = Usage(undisturbed)  # it lives longest, so that a leak would add up
        while start.process.poll() is None:
            time.sleep(0.5)
            undisturbed_usage.measure(find(start, "rank 0"))
        start.ends_well()
        last = f"run{runs}_epoch{SETTINGS['epochs']}.pt"
        same = is_same(checkpoint(disturbed, last)["model"], checkpoint(undisturbed, last)["model"])
        same_state = is_same(resume_state(disturbed, last), resume_state(undisturbed, last))
        figures = checkpoint(undisturbed, last)["metrics"]
    if not same or not same_state:
        soak.faults.append(f"weights or states of {last} differ")
    say(
        f"{minutes:.1f} minutes, {soak.kills.total()} faults: {dict(soak.kills)}; {last}, "
        f"{runs * SETTINGS['epochs']} epochs: same weights: {same}, "
        f"same optimizer, accounts and random streams: {same_state}; still learning: entropy "
        f"{figures['loss/entropy']:.3f}, gradient norm {figures['ppo/grad_norm']:.3g}"
    )
    for role, usage in {**soak.usage, "undisturbed rank 0": undisturbed_usage}.items():
        line, has_grown = usage.summary(role)
        say(line)
        if has_grown:
            soak.faults.append(f"{role}: memory or open files grow")
    for fault in soak.faults:
        say(f"FAULT: {fault}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
