"""Rollouts: one trunk forward over every environment's segment, then ``horizon`` small account steps.

Nothing here waits for the device: tensors in, tensors out.
Shapes: N = environments on this GPU, C = context bars, T = horizon, F = bar features, A = account
features, W = width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from envs.ahead import moves_ahead
from envs.counterfactuals import (
    accounts_in_every_position,
    held_index,
    market_rewards_of_every_choice,
    outcome_of_every_choice,
)
from envs.recent_volatility import recent_volatility
from envs.trading_env import TradingEnv
from models.forecaster import Forecaster
from models.policy import Policy
from models.transformer import draw_depth
from runtime.control import heartbeat
from training.hindsight import Hindsight
from training.rewards import RewardFunction, and_cash, by_choice, paid

# Of a symbol's typical moves per bar. Bad prints and crashes of quiet symbols are beyond; of 2.9 million real bars
# of 32 symbols one was, a company's earnings.
REWARD_LIMIT = 128.0


@dataclass
class Rollout:
    """One segment of every environment. Rewards, values and returns are in scaled units."""

    bars: Tensor  # (N, C + T, F) input of the trunk
    accounts: Tensor  # (N, T, A) account observations, input of the head
    actions: Tensor  # (N, T) int64, index of the chosen target position
    log_policy: Tensor  # (N, T, K) log-probability of every position
    rewards: Tensor  # (N, T)
    values: Tensor  # (N, T)
    terminated: Tensor  # (N, T) bool, ruined by this decision
    valid: Tensor  # (N, T) bool, False after a ruin
    next_value: Tensor  # (N,) value after the last decision
    hindsight: Hindsight | None = None
    forecasts: Tensor | None = None  # (N, T, 2, horizons), where they are learnt, by the weights that played
    ahead: Tensor | None = None  # (N, T, 2, horizons) what came, see envs.ahead
    # (N, layers) the blocks that each segment skipped, see transformer.draw_depth
    depth: Tensor | None = None
    # (N, T) of the last moves before each decision, in typical ones, see envs.recent_volatility. None in what an
    # older program saved
    volatility: Tensor | None = None

    @property
    def num_segments(self) -> int:
        """N."""
        return self.actions.shape[0]

    @property
    def horizon(self) -> int:
        """T."""
        return self.actions.shape[1]

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain types and CPU tensors."""
        return _on_host(self)

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], device: torch.device) -> Rollout:
        """Restore ``state_dict`` on a device."""
        values = dict(state)
        if state["hindsight"] is not None:
            values["hindsight"] = Hindsight(**_on_device(state["hindsight"], device))
        return Rollout(**_on_device(values, device))


def _on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Rollout | Hindsight):
        return {field.name: _on_host(getattr(value, field.name)) for field in fields(value)}
    return value


def add_noise(bars: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise to every feature of every bar, in place, and return the bars.

    Drawn again for every segment, so that no bar is seen twice alike, and none is learnt by heart. The update
    learns from the bars as they were seen; exams and live decisions see them without noise.
    """
    if deviation:
        bars.add_(torch.randn(bars.shape, generator=generator, device=bars.device), alpha=deviation)
    return bars


@torch.no_grad()
def collect(
    env: TradingEnv,
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
    """Play one segment in every environment.

    Args:
        env: N environments.
        policy: the actor and critic.
        generator: source of the action noise, on the environment's device.
        chunk_segments: segments per trunk forward, to bound memory.
        greedy: take the most likely position instead of sampling.
        hindsight: also value the choices that were not made.
        reward_scale: of rewards that are in units of each symbol's volatility per bar, at most REWARD_LIMIT.
        less_market: rewards are less what the same position in the others would have earned, see
            ``Segment.market_rewards``.
        feature_noise: see ``add_noise``.
        own_reward: of training/own_reward.py, in place of log growth.
        forecaster: heads whose forecasts are kept beside what came.
        stochastic_depth: chance that a segment skips the last block, here and in the update.

    Raises:
        ValueError: the market of such rewards has no ``others_growth``.
    """
    config = env.config
    horizon = config.horizon
    bars = add_noise(env.begin_segment(), feature_noise, generator)  # (N, C + T + 1, F)
    depth = depth_of(policy, config.num_envs, stochastic_depth, generator)
    projected, forecasts = encode(policy, bars, horizon, chunk_segments, forecaster, depth)
    newest = env.cursor[:, None] + torch.arange(horizon, device=bars.device)
    # What came is known already, since the market does not react; no decision sees it.
    ahead = None if forecaster is None else moves_ahead(env.market, newest)
    volatility = recent_volatility(env.market, newest)
    fills = env.segment.fills_ahead() if hindsight else None

    # Gumbel noise of all decisions in one draw.
    shape = (config.num_envs, horizon, len(config.positions))
    noise = torch.rand(shape, generator=generator, device=bars.device)
    noise = torch.zeros_like(noise) if greedy else -(-noise.clamp_(1e-7, 1 - 1e-7).log()).log()
    by_time = (tensor.transpose(0, 1).contiguous() for tensor in (projected[:, :-1], noise))
    trajectory = env.play(policy.head.choose, *by_time)
    columns = (*trajectory[:5], *trajectory.outputs)
    accounts, valid, log_equity, rewards, terminated, actions, log_policy, values = (
        column.transpose(0, 1).contiguous() for column in columns
    )
    after = env.account_observations()
    next_value = policy.head.decide(projected[:, horizon], after)[1]
    # In units of the symbol's typical move per bar, so that no volatile symbol drowns the calm ones.
    scale = reward_scale / env.volatility
    limit = REWARD_LIMIT * reward_scale
    others = env.segment.others_growth if less_market else None
    of_market = env.segment.market_rewards() if less_market else None
    if of_market is not None:
        rewards = rewards - of_market.t().float()
    elif less_market:
        raise ValueError("rewards less the market's need a market that is made with_others=True")
    if own_reward:
        played = own_reward, rewards, *_positions_of(env, accounts, actions)
        rewards = paid(*played, env.volatility[:, None])
    seen = None
    if fills is not None:
        outcome = outcome_of_every_choice(fills, config.positions, log_equity)
        growth = outcome.log_return.float()
        ends = log_equity[..., None, None] + growth <= math.log(config.ruin_fraction)
        if "margin" in fills:
            ends |= outcome.ruined
        if others is not None:
            growth = growth - market_rewards_of_every_choice(others.t(), config.positions)
        if own_reward:
            choices = by_choice(config.positions, growth)
            growth = paid(own_reward, growth, *choices, env.volatility[:, None, None, None])
        growth = (growth * scale[:, None, None, None]).float().clamp_(-limit, limit)
        accounts_and_after = torch.cat((accounts, after[:, None]), dim=1)
        log_policies, critic = _in_every_position(env, policy, projected, accounts_and_after, chunk_segments)
        held = held_index(accounts, config.positions)
        seen = Hindsight(growth, ends, log_policies, critic, held)
        if env.segment.allowed is not None:
            seen.only_cash = ~env.segment.allowed.t().contiguous()
            seen.cash = config.positions.index(0.0)
    return Rollout(
        bars[:, :-1],
        accounts,
        actions,
        log_policy,
        (rewards * scale[:, None]).clamp_(-limit, limit),
        values,
        terminated,
        valid,
        next_value,
        seen,
        forecasts,
        ahead,
        depth,
        volatility,
    )


def depth_of(policy: Policy, num_segments: int, chance: float, generator: torch.Generator) -> Tensor | None:
    """Draw which blocks each segment skips, (N, layers); None, and nothing is drawn, where the chance is 0."""
    num_layers = policy.trunk.config.num_layers
    return draw_depth(num_segments, num_layers, chance, generator) if chance else None


def encode(
    policy: Policy,
    bars: Tensor,
    horizon: int,
    chunk_segments: int,
    forecaster: Forecaster | None,
    depth: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the trunk over segments (N, C + T + 1, F), a chunk at a time.

    Returns:
        The market's part of the head at T decisions, and at the bar after the last one for the bootstrap value,
        (N, T + 1, W); and the forecasts at the decisions, (N, T, 2, horizons), where there is a forecaster.
    """
    projected, forecasts = [], []
    parts = bars.split(chunk_segments)
    depths = [None] * len(parts) if depth is None else depth.split(chunk_segments)
    for part, skipped in zip(parts, depths, strict=True):
        heartbeat()  # a large model takes minutes for a rollout on a CPU
        hidden = policy.hidden(part, horizon + 1, skipped)
        projected.append(policy.head.project(hidden))
        if forecaster is not None:
            forecasts.append(forecaster(hidden[:, :-1]))
    return torch.cat(projected), torch.cat(forecasts) if forecasts else None


def _positions_of(env: TradingEnv, accounts: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what was held before each decision and what was chosen, (N, T) each."""
    targets = and_cash(env.config.positions, accounts.dtype, accounts.device)
    chosen = targets[actions]
    if env.segment.allowed is not None:  # too near the close every choice became cash
        chosen = chosen * env.segment.allowed.t()
    return targets[held_index(accounts, env.config.positions)], chosen


def _in_every_position(
    env: TradingEnv, policy: Policy, projected: Tensor, accounts: Tensor, chunk_segments: int
) -> tuple[Tensor, Tensor]:
    """Evaluate policy (N, T, J, K) and critic (N, T + 1, J) as if every position were held."""
    # In chunks: the head's activations of the whole rollout, J times, would take much memory.
    log_policies, values = [], []
    for market, account in zip(projected.split(chunk_segments), accounts.split(chunk_segments), strict=True):
        everywhere = accounts_in_every_position(account, env.config.positions)
        logits, value = policy.head.decide(market[:, :, None], everywhere)
        log_policies.append(torch.log_softmax(logits[:, :-1], dim=-1))
        values.append(value)
    return torch.cat(log_policies), torch.cat(values)
