"""Public trading environments: the other side of env_throughput.py.

Runs in a virtual environment of its own, made by env_throughput.py --peers. Each line on stdin is a contender's
name and seconds; the answer is one line of JSON: steps, seconds, CPU seconds. The first line of output lists the
contenders, and for those that failed the reason.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np

CONTEXT, EPISODE = 64, 1_280
Round = Callable[[], int]  # runs some steps and returns their number


def prices(num_bars: int) -> np.ndarray:
    return 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 1e-3, num_bars)))


def gymnasium_round(make: Callable[[], object], num_envs: int, num_actions: int) -> Round:
    from gymnasium.vector import SyncVectorEnv

    envs = SyncVectorEnv([make] * num_envs)
    envs.reset(seed=0)
    actions = np.random.default_rng(1).integers(0, num_actions, (64, num_envs))

    def play() -> int:
        for action in actions:
            envs.step(action)
        return actions.size

    return play


def gym_trading_env(num_envs: int, num_bars: int) -> Round:
    import gym_trading_env.environments as trading
    import pandas as pd

    warnings.resetwarnings()  # importing it makes every warning of the process an error
    close = prices(num_bars)
    frame = pd.DataFrame(
        {
            "open": close,
            "high": close * 1.001,
            "low": close * 0.999,
            "close": close,
            "volume": np.ones_like(close),
        },
        index=pd.date_range("2024-01-01", periods=num_bars, freq="min"),
    )
    for number in range(5):  # the environment adds two
        frame[f"feature_{number}"] = frame["close"].pct_change(number + 1).fillna(0.0)

    def make() -> object:
        return trading.TradingEnv(
            df=frame,
            positions=[-1, 0, 1],
            windows=CONTEXT,
            trading_fees=6e-4,
            borrow_interest_rate=1e-7,
            max_episode_duration=EPISODE,
            verbose=0,
        )

    return gymnasium_round(make, num_envs, 3)


def gym_anytrading(num_envs: int, num_bars: int) -> Round:
    import pandas as pd
    from gym_anytrading.envs import StocksEnv

    frame = pd.DataFrame({"Close": prices(num_bars)})
    return gymnasium_round(
        lambda: StocksEnv(df=frame, window_size=CONTEXT, frame_bound=(CONTEXT, num_bars)), num_envs, 2
    )


def elegantrl(num_envs: int) -> Round:
    import torch
    from elegantrl.envs.StockTradingEnv import StockTradingVecEnv

    torch.set_num_threads(1)

    class OneSymbol(StockTradingVecEnv):  # type: ignore[misc]
        def load_data_from_disk(self, tech_id_list: object = None) -> tuple[np.ndarray, np.ndarray]:
            return prices(EPISODE + 1)[:, None], np.random.default_rng(1).normal(0, 1, (EPISODE + 1, 8))

    env = OneSymbol(num_envs=num_envs, gpu_id=-1, end_idx=EPISODE + 1)
    env.reset()
    actions = torch.rand(64, num_envs, 1) * 2 - 1

    def play() -> int:
        for action in actions:
            env.step(action)
        return actions.numel()

    return play


CONTENDERS: dict[str, Callable[[], Round]] = {
    "gym-trading-env, SyncVectorEnv, 512 envs": lambda: gym_trading_env(512, 10_000),
    "gym-trading-env, SyncVectorEnv, 64 envs": lambda: gym_trading_env(64, 100_000),
    "gym-anytrading, SyncVectorEnv, 512 envs": lambda: gym_anytrading(512, 100_000),
    "gym-anytrading, SyncVectorEnv, 64 envs": lambda: gym_anytrading(64, 100_000),
    "ElegantRL, vmap, 512 envs": lambda: elegantrl(512),
}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the peers print must not mix with answers
    playing: dict[str, Round] = {}
    failed: dict[str, str] = {}
    for name, make in CONTENDERS.items():
        try:
            playing[name] = make()
            playing[name]()
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            failed[name] = f"{type(error).__name__}: {error}"
    answers.write(json.dumps({"contenders": list(playing), "failed": failed}) + "\n")
    for line in sys.stdin:
        name, seconds = line.rstrip("\n").rsplit("\t", 1)
        steps, cpu, start = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - start < float(seconds):
            steps += playing[name]()
        spent, cpu = time.perf_counter() - start, time.process_time() - cpu
        answers.write(json.dumps({"steps": steps, "seconds": spent, "cpu_seconds": cpu}) + "\n")


if __name__ == "__main__":
    main()
