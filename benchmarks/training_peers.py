"""Transitions per second of whole training, rollout and update, on the CPU: ours beside stable-baselines3's PPO.

    python benchmarks/training_peers.py                    # a table, about ten minutes on an idle machine
    python benchmarks/training_peers.py --learn            # how soon the policy earns 95 % of the best there is

The same network sizes, environments, batch, passes and coefficients on both sides (training_settings.py): PPO on
gym-trading-env, which encodes the window of 64 bars anew for every step, in rollouts and in the update, as every
windowed environment makes it do; and our production path, which encodes segments. The peers' transformer is our
own trunk, and beside it torch's own layers. "Encoded anew" is our environment with the trunk used as the peers use
it.

Every contender lives in a process of its own and they take turns, so that a busy machine hurts all alike. Told are
medians over rounds, by the clock and by CPU seconds (with one thread the latter hardly depends on who else is at
work), and the share of what a square float32 matrix product reaches on as many threads, measured in every round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import VENV, Process, peers_venv
from commands.selftest import TRIALS, Sizes, run_trial
from training.distributed import Ranks

MATMUL_SIZE, MATMUL_REPEATS = 1_024, 12
OURS, SB3 = "training_ours.py", "training_sb3.py"
CONTENDERS = {
    "stable-baselines3, transformer": (SB3, "transformer"),
    "stable-baselines3, torch's transformer": (SB3, "torch-transformer"),
    "stable-baselines3, MLP of 7 features": (SB3, "mlp-few"),
    "stable-baselines3, MLP of 24 features": (SB3, "mlp"),
    "stable-baselines3, its own MlpPolicy of 7 features": (SB3, "default"),
    "ours, transformer": (OURS, "transformer"),
    "ours, transformer, compiled": (OURS, "compiled"),
    "ours, transformer, hindsight": (OURS, "hindsight"),
    "ours, transformer, hindsight, compiled": (OURS, "hindsight-compiled"),
    "ours, transformer, encoded anew": (OURS, "encoded-anew"),
    "ours, MLP of 7 features": (OURS, "mlp-few"),
    "ours, MLP of 7 features, compiled": (OURS, "mlp-few-compiled"),
    "ours, MLP of 24 features": (OURS, "mlp"),
    "ours, MLP of 24 features, compiled": (OURS, "mlp-compiled"),
}
# (this, beside that, at least so many times as fast)
GOALS = (
    ("ours, transformer", "stable-baselines3, transformer", 100.0),
    ("ours, transformer, compiled", "stable-baselines3, transformer", 100.0),
    ("ours, transformer, hindsight", "stable-baselines3, transformer", 100.0),
    ("ours, transformer, hindsight, compiled", "stable-baselines3, transformer", 100.0),
    ("ours, transformer", "stable-baselines3, torch's transformer", 100.0),
    ("ours, transformer, compiled", "stable-baselines3, torch's transformer", 100.0),
    ("ours, MLP of 7 features", "stable-baselines3, MLP of 7 features", 4.0),
    ("ours, MLP of 7 features, compiled", "stable-baselines3, MLP of 7 features", 4.0),
    ("ours, MLP of 24 features", "stable-baselines3, MLP of 24 features", 4.0),
    ("ours, MLP of 24 features, compiled", "stable-baselines3, MLP of 24 features", 4.0),
    ("ours, MLP of 7 features, compiled", "stable-baselines3, its own MlpPolicy of 7 features", 4.0),
    ("ours, transformer", "ours, transformer, encoded anew", 0.0),
)


@dataclass
class Result:
    """The rounds of one contender."""

    facts: dict
    rounds: list[dict] = field(default_factory=list)

    def median(self, divisor: str) -> float:
        """Return the median of transitions per ``divisor``."""
        return statistics.median(one["transitions"] / one[divisor] for one in self.rounds)

    @property
    def in_rollouts(self) -> float:
        """Median share of a round's seconds."""
        return statistics.median(one["rollout_seconds"] / one["seconds"] for one in self.rounds)

    @property
    def cores(self) -> float:
        """Median of CPU seconds per second."""
        return statistics.median(one["cpu_seconds"] / one["seconds"] for one in self.rounds)


def matmul_rates() -> tuple[float, float]:
    """Operations per second, and per CPU second, of a square float32 matrix product: the best of some."""
    left, right = torch.ones(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    seconds, cpu_seconds = [], []
    for _ in range(MATMUL_REPEATS):
        cpu, start = time.process_time(), time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    return 2 * MATMUL_SIZE**3 / min(seconds), 2 * MATMUL_SIZE**3 / min(cpu_seconds)


def compare(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    print(f"load average before: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    wanted = {name: c for name, c in CONTENDERS.items() if given.only in name}
    their_python = peers_venv(given.peers_venv)
    processes: dict[str, Process] = {}
    results: dict[str, Result] = {}
    for name, (script, argument) in wanted.items():
        python = sys.executable if script == OURS else their_python
        processes[name] = Process(python, script, argument, str(given.threads), threads=given.threads)
        # One after the other: compilers and warm-ups would disturb each other.
        results[name] = Result(processes[name].answer())
    products: list[tuple[float, float]] = []
    loads = []
    for _ in range(given.rounds):
        products.append(matmul_rates())
        for name, process in processes.items():
            results[name].rounds.append(process.ask(str(given.seconds)))
            loads.append(os.getloadavg()[0])
    for process in processes.values():
        process.close()
    report(results, products, loads, given)


def report(
    results: dict[str, Result],
    products: list[tuple[float, float]],
    loads: list[float],
    given: argparse.Namespace,
) -> None:
    by_clock, by_cpu = (statistics.median(rates) for rates in zip(*products, strict=True))
    print(
        f"CPU, {given.threads} threads each, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}; "
        f"{given.rounds} rounds; load average {min(loads):.1f} to {max(loads):.1f}; a product of {MATMUL_SIZE} x "
        f"{MATMUL_SIZE}: {by_clock / 1e9:.0f} GFLOP/s, {by_cpu / 1e9:.0f} per CPU second\n"
    )
    print(
        "| training | parameters | transitions/s | per CPU s | rollout | cores | share of the product's rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, one in results.items():
        flops = one.facts["flops_per_transition"]
        share = f"{flops * one.median('cpu_seconds') / by_cpu:.0%}" if flops else ""
        print(
            f"| {name} | {one.facts['parameters']:,} | {one.median('seconds'):,.0f} "
            f"| {one.median('cpu_seconds'):,.0f} | {one.in_rollouts:.0%} | {one.cores:.2f} | {share} |"
        )
    print("\n| ratio | by the clock | by CPU seconds | goal |\n|---|---|---|---|")
    for this, that, goal in GOALS:
        if this in results and that in results:
            clock, cpu = (
                results[this].median(divisor) / results[that].median(divisor)
                for divisor in ("seconds", "cpu_seconds")
            )
            print(f"| {this} : {that} | {clock:.1f} | {cpu:.1f} | {f'{goal:g}' if goal else ''} |")


def learn(given: argparse.Namespace) -> None:
    """Train the self-test's first market in ever longer runs until one earns 95 % on every seed."""
    torch.set_num_threads(given.threads)
    ranks = Ranks(0, 1, torch.device("cpu"))
    print(
        f"{TRIALS[0].title}: CPU, {given.threads} threads, torch {torch.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}; load average {os.getloadavg()[0]:.1f}\n"
    )
    print("| epochs | seed | share of the reference | seconds | CPU seconds |\n|---|---|---|---|---|")
    for epochs in given.epochs:
        trial, passed = replace(TRIALS[0], epochs=epochs), True
        for seed in range(given.seeds):
            cpu = time.process_time()
            result = run_trial(trial, Sizes(), seed, ranks)
            cpu = time.process_time() - cpu
            passed &= not result.failure
            print(
                f"| {epochs} | {seed} | {result.share:.2%} | {result.seconds:.0f} | {cpu:.0f} |", flush=True
            )
        if passed:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="at least, per contender and round")
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--peers-venv", type=Path, default=VENV)
    parser.add_argument("--learn", action="store_true", help="seconds to 95 %% of the reference instead")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[20, 30, 40, 60, 80], help="runs for --learn"
    )
    parser.add_argument("--seeds", type=int, default=3, help="for --learn")
    given = parser.parse_args()
    (learn if given.learn else compare)(given)


if __name__ == "__main__":
    main()
