"""Compiled code computes the same, and a failing compiler is reported and not used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from envs import compiled
from tests.envs.markets import env_of, mixed_market
from tests.training.rollouts import (
    ALONE,
    CONTEXT,
    FEATURES,
    HORIZON,
    SETTINGS,
    made_up_rollout,
    policy_for,
    rollout_of,
    small_learner,
    small_policy,
)
from training import compilation, hindsight
from training.compilation import compile_accounts, compile_hindsight, compile_objective
from training.losses import Objective

# The compiler asks the trunk's output for it and hides the warning, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.slow
def test_a_compiled_objective_gives_the_same_update() -> None:
    plain, compiled = (Objective(small_policy(num_layers=1), SETTINGS) for _ in range(2))
    assert compile_objective(compiled, 2, CONTEXT, HORIZON, ALONE) == ""
    assert list(plain.state_dict()) == list(compiled.state_dict())
    rollout = made_up_rollout(plain.policy, 4)
    statistics = []
    for objective in (plain, compiled):
        learner = small_learner(objective)
        for group in learner.optimizer.param_groups:
            group["eps"] = 1e-4  # as in test_learner: rounding stays rounding
        statistics.append(learner.update(rollout, run_fraction=0.0))
    torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def of_two_ranks() -> Any:
    return SimpleNamespace(world_size=2, device=ALONE.device, any=bool)


def test_alone_the_trunk_is_one_function_and_with_several_ranks_each_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owners: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda method, **_: owners.append(method.__self__) or method)
    alone, together = (Objective(small_policy(), SETTINGS) for _ in range(2))
    assert compile_objective(alone, 2, CONTEXT, HORIZON, ALONE) == ""
    assert owners == [alone.policy.trunk, alone]
    owners.clear()
    assert compile_objective(together, 2, CONTEXT, HORIZON, of_two_ranks()) == ""
    assert owners == [*together.policy.trunk.blocks, together]


@pytest.mark.drill
def test_with_several_ranks_a_blocks_gradients_are_there_before_the_backward_of_the_block_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Otherwise DDP, whose buckets fill as gradients come, has no backward left to overlap their all-reduce with.
    quickly = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **_: quickly(forward, backend="aot_eager"))
    objective, events = Objective(small_policy(), SETTINGS), list[str]()
    assert compile_objective(objective, 2, CONTEXT, HORIZON, of_two_ranks()) == ""
    below, above = objective.policy.trunk.blocks

    def watch(block: object, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: events.append("backward of the block below"))

    below.register_forward_hook(watch)
    above.down.weight.register_post_accumulate_grad_hook(
        lambda _: events.append("gradients of the one above")
    )
    compilation.dry_run(objective, 2, CONTEXT, HORIZON, ALONE)
    assert events == ["gradients of the one above", "backward of the block below"]


def without_compiler() -> AbstractContextManager[None]:
    torch._dynamo.reset()
    return torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})


def test_without_a_compiler_the_objective_is_left_as_it_was_and_the_reason_is_reported() -> None:
    policy = small_policy()
    objective = Objective(policy, SETTINGS)
    bars = torch.randn(2, CONTEXT + HORIZON, FEATURES)
    before = policy.encode(bars, HORIZON)
    with without_compiler():
        reason = compile_objective(objective, 2, CONTEXT, HORIZON, ALONE)
    assert "after_trunk" not in vars(objective)
    assert "ompiler" in reason and "\n" not in reason
    assert torch.equal(policy.encode(bars, HORIZON), before)
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.slow
def test_compiled_rollouts_are_the_plain_ones_and_leave_nothing_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "UNROLLED_DECISIONS", 2)  # quicker to compile
    market = mixed_market()
    plain, quick = (env_of(market, volume_slippage=0.02, flat_before_close=3) for _ in range(2))
    policy = policy_for(quick)
    before = quick.generator.get_state()
    lengths = quick.config.context_bars, quick.config.horizon
    objective = Objective(policy, SETTINGS)
    assert compile_objective(objective, 2, *lengths, ALONE) == ""
    assert compile_accounts(quick, policy, ALONE) == ""
    assert quick.compiled and torch.equal(quick.generator.get_state(), before)
    # The last minibatch of a pass is one of 4.
    learner = small_learner(objective, minibatch=6, micro=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            expected = rollout_of(plain, policy, chunk=2, hindsight=True)
            rollout = rollout_of(quick, policy, chunk=2, hindsight=True)
            for name, value in expected.state_dict().items():
                if name != "hindsight":
                    torch.testing.assert_close(getattr(rollout, name), value, rtol=1e-4, atol=1e-5)
            assert rollout.hindsight is not None and expected.hindsight is not None
            torch.testing.assert_close(
                rollout.hindsight.growth, expected.hindsight.growth, rtol=1e-4, atol=1e-5
            )
        assert len(expected.actions.unique()) == 3
        for hindsight in (True, False, True):
            learner.update(rollout_of(quick, policy, chunk=2, hindsight=hindsight), run_fraction=0.0)


def test_without_a_compiler_accounts_are_stepped_one_by_one_and_the_reason_is_reported() -> None:
    env = env_of(mixed_market(), num_envs=4)
    with without_compiler():
        reason = compile_accounts(env, policy_for(env), ALONE)
    assert reason.startswith("accounts are stepped one by one: ") and "ompiler" in reason
    assert not env.compiled and "\n" not in reason


@pytest.mark.slow
def test_compiled_hindsight_gives_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hindsight, "UNROLLED_STEPS", 2)  # quicker to compile
    env = env_of(mixed_market(), flat_before_close=3)
    policy = policy_for(env)
    plain, quick = Objective(policy, SETTINGS), Objective(policy, SETTINGS)
    assert compile_hindsight(quick, env, ALONE) == "" and quick.hindsight_is_compiled
    rollout = rollout_of(env, policy, hindsight=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    targets = [small_learner(objective)._targets(rollout)[0] for objective in (plain, quick)]
    for name, value in vars(targets[0]).items():
        torch.testing.assert_close(getattr(targets[1], name), value, rtol=1e-4, atol=1e-5)
    # Zeros and rollout look alike to the compiler.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_hindsight_is_valued_step_by_step() -> None:
    env = env_of(mixed_market())
    objective = Objective(policy_for(env), SETTINGS)
    hindsight.compiled.cache_clear()
    with without_compiler():
        reason = compile_hindsight(objective, env, ALONE)
    hindsight.compiled.cache_clear()
    assert reason.startswith("hindsight is valued step by step: ") and "ompiler" in reason
    assert not objective.hindsight_is_compiled


def test_an_error_of_the_gpu_is_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fall back to plain code, on a GPU that computes nothing any more."""

    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")

    objective = Objective(small_policy(), SETTINGS)
    monkeypatch.setattr(objective.policy, "encode", fail)
    with pytest.raises(torch.AcceleratorError):
        compile_objective(objective, 2, CONTEXT, HORIZON, ALONE)
    env = env_of(mixed_market(), num_envs=4)
    monkeypatch.setattr(compilation, "_play_on_zeros", fail)
    with pytest.raises(torch.AcceleratorError):
        compile_accounts(env, policy_for(env), ALONE)
    monkeypatch.setattr(compilation, "hindsight_advantages", fail)
    with pytest.raises(torch.AcceleratorError):
        compile_hindsight(objective, env, ALONE)


def test_a_missing_tool_is_the_reason_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_tools", lambda _: "there is no C compiler: install gcc")
    objective = Objective(small_policy(), SETTINGS)
    assert compile_objective(objective, 2, CONTEXT, HORIZON, ALONE) == "there is no C compiler: install gcc"
    assert "after_trunk" not in vars(objective)
