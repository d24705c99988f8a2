"""PPO's arithmetic against its definitions, written out."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from continuous_training import Settings
from training.losses import Targets, advantages_and_returns, ppo_losses

SETTINGS = Settings(gamma=0.9, gae_lambda=0.8, clip_coef=0.2, entropy_coef=0.01, value_coef=0.5)


def test_gae_by_hand() -> None:
    # One account, three decisions, no ruin. delta_t = r + 0.9 v' - v:
    # 1 + 0.9 * 2 - 1 = 1.8;  0 + 0.9 * 4 - 2 = 1.6;  -1 + 0.9 * 10 - 4 = 4.0
    # A_2 = 4;  A_1 = 1.6 + 0.72 * 4 = 4.48;  A_0 = 1.8 + 0.72 * 4.48 = 5.0256
    advantages, returns = advantages_and_returns(
        torch.tensor([[1.0, 0.0, -1.0]]),
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.tensor([10.0]),
        torch.zeros(1, 3, dtype=torch.bool),
        0.9,
        0.8,
    )
    torch.testing.assert_close(advantages, torch.tensor([[5.0256, 4.48, 4.0]]))
    torch.testing.assert_close(returns, torch.tensor([[6.0256, 6.48, 8.0]]))


def test_a_ruin_cuts_the_future_off() -> None:
    # Ruined by decision 1: delta_1 = -5 - 2 = -7, and nothing behind it counts.
    advantages, _ = advantages_and_returns(
        torch.tensor([[1.0, -5.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.tensor([10.0]),
        torch.tensor([[False, True, False]]),
        0.9,
        0.8,
    )
    torch.testing.assert_close(advantages[0, :2], torch.tensor([1.8 + 0.72 * -7.0, -7.0]))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), horizon=st.integers(1, 9), accounts=st.integers(1, 4), ruins=st.booleans())
def test_gae_equals_the_sum_of_discounted_errors(seed: int, horizon: int, accounts: int, ruins: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (
        torch.randn(accounts, horizon, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    next_value = torch.randn(accounts, dtype=torch.float64, generator=generator)
    terminated = (torch.rand(accounts, horizon, generator=generator) < 0.3) & ruins
    advantages, _ = advantages_and_returns(rewards, values, next_value, terminated, 0.97, 0.9)
    for n in range(accounts):
        for t in range(horizon):
            total, weight = 0.0, 1.0
            for k in range(t, horizon):
                future = float(values[n, k + 1]) if k + 1 < horizon else float(next_value[n])
                total += weight * (
                    float(rewards[n, k]) + (0.0 if terminated[n, k] else 0.97 * future) - float(values[n, k])
                )
                if terminated[n, k]:
                    break
                weight *= 0.97 * 0.9
            assert float(advantages[n, t]) == pytest.approx(total, abs=1e-12)


def batch(drawn: bool) -> tuple[Tensor, Tensor, Targets]:
    """Logits, values and targets in float64: weights on drawn positions, or on all of them."""
    generator = torch.Generator().manual_seed(3)
    shape = (5, 7)
    log_policy = torch.log_softmax(torch.randn(*shape, 3, generator=generator, dtype=torch.float64), -1)
    actions = torch.randint(3, shape, generator=generator)
    targets = Targets(
        log_policy=log_policy,
        weights=F.one_hot(actions, 3).double() if drawn else log_policy.exp(),
        advantages=torch.randn(*shape, 3, generator=generator, dtype=torch.float64),
        returns=torch.randn(shape, generator=generator, dtype=torch.float64),
        valid=torch.rand(shape, generator=generator) > 0.2,
    )
    logits = log_policy + 0.3 * torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return logits, torch.randn(shape, generator=generator, dtype=torch.float64), targets


@pytest.mark.parametrize("drawn", [True, False])
def test_losses_equal_a_scalar_reference(drawn: bool) -> None:
    logits, values, targets = batch(drawn)
    losses = ppo_losses(logits, values, targets, num_decisions=35, settings=SETTINGS)
    policy = value = entropy = kl = clipped = 0.0
    for n in range(5):
        for t in range(7):
            if not targets.valid[n, t]:
                continue
            row = logits[n, t].tolist()
            normaliser = math.log(sum(math.exp(x) for x in row))
            for k in range(3):
                log_new, log_old = row[k] - normaliser, float(targets.log_policy[n, t, k])
                ratio = math.exp(log_new - log_old)
                weight, advantage = float(targets.weights[n, t, k]), float(targets.advantages[n, t, k])
                policy -= weight * min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) / 35
                entropy -= math.exp(log_new) * log_new / 35
                kl += math.exp(log_old) * (log_old - log_new) / 35
                clipped += weight * (abs(ratio - 1) > 0.2) / 35
            value += 0.5 * (float(values[n, t]) - float(targets.returns[n, t])) ** 2 / 35
    assert float(losses.policy) == pytest.approx(policy, rel=1e-12)
    assert float(losses.value) == pytest.approx(value, rel=1e-12)
    assert float(losses.entropy) == pytest.approx(entropy, rel=1e-12)
    assert float(losses.approx_kl) == pytest.approx(kl, rel=1e-12)
    assert float(losses.clip_fraction) == pytest.approx(clipped, rel=1e-12)
    assert float(losses.total) == pytest.approx(policy + 0.5 * value - 0.01 * entropy, rel=1e-12)


def test_micro_batches_add_up_to_the_minibatch() -> None:
    logits, values, targets = batch(drawn=False)
    whole = ppo_losses(logits, values, targets, num_decisions=35, settings=SETTINGS).total
    parts = [
        ppo_losses(logits[rows], values[rows], targets[rows], num_decisions=35, settings=SETTINGS).total
        for rows in torch.tensor([0, 1, 2, 3, 4]).split([1, 3, 1])
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-12, atol=1e-12)


def test_what_happened_after_a_ruin_has_no_gradient() -> None:
    logits, values, targets = batch(drawn=False)
    leaves = (logits.requires_grad_(), values.requires_grad_())
    ppo_losses(logits, values, targets, num_decisions=35, settings=SETTINGS).total.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad[~targets.valid] == 0).all()
        assert (leaf.grad[targets.valid] != 0).any()


def test_clipping_takes_the_gradient_away_only_where_the_step_went_too_far() -> None:
    # ratio 1.5 with a good action: no more push; ratio 1.5 with a bad one: still pushed back.
    logits = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 2, 2)
    targets = Targets(
        log_policy=torch.full((1, 2, 2), math.log(0.5 / 1.5), dtype=torch.float64),
        weights=first,
        advantages=torch.tensor([[1.0, -1.0]], dtype=torch.float64)[..., None].expand(1, 2, 2),
        returns=torch.zeros(1, 2, dtype=torch.float64),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    values = torch.zeros(1, 2, dtype=torch.float64)
    ppo_losses(logits, values, targets, 2, replace(SETTINGS, entropy_coef=0.0)).total.backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] == 0).all()
    assert logits.grad[0, 1, 0] > 0  # descent lowers the bad action's logit
