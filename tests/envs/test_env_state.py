"""The same accounts after a restart, a refresh or a split."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from tests.envs.markets import (
    CONTEXT,
    HORIZON,
    env_of,
    market_of,
    mixed_market,
    play_segment,
    walk,
)


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_of_another_precision_keeps_the_positions_held():
    market, positions = mixed_market(), (-0.3, 0.0, 0.7)
    narrow, wide = (
        env_of(market, positions=positions, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    play_segment(narrow)
    wide.load_state_dict(narrow.state_dict())
    held = narrow.account_observations()[:, :3]
    assert held.sum() >= 12 and torch.equal(wide.account_observations()[:, :3], held)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_saved_environment_resumes_to_the_bit(after):
    market = mixed_market()
    env = env_of(market)
    for segment in range(after):
        play_segment(env, seed=segment)
    state = through_disk(env.state_dict())
    other = env_of(market, seed=99)
    other.load_state_dict(state)
    for segment in range(6):
        for ours, theirs in zip(
            play_segment(env, seed=segment), play_segment(other, seed=segment), strict=True
        ):
            assert torch.equal(ours, theirs)
    ours, theirs = env.episode_statistics(), other.episode_statistics()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_refreshed_market_keeps_accounts_where_their_bars_are_still_there():
    first, second, third = walk("AAA", 900), walk("BBB", 900, seed=1), walk("CCC", 900, "stock", seed=2)
    until = int(first.open_time[799])
    old = market_of(*(bars.between(0, until) for bars in (first, second, third)))
    env = env_of(old, num_envs=128, episode_bars=16 * HORIZON)
    for segment in range(2):
        play_segment(env, seed=segment)
    # Trimmed in front, longer at the end, in another order, and BBB is gone.
    since = int(first.open_time[100])
    new = market_of(third.between(since, 2**62), first.between(since, 2**62), statistics=old.statistics)
    before, names, times = env.account, [old.symbols[s] for s in env._symbol], old.open_time[env.cursor]
    kept = (
        torch.tensor([name != "BBB" for name in names])
        & (times >= first.open_time[100 + CONTEXT])
        & ~env._over
    )
    # Episodes that ended for lack of bars stay over, although there are new bars.
    expected = {
        name: getattr(before, name)[kept].clone()
        for name in ("cash", "units", "log_equity", "target", "owed")
    }
    env.use(new)
    env.begin_segment()
    assert 10 < kept.sum() < 118
    assert torch.equal(new.open_time[env.cursor][kept], times[kept])
    assert [new.symbols[s] for s, k in zip(env._symbol.tolist(), kept, strict=True) if k] == [
        name for name, k in zip(names, kept, strict=True) if k
    ]
    for name, value in expected.items():
        assert torch.equal(getattr(env.account, name)[kept], value), name
    assert (env.account.log_equity[~kept] == 0).all()
    assert (env.account.units[~kept] == 0).all()
    assert (env._played[~kept] == 0).all()


def test_a_split_does_not_change_equity():
    bars = walk(num_bars=900)
    env = env_of(market_of(bars), num_envs=32)
    play_segment(env, torch.full((HORIZON, 32), 2))
    adjusted = replace(
        bars,
        **{name: getattr(bars, name) / 4 for name in ("open", "high", "low", "close")},
        volume=bars.volume * 4,
    )
    twin = env_of(env.market, num_envs=32)
    twin.load_state_dict(env.state_dict())
    twin.use(market_of(adjusted, statistics=env.market.statistics))
    held = ~env._over
    for segment in range(2):
        *_, ours, _, _ = play_segment(env, torch.full((HORIZON, 32), 2))
        *_, theirs, _, _ = play_segment(twin, torch.full((HORIZON, 32), 2))
        torch.testing.assert_close(ours[:, held], theirs[:, held], atol=1e-7, rtol=1e-6, msg=str(segment))


def test_a_state_of_fewer_or_more_environments_and_of_other_positions_loads():
    market = mixed_market()
    env = env_of(market, num_envs=16)
    play_segment(env)
    state = env.state_dict()
    for num_envs in (8, 32):
        other = env_of(market, num_envs=num_envs, positions=(1.0, -1.0))
        other.load_state_dict(state)
        # Flat accounts now hold none of the targets, the others the one that they held.
        held = state["account"]["target"][:8]
        assert torch.equal(other.account.target[:8], held)
        seen = other.account_observations()[:8, :2]
        assert torch.equal(seen, torch.stack((held == 1, held == -1), dim=1).float())
        assert torch.equal(other.account.units[:8], state["account"]["units"][:8])
        *_, rewards, _, _ = play_segment(other)
        assert torch.isfinite(rewards).all()
