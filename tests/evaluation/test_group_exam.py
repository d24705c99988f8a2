"""The exam of accounts over groups: the same walk decision by decision, without foresight, whoever walks what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import Bars
from envs.config import GroupConfig
from envs.later_bars import replace_bars_after
from envs.market import Market
from evaluation.exam import POLICY, at_flat_cost
from evaluation.group_exam import examine_groups, groups_of
from models.policy import Policy
from tests.envs.group_reference import GroupWalk, ReferenceGroup, within_caps
from tests.envs.markets import CONTEXT, HORIZON, MONDAY, NEVER, config_of, market_of, walk
from tests.envs.test_group_env import awkward_bars
from tests.training.test_group_rollout import policy_for as policy_of_env

GROUP = GroupConfig(size=3, gross=1.2, net=0.3)
CONFIG = config_of(num_envs=3, group=GROUP, episode_bars=2 * HORIZON)
START = MONDAY + 60 * 60 * 10**9


def policy_on(market: Market) -> Policy:
    from envs.group_env import GroupEnv

    policy = policy_of_env(GroupEnv(market, CONFIG, "cpu", 0)).eval()
    torch.nn.init.normal_(policy.head.account.weight, std=0.3)
    return policy


def test_the_walk_is_the_plain_one_decision_by_decision() -> None:
    bars = awkward_bars()
    market = market_of(*bars)
    policy = policy_on(market)
    (group, _) = groups_of(market, 3)
    start = START + 45 * 60 * 10**9
    found = examine_groups(policy, market, CONFIG, [group], start, NEVER, max_segments=7)[POLICY][0]
    plain = PlainWalk(policy, market, bars, group.symbols)
    expected = [plain.decide_and_fill(minute) for minute in plain.minutes(start, len(found.time))]
    assert np.abs(found.log_returns - np.array(expected)).max() < 1e-6
    assert len(expected) == 7 * HORIZON and len(set(plain.choices)) > 5


class PlainWalk:
    """One account whose every decision reads its own segment, laid out by the clock."""

    def __init__(self, policy: Policy, market: Market, bars: list[Bars], symbols: tuple[str, ...]) -> None:
        self.policy, self.market, self.symbols = policy, market, symbols
        clock = sorted({int(time) for series in bars for time in series.open_time})
        self.walk = GroupWalk(bars, CONFIG, clock)
        self.offset = dict(zip(market.symbols, market.offsets.tolist(), strict=False))
        self.account = ReferenceGroup(CONFIG.ruin_fraction)
        self.held = dict.fromkeys(symbols, 1)
        self.log_equity = self.peak = self.start = 0.0
        self.played = 0
        self.choices: list[tuple[int, ...]] = []

    def minutes(self, start_ns: int, count: int) -> range:
        first = next(n for n, time in enumerate(self.walk.clock) if time >= start_ns)
        self.first = max(CONTEXT, first)
        return range(self.first, self.first + count)

    def decide_and_fill(self, minute: int) -> float:
        day = self.walk.clock[minute] // (86_400 * 10**9)
        of_day = next(n for n, time in enumerate(self.walk.clock) if time // (86_400 * 10**9) == day)
        begin = max(CONTEXT, of_day)
        start = minute - (minute - begin) % HORIZON
        if self.played == CONFIG.episode_bars:
            self.played = 0
        closes = {n: float(self.walk.bars[n].close[self.walk.newest(n, minute)]) for n in self.symbols}
        value = {n: self.account.units.get(n, 0.0) * closes[n] for n in self.symbols}
        equity = self.account.cash + sum(value.values())
        if self.played == 0:
            self.start = self.peak = math.log(equity)
        wanted = {}
        chosen = []
        for name in self.symbols:
            tokens = [self.walk.newest(name, t) for t in range(start - CONTEXT, minute + 1)]
            features = [
                self.market.features[self.offset[name] + bar].float()
                if bar >= 0
                else torch.zeros(self.market.num_features)
                for bar in tokens
            ]
            is_perpetual = self.walk.bars[name].asset_class == "perpetual"
            rate = (CONFIG.perpetual_fee_bps if is_perpetual else CONFIG.crypto_fee_bps) + CONFIG.slippage_bps
            exposure = {n: value[n] / equity for n in self.symbols}
            account = [float(self.held[name] == k) for k in range(3)] + [
                exposure[name] / GROUP.share,
                sum(exposure.values()) / GROUP.gross,
                sum(map(abs, exposure.values())) / GROUP.gross,
                10 * (math.log(equity) - self.peak),
                10 * (math.log(equity) - self.start),
                1 - self.played / CONFIG.episode_bars,
                1e3 * rate / 1e4,
            ]
            observed = torch.tensor(account).clamp(-8, 8)
            with torch.no_grad():
                projected = self.policy.encode(torch.stack(features)[None], 1)[0, 0]
                choice = int(self.policy.head.decide(projected, observed)[0].argmax())
            may_hold = self.walk.is_ready(name, minute) and not self.walk.is_gone(name, minute + 1)
            chosen.append(choice if may_hold else 1)
            wanted[name] = CONFIG.positions[chosen[-1]] * GROUP.share
        here, there = ({n: self.walk.meet(n, at) for n in self.symbols} for at in (minute + 1, minute + 2))
        log_return = self.account.fill(within_caps(wanted, GROUP.gross, GROUP.net), here, there)
        for name, choice in zip(self.symbols, chosen, strict=True):
            self.held[name] = choice if here[name].is_filled else self.held[name]
        self.choices.append(tuple(chosen))
        self.peak = max(self.peak, self.log_equity)
        self.log_equity += log_return
        self.played += 1
        return log_return


def test_later_bars_and_other_groups_change_nothing_and_costs_do() -> None:
    bars = [walk(f"S{number}", 500, seed=number) for number in range(6)]
    market = market_of(*bars)
    policy = policy_on(market)
    groups = groups_of(market, 3)
    assert [group.symbols for group in groups] == [("S0", "S1", "S2"), ("S3", "S4", "S5")]
    walks = examine_groups(policy, market, CONFIG, groups, START, NEVER, flat_costs_bps=(0.0, 20.0))
    free, dear = (sum(w.log_returns.sum() for w in walks[at_flat_cost(POLICY, b)]) for b in (0.0, 20.0))
    assert dear < sum(own.log_returns.sum() for own in walks[POLICY]) < free
    assert np.abs(walks["always flat"][0].log_returns).max() == 0
    hold = walks["buy and hold"][0]
    assert hold.traded[0] == pytest.approx(GROUP.gross, rel=2e-3) and hold.traded[1:].max() == 0
    alone = examine_groups(policy, market, CONFIG, groups[1:], START, NEVER)[POLICY][0]
    assert np.array_equal(alone.log_returns, walks[POLICY][1].log_returns)
    cut = 300
    other = [replace_bars_after(series, cut, seed=2 * number + 1) for number, series in enumerate(bars)]
    other = [replace(series, open_time=bars[0].open_time) for series in other]
    twin = market_of(*other, statistics=market.statistics)
    again = examine_groups(policy, twin, CONFIG, groups, START, NEVER)[POLICY][0]
    known = int((walks[POLICY][0].time <= np.datetime64(int(bars[0].open_time[cut]), "ns")).sum()) - 1
    assert known > 200
    assert np.array_equal(again.log_returns[: known - 1], walks[POLICY][0].log_returns[: known - 1])
    assert not np.array_equal(again.log_returns, walks[POLICY][0].log_returns)


def test_symbols_left_over_share_a_group_with_the_first() -> None:
    market = market_of(*[walk(f"S{number}", 500, seed=number) for number in range(4)])
    assert [group.symbols for group in groups_of(market, 3)] == [("S0", "S1", "S2"), ("S3", "S0", "S1")]
    assert groups_of(market, 3, ["S1", "S2", "S3"])[0].symbols == ("S1", "S2", "S3")
    with pytest.raises(ValueError, match="a group needs 5 symbols of one kind, stocks or coins: there are 4"):
        groups_of(market, 5)


def test_a_flat_cost_that_cannot_be_paid_is_refused() -> None:
    market = market_of(*awkward_bars())
    policy, groups = policy_on(market), groups_of(market, 3)
    with pytest.raises(ValueError, match=r"a flat cost must be 0 or more and under 4166\.67 bps, was 6000"):
        examine_groups(policy, market, CONFIG, groups, START, NEVER, flat_costs_bps=(0.0, 6000.0))
