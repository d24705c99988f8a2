"""Episodes, timing and look-ahead; test_env_state.py tests restarts and refreshes."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from benchmarks.env_throughput import bytes_per_environment
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.calendar import expected_minutes, minutes_left
from envs.later_bars import replace_bars_after
from envs.trading_env import TradingEnv
from tests.envs.account_reference import ReferenceAccount
from tests.envs.markets import (
    CONTEXT,
    FREE,
    HORIZON,
    config_of,
    constant,
    env_of,
    market_of,
    mixed_market,
    moved,
    play_segment,
    walk,
    without_syncs,
)


def test_tokens_are_the_bars_up_to_each_decision():
    env = env_of(mixed_market())
    bars = env.begin_segment()
    assert bars.shape == (16, CONTEXT + HORIZON + 1, env.market.num_features)
    assert bars.dtype == torch.float32
    for n, cursor in enumerate(env.cursor.tolist()):
        expected = env.market.features[cursor - CONTEXT : cursor + HORIZON + 1].float()
        assert torch.equal(bars[n], expected)


def test_the_next_segment_continues_right_after_the_last_with_the_same_account():
    env = env_of(mixed_market(), episode_bars=64 * HORIZON)
    first, observations, *_ = play_segment(env)
    second = env.begin_segment()
    same = [n for n in range(16) if torch.equal(first[n, -CONTEXT - 1 :], second[n, : CONTEXT + 1])]
    assert len(same) >= 12  # the others ran out of bars
    assert not env._over.any()
    assert torch.equal(env.account_observations()[same], observations[-1][same])


def test_rewards_are_the_plain_ledger_on_the_bars_of_the_market():
    random = np.random.default_rng(0)
    crypto, stock = walk("AAA", 900, gaps={300: 40}), walk("BBB", 900, "stock", seed=1, gaps={250: 1050})
    market = market_of(crypto, stock)
    env = env_of(market, borrow_rate=5.0)
    accounts = [ReferenceAccount(env.config.ruin_fraction, held=0.0) for _ in range(16)]
    years = 365.25 * 24 * 60 * MINUTE_NS
    for segment in range(4):
        env.begin_segment()
        symbols, cursors = env._symbol.tolist(), env.cursor.tolist()
        ended = torch.zeros(16, dtype=torch.bool)
        for h in range(HORIZON):
            actions = random.integers(0, 3, 16)
            rewards, _, truncated = env.step(torch.from_numpy(actions))
            ended |= truncated
            for n, account in enumerate(accounts):
                bars = (crypto, stock)[symbols[n]]
                bar = cursors[n] - 900 * symbols[n] + h
                # Prices are kept as float32.
                price, next_price = (float(np.float32(bars.open[bar + k])) for k in (1, 2))
                span = (bars.open_time[bar + 2] - bars.open_time[bar + 1]) / years
                rate = ((5.0, 0.5)[symbols[n]] + 1.0) / 1e4
                expected = account.fill(env.config.positions[actions[n]], price, next_price, rate, 5.0 * span)
                assert float(rewards[n]) == pytest.approx(expected, abs=1e-7), (segment, h, n)
        for n, account in enumerate(accounts):
            assert float(env.account.log_equity[n].exp()) == pytest.approx(
                account.equity(next_price_of(env, n)), rel=1e-9
            )
            if ended[n]:
                accounts[n] = ReferenceAccount(env.config.ruin_fraction, held=0.0)


def next_price_of(env, n):
    return float(env.market.quotes[env.cursor[n] + 1, 0])


def test_rewards_of_an_episode_add_up_to_its_log_equity():
    env = env_of(market_of(walk(num_bars=5_000)), num_envs=8, dtype=torch.float64)
    total, ended = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    for segment in range(8):
        *_, rewards, _, truncated = play_segment(env, seed=segment)
        total += rewards.sum(0)
        torch.testing.assert_close(total, env.account.log_equity.float(), atol=1e-6, rtol=1e-6)
        total.masked_fill_(truncated[-1], 0)
        ended += truncated[-1]
    assert (ended >= 2).all()


def test_episodes_end_after_their_bars_at_a_segments_last_step_and_not_all_at_once():
    env = env_of(market_of(walk(num_bars=50_000)), num_envs=15, episode_bars=3 * HORIZON)
    age = torch.arange(15) % 3  # the first episodes are this many segments old
    for segment in range(7):
        env.begin_segment()
        left = env.account_observations()[:, 3 + 4]
        torch.testing.assert_close(left, 1 - ((segment + age) % 3) / 3)
        for h in range(HORIZON):
            _, terminated, truncated = env.step(torch.full((15,), h % 3))
            assert not terminated.any()
            assert torch.equal(truncated, ((segment + 1 + age) % 3 == 0) & (h == HORIZON - 1))
    statistics = env.episode_statistics()
    assert statistics["episodes"] == 5 * (2 + 2 + 3)
    assert statistics["decisions"] == 7 * 15 * HORIZON
    assert sum(v for k, v in statistics.items() if k.startswith("in_position")) == 7 * 15 * HORIZON
    assert all(float(value) == 0 for value in env.episode_statistics().values())


def test_an_episode_is_cut_where_the_next_segment_does_not_fit():
    room = CONTEXT + 2 * HORIZON + 2
    env = env_of(market_of(walk(num_bars=room)), num_envs=256, episode_bars=999 * HORIZON)
    starts = []
    for segment in range(6):
        env.begin_segment()
        starts.append(env.cursor.clone())
        for _ in range(HORIZON):
            *_, truncated = env.step(torch.zeros(256, dtype=torch.int64))
        fits = starts[-1] + 2 * HORIZON + 1 <= room - 1
        assert torch.equal(truncated, ~fits), segment
    assert torch.cat(starts).min() >= CONTEXT
    assert torch.cat(starts).max() + HORIZON + 1 <= room - 1


def test_segments_never_cross_a_hole_nor_touch_the_holdout():
    crypto = walk("AAA", 700, gaps={100: 61, 300: 60, 500: 4_000})
    stock = walk("BBB", 700, "stock", seed=1, gaps={90: 1050, 300: 6_001, 450: 5_000})
    holdout = int(crypto.open_time[600])
    market = market_of(crypto, stock, holdout_start_ns=holdout)
    env = env_of(market, num_envs=256)
    hole = torch.where(market.is_crypto, 60, 6_000) * MINUTE_NS
    reach = torch.arange(-CONTEXT, HORIZON + 2)
    for segment in range(12):
        env.begin_segment()
        window = env.cursor[:, None] + reach
        times = market.open_time[window]
        assert (times < holdout).all()
        assert (times.diff(dim=1) > 0).all()
        assert (times.diff(dim=1) <= hole[env._symbol][:, None]).all()
        assert (window >= market.offsets[env._symbol][:, None]).all()
        for _ in range(HORIZON):
            env.step(torch.full((256,), segment % 3))


def crash_at(bar, num_bars=CONTEXT + 3 * HORIZON + 2):
    bars = constant(num_bars=num_bars)
    price = np.where(np.arange(num_bars) < bar, 50.0, 5.0)
    return replace(bars, open=price, high=price, low=price, close=price)


def test_ruin_ends_the_episode_freezes_the_account_and_starts_a_new_one():
    market = market_of(crash_at(CONTEXT + HORIZON))
    env = env_of(market, num_envs=64, episode_bars=2 * HORIZON)
    env.begin_segment()
    begun = env.cursor.clone()
    long = torch.full((64,), 2)
    ruined_at = torch.full((64,), -1)
    for h in range(HORIZON):
        alive = env.alive.clone()
        rewards, terminated, truncated = env.step(long)
        # Filled at bar h + 1, the price falls to a tenth at the crash.
        crash = CONTEXT + HORIZON - begun - 2
        assert torch.equal(terminated, (crash == h) & alive)
        assert (rewards[~alive] == 0).all()
        assert not (terminated & truncated).any()
        assert not (truncated & ~env.alive).any()
        ruined_at = torch.where(terminated, h, ruined_at)
        assert torch.isfinite(rewards).all()
    ruined = ruined_at >= 0
    assert ruined.any()
    assert not ruined.all()
    assert torch.equal(ruined, ~env.alive)
    statistics = env.episode_statistics()
    assert statistics["ruins"] == ruined.sum()
    assert statistics["decisions"] == (torch.where(ruined, ruined_at + 1, HORIZON)).sum()
    env.begin_segment()
    assert env.alive.all()
    assert (env.account.log_equity[ruined] == 0).all()
    assert (env.account.units[ruined] == 0).all()


def test_every_action_changes_the_outcome():
    env = env_of(mixed_market(), positions=(-1.0, -0.5, 0.0, 0.5, 1.0), num_envs=8)
    state = env.state_dict()
    outcomes = []
    for action in range(5):
        env.load_state_dict(state)
        *_, rewards, _, _ = play_segment(env, torch.full((HORIZON, 8), action))
        outcomes.append(rewards.sum(0))
    outcomes = torch.stack(outcomes)
    assert (outcomes[2] == 0).all()
    gaps = (outcomes[:, None] - outcomes[None]).abs() + torch.eye(5)[..., None]
    assert (gaps > 1e-6).all()


def test_without_costs_a_constant_price_pays_nothing_for_any_action():
    env = env_of(market_of(constant()), positions=(-1.0, 0.0, 0.3, 2.0), **FREE)
    *_, rewards, terminated, _ = play_segment(env)
    assert rewards.abs().max() < 1e-7
    assert not terminated.any()


def test_the_filling_bars_range_makes_fills_worse():
    env = env_of(market_of(walk()), range_slippage=0.5, num_envs=4, **FREE)
    plain = env_of(market_of(walk()), num_envs=4, **FREE)
    env.begin_segment(), plain.begin_segment()
    bar = env.cursor + 1
    bars = walk()
    spread = torch.from_numpy((bars.high - bars.low) / bars.open)[bar]
    long = torch.full((4,), 2)
    difference = plain.step(long)[0] - env.step(long)[0]
    torch.testing.assert_close(difference, torch.log1p(0.5 * spread).float(), atol=1e-6, rtol=1e-3)


def test_a_large_order_pays_by_its_fraction_of_the_bars_volume():
    bars = walk()
    given = {"volume_slippage": 0.05, "account_value": 1_000.0, **FREE}
    env, plain = env_of(market_of(bars), num_envs=4, **given), env_of(market_of(bars), num_envs=4, **FREE)
    env.begin_segment(), plain.begin_segment()
    bar = env.cursor + 1
    fraction = 1_000 / torch.from_numpy(bars.volume * bars.open)[bar]
    long = torch.full((4,), 2)
    difference = plain.step(long)[0] - env.step(long)[0]
    expected = torch.log1p(0.05 * fraction.clamp(max=1)).float()
    assert expected.min() < 0.048 / 2 < expected.max()
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=1e-3)


def trading_days(num_days, first=(2024, 7, 1), missing=()):
    """Stock bars of whole New York sessions from a Monday on, half days and holidays as they were."""
    start = int(datetime(*first, tzinfo=UTC).timestamp()) * 10**9
    times = expected_minutes(start, start + num_days * 86_400 * 10**9)
    times = np.delete(times, list(missing))
    return replace(walk("BBB", len(times), "stock", sigma=3e-4), open_time=times)


@pytest.mark.parametrize("positions", [(-1.0, 0.0, 1.0), (1.0, -1.0)])
def test_stocks_are_flat_before_the_scheduled_close_when_configured(positions):
    bars = trading_days(5)  # Wednesday closes at 13:00, Thursday is a holiday
    minutes = bars.open_time // MINUTE_NS % 1440
    last = np.append(np.diff(bars.open_time) > MINUTE_NS, True)
    left = np.concatenate([np.arange(n, 0, -1) for n in np.diff(np.flatnonzero(last), prepend=-1)])
    assert sorted(set(minutes[last])) == [1019, 1199]
    crypto = walk("AAA", len(bars))
    market = market_of(bars, crypto)
    assert (market.minutes_left[len(bars) :] == 32_767).all()
    env = env_of(market, num_envs=64, flat_before_close=5, episode_bars=64 * HORIZON, positions=positions)
    checked = 0
    for _ in range(60):
        env.begin_segment()
        for _ in range(HORIZON):
            env.step(torch.full((64,), positions.index(1.0)))
            fill = env.cursor.numpy()  # the bar in which the order filled
            stock = fill < len(bars)
            near = np.zeros(64, bool)
            near[stock] = np.append(left, 0)[fill[stock]] <= 5
            assert ((env.account.units.abs() < 1e-15).numpy() == near).all()
            checked += near.sum()
    assert checked > 50


def test_the_scheduled_close_does_not_depend_on_which_bars_exist():
    whole = trading_days(5)
    holes = [388, 389, 390 + 380, 780 + 205, 780 + 209]  # the last minutes of days among them
    thinned = trading_days(5, missing=holes)
    left = minutes_left(whole)
    assert left[[0, 389, 390, 780, 780 + 209, 990]].tolist() == [390, 1, 390, 210, 1, 390]
    assert np.array_equal(minutes_left(thinned), np.delete(left, holes))
    early = replace(whole, open_time=whole.open_time - 390 * MINUTE_NS)  # before the opening bell
    assert (minutes_left(early)[:390] == 0).all()
    good_friday = 1_775_174_400 * 10**9  # 2026-04-03: no session near the Saturday after it
    closed = replace(whole, open_time=good_friday + DAY_NS + np.arange(len(whole)) * MINUTE_NS)
    assert not minutes_left(closed).any()
    # The calendar ends a year ahead; beyond it, every day counts as a full session.
    far = int(time.time() // 86_400 + 550) * 1440
    later = replace(whole, open_time=(far + np.arange(len(whole))) * MINUTE_NS)
    assert sorted(set(minutes_left(later)[:1440].tolist())) == list(range(391))


class RandomModel(torch.nn.Module):
    """A causal network with random weights, and a head on its output and the account's observations."""

    def __init__(self, num_features, num_account_features):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(num_features, 32)
        self.account = torch.nn.Linear(num_account_features, 32)
        self.logits = torch.nn.Linear(32, 3)

    @torch.no_grad()
    def forward(self, past, account):
        return self.logits(torch.tanh(self.trunk(past).cumsum(1)[:, -1] + self.account(account)))


def trace(env, model, last):
    """Logits, observations and rewards of the decisions up to ``last``, with the model's own actions."""
    bars = env.begin_segment()
    logits, observations, rewards = [], [], []
    for h in range(last + 1):
        observations.append(env.account_observations())
        logits.append(model(bars[:, : CONTEXT + h + 1], observations[-1]))
        if h < last:
            rewards.append(env.step(logits[-1].argmax(1))[0])
    # The last reward ends at the open of the next bar, which must not be seen yet.
    return bars[:, : CONTEXT + last + 1], logits, observations, rewards[:-1]


@pytest.mark.parametrize("last", [0, 1, 2, 5, HORIZON - 1])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_up_to_a_decision_depends_on_any_later_bar(seed, last):
    bars = walk(num_bars=1_600, seed=seed)
    market = market_of(bars)
    env = env_of(market, num_envs=1, seed=seed, ruin_fraction=1e-6)
    model = RandomModel(market.num_features, env.num_account_features)
    truth = trace(env, model, last)
    now = int(env.cursor[0])
    later = replace_bars_after(bars, now, seed)
    # Times stay, so that the same segment is drawn; test_features changes them, too.
    other = market_of(replace(later, open_time=bars.open_time), statistics=market.statistics)
    twin = env_of(other, num_envs=1, seed=seed, ruin_fraction=1e-6)
    again = trace(twin, model, last)
    assert int(twin.cursor[0]) == now
    assert not torch.equal(market.features[now + 1 :], other.features[now + 1 :])
    torch.testing.assert_close(again, truth, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    market = mixed_market()
    runs = []
    for seed in (1, 1, 2):
        env = env_of(market, seed=seed)
        runs.append([torch.cat([part.flatten() for part in play_segment(env)]) for _ in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_calls_out_of_order_are_refused():
    env = env_of(mixed_market())
    actions = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="call begin_segment"):
        env.step(actions)
    env.begin_segment()
    env.step(actions)
    for forbidden in (env.begin_segment, env.state_dict):
        with pytest.raises(RuntimeError, match=r"after step 1|step 1 of 16"):
            forbidden()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_envs", 0),
        ("episode_bars", 100),
        ("positions", (1.0,)),
        ("positions", (0.0, 0.0)),
        ("positions", (0.0, float("nan"))),
        ("slippage_bps", -1.0),
        ("borrow_rate", float("inf")),
        ("ruin_fraction", 0.0),
        ("ruin_fraction", 1.0),
        ("crypto_fee_bps", 6_000.0),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting}|fees and slippage"):
        config_of(**{setting: value})


def test_a_market_of_other_sizes_is_refused():
    with pytest.raises(
        ValueError, match=r"must be made for context_bars and horizon \(8, 8\), was made for \(8, 16\)"
    ):
        env_of(mixed_market(), horizon=8, episode_bars=8)


@pytest.mark.gpu
def test_a_rollout_never_waits_for_the_device():
    market = moved(market_of(walk(num_bars=2_000), walk("BBB", 900, "stock", seed=1)), "cuda")
    config = config_of(num_envs=64, episode_bars=2 * HORIZON)
    env = TradingEnv(market, config, "cuda", 0)
    actions = torch.randint(0, 3, (HORIZON, 64), device="cuda")
    with without_syncs():
        for _ in range(3):
            play_segment(env, actions)
            env.episode_statistics()


def test_a_curriculum_scales_every_cost():
    outcomes = []
    for scale in (0.0, 0.5, 1.0):
        env = env_of(market_of(constant()), num_envs=4, range_slippage=0.5, borrow_rate=1e3)
        env.cost_scale = scale
        *_, rewards, _, _ = play_segment(env, torch.zeros(HORIZON, 4, dtype=torch.int64))
        outcomes.append(float(rewards.sum(0)[0]))
    free, half, whole = outcomes
    assert free == 0
    # To first order in the costs.
    assert half == pytest.approx(whole / 2, rel=0.05)
    assert whole < -0.01


def test_a_step_returns_tensors_of_its_own():
    env = env_of(mixed_market())
    env.begin_segment()
    first = env.step(torch.full((16,), 2))
    kept = [part.clone() for part in first]
    for _ in range(HORIZON - 1):
        env.step(torch.zeros(16, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_an_environment_keeps_under_two_hundred_bytes():
    env = env_of(mixed_market(), num_envs=128)
    for segment in range(2):
        play_segment(env, seed=segment)
    kept, segment = bytes_per_environment(env)
    assert 100 < kept < 200
    assert segment == (HORIZON + 2) * 5 * 8 + HORIZON
