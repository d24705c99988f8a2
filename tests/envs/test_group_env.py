"""GroupEnv plays what its docstring says: compared with a plain walk, and with bars that differ later."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data_sources.bars import Bars
from envs.config import GroupConfig
from envs.grid import Grid, bytes_of_grid
from envs.group_env import GroupEnv
from envs.later_bars import change_bars_after, replace_bars_after
from envs.market import Market
from tests.envs.group_reference import GroupWalk, ReferenceGroup, within_caps
from tests.envs.markets import CONTEXT, HORIZON, NEVER, config_of, funded, market_of, walk

CAPS = GroupConfig(size=3, gross=1.5, net=0.4)


def without(bars: Bars, minutes: Iterable[int]) -> Bars:
    """Return the bars but those with these numbers."""
    return bars.select(~np.isin(np.arange(len(bars)), list(minutes)))


def awkward_bars(with_funding: bool = True) -> list[Bars]:
    """Coins and a perpetual future with missing minutes, a late start, an outage and an end."""
    future = walk("BBB", 600, "perpetual", seed=1, sigma=5e-3)
    late = walk("CCC", 600, seed=2, sigma=5e-3)
    return [
        without(walk("AAA", 600, sigma=5e-3), (140, 141, 150, 163, 202)),
        funded(future) if with_funding else future,
        without(late, range(130)),
        without(walk("DDD", 600, seed=3, sigma=5e-3), range(160, 240)),
        walk("EEE", 190, seed=4, sigma=5e-3),
    ]


def group_env(market: Market, seed: int = 0, num_groups: int = 6, **changes: Any) -> GroupEnv:
    group = changes.pop("group", CAPS)
    config = config_of(num_envs=num_groups * group.size, group=group, **changes)
    return GroupEnv(market, config, "cpu", seed)


def actions_for(env: GroupEnv, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (env.config.horizon, env.config.num_envs)
    drawn = torch.randint(0, len(env.config.positions), shape, generator=generator)
    # Choices that last, so that positions are held, too.
    return drawn[torch.arange(shape[0]) // 3]


@pytest.mark.parametrize("costs", [{}, {"range_slippage": 0.1, "volume_slippage": 0.01}])
def test_segments_are_those_of_a_plain_walk(costs: dict[str, float]) -> None:
    bars = awkward_bars()
    market = market_of(*bars)
    env = group_env(market, episode_bars=HORIZON, ruin_fraction=0.985, borrow_rate=20.0, **costs)
    clock = env.grid.minutes.tolist()
    plain = GroupWalk(bars, env.config, clock)
    seen = {"unfilled": 0, "gone": 0, "ruined": 0, "unready": 0}
    # Around all that happens, whether or not the symbols are ready.
    generator = torch.Generator().manual_seed(1)
    env._places = lambda: (
        torch.rand(6, 5, generator=generator).argsort(1)[:, :3],
        torch.randint(100, 320, (6,), generator=generator),
    )
    for number in range(8):
        env.begin_segment()
        begins, groups = env.minute.tolist(), env.symbols.tolist()
        actions = actions_for(env, number)
        played = env.play(lambda _, action: (action,), actions)
        for row, (begin, symbols) in enumerate(zip(begins, groups, strict=True)):
            names = [market.symbols[symbol] for symbol in symbols]
            account = ReferenceGroup(env.config.ruin_fraction)
            for h in range(HORIZON):
                minute = begin + h
                chosen = actions[h].view(len(groups), -1)[row].tolist()
                wanted = {}
                for name, choice in zip(names, chosen, strict=True):
                    is_ready, gone = plain.is_ready(name, minute), plain.is_gone(name, minute + 1)
                    target = env.config.positions[choice] if is_ready and not gone else 0.0
                    wanted[name] = target * CAPS.share
                    seen["gone"] += gone
                    seen["unready"] += not is_ready
                here, there = (
                    {name: plain.meet(name, at) for name in names} for at in (minute + 1, minute + 2)
                )
                seen["unfilled"] += not all(meeting.is_filled for meeting in here.values())
                log_return = account.fill(within_caps(wanted, CAPS.gross, CAPS.net), here, there)
                assert math.isclose(
                    float(played.rewards[h, row]), log_return, rel_tol=0, abs_tol=1e-6
                )  # prices are float32
                if account.ruined:
                    break
            seen["ruined"] += account.ruined
    assert all(seen.values()), seen


def test_nothing_depends_on_a_later_bar_of_any_symbol() -> None:
    bars = awkward_bars(with_funding=False)  # which changed bars have not
    market = market_of(*bars)
    env = group_env(market, num_groups=4)
    ages = env._played.clone()
    tokens, actions = env.begin_segment(), actions_for(env)
    played = env.play(lambda _, action: (action,), actions)
    begin = env.minute - HORIZON
    for cut in (0, HORIZON // 2, HORIZON - 1):
        for row in range(4):
            moment = int(env.grid.minutes[begin[row] + cut])
            other = market_of(*change_bars_after(bars, moment, seed=cut), statistics=market.statistics)
            twin = group_env(replace(other, volatility=market.volatility), num_groups=1)
            twin.grid = Grid.of(other, CAPS.size)
            names = [market.symbols[number] for number in env.symbols[row].tolist()]
            symbol, minute = (
                torch.tensor([[other.symbols.index(name) for name in names]]),
                begin[row : row + 1],
            )
            twin._places = lambda symbol=symbol, minute=minute: (symbol, minute)
            if int(minute) + HORIZON + 1 >= len(twin.grid.minutes):
                continue
            slots = slice(row * CAPS.size, (row + 1) * CAPS.size)
            twin._played[:] = ages[row]
            assert torch.equal(
                twin.begin_segment()[:, : CONTEXT + cut + 1], tokens[slots, : CONTEXT + cut + 1]
            )
            again = twin.play(lambda _, action: (action,), actions[:, slots])
            ours = played.observations[: cut + 1, slots]
            assert torch.equal(again.observations[: cut + 1], ours)
            assert torch.equal(again.held[: cut + 1, 0], played.held[: cut + 1, row])
            assert torch.equal(again.rewards[: max(0, cut - 1), 0], played.rewards[: max(0, cut - 1), row])


def test_an_ended_symbol_is_sold_at_its_last_close_and_a_late_one_joins() -> None:
    bars = [walk("AAA"), walk("BBB", seed=1), walk("CCC", 300, seed=2)]
    env = group_env(market_of(*bars), num_groups=1, episode_bars=10 * HORIZON)
    last = 299
    env._places = lambda: (torch.tensor([[0, 1, 2]]), torch.tensor([last - 5]))
    env.begin_segment()
    held = []
    while int(env.minute) < last + 70:
        if env._step == HORIZON:
            env.begin_segment()
        _, ruined, _ = env.step(torch.tensor([0, 0, 2]))  # short, short, long
        assert not ruined
        held.append(float(env.account.units[0, 2]))
    # Held at its last close while it may come back, an hour, and sold then.
    assert held[2] > 0 and held[50] == held[10] and held[-1] == 0.0
    assert int(env.account.choice[0, 2]) == 1


def test_a_state_resumes_to_the_bit_and_fits_a_refreshed_market() -> None:
    bars = awkward_bars()
    env = group_env(market_of(*bars), episode_bars=4 * HORIZON)
    play = lambda env, seed: env.play(lambda _, action: (action,), actions_for(env, seed))  # noqa: E731
    env.begin_segment()
    play(env, 0)
    state = env.state_dict()
    twin = group_env(market_of(*bars), seed=9, episode_bars=4 * HORIZON)
    twin.load_state_dict(state)
    assert torch.equal(env.begin_segment(), twin.begin_segment())
    for ours, theirs in zip(play(env, 1)[:7], play(twin, 1)[:7], strict=True):
        assert torch.equal(ours, theirs)
    # The front is trimmed and a split halves the prices of one: the same accounts are worth the same.
    split = {name: getattr(bars[1], name) / 2 for name in ("open", "high", "low", "close")}
    fresh = [bars[0].rows(20, len(bars[0])), replace(bars[1], **split).rows(20, 600), *bars[2:]]
    other = group_env(market_of(*fresh), seed=9, episode_bars=4 * HORIZON)
    other.load_state_dict(state)
    stays = ~other._over
    assert bool(stays.any())
    other.begin_segment()
    env.load_state_dict(state)
    env.begin_segment()
    ours, theirs = play(env, 1).rewards[:, stays], play(other, 1).rewards[:, stays]
    assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_groups_are_of_one_kind_and_ready_where_enough_are() -> None:
    stocks = [walk(name, 500, "stock", seed=seed) for seed, name in enumerate(("SSS", "TTT", "UUU"))]
    market = market_of(*awkward_bars(), *stocks)
    env = group_env(market, num_groups=64)
    env.begin_segment()
    is_stock = env.symbols >= 5
    assert bool((is_stock.all(1) | (~is_stock).all(1)).all()) and bool(is_stock.any()) and not is_stock.all()
    assert all(len(set(row)) == 3 for row in env.symbols.tolist())
    with pytest.raises(ValueError, match="a group of 6 symbols must fit into a market"):
        group_env(market, group=GroupConfig(6, 1.0, 0.0))


def test_bars_before_the_holdout_decide_all() -> None:
    bars = awkward_bars(with_funding=False)
    end_ns = int(bars[1].open_time[300])
    cuts = [int(np.searchsorted(series.open_time, end_ns)) - 1 for series in bars]
    other = [replace_bars_after(series, cut, seed=1) for series, cut in zip(bars, cuts, strict=True)]
    markets = [market_of(*series, holdout_start_ns=end_ns) for series in (bars, other)]
    envs = [group_env(market) for market in markets]
    for _ in range(3):
        assert torch.equal(*(env.begin_segment() for env in envs))
        a, b = (env.play(lambda _, action: (action,), actions_for(env)) for env in envs)
        assert torch.equal(a.rewards, b.rewards)
    assert int(envs[0].grid.minutes[-1]) < end_ns < NEVER


def test_segments_are_laid_out_by_the_clock_as_those_of_a_symbol_are() -> None:
    market = market_of(walk("AAA", 3_200, gaps={700: 90}))
    grid = Grid.of(market, 1)
    bars = torch.arange(CONTEXT, 3_200)
    starts = market.segment_starts(0, bars, HORIZON)
    is_known = starts <= bars
    assert int((~is_known).sum()) == CONTEXT  # after the hole
    assert torch.equal(grid.segment_starts(bars, HORIZON)[is_known], starts[is_known])
    assert bool((grid.minutes == market.open_time).all())


def test_the_memory_of_a_grid_is_known_before_it_is_made() -> None:
    stocks = [walk(f"S{number}", 300, "stock", seed=number) for number in range(3)]
    for bars in (awkward_bars(), [*awkward_bars(), *stocks]):
        market = market_of(*bars, holdout_start_ns=int(bars[0].open_time[500]))
        left = Grid.of(market, 3).num_bytes - bytes_of_grid(market, 3)
        assert 0 < left < 40 * len(bars) + 200  # numbers per symbol, clock and span
