"""Rollouts: one trunk forward over every environment's segment, then ``horizon`` small account steps.

Nothing here waits for the device: tensors in, tensors out.
Shapes: N = environments on this GPU, C = context bars, T = horizon, F = bar features, A = account
features, W = width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from envs.choices import accounts_in_every_position, growth_of_every_choice, what_is_held
from envs.trading_env import TradingEnv
from models.policy import Policy
from training.hindsight import Hindsight


@dataclass
class Rollout:
    """What one segment of every environment gave. Rewards, values and returns are in scaled units."""

    bars: Tensor  # (N, C + T, F) what the trunk saw
    accounts: Tensor  # (N, T, A) what the head saw of the account
    actions: Tensor  # (N, T) int64, index of the chosen target position
    log_policy: Tensor  # (N, T, K) log-probability of every position
    rewards: Tensor  # (N, T)
    values: Tensor  # (N, T)
    terminated: Tensor  # (N, T) bool, ruined by this decision
    valid: Tensor  # (N, T) bool, False after a ruin
    next_value: Tensor  # (N,) value after the last decision
    hindsight: Hindsight | None = None

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
        """Make it from ``state_dict``, on a device."""
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


@torch.no_grad()
def collect(
    env: TradingEnv,
    policy: Policy,
    generator: torch.Generator,
    chunk_segments: int,
    greedy: bool = False,
    hindsight: bool = False,
    reward_scale: float = 1.0,
    beat: Callable[[], None] = lambda: None,
) -> Rollout:
    """Play one segment in every environment.

    Args:
        env: N environments.
        policy: the actor and critic.
        generator: source of the action noise, on the environment's device.
        chunk_segments: segments per trunk forward, to bound memory.
        greedy: take the most likely position instead of drawing one.
        hindsight: value the choices that were not made, too.
        reward_scale: of rewards that are in units of each symbol's volatility per bar.
        beat: called for every chunk, as a sign of life: a large model takes minutes for a rollout on a CPU.
    """
    config = env.config
    horizon = config.horizon
    bars = env.begin_segment()  # (N, C + T + 1, F)
    # T decisions, and the bar after the last one for the bootstrap value.
    parts = []
    for part in bars.split(chunk_segments):
        beat()
        parts.append(policy.encode(part, horizon + 1))
    projected = torch.cat(parts)
    fills = env.fills_ahead() if hindsight else None

    num_positions = len(config.positions)
    shape = (config.num_envs, horizon)
    device = bars.device
    accounts = torch.empty(config.num_envs, horizon + 1, env.num_account_features, device=device)
    actions = torch.empty(shape, dtype=torch.int64, device=device)
    log_policy = torch.empty(*shape, num_positions, device=device)
    rewards, values = (torch.empty(shape, device=device) for _ in range(2))
    terminated, valid = (torch.empty(shape, dtype=torch.bool, device=device) for _ in range(2))
    log_equity = torch.empty(shape, dtype=env.dtype, device=device)
    # Gumbel-max sampling: the noise of all decisions in one draw.
    noise = torch.rand(*shape, num_positions, generator=generator, device=device)
    gumbel = torch.zeros_like(noise) if greedy else -(-noise.clamp_(1e-7, 1 - 1e-7).log()).log()

    for t in range(horizon):
        accounts[:, t] = env.account_observations()
        valid[:, t], log_equity[:, t] = env.alive, env.account.log_equity
        logits, values[:, t] = policy.head.decide(projected[:, t], accounts[:, t])
        log_policy[:, t] = torch.log_softmax(logits, dim=-1)
        actions[:, t] = (log_policy[:, t] + gumbel[:, t]).argmax(dim=-1)
        rewards[:, t], terminated[:, t], _ = env.step(actions[:, t])
    accounts[:, horizon] = env.account_observations()
    next_value = policy.head.decide(projected[:, horizon], accounts[:, horizon])[1]
    # In units of the symbol's typical move per bar, so that no wild symbol drowns the calm ones.
    scale = reward_scale / env.volatility
    seen = None
    if fills is not None:
        growth = growth_of_every_choice(fills, config.positions, log_equity)
        ends = log_equity[..., None, None] + growth <= math.log(config.ruin_fraction)
        growth = (growth * scale[:, None, None, None]).float()
        log_policies, critic = _in_every_position(env, policy, projected, accounts, chunk_segments)
        held = what_is_held(accounts[:, :-1], config.positions)
        seen = Hindsight(growth, ends, log_policies, critic, held)
        if env.segment.allowed is not None:
            seen.only_cash = ~torch.stack(env.segment.allowed, dim=1)
            seen.cash = config.positions.index(0.0)
    return Rollout(
        bars[:, :-1],
        accounts[:, :-1],
        actions,
        log_policy,
        rewards * scale[:, None],
        values,
        terminated,
        valid,
        next_value,
        seen,
    )


def _in_every_position(
    env: TradingEnv, policy: Policy, projected: Tensor, accounts: Tensor, chunk_segments: int
) -> tuple[Tensor, Tensor]:
    """Ask the policy (N, T, J, K) and the critic (N, T + 1, J) as if every position were held."""
    # In chunks: J times the head's activations of the whole rollout would be much.
    log_policies, values = [], []
    for market, account in zip(projected.split(chunk_segments), accounts.split(chunk_segments), strict=True):
        everywhere = accounts_in_every_position(account, env.config.positions)
        logits, value = policy.head.decide(market[:, :, None], everywhere)
        log_policies.append(torch.log_softmax(logits[:, :-1], dim=-1))
        values.append(value)
    return torch.cat(log_policies), torch.cat(values)
