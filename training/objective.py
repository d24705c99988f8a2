"""Objective: what an update makes small; trunk, head and losses as one module.

One module, since ranks average the gradients of one module's forward (training/parallel.py), and since head and
losses, many small operations over the same few numbers, are compiled as one function (training/compilation.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.policy import Policy
from training.ppo import Losses, PPOConfig, Targets, ppo_losses


class Objective(nn.Module):
    """PPO's losses of the decisions that a policy takes in whole segments.

    Shapes: B = segments of a micro-batch, S = bars of a segment, T = decisions, F, A, D as in models/policy.py.
    """

    def __init__(self, policy: Policy, config: PPOConfig) -> None:
        super().__init__()
        self.policy = policy
        self.config = config

    def forward(self, bars: Tensor, accounts: Tensor, targets: Targets, num_decisions: int) -> Losses:
        """Evaluate one micro-batch.

        Args:
            bars: (B, S, F) normalised features.
            accounts: (B, T, A) account observations at the last T bars.
            targets: of these decisions.
            num_decisions: decisions of the whole minibatch on this rank, the divisor of every sum.

        Returns:
            Scalars on the device; ``total`` is what to go backward from.
        """
        hidden = self.policy.hidden(bars, accounts.shape[1])
        # A number would be compiled in, and the last minibatch of a pass may be a smaller one.
        divisor = torch.full((), num_decisions, dtype=hidden.dtype, device=hidden.device)
        return self.after_trunk(hidden, accounts, targets, divisor)

    def after_trunk(self, hidden: Tensor, accounts: Tensor, targets: Targets, divisor: Tensor) -> Losses:
        """Judge the decisions that follow from the trunk's output (B, T, D); ``divisor`` of every sum is ()."""
        head = self.policy.head
        logits, values = head.decide(head.project(hidden), accounts)
        return ppo_losses(logits, values, targets, divisor, self.config)
