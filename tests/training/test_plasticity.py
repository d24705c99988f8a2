"""Plasticity against values computed by hand, and proof that asking for it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

import training.trainer
from tests.program import is_same
from tests.training.rollouts import CONTEXT, FEATURES, HORIZON, small_policy
from tests.training.test_trainer import small_trainer
from training.metrics import (
    BARS_OF_EACH,
    NUM_SEGMENTS,
    Yardstick,
    activations,
    dormant_share,
    effective_rank,
    fixed_batch,
    plasticity,
)


def bars(segments: int = 4) -> torch.Tensor:
    return torch.randn(segments, CONTEXT + HORIZON, FEATURES, generator=torch.Generator().manual_seed(1))


def test_a_unit_is_dormant_when_it_does_little_beside_its_own_layer() -> None:
    # Layer 1 has mean 1: a unit at 0.025 is dormant, one at 0.026 is not. Layer 2 is as quiet, but evenly.
    activity = torch.tensor([[0.025, 0.026, 0.0, 3.949], [0.01, 0.01, 0.01, 0.01]], dtype=torch.float64)
    assert float(dormant_share(activity, tau=0.025)) == 2 / 8
    assert float(dormant_share(activity, tau=0.0251 + 0.001)) == 3 / 8


def test_units_that_are_all_silent_are_all_dormant() -> None:
    assert float(dormant_share(torch.zeros(2, 5))) == 1.0


def test_a_yardstick_of_a_busy_start_is_measured_again() -> None:
    yardstick = Yardstick(torch.device("cpu"), torch.float32)
    yardstick.rate = 1e6  # of a device that another program used
    assert 0 < yardstick.share(1.41e6) < 0.5  # measured again, as nothing is faster than a matrix product
    yardstick.rate = 1e6
    shares = [yardstick.share(1e5) for _ in range(9)]
    assert (shares[:8], yardstick.rate > 1e7) == ([0.1] * 8, True)  # and in the tenth epoch
    assert yardstick.share(1e18) == 1.0


@pytest.mark.parametrize("rows", [6, 40])
def test_effective_rank_is_that_of_the_paper(rows: int) -> None:
    # Singular values 3, 2, 1: shares 1/2, 1/3, 1/6.
    shares = (1 / 2, 1 / 3, 1 / 6)
    by_hand = math.exp(-sum(share * math.log(share) for share in shares))
    left = torch.linalg.qr(torch.randn(rows, 3, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    features = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ right.T
    assert effective_rank(features) == pytest.approx(by_hand, rel=1e-5)


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.ones(20, 5)) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(torch.zeros(20, 5)) == 0.0
    assert math.isnan(effective_rank(torch.full((4, 4), math.inf)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_walk_through_the_blocks_is_the_trunk_itself(precision: str) -> None:
    policy = small_policy(precision)
    with torch.no_grad(), policy.autocast(torch.device("cpu")):
        hidden, activity = activations(policy.trunk, bars())
        assert torch.equal(hidden, policy.trunk(bars()))
    assert activity.shape == (2, 4 * 32) and bool((activity > 0).all())


def test_silenced_units_are_found_in_a_policy() -> None:
    policy = small_policy()
    before = plasticity(policy, bars())
    with torch.no_grad():
        policy.trunk.blocks[0].up.weight[:64] = 0.0  # half of the units of one of two layers
    after = plasticity(policy, bars())
    assert after["plasticity/dormant_units"] == before["plasticity/dormant_units"] + 0.25
    by_hand = math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in policy.parameters()))
    assert after["plasticity/weight_norm"] == pytest.approx(by_hand)
    assert 1.0 <= after["plasticity/effective_rank"] <= 32


def test_weights_that_are_not_finite_are_told_as_such() -> None:
    policy = small_policy()
    with torch.no_grad():
        policy.trunk.embed.weight[0, 0] = math.nan
    assert math.isnan(plasticity(policy, bars())["plasticity/effective_rank"])


def test_the_batch_is_the_same_every_time_and_spread_over_the_market() -> None:
    market = small_trainer().env.market
    batch = fixed_batch(market)
    assert batch.shape == (NUM_SEGMENTS, market.context_bars + market.horizon, market.num_features)
    assert torch.equal(batch, fixed_batch(small_trainer().env.market))
    assert len(batch.flatten(1).unique(dim=0)) == NUM_SEGMENTS
    assert BARS_OF_EACH * NUM_SEGMENTS == 256  # as docs/metrics.md says


def test_it_is_measured_in_the_first_and_in_every_tenth_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, calls = small_trainer(), []
    real = training.trainer.plasticity
    monkeypatch.setattr(training.trainer, "plasticity", lambda *given: (calls.append(1), real(*given))[1])
    losses = trainer.update(trainer.collect())
    assert losses is not None
    measured = []
    for trainer.progress.epoch in range(1, 31):
        if any(name.startswith("plasticity/") for name in trainer.metrics(losses)):
            measured.append(trainer.progress.epoch)
    assert measured == [1, 10, 20, 30]
    assert len(calls) == 4


def test_asking_for_it_changes_no_number_of_the_training() -> None:
    ends = []
    for asks in (False, True):
        trainer = small_trainer()
        for _ in range(3):
            rollout = trainer.collect()
            trainer.update(rollout)
            if asks:
                figures = plasticity(trainer.policy, fixed_batch(trainer.env.market))
                assert all(math.isfinite(value) for value in figures.values())
        state = {
            "model": trainer.policy.state_dict(),
            "learner": trainer.learner.state_dict(),
            "own": trainer._own_state(),
            "global": torch.get_rng_state(),
            "gradients": [weight.grad for weight in trainer.policy.parameters()],
        }
        ends.append(state)
    assert is_same(*ends)
