"""How long training stands still for a checkpoint: copied and written in the background, or written at once.

    python benchmarks/checkpoint_stall.py                     # sizes for a CPU
    python benchmarks/checkpoint_stall.py --sizes 2048x12     # the full model, on a GPU where there is one

For each size, interleaved rounds of the two ways on the same weights and optimizer state. Ratios belong in
RESULTS.md; absolute times belong to one machine and disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from models.policy import Policy
from models.transformer import TransformerConfig
from monitoring.console import Console
from training import checkpoint
from training.checkpoint_writer import BackgroundWriter


def state_of(width: int, layers: int, device: str) -> tuple[dict, dict]:
    """Return the state of a policy that took one step of Adam, as a session hands it out."""
    policy = Policy(TransformerConfig(30, width, layers, max(1, width // 64), 193), 8, 3).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"run": 1, "epoch": 1, "model": policy.state_dict()}, {"optimizer": optimizer.state_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["256x4", "768x8"], help="width x layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds, medians")
    print("| model | state | stall, background | written | stall, written at once | background / at once |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        weights, resume = state_of(*map(int, size.split("x")), device)
        num_bytes = sum(t.nbytes for t in checkpoint.tensors_of((weights, resume)))
        stalls, whole, direct = [], [], []
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as name,
            BackgroundWriter(Path(name), 2, Console(None), wanted=True) as writer,
        ):
            for number in range(options.rounds + 1):
                weights["epoch"] += 1
                began = time.perf_counter()
                writer.save(weights, resume)
                stalls.append(time.perf_counter() - began)
                writer.finish()
                whole.append(time.perf_counter() - began)
                weights["epoch"] += 1
                began = time.perf_counter()
                checkpoint.save(Path(name), weights, resume, keep=2)
                direct.append(time.perf_counter() - began)
                if number == 0:  # asks for the host memory that is kept from then on
                    first = stalls[0]
                    stalls, whole, direct = [], [], []
        stall, write, at_once = map(statistics.median, (stalls, whole, direct))
        print(
            f"| {size} | {num_bytes / 1e6:,.0f} MB | {stall:.3f} s (the first {first:.3f} s) | {write:.2f} s | "
            f"{at_once:.2f} s | {stall / at_once:.3f} |"
        )


if __name__ == "__main__":
    main()
