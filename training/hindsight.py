"""Hindsight advantages: every position is valued along the realised path, not only the one that was held.

The market does not react to us, so a segment's bars determine what every choice would have earned at every
decision. One backward recursion over the policy's own probabilities then values each (held, chosen) pair:
without action-sampling noise, and without paying a fee to find out what a position is worth (Sinclair et al.
2023, "Hindsight learning for MDPs with exogenous inputs", arXiv:2207.06272).

Shapes: N = segments, T = horizon, J = what can be held, K = what can be chosen (the first K of J).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from envs.compiled import compiled

UNROLLED_STEPS = 8  # of the recursion, in one compiled call


@dataclass
class Hindsight:
    """Inputs of the recursion, from a rollout."""

    growth: Tensor  # (N, T, J, K) scaled log growth of equity from holding j and choosing k, net of costs
    ends: Tensor  # (N, T, J, K) bool, ruined by it: the future is worth nothing
    log_policy: Tensor  # (N, T, J, K) log-probability of choosing k while holding j
    values: Tensor  # (N, T + 1, J) of the critic, while holding j
    held: Tensor  # (N, T) int64, index of the held position
    only_cash: Tensor | None = None  # (N, T) bool, every choice became cash
    cash: int = 0  # its index among the choices, where only_cash is given


def choice_values(
    hindsight: Hindsight, valid: Tensor, gamma: float, trace_lambda: float
) -> tuple[Tensor, Tensor]:
    """Value every choice from every held position.

    q(t, j, k) = growth(t, j, k) + gamma * v(t + 1, k), where v mixes the critic with the policy's return
    on the realised bars: v(t, j) = (1 - lambda) * critic(t, j) + lambda * sum_k policy(k | t, j) * q(t, j, k).
    The lambda-return of GAE, with the expectation over actions taken exactly. After a ruin there is no account
    any more: choices that would have survived it are valued by the critic.

    Args:
        hindsight: of N segments.
        valid: (N, T) bool; False after a ruin.
        gamma: discount per bar.
        trace_lambda: weight of the realised future against the critic.

    Returns:
        q: (N, T, J, K).
        expected: (N, T, J), the policy's expectation of q, and the critic's target.
    """
    num_choices = hindsight.growth.shape[-1]
    policy = hindsight.log_policy.exp()
    discount = gamma * (~hindsight.ends).to(policy.dtype)
    q = torch.empty_like(hindsight.growth)
    expected = torch.empty_like(hindsight.growth[..., 0])
    following = hindsight.values[:, -1, :num_choices]
    for t in reversed(range(q.shape[1])):
        q[:, t] = hindsight.growth[:, t] + discount[:, t] * following[:, None, :]
        if hindsight.only_cash is not None:
            cash = q[:, t, :, hindsight.cash, None]
            q[:, t] = torch.where(hindsight.only_cash[:, t, None, None], cash, q[:, t])
        realised = (policy[:, t] * q[:, t]).sum(-1)
        expected[:, t] = torch.where(valid[:, t, None], realised, hindsight.values[:, t])
        following = torch.lerp(hindsight.values[:, t], expected[:, t], trace_lambda)[:, :num_choices]
    return q, expected


def compiled_choice_values(
    hindsight: Hindsight, valid: Tensor, gamma: float, trace_lambda: float
) -> tuple[Tensor, Tensor]:
    """Compute ``choice_values`` in few calls: on a GPU, its steps take longer to launch than to compute."""
    horizon, num_held, num_choices = hindsight.growth.shape[1:]
    discount = gamma * (~hindsight.ends).to(hindsight.growth.dtype)
    columns = [hindsight.growth, discount, hindsight.log_policy.exp(), hindsight.values[:, :-1], valid]
    if hindsight.only_cash is not None:
        columns.append(hindsight.only_cash)
    following = hindsight.values[:, -1, :num_choices].contiguous()
    parts = []
    for last in range(horizon, 0, -UNROLLED_STEPS):
        rows = slice(max(0, last - UNROLLED_STEPS), last)
        run = compiled(_steps, valid.device.type) if last >= UNROLLED_STEPS else _steps
        *part, following = run(following, [c[:, rows] for c in columns], hindsight.cash, trace_lambda)
        parts.append(part)
    q, expected = (torch.cat(column[::-1]).movedim(-1, 0) for column in zip(*parts, strict=True))
    return q.unflatten(1, (horizon, num_held, num_choices)), expected.unflatten(1, (horizon, num_held))


def _steps(
    following: Tensor, columns: list[Tensor], cash: int, trace_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take S steps of the recursion, the last first: q (S * J * K, N), expected (S * J, N) and the next following.

    Tensors of (N,) alone, so that all of it is one kernel over the segments.
    """
    growth, discount, policy, values, valid, *only_cash = columns
    num_held, num_choices = growth.shape[2:]
    future = list(following.unbind(1))
    q_rows: list[Tensor] = []
    expected_rows: list[Tensor] = []
    for t in reversed(range(growth.shape[1])):
        q = [
            [growth[:, t, j, k] + discount[:, t, j, k] * future[k] for k in range(num_choices)]
            for j in range(num_held)
        ]
        if only_cash:
            q = [[torch.where(only_cash[0][:, t], row[cash], value) for value in row] for row in q]
        expected = []
        for j, row in enumerate(q):
            realised = policy[:, t, j, 0] * row[0]
            for k in range(1, num_choices):
                realised = realised + policy[:, t, j, k] * row[k]
            expected.append(torch.where(valid[:, t], realised, values[:, t, j]))
        future = [torch.lerp(values[:, t, k], expected[k], trace_lambda) for k in range(num_choices)]
        q_rows = [value for row in q for value in row] + q_rows
        expected_rows = expected + expected_rows
    return torch.stack(q_rows), torch.stack(expected_rows), torch.stack(future, dim=1)


def hindsight_advantages(
    hindsight: Hindsight, valid: Tensor, gamma: float, trace_lambda: float, is_compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return advantages (N, T, K) of every choice from what was held, and the critic's targets (N, T)."""
    values_of = compiled_choice_values if is_compiled else choice_values
    q, expected = values_of(hindsight, valid, gamma, trace_lambda)
    held = hindsight.held[..., None]
    returns = expected.gather(-1, held)
    q = q.gather(-2, held[..., None].expand(*held.shape, q.shape[-1])).squeeze(-2)
    return q - returns, returns.squeeze(-1)
