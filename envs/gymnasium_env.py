"""Gymnasium adapter, with NumPy in and out.

It is slower than ``TradingEnv`` itself, since every step copies each account's window of bars.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError("envs.gymnasium_env needs Gymnasium 1.1 or newer: pip install gymnasium") from error

from envs.config import EnvConfig
from envs.features import CLIP
from envs.market import Market
from envs.trading_env import TradingEnv

Step = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class TradingVectorEnv(gymnasium.vector.VectorEnv):
    """N accounts as a ``gymnasium.vector.VectorEnv``; action, reward, costs and timing are those of TradingEnv.

    An observation is a float32 vector in [-8, 8]: the C + 1 newest bars, oldest first, with F features each, then
    the A observations of the account. So ``observation[: (C + 1) * F].reshape(C + 1, F)`` is the bars.

    Episodes are reset in the step that ends them (``AutoresetMode.SAME_STEP``): the observation is the new
    episode's first, and ``infos["final_obs"]`` holds the old one's last where ``infos["_final_obs"]`` is true.
    ``terminated`` is ruin; ``truncated`` is the end of the time or the bars, so bootstrap from ``final_obs``.

    Args:
        market: made for ``horizon=1``, since any step may be an episode's last.
        config: with ``horizon=1``; ``episode_bars`` counts steps.
        device: of the market.
        seed: of symbols and starts, until ``reset`` is given one.

    Raises:
        ValueError: the horizon is not 1.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, market: Market, config: EnvConfig, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        if config.horizon != 1:
            raise ValueError(f"horizon must be 1 for Gymnasium, for market and config, was {config.horizon}")
        self.env = TradingEnv(market, config, device, seed)
        self.num_envs = config.num_envs
        self._window = config.context_bars + 1
        size = self._window * market.num_features + self.env.num_account_features
        self.single_observation_space = spaces.Box(-CLIP, CLIP, (size,), np.float32)
        self.single_action_space = spaces.Discrete(len(config.positions))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._bars = torch.empty(0)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin a new episode in every environment; the same ``seed`` begins the same episodes.

        Args:
            seed: an integer, or a list as for SyncVectorEnv, of which the first counts.
            options: ignored.
        """
        if isinstance(seed, list):
            seed = seed[0]
        super().reset(seed=seed)
        self.env.restart(seed)
        self._bars = self.env.begin_segment()
        return self._observations(0), {}

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take one action per environment, (N,) indices of ``positions``."""
        chosen = torch.as_tensor(actions, dtype=torch.int64, device=self.env.device)
        rewards, terminated, truncated = self.env.step(chosen)
        observations, ended = self._observations(1), (terminated | truncated).cpu().numpy()
        self._bars = self.env.begin_segment()
        infos: dict[str, Any] = {}
        if ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            for number in np.flatnonzero(ended):
                final[number] = observations[number]
            infos = {"final_obs": final, "_final_obs": ended}
            observations = self._observations(0)
        ends = terminated.cpu().numpy(), truncated.cpu().numpy()
        return observations, rewards.double().cpu().numpy(), *ends, infos

    def _observations(self, first: int) -> NDArray[np.float32]:
        bars = self._bars[:, first : first + self._window].flatten(1)
        return torch.cat((bars, self.env.account_observations()), dim=1).cpu().numpy()


class SingleTradingEnv(gymnasium.Env):
    """One account as a plain ``gymnasium.Env``, for Stable-Baselines3 and others; see TradingVectorEnv."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, market: Market, config: EnvConfig, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        if config.num_envs != 1:
            raise ValueError(f"num_envs must be 1 for a single environment, was {config.num_envs}")
        self.accounts = TradingVectorEnv(market, config, device, seed)
        self.observation_space = self.accounts.single_observation_space
        self.action_space = self.accounts.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin a new episode."""
        super().reset(seed=seed)
        observations, _ = self.accounts.reset(seed=seed)
        return observations[0], {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one action; call ``reset`` after the end of an episode."""
        observations, rewards, terminated, truncated, infos = self.accounts.step(np.array([action]))
        last = infos["final_obs"][0] if infos else observations[0]
        return last, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}
