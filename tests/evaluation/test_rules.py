"""The ledger without a loop earns what the environment's accounts earn; a rule trades as the plain loop says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from commands.selftest.known_markets import apply_rule as apply_rule_plainly
from envs.market import Market
from envs.walk_env import ExamEnv
from evaluation.forecasts import BarTable
from evaluation.measures import margin
from evaluation.rules import Decisions, Rule, apply_rule, choose_rules, play, walks_of
from tests.envs.markets import CONTEXT, FREE, HORIZON, config_of, funded, market_of, walk

START_NS = 0


def decisions_of(market: Market, rows: np.ndarray | None = None, **changes: object) -> Decisions:
    table = BarTable.of(market)
    rows = table.rows_between(0, 2**62) if rows is None else rows
    return Decisions.at(market, table, config_of(**changes), rows)


@pytest.mark.parametrize("leave", [0.5, 0.25, 0.0, -0.25, -0.5])
def test_a_rule_trades_as_the_plain_loop(leave: float) -> None:
    random = np.random.default_rng(1)
    forecast = random.normal(0, 0.5, (3, 400)).round(1)  # ties with the thresholds, too
    begins = np.zeros(forecast.size, np.bool_)
    begins[::400] = True
    sides = apply_rule(Rule(1, 0.5, leave), forecast.ravel(), begins)
    assert np.array_equal(sides.reshape(3, 400), apply_rule_plainly((0.5, leave), forecast))
    assert set(sides) == {-1, 0, 1}


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("flat_before_close", [0, 20])
@pytest.mark.parametrize("cost_bps", [0.0, 3.0])
def test_the_ledger_is_that_of_the_accounts(cost_bps: float, flat_before_close: int, late: int) -> None:
    """All three kinds, with a hole, a night, funding and borrowing, decision by decision."""
    market = market_of(
        funded(walk("PERP", 300, "perpetual", seed=1, gaps={140: 90})),
        walk("COIN", 260, "crypto", seed=2),
        walk("STOCK", 330, "stock", seed=3, gaps={200: 1050}),
    )
    changes = {"borrow_rate": 500.0, "flat_before_close": flat_before_close, "positions": (-1.0, 0.0, 0.5)}
    env = ExamEnv(
        market,
        config_of(**changes),
        "cpu",
        [(symbol, START_NS) for symbol in market.symbols],
        flat_cost_bps=[cost_bps] * 3,
    )
    walked = (env.schedule[..., None] + torch.arange(HORIZON)).permute(1, 0, 2).numpy()  # (S, segments, H)
    walked = walked[np.broadcast_to(env.schedule.T.numpy()[..., None] >= 0, walked.shape)]
    decisions = decisions_of(market, walked, **changes)
    sides = np.random.default_rng(0).choice([-1, 0, 1], len(walked), p=[0.3, 0.4, 0.3])
    sides = np.repeat(sides[::3], 3)[: len(walked)].astype(np.int8)  # held for a while
    targets = decisions.targets(sides, late)
    played = play(decisions, targets, cost_bps)

    action_of = np.zeros(len(market.open_time), np.int64)
    action_of[walked] = [changes["positions"].index(target) for target in targets]
    flows = np.full((5, len(market.open_time)), np.nan)  # log return, and as fractions of equity the others
    for starts in env.schedule:
        env.begin_segment()
        for ahead in range(HORIZON):
            bars = (starts + ahead).clamp(min=0).numpy()
            equity = env.account.log_equity.exp()
            env.step(torch.from_numpy(action_of[bars]))
            fill = env.last_fill / torch.stack([torch.ones_like(equity), *[equity] * 4])
            there = (starts >= 0).numpy()
            flows[:, bars[there]] = fill.numpy()[:, there]
    ours = (
        played.log_returns,
        played.traded,
        played.costs - played.borrowing,
        played.borrowing,
        played.funding,
    )
    np.testing.assert_allclose(np.stack(ours), flows[:, walked], rtol=0, atol=1e-12)
    fees = played.costs - played.borrowing
    assert (fees > 0).any() == bool(cost_bps) and (played.borrowing > 0).any() and played.funding.any()
    walks = walks_of(market, BarTable.of(market), decisions, played)
    assert [walk.symbol for walk in walks] == list(market.symbols)
    assert sum(len(walk.time) for walk in walks) == len(walked)


def test_costs_and_trades_explain_the_return() -> None:
    """What is held and paid adds up to the equity, and gross less costs is net."""
    market = market_of(walk(sigma=1e-3))
    decisions = decisions_of(market, **FREE)
    sides = np.tile(np.repeat([1, 0, -1], 5), len(decisions)).astype(np.int8)[: len(decisions)]
    found = []
    for cost_bps in (0.0, 10.0):
        played = play(decisions, decisions.targets(sides), cost_bps)
        found.append(margin(walks_of(market, BarTable.of(market), decisions, played)))
    free, costly = found
    assert free.gross_bps == free.net_bps == pytest.approx(costly.gross_bps, rel=1e-2)
    assert costly.gross_bps - costly.net_bps == pytest.approx(10.0 * costly.turnover, rel=1e-2)
    assert costly.turnover == pytest.approx(4 / 15, rel=0.02)  # in, out, in, and to the other side
    assert free.break_even_bps == pytest.approx(free.gross_bps / free.turnover)


def test_rules_are_chosen_for_their_cost() -> None:
    """Cheap: every forecast is traded. Dear: the strong ones alone. Too dear: none."""
    market = market_of(walk(num_bars=20_000, sigma=1e-3))
    decisions = decisions_of(market)
    move = np.log(decisions.next_price / decisions.price)
    random = np.random.default_rng(0)
    forecast = (0.1 * (move + 3e-3 * random.standard_normal(len(move)))).astype(np.float32)
    rules, num_trials = choose_rules(decisions, forecast[:, None], (1,), (0.0, 3.0, 1_000.0))
    cheap, dear, none = rules
    assert num_trials == 27 and none is None
    assert cheap is not None and dear is not None
    assert dear.enter > cheap.enter and cheap.horizon == 1


def test_no_decision_is_left_over_a_hole() -> None:
    market = market_of(walk(num_bars=300, gaps={150: 120}))
    decisions = decisions_of(market)
    assert decisions.rows.tolist() == [*range(148), *range(150, 298)]
    assert decisions.begins.nonzero()[0].tolist() == [0, 148]
    sides = np.ones(len(decisions), np.int8)
    assert np.flatnonzero(decisions.targets(sides, late=1) == 0).tolist() == [0, 148]
    assert CONTEXT and math.isfinite(play(decisions, decisions.targets(sides), 1.0).log_returns.sum())


def test_a_rule_sees_nothing_ahead() -> None:
    forecast = np.random.default_rng(3).normal(size=500)
    begins = np.arange(500) == 0
    changed = np.concatenate([forecast[:300], -5 * forecast[300:]])
    rule = Rule(1, 0.8, 0.1)
    before = apply_rule(rule, forecast, begins)
    assert np.array_equal(before[:300], apply_rule(rule, changed, begins)[:300])
    decisions = replace(decisions_of(market_of(walk())), begins=np.arange(598) == 0)
    targets = decisions.targets(apply_rule(rule, np.resize(forecast, 598), decisions.begins))
    later = np.where(np.arange(598) < 400, targets, 0.0)
    ours, theirs = (play(decisions, chosen, 2.0).log_returns[:400] for chosen in (targets, later))
    assert np.array_equal(ours, theirs)
