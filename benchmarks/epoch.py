"""Profile an epoch: where its time goes, how much of the device it uses, whether the memory plan was right.

    python benchmarks/epoch.py                                   # the full preset
    python benchmarks/epoch.py --preset small --compile on       # any flag of the training
    torchrun --nproc-per-node 2 benchmarks/epoch.py --parallel fsdp

It runs the rollouts and updates of a real training on a market of 32 random walks, and nothing else. Times come
from the device's own timeline (CUDA events), so measuring adds no waits. The report shows rank 0's medians over
epochs, after a warm-up epoch.

The rollout's trunk and the update's forward and backward (losses included) are matrix work; everything else is
overhead. The account loop is ``env.play``: the head's decisions and the accounts' steps. MFU counts the trunk's
operations (``Trunk.forward_flops``), relative to a square matrix product in the same run, and to the data sheet's
peak if the device is known.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.env_throughput import market_of
from commands.cli import command_from
from continuous_training import PRESETS, Settings
from training import distributed, group_rollout, rollout
from training.memory import plan_memory
from training.metrics import Stopwatch, matmul_rate
from training.progress import TrainingProgress
from training.trainer import Trainer

# Dense bf16 operations per second according to NVIDIA's data sheets (A100: 2021-06, H100 and H200: 2024-11). By
# full name: other form factors have other clocks.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
EPOCHS_OF_A_RUN = 200


class Spans:
    """Measures calls of methods on the device's timeline."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watches: dict[str, list[Stopwatch]] = {}

    def watch(self, owner: object, method: str, name: str) -> None:
        """Measure all calls of a method."""
        original: Callable[..., Any] = getattr(owner, method)

        def measured(*arguments: Any, **named: Any) -> Any:
            watch = Stopwatch(self.device)
            result = original(*arguments, **named)
            watch.mark()
            self.watches.setdefault(name, []).append(watch)
            return result

        setattr(owner, method, measured)

    def take(self) -> dict[str, float]:
        """Return the seconds of each name since the last call, and reset."""
        seconds = {
            name: sum(sum(watch.seconds()) for watch in watches) for name, watches in self.watches.items()
        }
        self.watches.clear()
        return seconds


def measure(
    settings: Settings,
    measured_epochs: Annotated[int, typer.Option(help="epochs to measure, after a warm-up")] = 5,
) -> None:
    """Train some epochs and report where the time went."""
    with distributed.start() as ranks:
        market = market_of(60_000, 32, ranks.device, settings.horizon, settings.context_bars)
        plan = plan_memory(settings, market.num_bytes, ranks)
        start = time.perf_counter()
        trainer = Trainer(market, settings, ranks, plan, TrainingProgress(run=2))
        prepared = time.perf_counter() - start
        spans = Spans(ranks.device)
        spans.watch(trainer, "collect", "rollout")
        spans.watch(trainer, "update", "update")
        for module in (rollout, group_rollout):  # of accounts over one symbol, or over several
            spans.watch(module, "encode", "trunk")
        spans.watch(trainer.env, "begin_segment", "new bars")
        spans.watch(trainer.env, "play", "account loop")
        spans.watch(trainer.learner, "_targets", "advantages")
        spans.watch(trainer.learner, "_apply_gradients", "optimizer")
        epochs = []
        for _ in range(measured_epochs + 1):
            collected = trainer.collect()
            spent = spans.take()
            trainer.update(collected)
            epochs.append(spans.take() | spent)
        if ranks.is_first:
            print_report(settings, trainer, epochs[1:], prepared)


def print_report(
    settings: Settings, trainer: Trainer, epochs: Sequence[Mapping[str, float]], prepared: float
) -> None:
    """Print the table and the figures derived from it."""
    ranks, trunk, precision = trainer.ranks, trainer.policy.trunk, trainer.policy.precision
    seconds = {name: statistics.median(epoch[name] for epoch in epochs) for name in epochs[0]}
    total = seconds["rollout"] + seconds["update"]
    parts = {
        "rollout: trunk": seconds["trunk"],
        "rollout: account loop": seconds["account loop"],
        "rollout: new bars": seconds["new bars"],
        "rollout: hindsight and the rest": seconds["rollout"]
        - sum(seconds[name] for name in ("trunk", "account loop", "new bars")),
        "update: forward and backward": seconds["update"] - seconds["advantages"] - seconds["optimizer"],
        "update: advantages": seconds["advantages"],
        "update: optimizer": seconds["optimizer"],
    }
    is_cuda, micro_batch = ranks.device.type == "cuda", trainer.learner.micro_batch_segments
    name = torch.cuda.get_device_name(ranks.device) if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{ranks.world_size} x {name}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}; {len(epochs)} "
        f"epochs; {trainer.policy.num_parameters():,} parameters, trunk in {precision}, "
        f"{settings.envs_per_gpu} accounts per device, {micro_batch} segments per micro-batch, "
        f"not compiled: {trainer.not_compiled or 'nothing'}; prepared in {prepared:.0f} s\n"
    )
    print("| part of an epoch | seconds | share |\n|---|---|---|")
    for part, spent in parts.items():
        print(f"| {part} | {spent:.4g} | {spent / total:.1%} |")
    matrix_work = parts["rollout: trunk"] + parts["update: forward and backward"]
    transitions = settings.envs_per_gpu * settings.horizon * ranks.world_size
    segments = settings.envs_per_gpu * settings.update_passes
    flops = 3 * segments * trunk.forward_flops(settings.context_bars + settings.horizon, settings.horizon)
    rate = flops / seconds["update"]
    product = matmul_rate(ranks.device, trainer.policy.dtype)
    figures = {
        "transitions per second": f"{transitions / total:,.0f}",
        "rollout, share of the epoch": f"{seconds['rollout'] / total:.1%}",
        "neither the rollout's trunk nor forward and backward": f"{1 - matrix_work / total:.1%}",
        "update, share of a square product's rate": f"{rate / product:.1%}",
        f"a run of {EPOCHS_OF_A_RUN} epochs, hours": f"{EPOCHS_OF_A_RUN * total / 3_600:.2f}",
    }
    if precision == "bf16" and name in PEAKS:
        figures["update, MFU by the data sheet"] = f"{rate / PEAKS[name]:.1%}"
    if is_cuda and trainer.memory_plan.memory_bytes:
        peak_memory = torch.cuda.max_memory_allocated(ranks.device)
        figures["memory, planned GiB"] = f"{trainer.memory_plan.needed_bytes / 2**30:.1f}"
        figures["memory, measured peak GiB"] = f"{peak_memory / 2**30:.1f}"
    print("\n| figure | is |\n|---|---|")
    for figure, value in figures.items():
        print(f"| {figure} | {value} |")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command_from(Settings, PRESETS, measure))
    app()
