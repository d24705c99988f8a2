"""Many steps in one call, and steps by torch.compile, are what one plain step after the other is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs import compiled
from tests.envs.markets import HORIZON, env_of, mixed_market, play_segment

# Whatever changes the arithmetic of a step: large orders, orders that do not count, and ruin.
AWKWARD = {"volume_slippage": 0.02, "flat_before_close": 3, "ruin_fraction": 0.99, "num_envs": 32}
# Torch's own, when it loads its compiler.
of_the_compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def decide(observations, wishes, bias):
    """Something that hangs on the account and on what it is given, and tells more than the actions."""
    scores = wishes + observations[:, :3] * bias[:, None] - 50 * observations[:, 4:5] * wishes.flip(1)
    return scores.argmax(-1), scores


def given_of(segment, num_envs=32):
    generator = torch.Generator().manual_seed(segment)
    return (
        torch.rand(HORIZON, num_envs, 3, generator=generator),
        torch.rand(HORIZON, num_envs, generator=generator),
    )


def assert_same(ours, theirs, tolerance):
    for one, two in zip((*ours[:6], *ours.told), (*theirs[:6], *theirs.told), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


def test_playing_a_segment_is_deciding_and_stepping_one_by_one():
    played, stepped = (env_of(mixed_market(), **AWKWARD) for _ in range(2))
    for segment in range(3):
        given = given_of(segment)
        played.begin_segment(), stepped.begin_segment()
        result = played.play(decide, *given)
        for t in range(HORIZON):
            observations = stepped.account_observations()
            assert torch.equal(result.observations[t], observations)
            assert torch.equal(result.alive[t], stepped.alive)
            assert torch.equal(result.log_equity[t], stepped.account.log_equity)
            actions, scores = decide(observations, given[0][t], given[1][t])
            rewards, terminated, truncated = stepped.step(actions)
            assert torch.equal(result.told[0][t], actions) and torch.equal(result.told[1][t], scores)
            assert torch.equal(result.rewards[t], rewards)
            assert torch.equal(result.terminated[t], terminated)
        assert torch.equal(result.truncated, truncated)
        assert torch.equal(played.account_observations(), stepped.account_observations())
    assert result.terminated.any() and not result.alive.all()


def test_a_segment_that_has_not_just_begun_is_not_played():
    env = env_of(mixed_market())
    with pytest.raises(RuntimeError, match="call begin_segment"):
        env.play(decide, *given_of(0, 16))
    env.begin_segment()
    env.step(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="1 steps of the segment are taken"):
        env.play(decide, *given_of(0, 16))


@pytest.mark.slow
@of_the_compiler
def test_compiled_decisions_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(compiled, "UNROLLED_DECISIONS", 3)  # leaves one step over, which is not compiled
    plain, quick = (env_of(mixed_market(), **AWKWARD) for _ in range(2))
    quick.compiled = True
    for segment in range(3):
        plain.begin_segment(), quick.begin_segment()
        expected = plain.play(decide, *given_of(segment))
        assert_same(quick.play(decide, *given_of(segment)), expected, 1e-5)
        torch.testing.assert_close(
            quick.account_observations(), plain.account_observations(), rtol=0, atol=1e-5
        )
    assert expected.terminated.any() and not expected.alive.all()
    for one, two in zip(plain.account.tensors(), quick.account.tensors(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)
    ours, theirs = quick.episode_statistics(), plain.episode_statistics()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9)


def test_replaying_actions_is_the_same_as_stepping_through_them():
    market = mixed_market()
    given = {"range_slippage": 0.3, "volume_slippage": 0.02, "flat_before_close": 3, "ruin_fraction": 0.9}
    env, twin = (
        env_of(market, num_envs=32, episode_bars=2 * HORIZON, borrow_rate=5.0, **given) for _ in range(2)
    )
    for segment in range(6):
        actions = torch.from_numpy(np.random.default_rng(segment).integers(0, 3, (HORIZON, 32)))
        *_, rewards, terminated, truncated = play_segment(env, actions)
        again = twin.replay(actions, by_compiler=False)
        assert torch.equal(rewards, again[0])
        assert torch.equal(terminated, again[1])
        assert torch.equal(truncated[-1], again[2])
        assert torch.equal(env.account_observations(), twin.account_observations())
    ours, theirs = env.episode_statistics(), twin.episode_statistics()
    assert ours["ruins"] > 0
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"actions must have shape \(16, 32\)"):
        twin.replay(actions[1:])


@pytest.mark.slow
@of_the_compiler
def test_compiled_steps_and_replays_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(compiled, "UNROLLED", 4)  # quicker to compile
    plain, stepped, replayed = (env_of(mixed_market(), **AWKWARD) for _ in range(3))
    stepped.compiled = True
    for segment in range(3):
        actions = torch.from_numpy(np.random.default_rng(segment).integers(0, 3, (HORIZON, 32)))
        _, seen, *expected, truncated = play_segment(plain, actions)
        _, ours, *outcomes, _ = play_segment(stepped, actions)
        again = replayed.replay(actions)
        torch.testing.assert_close(ours, seen, rtol=0, atol=1e-6)
        for one, two, three in zip(expected, outcomes, again, strict=False):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-9)
            torch.testing.assert_close(three, one, rtol=0, atol=1e-9)
        assert torch.equal(again[2], truncated[-1])
    assert expected[1].any()
    for env in (stepped, replayed):
        for one, two in zip(plain.account.tensors(), env.account.tensors(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@of_the_compiler
def test_a_process_may_compile_for_more_sizes_than_torch_allows_by_default():
    with torch._dynamo.config.patch(recompile_limit=2):
        run = compiled._compiled(lambda x: x + 1, "cpu")
        for size in range(2, 6):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))
