"""When do DDP's buckets become ready during a backward: then their all-reduce overlaps with the rest of it.

    torchrun --nproc-per-node 2 benchmarks/ddp_buckets.py --compile blocks    # as training does
    torchrun --nproc-per-node 2 benchmarks/ddp_buckets.py --compile trunk     # one function for all blocks
    torchrun --nproc-per-node 2 benchmarks/ddp_buckets.py --compile off

A transformer of 19 M parameters: three full buckets of 25 MiB, and a rest. The report is of rank 0; for comparable
seconds of compiling, set TORCHINDUCTOR_COMPILE_THREADS=1 and an empty TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from continuous_training import Settings
from models.policy import Policy
from models.transformer import TransformerConfig
from training import distributed
from training.compilation import compile_objective, zeros_of
from training.losses import Objective
from training.parallel import parallelize

CONTEXT, HORIZON, FEATURES, SEGMENTS = 64, 128, 24, 2
WARM_UP = 2  # DDP orders its buckets again after the first backward


class Compiled(StrEnum):
    """What is compiled as one function."""

    off = "off"
    trunk = "trunk"
    blocks = "blocks"


def measure(
    compiled: Annotated[Compiled, typer.Option("--compile")] = Compiled.blocks,
    layers: int = 6,
    width: int = 512,
    repetitions: int = 5,
) -> None:
    """Run some backwards, and print at which part of each the buckets were ready."""
    with distributed.start() as ranks:
        torch.manual_seed(0)
        policy = Policy(TransformerConfig(FEATURES, width, layers, 8, CONTEXT + HORIZON + 1), 9, 3)
        objective = Objective(policy.to(ranks.device), Settings())
        began, not_compiled = sum(os.times()[:4]), ""  # with the C++ compilers that it starts
        if compiled != Compiled.off:
            as_one = ranks if compiled == Compiled.blocks else replace(ranks, world_size=1)
            not_compiled = compile_objective(objective, SEGMENTS, CONTEXT, HORIZON, as_one)
        seconds, graphs = sum(os.times()[:4]) - began, counters["stats"]["unique_graphs"]
        model = parallelize(objective, ranks, sharded=False).objective
        assert isinstance(model, DistributedDataParallel), "start it with torchrun, on two ranks or more"
        ready: list[float] = []

        def noted(group, bucket):  # without types: DDP compares them, and they would be strings
            ready.append(time.perf_counter())
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, noted)
        bars = torch.randn(SEGMENTS, CONTEXT + HORIZON, FEATURES, device=ranks.device)
        accounts, targets = zeros_of(objective, SEGMENTS, HORIZON)
        for number in range(WARM_UP + repetitions):
            total = model(bars, accounts, targets, targets.valid.numel()).total
            ready.clear()
            start = time.perf_counter()
            total.backward()
            end = time.perf_counter()
            policy.zero_grad()
            if ranks.is_first and number >= WARM_UP:
                shares = " ".join(f"{(at - start) / (end - start):4.0%}" for at in ready)
                print(f"{compiled}: buckets ready at {shares} of a backward of {end - start:.2f} s")
        if ranks.is_first:
            print(f"{compiled}: {graphs} graphs in {seconds:.0f} s of CPU time {not_compiled}")


if __name__ == "__main__":
    typer.run(measure)
