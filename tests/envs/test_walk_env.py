"""An exam walks given bars in order, once, with the same account throughout."""

from __future__ import annotations

import pytest
import torch

from data_sources.bars import MINUTE_NS
from envs.walk_env import ExamEnv
from tests.envs.account_reference import ReferenceAccount
from tests.envs.markets import CONTEXT, HORIZON, config_of, market_of, walk

YEAR_MINUTES = 365.25 * 24 * 60


def exam_of(market, places, **changes):
    config = config_of(**{"episode_bars": 2 * HORIZON, **changes})
    return ExamEnv(market, config, "cpu", places)


def play(env, seed=0):
    """Return rewards, alive before, truncated, actions and cursors of all decisions, (segments x H, N) each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(env.num_segments):
        env.begin_segment()
        for _ in range(HORIZON):
            env.account_observations()
            alive, cursor = env.alive.clone(), env.cursor.clone()
            actions = torch.randint(0, 3, (env.config.num_envs,), generator=generator)
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


def test_the_policy_sees_episodes_as_in_training_and_the_position_stays():
    env = exam_of(market_of(walk("AAA", 300)), [("AAA", 0)])
    exposure = 0.0
    for segment in range(6):
        env.begin_segment()
        before = env.account.units * env.segment.prices[0] / env.account.log_equity.exp()
        seen = env.account_observations()[0]
        assert seen[3 + 4] == pytest.approx(1 - (segment % 2) / 2)
        if segment:
            assert seen[2] == 1  # the long position
            assert float(before) == pytest.approx(exposure, rel=1e-9)
        if segment % 2 == 0:
            assert env.account.log_equity.abs() < 1e-15
        for _ in range(HORIZON):
            env.step(torch.tensor([2]))
        exposure = float(env.account.units * env.segment.prices[-1] / env.account.log_equity.exp())


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
