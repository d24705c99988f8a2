"""An exam walks given bars in order, once, with the same account throughout."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS
from envs.walk_env import ExamEnv
from tests.envs.account_reference import ReferenceAccount, cost_in_bar
from tests.envs.markets import CONTEXT, HORIZON, config_of, market_of, walk

YEAR_MINUTES = 365.25 * 24 * 60


def exam_of(market, places, **changes):
    config = config_of(**{"episode_bars": 2 * HORIZON, **changes})
    return ExamEnv(market, config, "cpu", places)


def at_random(count, generator):
    return torch.randint(0, 3, (count,), generator=generator)


def long_most_of_the_time(count, generator):
    return 1 + (torch.rand(count, generator=generator) < 0.7).long()


def play(env, choose=at_random):
    """Return rewards, alive before, truncated, actions and cursors of all decisions, (segments x H, N) each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(env.num_segments):
        env.begin_segment()
        for _ in range(HORIZON):
            env.account_observations()
            alive, cursor = env.alive.clone(), env.cursor.clone()
            actions = choose(env.config.num_envs, generator)
            rewards, _, truncated = env.step(actions)
            rows.append((rewards, alive, truncated, actions, cursor))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def test_every_bar_of_each_stretch_is_walked_in_order_and_once():
    first = walk("AAA", 400, gaps={150: 300})
    second = walk("BBB", 260, "stock", seed=1)
    market = market_of(walk("CCC", 100, seed=2), first, second)
    start = int(first.open_time[40])
    env = exam_of(market, [("BBB", int(second.open_time[0])), ("AAA", start)])
    _, alive, truncated, _, cursor = play(env)
    # Stretches are bars 0 to 149 and 150 to 399; a stretch ends with up to HORIZON + 1 bars left over.
    walked = [*range(40, 40 + 6 * HORIZON), *range(150 + CONTEXT, 150 + CONTEXT + 15 * HORIZON)]
    assert cursor[alive[:, 1], 1].tolist() == [100 + bar for bar in walked]
    walked = range(CONTEXT, CONTEXT + 15 * HORIZON)
    assert cursor[alive[:, 0], 0].tolist() == [500 + bar for bar in walked]
    assert torch.nonzero(truncated[:, 1]).flatten().tolist() == [6 * HORIZON - 1, 21 * HORIZON - 1]
    assert truncated[:, 0].sum() == 1
    with pytest.raises(RuntimeError, match="all 21 segments of the exam are played"):
        env.begin_segment()


def test_rewards_add_up_to_the_return_of_one_account_over_the_whole_walk():
    bars = walk("AAA", 300)
    env = exam_of(market_of(bars), [("AAA", 0)], borrow_rate=5.0)
    rewards, alive, _, actions, cursor = play(env)
    assert alive.all()
    account = ReferenceAccount(1e-6, held=0.0)
    for action, bar in zip(actions[:, 0].tolist(), cursor[:, 0].tolist(), strict=True):
        price, after = (float(torch.tensor(bars.open[bar + k]).float()) for k in (1, 2))
        span = (bars.open_time[bar + 2] - bars.open_time[bar + 1]) / MINUTE_NS / YEAR_MINUTES
        account.fill(env.config.positions[action], price, after, 6e-4, 5.0 * span)
    assert float(rewards.double().sum().exp()) == pytest.approx(account.equity(after), rel=1e-6)
    statistics = env.episode_statistics()
    assert float(statistics["rewards"]) == pytest.approx(float(rewards.sum()), abs=1e-6)
    assert statistics["decisions"] == len(rewards)


def test_the_policy_sees_episodes_as_in_training_and_the_account_stays():
    env = exam_of(market_of(walk("AAA", 300)), [("AAA", 0)])
    units, begun, peak = 0.0, 0.0, 0.0
    for segment in range(6):
        env.begin_segment()
        seen = env.account_observations()[0]
        marked = math.log(float(env.account.cash + env.account.units * env.segment.closes[0]))
        if (
            segment % 2 == 0
        ):  # an episode begins at the newest close: the open of its first fill is not known yet
            begun = peak = marked
        assert seen[3 + 2] == pytest.approx(10 * (marked - float(env.account.log_peak)), abs=1e-6)
        assert seen[3 + 3] == pytest.approx(10 * (marked - begun), abs=1e-6)
        assert seen[3 + 4] == pytest.approx(1 - (segment % 2) / 2)
        assert float(env.account.log_peak) == pytest.approx(peak)
        if segment:
            assert seen[2] == 1  # the long position
            assert float(env.account.units) == units
        for _ in range(HORIZON):
            peak = max(peak, float(env.account.log_equity))
            env.step(torch.tensor([2]))
        units = float(env.account.units)
    assert begun != 0


def test_a_large_order_pays_for_all_that_the_account_has_grown_to_beyond_holes_too():
    bars = walk("AAA", 400, sigma=0.005, gaps={150: 300})
    growth = np.exp(0.014 * np.arange(400))
    prices = {name: getattr(bars, name) * growth for name in ("open", "high", "low", "close")}
    prices["open"] = prices["open"].astype(np.float32).astype(float)
    bars = replace(bars, volume=bars.volume / growth, **prices)
    rules = {"range_slippage": 0.02, "volume_slippage": 0.02, "account_value": 300.0}
    env = exam_of(market_of(bars), [("AAA", 0)], **rules)
    rewards, alive, _, actions, cursor = play(env, long_most_of_the_time)
    assert alive.all()
    account, last = ReferenceAccount(0.2, held=0.0), None
    for reward, action, bar in zip(rewards[:, 0], actions[:, 0].tolist(), cursor[:, 0].tolist(), strict=True):
        if last is not None and bar != last + 1:  # after a hole, in cash
            account = ReferenceAccount(0.2, held=0.0, cash=account.equity(bars.open[last + 2]))
        last = bar
        expected = account.fill(
            env.config.positions[action],
            bars.open[bar + 1],
            bars.open[bar + 2],
            cost_in_bar(bars, bar + 1, env.config),
            0.05 * (bars.open_time[bar + 2] - bars.open_time[bar + 1]) / MINUTE_NS / YEAR_MINUTES,
            cost_in_bar(bars, bar + 2, env.config),
        )
        assert float(reward) == pytest.approx(expected, abs=1e-6)
    assert account.equity(bars.open[last + 2]) > 5
    assert float(env.account.log_equity) == pytest.approx(
        math.log(account.equity(bars.open[last + 2])), rel=1e-6
    )


def test_slow_losses_over_many_episodes_are_a_ruin():
    fall = 100 * np.exp(-0.02 * np.arange(400))
    bars = replace(walk("AAA", 400), open=fall, high=fall, low=fall, close=fall)
    env = exam_of(market_of(bars), [("AAA", 0)])
    rewards, alive, *_ = play(env, lambda *_: torch.tensor([2]))
    ruined = int(alive.sum())
    # Half the equity is lost in an episode of 32 bars; a fifth is left after 80.
    assert ruined == pytest.approx(math.log(1 / 0.2) / 0.02, abs=2)
    assert float(rewards.sum().exp()) == pytest.approx(0.2, rel=0.03)


def test_the_ruined_stay_ruined_and_the_finished_count_nowhere():
    # A market in which every position but cash is soon lost.
    market = market_of(walk("AAA", 200, sigma=0.3), walk("BBB", 60, seed=1), walk("CCC", 200, seed=2))
    env = exam_of(market, [("AAA", 0), ("BBB", 0), ("CCC", 2**61)], ruin_fraction=0.9)
    rewards, alive, _, _, _ = play(env)
    ruined = int(alive[:, 0].sum())
    assert 0 < ruined < HORIZON
    assert alive[:, 1].sum() == 3 * HORIZON
    assert not alive[:, 2].any()
    assert (rewards[~alive] == 0).all()
    statistics = env.episode_statistics()
    assert statistics["decisions"] == alive.sum()
    assert (statistics["episodes"], statistics["ruins"]) == (2, 1)
    assert sum(v for k, v in statistics.items() if k.startswith("in_position")) == alive.sum()


def test_an_exam_is_the_same_every_time_and_reaches_the_holdout_only_when_the_market_does():
    bars = walk("AAA", 300)
    holdout = int(bars.open_time[200])
    training = market_of(bars, holdout_start_ns=holdout)
    with pytest.raises(ValueError, match="no place has the 18 bars of a segment after its start"):
        exam_of(training, [("AAA", holdout)])
    exam = market_of(bars, statistics=training.statistics)
    runs = [play(exam_of(exam, [("AAA", holdout)])) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][4].min() == 200
    with pytest.raises(ValueError, match="ZZZ is not among the 1 symbols"):
        exam_of(exam, [("ZZZ", 0)])
