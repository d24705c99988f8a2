"""What an exam costs beside its transformer's own forward, and beside walks of one contestant after the other.

    python benchmarks/exam.py [--preset small] [--symbols 42] [--days 1] [--rounds 3] [--compiled]

A policy with random weights walks simulated bars at its own costs and at five flat ones, beside the three
rules: nine contestants. ``exam`` is ``evaluation.exam.examine`` for all of them, ``trunk`` the part of it that
``Policy.encode`` took, and ``one by one`` the same walks in an exam for each of the costs, as if no forward
were shared; their returns must be the same. CPU seconds of one thread, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.env_throughput import market_of
from continuous_training import PRESETS, Settings
from envs.config import EnvConfig
from evaluation.exam import POLICY, at_flat_cost, examine
from models.policy import Policy
from models.transformer import TransformerConfig

COSTS_BPS = (0.0, 1.0, 2.0, 5.0, 10.0)
WARM_UP_BARS = 3_000  # older than those that are walked


def policy_of(settings: Settings, num_features: int) -> Policy:
    """Return a policy that trades."""
    torch.manual_seed(0)
    length = settings.context_bars + settings.horizon + 1
    sizes = TransformerConfig(num_features, settings.d_model, settings.num_layers, settings.num_heads, length)
    config = EnvConfig.from_settings(settings)
    policy = Policy(sizes, config.num_account_features, len(config.positions))
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    return policy


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--symbols", type=int, default=42)
    parser.add_argument("--days", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**PRESETS[options.preset])
    num_bars = WARM_UP_BARS + int(options.days * 1_440)
    market = market_of(
        num_bars, options.symbols, torch.device("cpu"), settings.horizon, settings.context_bars
    )
    start_ns, config = int(market.open_time[WARM_UP_BARS]), EnvConfig.from_settings(settings)
    policy = policy_of(settings, market.num_features)
    encode, trunk = policy.encode, [0.0]

    def timed(*given: Any) -> torch.Tensor:
        begin = time.process_time()
        encoded = encode(*given)
        trunk[0] += time.process_time() - begin
        return encoded

    policy.encode = timed  # type: ignore[method-assign]

    def walk(costs_bps: tuple[float, ...]) -> dict[str, Any]:
        return examine(
            policy,
            market,
            config,
            market.symbols,
            start_ns,
            2**62,
            flat_costs_bps=costs_bps,
            compiled=options.compiled,
        )

    def one_by_one() -> dict[str, Any]:
        return walk(()) | {name: own for cost in COSTS_BPS for name, own in walk((cost,)).items()}

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "exam": lambda: walk(COSTS_BPS),
        "one by one": one_by_one,
    }
    seconds: dict[str, list[float]] = {"exam": [], "trunk": [], "one by one": []}
    for _ in range(options.rounds):
        walks = {}
        for way, run in ways.items():
            trunk[0], begin = 0.0, time.process_time()
            walks[way] = run()
            seconds[way].append(time.process_time() - begin)
            if way == "exam":
                seconds["trunk"].append(trunk[0])
        for name in (POLICY, *(at_flat_cost(POLICY, cost) for cost in COSTS_BPS)):
            for one, other in zip(walks["exam"][name], walks["one by one"][name], strict=True):
                np.testing.assert_allclose(one.log_returns, other.log_returns, atol=1e-9)
    steps = len(walks["exam"][POLICY][0].time)
    print(
        f"preset {options.preset}, {options.symbols} symbols x {steps} bars, {len(walks['exam'])} contestants"
    )
    print("| | CPU seconds, least and most | of the trunk's own |\n|---|---|---|")
    for name, each in seconds.items():
        share = statistics.median(a / b for a, b in zip(each, seconds["trunk"], strict=True))
        print(
            f"| {name} | {statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f}) | {share:.2f} |"
        )


if __name__ == "__main__":
    main()
