"""Which environment a training plays: an account per symbol, or over groups of symbols."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from envs.config import EnvConfig, GroupConfig
from envs.grid import bytes_of_grid
from envs.group_env import GroupEnv
from envs.market import Market
from envs.trading_env import TradingEnv
from models.forecaster import Forecaster
from models.policy import Policy
from runtime.control import EXIT_NO_DATA, ExitProgram
from training.group_rollout import collect_groups
from training.rewards import RewardFunction
from training.rollout import Rollout, collect

if TYPE_CHECKING:
    from continuous_training import Settings

AnyEnv = TradingEnv | GroupEnv


def make_env(market: Market, config: EnvConfig, device: torch.device, seed: int) -> AnyEnv:
    """Return the environment of these accounts.

    Raises:
        NoSegment, ValueError: the market has too few minutes, or too few symbols for a group.
    """
    return (GroupEnv if config.group else TradingEnv)(market, config, device, seed)


def bytes_of_bars(market: Market, settings: Settings) -> int:
    """Return the device memory of a market, with the grid of its minutes where accounts are over groups."""
    group = GroupConfig.from_settings(settings)
    return market.num_bytes + (bytes_of_grid(market, group.size) if group else 0)


@contextmanager
def exit_without_groups() -> Iterator[None]:
    """Turn a market that is too small for its groups into the end of the program, in one line."""
    try:
        yield
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def play_segment(
    env: AnyEnv,
    policy: Policy,
    generator: torch.Generator,
    chunk_segments: int,
    greedy: bool = False,
    hindsight: bool = False,
    reward_scale: float = 1.0,
    less_market: bool = False,
    feature_noise: float = 0.0,
    own_reward: RewardFunction | None = None,
    forecaster: Forecaster | None = None,
    stochastic_depth: float = 0.0,
) -> Rollout:
    """Play one segment in every environment, see ``rollout.collect``; of groups, a row per symbol.

    Groups have no rewards less the market's (training/validation.py): their caps take it off. Nor have they one of
    the user's own (rewards.py).
    """
    terms = generator, chunk_segments, greedy, hindsight, reward_scale
    if isinstance(env, GroupEnv):
        return collect_groups(env, policy, *terms, feature_noise, forecaster, stochastic_depth)
    own = less_market, feature_noise, own_reward
    return collect(env, policy, *terms, *own, forecaster, stochastic_depth)
