"""Playing a segment, in compiled calls or not, is the same as taking one plain step after the other."""

from __future__ import annotations

import pytest
import torch

from envs import compiled
from tests.envs.markets import HORIZON, env_of, mixed_market, play_segment

# Everything that changes the arithmetic of a step: large orders, orders that do not count, and ruin.
AWKWARD = {
    "range_slippage": 0.3,
    "volume_slippage": 0.02,
    "flat_before_close": 3,
    "ruin_fraction": 0.99,
    "num_envs": 32,
}
# A warning of torch's own when it loads its compiler.
of_the_compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def decide(observations, preferences, bias):
    """Depends on the account and on the inputs, and returns more than the actions."""
    scores = (
        preferences + observations[:, :3] * bias[:, None] - 50 * observations[:, 4:5] * preferences.flip(1)
    )
    return scores.argmax(-1), scores


def take_given_actions(observations, actions):
    return (actions,)


def inputs_of(segment, num_envs=32):
    generator = torch.Generator().manual_seed(segment)
    return (
        torch.rand(HORIZON, num_envs, 3, generator=generator),
        torch.rand(HORIZON, num_envs, generator=generator),
    )


def actions_of(segment, num_envs=32):
    return torch.randint(0, 3, (HORIZON, num_envs), generator=torch.Generator().manual_seed(segment))


def assert_same_statistics(env, other, rtol):
    ours, theirs = env.episode_statistics(), other.episode_statistics()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=rtol)
    return ours


def assert_same_accounts(env, other):
    for one, two in zip(env.account.tensors(), other.account.tensors(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


def test_playing_a_segment_is_deciding_and_stepping_one_by_one():
    played, stepped = (env_of(mixed_market(), **AWKWARD) for _ in range(2))
    for segment in range(3):
        inputs = inputs_of(segment)
        played.begin_segment(), stepped.begin_segment()
        result = played.play(decide, *inputs)
        for t in range(HORIZON):
            observations = stepped.account_observations()
            assert torch.equal(result.observations[t], observations)
            assert torch.equal(result.alive[t], stepped.alive)
            assert torch.equal(result.log_equity[t], stepped.account.log_equity)
            actions, scores = decide(observations, inputs[0][t], inputs[1][t])
            rewards, terminated, truncated = stepped.step(actions)
            assert torch.equal(result.outputs[0][t], actions) and torch.equal(result.outputs[1][t], scores)
            assert torch.equal(result.rewards[t], rewards)
            assert torch.equal(result.terminated[t], terminated)
        assert torch.equal(result.truncated, truncated)
        assert torch.equal(played.account_observations(), stepped.account_observations())
    assert result.terminated.any() and not result.alive.all()


def test_a_segment_that_has_not_just_begun_is_not_played():
    env = env_of(mixed_market())
    with pytest.raises(RuntimeError, match="call begin_segment"):
        env.play(decide, *inputs_of(0, 16))
    env.begin_segment()
    env.step(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="1 steps of the segment are taken"):
        env.play(decide, *inputs_of(0, 16))


@pytest.mark.parametrize("perpetuals", [False, True])
def test_decisions_of_one_call_are_the_steps_one_by_one_to_the_bit(perpetuals, monkeypatch):
    """The function that is compiled, as it is without the compiler."""
    monkeypatch.setattr(compiled, "compiled", lambda function, device: function)
    market = mixed_market(perpetuals)
    costs = {"range_slippage": 0.3, "volume_slippage": 0.02, "flat_before_close": 3, "ruin_fraction": 0.9}
    env, twin = (
        env_of(market, num_envs=32, episode_bars=2 * HORIZON, borrow_rate=5.0, **costs) for _ in range(2)
    )
    twin.compiled = True
    for segment in range(6):
        actions = actions_of(segment)
        _, observations, rewards, terminated, truncated = play_segment(env, actions)
        twin.begin_segment()
        result = twin.play(take_given_actions, actions)
        assert torch.equal(result.observations, observations[:-1])
        assert torch.equal(result.rewards, rewards)
        assert torch.equal(result.terminated, terminated)
        assert torch.equal(result.truncated, truncated[-1])
        assert torch.equal(twin.account_observations(), observations[-1])
    statistics = assert_same_statistics(env, twin, 1e-12)
    assert statistics["ruins"] > 0 and (statistics["funding"] != 0) == perpetuals


@pytest.mark.slow
@of_the_compiler
@pytest.mark.parametrize("perpetuals", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_compiled_decisions_are_the_plain_ones(perpetuals, monkeypatch):
    monkeypatch.setattr(compiled, "UNROLLED_DECISIONS", 3)  # leaves one step over, which is not compiled
    plain, quick = (env_of(mixed_market(perpetuals), **AWKWARD) for _ in range(2))
    quick.compiled = True
    for segment in range(3):
        plain.begin_segment(), quick.begin_segment()
        expected = plain.play(decide, *inputs_of(segment))
        result = quick.play(decide, *inputs_of(segment))
        for ours, theirs in zip(
            (*result[:6], *result.outputs), (*expected[:6], *expected.outputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            quick.account_observations(), plain.account_observations(), rtol=0, atol=1e-5
        )
    assert expected.terminated.any() and not expected.alive.all()
    assert_same_accounts(plain, quick)
    assert_same_statistics(quick, plain, 1e-9)


@pytest.mark.slow
@of_the_compiler
def test_given_actions_in_compiled_calls_earn_what_plain_steps_do(monkeypatch):
    monkeypatch.setattr(compiled, "UNROLLED_DECISIONS", 3)
    plain, quick = (env_of(mixed_market(), **AWKWARD) for _ in range(2))
    quick.compiled = True
    for segment in range(3):
        actions = actions_of(segment)
        _, observations, rewards, terminated, truncated = play_segment(plain, actions)
        quick.begin_segment()
        result = quick.play(take_given_actions, actions)
        torch.testing.assert_close(result.observations, observations[:-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(quick.account_observations(), observations[-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(result.rewards, rewards, rtol=0, atol=1e-9)
        assert torch.equal(result.terminated, terminated)
        assert torch.equal(result.truncated, truncated[-1])
    assert terminated.any()
    assert_same_accounts(plain, quick)


@pytest.mark.drill
@of_the_compiler
def test_a_process_may_compile_for_more_sizes_than_torch_allows_by_default():
    with torch._dynamo.config.patch(recompile_limit=2):
        run = compiled.compiled(lambda x: x + 1, "cpu")
        for size in range(2, 6):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))
