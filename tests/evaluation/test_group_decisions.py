"""Live decisions for accounts over groups: those of the exam at the same minute, with bars that come late, too."""

from __future__ import annotations

import torch

from evaluation.group_decisions import decide_groups, observe_new_groups
from evaluation.group_exam import groups_of
from evaluation.trained_policy import Actor
from tests.envs.group_reference import within_caps
from tests.envs.markets import MONDAY, market_of
from tests.envs.test_group_env import awkward_bars, group_env
from tests.evaluation.test_group_exam import CONFIG, GROUP, PlainWalk, policy_on

MINUTE = 60 * 10**9


def test_live_decisions_are_those_of_an_account_that_begins_there() -> None:
    bars = awkward_bars()
    market = market_of(*bars)
    policy = policy_on(market)
    actor = Actor(policy, market.statistics, CONFIG, market.symbols)
    (group, _) = groups_of(market, 3)
    for after in (149, 163, 180, 250):  # some of them minutes without a bar of one
        now = MONDAY + after * MINUTE
        closed = [series.between(0, now + 1) for series in bars]
        found, unavailable = decide_groups(actor, closed, [], {})
        plain = PlainWalk(policy, market, bars, group.symbols)
        plain.decide_and_fill(plain.walk.clock.index(max(int(series.open_time[-1]) for series in closed)))
        own = {each.decision.symbol: each for each in found if each.group == group.name}
        for symbol, choice in zip(group.symbols, plain.choices[0], strict=True):
            if symbol in own:
                assert own[symbol].decision.when_holding(0.0)[0] == CONFIG.positions[choice]
            else:
                assert symbol in unavailable and CONFIG.positions[choice] == 0
        targets = {name: each.decision.when_holding(0.0)[0] * GROUP.share for name, each in own.items()}
        weights = within_caps(targets, GROUP.gross, GROUP.net)
        assert all(abs(own[name].weight - weights[name]) < 1e-9 for name in own)


def test_what_is_held_is_seen_as_in_the_environment() -> None:
    market = market_of(*awkward_bars())
    env = group_env(market, num_groups=1, group=GROUP)
    env._places = lambda: (torch.tensor([[0, 1, 4]]), torch.tensor([100]))
    env.begin_segment()
    env.step(torch.tensor([2, 0, 1]))
    held = torch.tensor([[2, 0, 1]])
    seen = observe_new_groups(market, CONFIG, torch.tensor([[0, 1, 4]]), held)
    observed = env.account_observations().view(1, 3, -1)
    for slot, position in enumerate((2, 0, 1)):
        # But for the drift since the fill, its cost, and the age of the episode.
        difference = (seen[0, slot, position] - observed[0, slot]).abs()
        assert float(difference[[0, 1, 2, 9]].max()) < 1e-6 and float(difference[3:8].max()) < 0.3
