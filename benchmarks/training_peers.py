"""Transitions per second of training (rollout and update) on the CPU, ours beside stable-baselines3's PPO.

    python benchmarks/training_peers.py                    # a table, about ten minutes on an idle machine

Both sides use the same network sizes, environments, batch, passes and coefficients (peers.py). Theirs is PPO on
gym-trading-env, which encodes the window of 64 bars again for every step, in rollouts and in the update, as every
windowed environment requires; ours is the production path, which encodes segments. Their transformer is our own
trunk, and in a second contender torch's own layers. "Per-window encoding" is our environment with the trunk used
as the peers use it.

Every contender lives in a process of its own and they take turns, so that other load on the machine hurts all
alike. The report shows medians over rounds, by the clock and by CPU seconds (with one thread the latter hardly
depend on other load), and the fraction of the rate of a square float32 matrix product on as many threads, measured
in every round.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from benchmarks.env_throughput import market_of
from continuous_training import Settings
from models.linear import Linear
from models.transformer import TransformerConfig
from tests.training.reencoding import WindowLearner, collect_by_windows
from training.compilation import compile_accounts, compile_objective
from training.distributed import Ranks
from training.learner import Learner
from training.memory import MemoryNeeds, MemoryPlan
from training.progress import TrainingProgress
from training.trainer import Trainer

MATMUL_SIZE, MATMUL_REPEATS = 1_024, 12
RANKS = Ranks(0, 1, torch.device("cpu"))
MICRO_BATCH = 16  # segments
MICRO_BATCH_OF_WINDOWS = 8  # of the wide MLP: 6 MB of windows instead of 12


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent to 1e-7; torch's own, and the compiler's, take two to four times as long on CPUs."""
    return 2.0 * torch.sigmoid(2.0 * x) - 1.0


class WindowMLP(nn.Module):
    """Two layers over the flattened window of each bar, in place of the trunk."""

    def __init__(self, config: TransformerConfig, num_features: int) -> None:
        super().__init__()
        self.config = config
        self.num_features = num_features  # the first of each bar; the others are ignored
        self.window = Linear(peers.CONTEXT * num_features, config.d_model)
        self.second = Linear(config.d_model, config.d_model)

    def forward_flops(self, length: int, num_last: int) -> int:
        """Count the operations over one segment."""
        return 2 * num_last * (self.window.weight.numel() + self.second.weight.numel())

    def forward(self, bars: Tensor, num_last: int) -> Tensor:
        """(B, S, F) -> (B, num_last, D)."""
        seen = bars[:, bars.shape[1] + 1 - num_last - peers.CONTEXT :, : self.num_features].contiguous()
        # Same as unfold, which the compiler would turn into two divisions for every element.
        sizes = len(seen), num_last, self.window.in_features
        windows = seen.as_strided(sizes, (seen.stride(0), self.num_features, 1)).contiguous()
        return tanh(self.second(tanh(self.window(windows))))


def make_trainer(
    advantages: str = "gae", horizon: int = peers.HORIZON, micro_batch: int = MICRO_BATCH
) -> Trainer:
    market = market_of(60_000, 32, "cpu", horizon)
    settings = Settings(
        envs_per_gpu=peers.NUM_ENVS,
        context_bars=peers.CONTEXT,
        horizon=horizon,
        episode_bars=10 * peers.HORIZON,
        positions=peers.POSITIONS,
        crypto_fee_bps=1e4 * peers.FEE,
        slippage_bps=0.0,
        d_model=peers.WIDTH,
        num_layers=peers.LAYERS,
        num_heads=peers.HEADS,
        compile="off",
        batch_size=peers.MINIBATCH,
        update_passes=peers.PASSES,
        learning_rate=peers.LEARNING_RATE,
        warmup_steps=1,
        final_learning_rate_fraction=1.0,
        weight_decay=0.0,
        max_grad_norm=peers.MAX_GRAD_NORM,
        gamma=peers.GAMMA,
        gae_lambda=peers.LAMBDA,
        advantages=advantages,
        clip_coef=peers.CLIP,
        entropy_coef=peers.ENTROPY,
        value_coef=peers.VALUE,
    )
    needs = MemoryNeeds.of(settings, market.num_bytes, world_size=1, precision="fp32")
    return Trainer(market, settings, RANKS, MemoryPlan(needs, None, micro_batch), TrainingProgress(run=2))


def production(trainer: Trainer, compiled: bool) -> peers.Contender:
    if compiled:  # as a trainer does that was given a plan of its memory
        sizes = trainer.learner.micro_batch_segments, peers.CONTEXT, peers.HORIZON
        reason = compile_objective(trainer.objective, *sizes, RANKS) or compile_accounts(
            trainer.env, trainer.policy, RANKS
        )
        if reason:
            raise SystemExit(f"not compiled: {reason}")

    def iterate() -> tuple[float, float]:
        start = time.perf_counter()
        rollout = trainer.collect()
        middle = time.perf_counter()
        trainer.update(rollout)
        return middle - start, time.perf_counter() - middle

    return peers.Contender(
        iterate,
        peers.NUM_ENVS * peers.HORIZON,
        trainer.policy.num_parameters(),
        trainer.flops_per_transition(),
    )


def transformer(advantages: str = "gae", compiled: bool = False) -> peers.Contender:
    return production(make_trainer(advantages), compiled)


def mlp(num_features: int, compiled: bool = False) -> peers.Contender:
    micro_batch = MICRO_BATCH_OF_WINDOWS if num_features > peers.FEW_FEATURES else MICRO_BATCH
    trainer = make_trainer(micro_batch=micro_batch)
    trainer.policy.trunk = WindowMLP(trainer.policy.trunk.config, num_features)
    trainer.learner = Learner(trainer.objective, RANKS, micro_batch)
    return production(trainer, compiled)


def windowed_transformer() -> peers.Contender:
    trainer = make_trainer(horizon=peers.SHORT_HORIZON)
    learner = WindowLearner(trainer.objective, RANKS, MICRO_BATCH)

    def iterate() -> tuple[float, float]:
        start = time.perf_counter()
        scale = math.sqrt(1.0 - peers.GAMMA**2)
        rollout = collect_by_windows(trainer.env, trainer.policy, learner.generator, reward_scale=scale)
        middle = time.perf_counter()
        learner.update_by_windows(rollout, peers.MINIBATCH)
        return middle - start, time.perf_counter() - middle

    per_decision = (1 + 3 * peers.PASSES) * trainer.policy.trunk.forward_flops(peers.CONTEXT, 1)
    transitions = peers.NUM_ENVS * peers.SHORT_HORIZON
    return peers.Contender(iterate, transitions, trainer.policy.num_parameters(), per_decision)


OURS: dict[str, Callable[[], peers.Contender]] = {
    "ours, transformer": transformer,
    "ours, transformer, compiled": partial(transformer, compiled=True),
    "ours, transformer, hindsight": partial(transformer, "hindsight"),
    "ours, transformer, hindsight, compiled": partial(transformer, "hindsight", compiled=True),
    "ours, transformer, per-window encoding": windowed_transformer,
    "ours, MLP of 7 features": partial(mlp, peers.FEW_FEATURES),
    "ours, MLP of 7 features, compiled": partial(mlp, peers.FEW_FEATURES, compiled=True),
    "ours, MLP of 24 features": partial(mlp, peers.FEATURES),
    "ours, MLP of 24 features, compiled": partial(mlp, peers.FEATURES, compiled=True),
}
SB3 = (  # keys of training_sb3.CONTENDERS, which only the peers' environment can import
    "stable-baselines3, transformer",
    "stable-baselines3, torch's transformer",
    "stable-baselines3, MLP of 7 features",
    "stable-baselines3, MLP of 24 features",
    "stable-baselines3, its own MlpPolicy of 7 features",
)
# (ours, compared with, goal: at least so many times as fast)
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
    ("ours, transformer", "ours, transformer, per-window encoding", 0.0),
)


@dataclass
class Result:
    """The rounds of one contender."""

    facts: dict
    rounds: list[dict] = field(default_factory=list)

    def median(self, numerator: str, denominator: str) -> float:
        """Return the median over rounds of one figure divided by another."""
        return statistics.median(figures[numerator] / figures[denominator] for figures in self.rounds)


def matmul_rates() -> tuple[float, float]:
    """Return operations per second and per CPU second of a square float32 matrix product, the best of several."""
    left, right = torch.ones(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    seconds, cpu_seconds = [], []
    for _ in range(MATMUL_REPEATS):
        cpu, start = time.process_time(), time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    return 2 * MATMUL_SIZE**3 / min(seconds), 2 * MATMUL_SIZE**3 / min(cpu_seconds)


def compare(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    print(f"load average before: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    python_of_peers = str(peers.make_venv(options.peers_venv))
    threads = str(options.threads)
    commands = {name: (python_of_peers, "training_sb3.py", name, threads) for name in SB3}
    commands |= {
        name: (sys.executable, "training_peers.py", "--threads", threads, "--serve", name) for name in OURS
    }
    processes: dict[str, peers.Process] = {}
    results: dict[str, Result] = {}
    for name, command in commands.items():
        if options.only in name:
            processes[name] = peers.Process(*command, threads=options.threads)
            # One after the other: compilers and warm-ups would disturb each other.
            results[name] = Result(processes[name].answer())
    products: list[tuple[float, float]] = []
    loads = []
    for _ in range(options.rounds):
        products.append(matmul_rates())
        for name, process in processes.items():
            results[name].rounds.append(process.ask(str(options.seconds)))
            loads.append(os.getloadavg()[0])
    for process in processes.values():
        process.close()
    print_report(results, products, loads, options)


def print_report(
    results: dict[str, Result],
    products: list[tuple[float, float]],
    loads: list[float],
    options: argparse.Namespace,
) -> None:
    by_clock, by_cpu = (statistics.median(rates) for rates in zip(*products, strict=True))
    print(
        f"CPU, {options.threads} threads each, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}; "
        f"{options.rounds} rounds; load average {min(loads):.1f} to {max(loads):.1f}; a product of "
        f"{MATMUL_SIZE} x {MATMUL_SIZE}: {by_clock / 1e9:.0f} GFLOP/s, {by_cpu / 1e9:.0f} per CPU second\n"
    )
    print(
        "| training | parameters | transitions/s | per CPU s | rollout | cores | share of the product's rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        cpu_rate, flops = result.median("transitions", "cpu_seconds"), result.facts["flops_per_transition"]
        share = f"{flops * cpu_rate / by_cpu:.0%}" if flops else ""
        print(
            f"| {name} | {result.facts['parameters']:,} | {result.median('transitions', 'seconds'):,.0f} "
            f"| {cpu_rate:,.0f} | {result.median('rollout_seconds', 'seconds'):.0%} "
            f"| {result.median('cpu_seconds', 'seconds'):.2f} | {share} |"
        )
    print("\n| ratio | by the clock | by CPU seconds | goal |\n|---|---|---|---|")
    for ours, other, goal in GOALS:
        if ours in results and other in results:
            clock, cpu = (
                results[ours].median("transitions", unit) / results[other].median("transitions", unit)
                for unit in ("seconds", "cpu_seconds")
            )
            print(f"| {ours} : {other} | {clock:.1f} | {cpu:.1f} | {f'{goal:g}' if goal else ''} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="at least, per contender and round")
    parser.add_argument("--only", default="", help="contenders with this text in their name")
    parser.add_argument("--peers-venv", type=Path, default=peers.VENV)
    parser.add_argument("--serve", choices=OURS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        peers.serve(OURS[options.serve], options.threads)
    else:
        compare(options)


if __name__ == "__main__":
    main()
