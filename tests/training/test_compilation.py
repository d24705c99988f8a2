"""A compiled trunk is the same trunk, and a compiler that fails is told and done without."""

from __future__ import annotations

import pytest
import torch

from tests.training.rollouts import (
    ALONE,
    CONTEXT,
    FEATURES,
    HORIZON,
    made_up_rollout,
    small_learner,
    small_policy,
)
from training.compilation import compile_trunk


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_update() -> None:
    plain, compiled = small_policy(num_layers=1), small_policy(num_layers=1)
    assert compile_trunk(compiled, 2, CONTEXT, HORIZON, ALONE) == ""
    assert list(plain.state_dict()) == list(compiled.state_dict())
    rollout = made_up_rollout(plain, 4)
    for policy in (plain, compiled):
        learner = small_learner(policy)
        for group in learner.optimizer.param_groups:
            group["eps"] = 1e-4  # as in test_learner: rounding stays rounding
        learner.update(rollout, run_fraction=0.0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_trunk_is_left_as_it_was_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    policy = small_policy()
    bars = torch.randn(2, CONTEXT + HORIZON, FEATURES)
    before = policy.encode(bars, HORIZON)
    with torch._inductor.config.patch(force_disable_caches=True):
        reason = compile_trunk(policy, 2, CONTEXT, HORIZON, ALONE)
    assert "ompiler" in reason and "\n" not in reason
    assert torch.equal(policy.encode(bars, HORIZON), before)
    assert all(parameter.grad is None for parameter in policy.parameters())
