"""Rollouts, made-up and played, with small policies and learners; the two-rank script uses them, too."""

from dataclasses import replace
from typing import Literal

import torch

from continuous_training import Settings
from envs.ahead import HORIZONS
from envs.market import Market
from envs.trading_env import TradingEnv
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import market_of, walk
from training.distributed import Ranks
from training.hindsight import Hindsight
from training.learner import Learner
from training.losses import Objective
from training.rollout import Rollout, collect

CONTEXT, HORIZON, FEATURES, ACCOUNT, POSITIONS = 4, 8, 5, 6, 3
ALONE = Ranks(0, 1, torch.device("cpu"))


def small_policy(precision: str = "fp32", num_layers: int = 2) -> Policy:
    torch.manual_seed(0)
    config = TransformerConfig(
        FEATURES, d_model=32, num_layers=num_layers, num_heads=4, max_length=CONTEXT + HORIZON + 1
    )
    policy = Policy(config, ACCOUNT, POSITIONS, precision)
    for layer in (policy.head.logits, policy.head.value):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return policy


SETTINGS = Settings(
    envs_per_gpu=64,
    context_bars=CONTEXT,
    horizon=HORIZON,
    episode_bars=2 * HORIZON,
    d_model=32,
    num_layers=2,
    num_heads=4,
    batch_size=4 * HORIZON,
    update_passes=2,
    learning_rate=1e-3,
    warmup_steps=1,
    gamma=0.97,
    gae_lambda=0.9,
)


def small_learner(
    of: Policy | Objective,
    ranks: Ranks = ALONE,
    *,
    minibatch: int = 4,
    micro: int = 2,
    passes: int = 2,
    sharded: bool = False,
    forecast_coef: float = 0.0,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> Learner:
    settings = replace(
        SETTINGS,
        batch_size=minibatch * HORIZON * ranks.world_size,
        update_passes=passes,
        parallel="fsdp" if sharded else "ddp",
        forecast_coef=forecast_coef,
        optimizer=optimizer,
    )
    objective = of if isinstance(of, Objective) else Objective(of, settings)
    objective.settings = settings
    return Learner(objective, ranks, micro)


@torch.no_grad()
def made_up_rollout(
    policy: Policy, num_segments: int, seed: int = 0, hindsight: bool = True, has_forecasts: bool = False
) -> Rollout:
    """Random bars and rewards, but log-probabilities and values that are the policy's own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_segments, HORIZON)
    bars = torch.randn(num_segments, CONTEXT + HORIZON, FEATURES, generator=generator)
    accounts = torch.randn(*shape, ACCOUNT, generator=generator)
    logits, values = policy(bars, accounts)
    log_policy = torch.log_softmax(logits, -1)
    actions = torch.randint(POSITIONS, shape, generator=generator)
    terminated = torch.rand(shape, generator=generator) < 0.05
    valid = torch.cat(
        (torch.ones(num_segments, 1, dtype=torch.bool), terminated.cumsum(1)[:, :-1] == 0), dim=1
    )
    rollout = Rollout(
        bars=bars,
        accounts=accounts,
        actions=actions,
        log_policy=log_policy,
        rewards=torch.randn(shape, generator=generator) * valid,
        values=values,
        terminated=terminated & valid,
        valid=valid,
        next_value=torch.randn(num_segments, generator=generator),
        hindsight=made_up_hindsight(generator, num_segments) if hindsight else None,
    )
    if has_forecasts:
        rollout.forecasts, rollout.ahead = torch.randn(2, *shape, 2, len(HORIZONS), generator=generator)
        rollout.ahead[torch.rand(rollout.ahead.shape, generator=generator) < 0.3] = torch.nan
    return rollout


def made_up_hindsight(generator: torch.Generator, num_segments: int, held: int = POSITIONS) -> Hindsight:
    choices = (num_segments, HORIZON, held, POSITIONS)
    return Hindsight(
        growth=torch.randn(choices, generator=generator),
        ends=torch.rand(choices, generator=generator) < 0.1,
        log_policy=torch.log_softmax(torch.randn(choices, generator=generator), -1),
        values=torch.randn(num_segments, HORIZON + 1, held, generator=generator),
        held=torch.randint(held, (num_segments, HORIZON), generator=generator),
    )


def part_of(rollout: Rollout, rows: slice) -> Rollout:
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    parts = {name: value[rows] for name, value in tensors.items()}
    if rollout.hindsight:
        parts["hindsight"] = Hindsight(
            *(value[rows] for value in vars(rollout.hindsight).values() if isinstance(value, torch.Tensor))
        )
    return Rollout(**parts)


def policy_for(env: TradingEnv, precision: str = "fp32") -> Policy:
    torch.manual_seed(0)
    length = env.config.context_bars + env.config.horizon + 1
    config = TransformerConfig(
        env.market.num_features, d_model=32, num_layers=2, num_heads=4, max_length=length
    )
    policy = Policy(config, env.num_account_features, len(env.config.positions), precision)
    for layer in (policy.head.logits, policy.head.value):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return policy


def rollout_of(
    env: TradingEnv, policy: Policy, chunk: int = 16, greedy: bool = False, hindsight: bool = False
) -> Rollout:
    generator = torch.Generator(env.device).manual_seed(7)
    return collect(env, policy, generator, chunk, greedy, hindsight)


def calm_and_wild() -> Market:
    """Two symbols of which one moves ten times as much as the other."""
    return market_of(walk("AAA"), walk("BBB", seed=1, sigma=1e-2))
