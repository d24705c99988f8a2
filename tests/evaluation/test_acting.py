"""A live decision equals the batch evaluation's: bars replayed one by one give the same numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS, Bars
from data_sources.calendar import expected_minutes
from envs.config import EnvConfig
from envs.counterfactuals import accounts_in_every_position
from envs.latest import latest_decisions
from envs.walk_env import ExamEnv
from evaluation.exam import examine
from evaluation.trained_policy import Actor
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import CONTEXT, HORIZON, MONDAY, NEVER, config_of, market_of, walk

CONFIG = config_of(num_envs=1)


def first_bars(bars: Bars, count: int) -> Bars:
    return Bars(bars.symbol, bars.asset_class, *(getattr(bars, name)[:count] for name in COLUMNS))


def actor_of(*bars: Bars, config: EnvConfig = CONFIG) -> Actor:
    market = market_of(*bars)
    torch.manual_seed(0)
    trunk = TransformerConfig(market.num_features, 32, 2, 4, CONTEXT + HORIZON + 1)
    policy = Policy(trunk, len(config.positions) + 6, len(config.positions))
    for layer in (policy.head.logits, policy.head.account, policy.head.market):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return Actor(policy.eval(), market.statistics, config)


@torch.no_grad()
def batch(actor: Actor, bars: list[Bars], start_ns: int) -> dict[tuple[str, int], tuple[torch.Tensor, ...]]:
    """Walk an exam from ``start_ns`` on: by symbol and bar, log-probabilities (J, K), tokens, accounts."""
    market = market_of(*bars, statistics=actor.statistics)
    env = ExamEnv(market, actor.config, "cpu", [(series.symbol, start_ns) for series in bars])
    generator, seen = torch.Generator().manual_seed(0), {}
    for _ in range(env.num_segments):
        tokens = env.begin_segment()
        projected = actor.policy.encode(tokens, HORIZON + 1)
        for h in range(HORIZON):
            observed = accounts_in_every_position(env.account_observations(), env.config.positions)
            # A new account, without the drift, gain and age of the walking one.
            observed[..., 3:7], observed[..., 7] = 0.0, 1.0
            logits, _ = actor.policy.head.decide(projected[:, h, None], observed)
            for n in torch.nonzero(env.alive).flatten().tolist():
                key = bars[n].symbol, int(market.open_time[env.cursor[n]])
                seen[key] = (
                    torch.log_softmax(logits[n], -1),
                    tokens[n, : CONTEXT + h + 1],
                    observed[n].clone(),
                )
            env.step(torch.randint(0, 3, (len(bars),), generator=generator))
    return seen


def test_bars_replayed_one_by_one_give_the_numbers_of_the_batch() -> None:
    # A coin with an outage of hours and missing minutes, one with few bars, a stock with a night within.
    coin = walk("AAA", 700, gaps={90: 3, 200: 400, 333: 1, 500: 61})
    short = walk("BBB", 260, seed=1, gaps={100: 20})
    stock = walk("CCC", 400, "stock", seed=2, gaps={50: 1, 120: 1390})
    bars = [coin, short, stock]
    actor = actor_of(*bars)
    days = range(MONDAY, int(stock.open_time[-1]) + 1, DAY_NS)
    assert len(days) == 2
    walked = {day: batch(actor, bars, day) for day in days}
    compared: Counter[tuple[str, int]] = Counter()
    worst = 0.0
    for count in range(2 * CONTEXT, 700, 3):
        market = market_of(
            *(first_bars(series, count) for series in bars), horizon=1, statistics=actor.statistics
        )
        now = latest_decisions(market, CONFIG)
        live = actor.log_policy(now.bars, now.decision, now.accounts)
        for n, symbol in enumerate(now.symbols):
            time = int(market.open_time[now.bar[n]])
            day = time // DAY_NS * DAY_NS
            if (symbol, time) not in walked[day]:
                continue  # an exam leaves the last bars of a stretch over, since no fill follows
            log_policy, tokens, accounts = walked[day][symbol, time]
            seen = CONTEXT + int(now.decision[n]) + 1
            assert torch.equal(now.bars[n, :seen], tokens)
            assert not now.bars[n, seen:].any()
            assert torch.equal(now.accounts[n], accounts)
            worst = max(worst, float((live[n] - log_policy).abs().max()))
            compared[symbol, day] += 1
    assert set(compared) == {("AAA", MONDAY), ("BBB", MONDAY), ("CCC", MONDAY), ("CCC", days[1])}
    assert min(compared.values()) > 30 and compared.total() > 350
    # On some processors, other rows in a matrix product round differently.
    assert worst < 1e-5


@pytest.mark.parametrize("start_minute", [0, 37, 1439, 2000])
def test_an_exam_from_any_minute_takes_the_positions_that_live_decisions_do(start_minute: int) -> None:
    # 1,440 is no multiple of the horizon of 37: segments from the walk's begin on shift from day to day.
    config = config_of(num_envs=1, horizon=37, episode_bars=3_700)
    coin = walk("AAA", 3_400, gaps={90: 3, 1_200: 400, 2_333: 1, 2_500: 61, 2_501: 30, 2_502: 30})
    stock = walk("BBB", 900, "stock", seed=2, gaps={50: 1, 390: 1_050, 780: 1_050})
    market = market_of(coin, stock, horizon=37)
    torch.manual_seed(0)
    policy = Policy(TransformerConfig(market.num_features, 32, 2, 4, CONTEXT + 38), 9, 3)
    for layer in (policy.head.logits, policy.head.market):
        torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.zeros_(policy.head.account.weight)  # a live account has no gain or age yet
    actor = Actor(policy.eval(), market.statistics, config)
    start_ns = MONDAY + start_minute * MINUTE_NS
    walks = examine(policy, market, config, ("AAA", "BBB"), start_ns, NEVER, chunk_segments=7)["policy"]
    targets = set()
    for bars, played in zip((coin, stock), walks, strict=True):
        fills = np.searchsorted(bars.open_time, played.time.astype(np.int64))
        assert len(fills) > 100
        for t in range(CONTEXT, len(fills), 47):
            # The fill's bar was not there yet when it was decided.
            ((decision,), _) = actor.decide([first_bars(bars, int(fills[t]))])
            target, probability = decision.when_holding(0.0)
            if probability > 0.51:  # else rounding may decide
                assert round(played.position[t]) == target
                targets.add(target)
    assert targets == {-1.0, 0.0, 1.0}


def test_a_decision_is_the_most_likely_target_for_the_position_held() -> None:
    bars = [walk("AAA", 300), walk("BBB", 200, "stock", seed=1)]
    actor = actor_of(*bars)
    decisions, unavailable = actor.decide(bars)
    assert unavailable == {}
    now = latest_decisions(market_of(*bars, horizon=1, statistics=actor.statistics), CONFIG)
    odds = actor.log_policy(now.bars, now.decision, now.accounts).exp()
    assert len({row.argmax().item() for row in odds.flatten(0, 1)}) > 1
    for n, (decision, series) in enumerate(zip(decisions, bars, strict=True)):
        assert (decision.symbol, decision.asset_class) == (series.symbol, series.asset_class)
        assert decision.open_time == series.open_time[-1] and decision.close == series.close[-1]
        assert decision.close_time - decision.open_time == MINUTE_NS
        for j, held in enumerate(CONFIG.positions):
            best = int(odds[n, j].argmax())
            target, probability = decision.when_holding(held)
            assert (target, probability) == (CONFIG.positions[best], pytest.approx(float(odds[n, j, best])))
    with pytest.raises(ValueError, match=r"AAA: the position held must be one of -1, 0, 1, was 0\.5"):
        decisions[0].when_holding(0.5)


def test_after_a_hole_a_symbol_has_no_decision_until_its_context_is_full() -> None:
    bars = walk("AAA", 300, gaps={250: 61})
    actor = actor_of(bars)
    for count, has_decision in ((250, True), (251, False), (250 + CONTEXT, False), (251 + CONTEXT, True)):
        decisions, unavailable = actor.decide([first_bars(bars, count)])
        assert bool(decisions) == has_decision
        reason = f"{count - 250} bars in a row since its last hole, needs {CONTEXT + 1}"
        assert unavailable == ({} if has_decision else {"AAA": reason})


def test_nothing_is_held_near_the_close_if_the_training_forbade_it() -> None:
    times = expected_minutes(MONDAY + DAY_NS, MONDAY + 3 * DAY_NS)
    assert times is not None
    stock = replace(walk("AAA", 390, "stock"), open_time=times[:390])
    actor = actor_of(stock, config=replace(CONFIG, flat_before_close=5))

    def is_forced(count: int) -> bool:
        (decision,) = actor.decide([first_bars(stock, count)])[0]
        if decision.only_cash:
            assert {decision.when_holding(held)[0] for held in CONFIG.positions} == {0.0}
        return decision.only_cash

    # The order of the bar at 15:54 fills at 15:55, five minutes before the close; that of 15:59 on the next day.
    assert [is_forced(count) for count in (384, 385, 386, 389, 390)] == [False, True, True, True, False]


def test_forty_five_days_are_enough_for_every_feature() -> None:
    bars = walk("AAA", 60 * 1440)
    actor = actor_of(first_bars(bars, 5000))
    days = Bars("AAA", "crypto", *(getattr(bars, name)[-45 * 1440 :] for name in COLUMNS))
    whole, part = (actor.decide([series])[0][0] for series in (bars, days))
    assert whole == part
    few = Bars("AAA", "crypto", *(getattr(bars, name)[-1440:] for name in COLUMNS))
    assert actor.decide([few])[0][0] != whole
    assert np.isfinite(whole.probabilities).all()
