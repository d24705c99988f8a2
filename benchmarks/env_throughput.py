"""Environment steps per second: all costs, account observations and episode resets included.

    python benchmarks/env_throughput.py                    # a table, about two minutes
    python benchmarks/env_throughput.py --peers            # with public environments for comparison

``--peers`` makes a virtual environment in data_cache/ with gym-trading-env, gym-anytrading and ElegantRL from PyPI
(``--peers-venv`` uses an existing one) and runs them in a process of their own, see env_peers.py.

Contenders take turns, round after round, so that other load on the machine hurts all alike. The report shows
medians over rounds: steps per second by the clock, from rounds in which the process had 97 % of a core if there
are any, and steps per second of CPU time, from which the ratios are computed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import VENV, Process, make_venv
from continuous_training import Settings
from data_sources.bars import MINUTE_NS, Bars
from envs import features
from envs.config import EnvConfig
from envs.market import Market
from envs.trading_env import TradingEnv

HORIZON = 128
EVERY_COST = {"range_slippage": 0.05, "volume_slippage": 0.01, "account_value": 1_000.0}
# (ours, compared with, goal: at least so many times as fast)
GOALS = (
    ("stepped", "gym-trading-env", 150.0),
    ("stepped", "gym-anytrading", 25.0),
    ("stepped", "ElegantRL", 5.0),
    ("played", "ElegantRL", 5.0),
)
Round = Callable[[float], tuple[int, float, float]]  # seconds -> steps, seconds and CPU seconds it took


def random_walk(symbol: str, num_bars: int, seed: int) -> Bars:
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 1e-3, num_bars)))
    opens = np.concatenate([[100.0], close[:-1]])
    high, low = np.maximum(opens, close) * 1.0003, np.minimum(opens, close) * 0.9997
    times = (np.arange(num_bars, dtype=np.int64) + 26_000_000) * MINUTE_NS
    return Bars(symbol, "crypto", times, opens, high, low, close, random.lognormal(3, 1, num_bars))


def market_of(
    num_bars: int,
    num_symbols: int,
    device: str | torch.device,
    horizon: int = HORIZON,
    context_bars: int = 64,
) -> Market:
    bars = [random_walk(f"S{n:03}", num_bars, n) for n in range(num_symbols)]
    return Market.from_bars(
        bars, device=device, holdout_start_ns=2**62, context_bars=context_bars, horizon=horizon
    )


def ours(market: Market, num_envs: int, device: str, way: str = "stepped", **costs: float) -> Round:
    """Return rounds of whole segments with given random actions."""
    config = EnvConfig.from_settings(Settings(horizon=HORIZON, **costs), num_envs)
    env = TradingEnv(market, config, device, seed=0, compiled=way == "played")
    actions = torch.randint(0, 3, (HORIZON, num_envs), device=device)

    def segment() -> None:
        env.begin_segment()
        if way == "played":  # as a rollout does: asked at every step, with the observations of that step
            env.play(lambda observations, action: (action,), actions)
            return
        for action in actions:
            env.account_observations()
            env.step(action)

    def play(seconds: float) -> tuple[int, float, float]:
        segments, cpu, start = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            segment()
            segments += 1
            if device == "cuda":
                torch.cuda.synchronize()
        return segments * actions.numel(), time.perf_counter() - start, time.process_time() - cpu

    for _ in range(2):  # compiles, where it does
        segment()
    return play


def bytes_per_environment(env: TradingEnv) -> tuple[float, float]:
    """Return the memory that an environment keeps, and that of its current segment's quotes."""
    num_envs = env.config.num_envs
    kept = [*vars(env).values(), *env.account.tensors(), *vars(env.statistics).values()]
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in kept
        if torch.is_tensor(tensor) and num_envs in tensor.shape
    }
    return sum(sizes.values()) / num_envs, env.segment.nbytes / num_envs


def in_gymnasium(num_envs: int) -> Round:
    from envs.gymnasium_env import TradingVectorEnv

    market = market_of(60_000, 32, "cpu", horizon=1)
    env = TradingVectorEnv(market, EnvConfig.from_settings(Settings(horizon=1, **EVERY_COST), num_envs))
    env.reset()
    actions = np.random.default_rng(0).integers(0, 3, (16, num_envs))

    def play(seconds: float) -> tuple[int, float, float]:
        steps, cpu, start = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            for action in actions:
                env.step(action)
            steps += actions.size
        return steps, time.perf_counter() - start, time.process_time() - cpu

    return play


def contenders(device: str) -> dict[str, Round]:
    short, long = market_of(100_000, 1, device), market_of(2_000_000, 1, device)
    many = market_of(60_000, 32, device)
    return {
        "ours stepped, 512 envs": ours(many, 512, device, **EVERY_COST),
        "ours stepped, 512 envs, plain costs": ours(many, 512, device),
        "ours played, 512 envs": ours(many, 512, device, "played", **EVERY_COST),
        "ours stepped, 4,096 envs": ours(many, 4_096, device, **EVERY_COST),
        "ours, one symbol of 100 k bars": ours(short, 512, device),
        "ours, one symbol of 2 M bars": ours(long, 512, device),
        "ours as a Gymnasium VectorEnv, 512": in_gymnasium(512),
    }


def played_by(peers: Process, name: str, seconds: float) -> tuple[int, float, float]:
    answer = peers.ask(f"{name}\t{seconds}")
    return answer["steps"], answer["seconds"], answer["cpu_seconds"]


def feature_seconds(device: str) -> float:
    bars = random_walk("S000", 1_000_000, 0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        features.compute(bars, torch.device(device), features.chosen_features())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass
class Result:
    """The rounds of one contender: steps per second, by the clock and by CPU time."""

    by_clock: list[float] = field(default_factory=list)
    by_cpu: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    def add(self, steps: int, seconds: float, cpu_seconds: float) -> None:
        """Add a round."""
        self.by_clock.append(steps / seconds)
        self.by_cpu.append(steps / cpu_seconds)
        self.cores.append(cpu_seconds / seconds)

    @property
    def clean(self) -> int:
        """Number of rounds in which no other process had the core."""
        return sum(core > 0.97 for core in self.cores)

    @property
    def rate(self) -> float:
        """Median steps per second of clean rounds, or of all rounds if none was clean."""
        clean = [rate for rate, core in zip(self.by_clock, self.cores, strict=True) if core > 0.97]
        return statistics.median(clean or self.by_clock)

    @property
    def cpu_rate(self) -> float:
        """Median steps per second of CPU time."""
        return statistics.median(self.by_cpu)


def best(results: dict[str, Result], start: str) -> str:
    """Return our fastest contender at 512 environments, or a peer's at any number."""
    names = [
        name for name in results if name.startswith(start) and "plain" not in name and "4,096" not in name
    ]
    return max(names, key=lambda name: results[name].cpu_rate, default="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round")
    parser.add_argument("--peers", action="store_true", help="compare with public environments")
    parser.add_argument("--peers-venv", type=Path, default=VENV)
    options = parser.parse_args()
    torch.set_num_threads(1)

    playing = contenders(options.device)
    # One thread, like ours.
    peers = Process(make_venv(options.peers_venv), "env_peers.py") if options.peers else None
    if peers:
        first = peers.answer()
        playing |= {name: partial(played_by, peers, name) for name in first["contenders"]}
    results = {name: Result() for name in playing}
    for _ in range(options.rounds):
        for name, play in playing.items():
            results[name].add(*play(options.seconds))

    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    print(f"{where}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}; {options.rounds} rounds\n")
    print(
        "| environment | steps/s | steps per CPU s | lowest, highest | clean rounds |\n|---|---|---|---|---|"
    )
    for name, result in results.items():
        spread = f"{min(result.by_cpu):,.0f}, {max(result.by_cpu):,.0f}"
        print(f"| {name} | {result.rate:,.0f} | {result.cpu_rate:,.0f} | {spread} | {result.clean} |")
    print("\n| ratio, by CPU seconds | is | goal |\n|---|---|---|")
    for way, peer, goal in GOALS:
        this, that = best(results, f"ours {way}"), best(results, peer)
        if that:
            times = results[this].cpu_rate / results[that].cpu_rate
            print(f"| {this} : {that} | {times:.1f} | {goal:g} |")
    history = [results[f"ours, one symbol of {size} bars"] for size in ("100 k", "2 M")]
    pairs = [a / b for a, b in zip(*(result.by_cpu for result in history), strict=True)]
    print(f"| a step in 2 M bars : in 100 k bars, time | {statistics.median(pairs):.2f} | at most 1.1 |")
    env = TradingEnv(market_of(2_000, 1, "cpu"), EnvConfig.from_settings(Settings(), 512), "cpu", 0)
    kept, segment = bytes_per_environment(env)
    print(
        f"\nMemory per environment beside the market: {kept:.0f} bytes kept; {segment:,.0f} for the quotes of the "
        f"segment that is played.\n{len(features.chosen_features())} features of a million bars: "
        f"{feature_seconds(options.device):.2f} s."
    )
    if peers:
        for name, reason in first["failed"].items():
            print(f"Not run: {name}: {reason}")
        peers.close()


if __name__ == "__main__":
    main()
