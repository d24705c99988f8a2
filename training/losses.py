"""PPO arithmetic: generalised advantage estimation, the clipped loss, and its diagnostics.

Pure functions of tensors: no environment, no model, no process group, no logging.
Shapes: N = environments on this GPU, T = horizon (decisions per rollout), K = target positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from envs.ahead import HORIZONS
from models.forecaster import Forecaster
from models.policy import Policy
from training.forecasts import forecast_loss

if TYPE_CHECKING:
    from continuous_training import Settings


def advantages_and_returns(
    rewards: Tensor, values: Tensor, next_value: Tensor, terminated: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv:1506.02438), eq. 16.

    ``terminated[:, t]`` means that the account was ruined by decision t: the future is worth nothing. An
    episode that only runs out of bars ends with the segment, where ``next_value`` stands for its future
    just as for an episode that goes on: truncation needs no case of its own.

    Args:
        rewards, values: (N, T) float32.
        next_value: (N,) value of the observation after the last decision.
        terminated: (N, T) bool.
        gamma: discount per bar.
        gae_lambda: weight of longer returns.

    Returns:
        advantages and returns (advantages + values), both (N, T).
    """
    alive = (~terminated).to(rewards.dtype)
    following = torch.cat((values[:, 1:], next_value[:, None]), dim=1)
    deltas = rewards + gamma * following * alive - values
    decay = gamma * gae_lambda * alive
    last, backwards = torch.zeros_like(next_value), []
    for delta, weight in zip(reversed(deltas.unbind(1)), reversed(decay.unbind(1)), strict=True):
        last = torch.addcmul(delta, weight, last)
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


@dataclass
class Losses:
    """The objective of one micro-batch, and diagnostics.

    Every entry is a sum over the micro-batch's decisions divided by ``num_decisions`` of the whole
    minibatch, so that micro-batches add up to the minibatch whatever their size.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    forecast: Tensor | None = None  # where forecasts are learnt


@dataclass
class Targets:
    """Targets of policy and critic; (..., K) has one entry per position."""

    log_policy: Tensor  # (..., K) of the policy that acted
    weights: Tensor  # (..., K) adding up to 1: the drawn position, or the probability of each
    advantages: Tensor  # (..., K), normalised over the whole rollout
    returns: Tensor  # (...)
    valid: Tensor  # (...) bool; False after a ruin, when there was no decision
    ahead: Tensor | None = None  # (..., 2, horizons), see envs.ahead; None where no forecasts are learnt

    def __getitem__(self, rows: Tensor) -> Targets:
        """Return the targets of some segments."""
        columns = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Targets(**{name: column[rows] for name, column in columns if column is not None})


def ppo_losses(
    logits: Tensor, values: Tensor, targets: Targets, num_decisions: int | Tensor, settings: Settings
) -> Losses:
    """Clipped surrogate, value and entropy losses (Schulman et al. 2017, eq. 9), in float32.

    Args:
        logits: (..., K) of the policy now.
        values: (...) of the critic now.
        targets: of the same decisions.
        num_decisions: decisions of the whole minibatch on this rank, the divisor of every sum.
        settings: its coefficients, in the words of the paper.
    """
    weight = targets.valid.to(logits.dtype) / num_decisions
    log_policy = torch.log_softmax(logits, dim=-1)
    log_ratio = log_policy - targets.log_policy
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - settings.clip_coef, 1.0 + settings.clip_coef)
    gain = torch.minimum(ratio * targets.advantages, clipped * targets.advantages)
    policy = -((gain * targets.weights).sum(-1) * weight).sum()
    value = 0.5 * ((values - targets.returns).square() * weight).sum()
    entropy = -((log_policy.exp() * log_policy).sum(-1) * weight).sum()
    with torch.no_grad():
        approx_kl = (-(targets.log_policy.exp() * log_ratio).sum(-1) * weight).sum()
        outside = ((ratio - 1.0).abs() > settings.clip_coef) * targets.weights
        clip_fraction = (outside.sum(-1) * weight).sum()
    total = policy + settings.value_coef * value - settings.entropy_coef * entropy
    return Losses(total, policy.detach(), value.detach(), entropy.detach(), approx_kl, clip_fraction)


class Objective(nn.Module):
    """PPO's losses of a policy's decisions in whole segments: trunk, head and losses as one module.

    DDP averages the gradients of one module's forward, and head and losses, many small operations on the same few
    numbers, are compiled as one function.

    Shapes: B = segments of a micro-batch, S = bars of a segment, T = decisions, F, A, D as in models/policy.py.
    """

    def __init__(self, policy: Policy, settings: Settings) -> None:
        super().__init__()
        self.policy = policy
        self.settings = settings
        self.forecaster: Forecaster | None = None
        if settings.forecast_coef:
            device = policy.head.logits.weight.device
            self.forecaster = Forecaster(policy.trunk.config.d_model, len(HORIZONS), device)
        self.hindsight_is_compiled = False  # see compilation.compile_hindsight

    def learnt(self) -> list[tuple[str, nn.Parameter]]:
        """Return name and weight of everything that is learnt: the policy's, then those that only training has."""
        own = [] if self.forecaster is None else list(self.forecaster.named_parameters(prefix="forecaster"))
        return [*self.policy.named_parameters(), *own]

    def forward(
        self,
        bars: Tensor,
        accounts: Tensor,
        targets: Targets,
        num_decisions: int,
        depth: Tensor | None = None,
    ) -> Losses:
        """Evaluate one micro-batch.

        Args:
            bars: (B, S, F) normalised features.
            accounts: (B, T, A) account observations at the last T bars.
            targets: of these decisions.
            num_decisions: decisions of the whole minibatch on this rank, the divisor of every sum.
            depth: (B, layers) the blocks that each segment skips, as in its rollout.

        Returns:
            Scalars on the device; ``total`` is the one to differentiate.
        """
        hidden = self.policy.hidden(bars, accounts.shape[1], depth)
        # A number would be compiled in, and the last minibatch of a pass may be a smaller one.
        divisor = torch.full((), num_decisions, dtype=hidden.dtype, device=hidden.device)
        return self.after_trunk(hidden, accounts, targets, divisor)

    def after_trunk(self, hidden: Tensor, accounts: Tensor, targets: Targets, divisor: Tensor) -> Losses:
        """Return the losses of the decisions that follow from the trunk's output (B, T, D); ``divisor`` is ()."""
        head = self.policy.head
        logits, values = head.decide(head.project(hidden), accounts)
        losses = ppo_losses(logits, values, targets, divisor, self.settings)
        if self.forecaster is None:
            return losses
        assert targets.ahead is not None
        forecast = forecast_loss(self.forecaster(hidden), targets.ahead, divisor)
        total = losses.total + self.settings.forecast_coef * forecast
        return replace(losses, total=total, forecast=forecast.detach())
