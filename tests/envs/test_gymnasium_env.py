"""The Gymnasium adapter: Gymnasium's checker and wrappers, and the numbers of the native environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from envs.gymnasium_env import SingleTradingEnv, TradingVectorEnv
from envs.trading_env import TradingEnv
from tests.envs.markets import CONTEXT, config_of, market_of, walk

ROOT = Path(__file__).parent.parent.parent


def small_market(sigma=1e-3):
    return market_of(walk(num_bars=400, sigma=sigma), walk("BBB", 300, "stock", seed=1), horizon=1)


def config(num_envs, **changes):
    return config_of(num_envs=num_envs, horizon=1, episode_bars=20, **changes)


def test_gymnasiums_checker_finds_nothing():
    env = SingleTradingEnv(small_market(), config(1))
    with pytest.warns(UserWarning, match="render_modes|spec") as warned:
        check_env(env)
    assert all("render" in str(w.message) or "spec" in str(w.message) for w in warned)


def test_spaces_types_and_autoreset_follow_gymnasium():
    env = TradingVectorEnv(small_market(), config(6))
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP
    observations, infos = env.reset(seed=3)
    assert env.observation_space.contains(observations)
    assert infos == {}
    env.action_space.seed(0)
    for step in range(1, 61):
        before = observations
        observations, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
        assert env.observation_space.contains(observations)
        assert (rewards.shape, rewards.dtype) == ((6,), np.float64)
        assert terminated.dtype == truncated.dtype == np.bool_
        assert not terminated.any()
        # Restarted together, they end together, except for lack of bars.
        assert truncated.all() or step % 20
        assert set(infos) == ({"final_obs", "_final_obs"} if truncated.any() else set())
        width = env.env.market.num_features
        for n in range(6):
            last = infos["final_obs"][n] if truncated[n] else observations[n]
            # The window moves by one bar.
            assert np.array_equal(last[: CONTEXT * width], before[n, width : (CONTEXT + 1) * width])
            assert env.single_observation_space.contains(last)
            if truncated[n]:
                assert observations[n, -2] == 1  # a whole episode is left
    env.close()


def test_its_numbers_are_those_of_the_native_environment():
    market, settings = small_market(sigma=0.1), config(8, positions=(-2.0, 0.0, 2.0), ruin_fraction=0.8)
    env, native = TradingVectorEnv(market, settings, seed=5), TradingEnv(market, settings, "cpu", 5)
    env.reset(seed=9)
    native.restart(9)
    random, ruins = np.random.default_rng(0), 0
    for _ in range(50):
        actions = random.integers(0, 3, 8)
        bars = native.begin_segment()
        rewards, terminated, truncated = native.step(torch.from_numpy(actions))
        theirs = env.step(actions)
        assert np.array_equal(theirs[1], rewards.double().numpy())
        assert np.array_equal(theirs[2], terminated.numpy())
        assert np.array_equal(theirs[3], truncated.numpy())
        ruins += terminated.sum()
        for n in np.flatnonzero(theirs[2] | theirs[3]):
            assert np.array_equal(
                theirs[4]["final_obs"][n][: -env.env.num_account_features], bars[n, 1:].flatten()
            )
    assert ruins > 0


def test_the_same_seed_begins_the_same_episodes_and_wrappers_fit():
    env = RecordEpisodeStatistics(TradingVectorEnv(small_market(), config(4)))
    runs = []
    for seed in (1, 1, [2, 3, 4, 5]):
        observations, _ = env.reset(seed=seed)
        steps = [env.step(np.arange(4) % 3) for _ in range(20)]
        runs.append((observations, steps[-1][0], steps[-1][4]["episode"]["r"]))
    assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not np.array_equal(runs[0][0], runs[2][0])


def test_a_mistake_raises_a_message_of_one_line():
    market = market_of(walk())
    with pytest.raises(ValueError, match=r"^horizon must be 1 for Gymnasium, for market and config, was 16$"):
        TradingVectorEnv(market, config_of(num_envs=2))
    with pytest.raises(ValueError, match="num_envs must be 1"):
        SingleTradingEnv(small_market(), config(2))
    code = "import sys; sys.modules['gymnasium'] = None; import envs.gymnasium_env"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: envs.gymnasium_env needs Gymnasium 1.1 or newer: pip install gymnasium"
