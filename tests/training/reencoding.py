"""The plain way to roll out and update, kept as a reference: the window is encoded again for every decision.

About as many times slower as the window has bars. tests/training/test_rollout.py holds the quick way to it,
which is some 56 times as quick (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.trading_env import TradingEnv
from models.policy import Policy
from training.learner import Learner
from training.losses import Targets, ppo_losses
from training.rollout import Rollout


def window_of(bars: Tensor, t: int, context: int, whole: bool) -> Tensor:
    """Return what decision ``t`` sees of a segment's bars: the newest ``context`` of them, or all."""
    newest = context + t
    return bars[:, 0 if whole else newest + 1 - context : newest + 1]


@torch.no_grad()
def collect_by_windows(
    env: TradingEnv,
    policy: Policy,
    generator: torch.Generator,
    whole: bool = False,
    reward_scale: float = 1.0,
) -> Rollout:
    """Play one segment in every environment, as ``training.rollout.collect`` without hindsight does.

    Args:
        env: N environments.
        policy: actor and critic.
        generator: source of the action noise, used as ``collect`` uses it.
        whole: every decision sees all bars of the segment up to its own, as in ``collect``; else the newest
            ``context_bars``.
        reward_scale: of rewards in units of each symbol's volatility per bar.
    """
    context, horizon = env.config.context_bars, env.config.horizon
    bars = env.begin_segment()
    noise = torch.rand(len(bars), horizon, len(env.config.positions), generator=generator)
    gumbel = -(-noise.clamp(1e-7, 1 - 1e-7).log()).log()
    seen = []
    for t in range(horizon):
        account, alive = env.account_observations(), env.alive
        logits, value = policy(window_of(bars, t, context, whole), account[:, None])
        log_policy = torch.log_softmax(logits[:, 0], dim=-1)
        action = (log_policy + gumbel[:, t]).argmax(dim=-1)
        reward, terminated, _ = env.step(action)
        seen.append((account, action, log_policy, reward, value[:, 0], terminated, alive))
    last = policy(window_of(bars, horizon, context, whole), env.account_observations()[:, None])[1]
    accounts, actions, log_policies, rewards, values, terminated, valid = (
        torch.stack(column, dim=1) for column in zip(*seen, strict=True)
    )
    rewards = rewards * (reward_scale / env.volatility)[:, None]
    return Rollout(
        bars[:, :-1], accounts, actions, log_policies, rewards, values, terminated, valid, last[:, 0]
    )


class WindowLearner(Learner):
    """Shuffles decisions instead of segments, and encodes the window of ``context`` bars of each again."""

    def decisions(self, rollout: Rollout) -> tuple[Targets, Tensor, Tensor]:
        """Return targets (N * T, ...), windows (N * T, C, F) and accounts (N * T, 1, A) of all decisions."""
        targets, _ = self._targets(rollout)
        flat = Targets(
            **{name: value.flatten(0, 1) for name, value in vars(targets).items() if value is not None}
        )
        context = rollout.bars.shape[1] - rollout.horizon
        windows = rollout.bars[:, 1:].unfold(1, context, 1).transpose(2, 3)
        return flat, windows.flatten(0, 1), rollout.accounts.flatten(0, 1)[:, None]

    def update_by_windows(self, rollout: Rollout, minibatch: int) -> None:
        """Improve the policy on one rollout, ``minibatch`` decisions per optimizer step."""
        targets, windows, accounts = self.decisions(rollout)
        for _ in range(self.settings.update_passes):
            order = torch.randperm(len(accounts), generator=self.generator)
            for rows in order.split(minibatch):
                logits, values = self.policy(windows[rows], accounts[rows])
                losses = ppo_losses(logits[:, 0], values[:, 0], targets[rows], len(rows), self.settings)
                losses.total.backward()
                self._apply_gradients(self.config.learning_rate)
