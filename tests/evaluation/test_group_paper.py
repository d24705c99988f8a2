"""Paper accounts over groups, minute by minute under faults, are to the bit what an exam of the minutes says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS, Bars
from envs.group_walk_env import GroupExamEnv
from envs.open_group_env import account_of
from evaluation.exam import Walk
from evaluation.group_exam import Group, examine_groups
from evaluation.open_walk import walk_on
from evaluation.paper import SETTLED_MINUTES, run_minute
from evaluation.paper_book import Book
from evaluation.trained_policy import Actor
from tests.envs.markets import HORIZON, MONDAY, NEVER, config_of, funded, market_of, walk
from tests.envs.test_group_env import without
from tests.evaluation.test_group_exam import GROUP, policy_on
from tests.evaluation.test_open_walk import COLUMNS
from tests.evaluation.test_paper import Life, Source, assert_equal

COINS = (
    funded(walk("AAA", 200, "perpetual", sigma=5e-3)),
    without(walk("BBB", 200, seed=1, sigma=5e-3), (70, 71, 75, 90)),
    walk("CCC", 200, seed=2, sigma=5e-3, gaps={96: 2}),
    walk("DDD", 200, seed=3, sigma=5e-3),
)
MARKET = market_of(*COINS)
CONFIG = config_of(
    group=GROUP, episode_bars=2 * HORIZON, borrow_rate=5.0, range_slippage=0.05, volume_slippage=0.001
)
ACTOR = Actor(policy_on(MARKET), MARKET.statistics, CONFIG, MARKET.symbols)
GROUPS = [Group("group 1", ("AAA", "BBB", "CCC")), Group("group 2", ("DDD", "AAA", "BBB"))]
FIRST, LAST = 60, 103  # minutes: it begins at the end of the first one


def open_of(minute: int) -> int:
    return MONDAY + minute * MINUTE_NS


def time_of(minute: int) -> int:
    """A few seconds after a minute has closed."""
    return open_of(minute + 1) + 6 * 10**9


def on_time(now_ns: int) -> list[Bars]:
    return [bars.between(0, now_ns - MINUTE_NS + 1) for bars in COINS]


def life_of(source: Source, first: int = FIRST, last: int = LAST) -> Life:
    return Life(source, ACTOR, time_of).run(first, last)


def exam() -> dict[str, list[Walk]]:
    return examine_groups(ACTOR.policy, MARKET, CONFIG, GROUPS, open_of(FIRST), NEVER)


@pytest.fixture(scope="module")
def plain() -> Life:
    return life_of(on_time)


def test_minute_by_minute_is_one_exam_to_the_bit_with_missing_minutes(plain: Life) -> None:
    whole = exam()
    for name in ("policy", "buy and hold"):
        for number, group in enumerate(GROUPS):
            assert_equal(plain.booked(name, group.name), whole[name][number])
    assert (plain.booked("policy", "group 1").traded > 0).sum() > 10
    assert not any(plain.found(what) for what in ("late", "revised", "inserted"))
    assert len(plain.state.decided["group 1"]) == 2 + SETTLED_MINUTES
    assert plain.state.groups == {each.name: each.symbols for each in GROUPS}
    assert not plain.minutes[-1].waiting
    assert plain.minutes[71 - FIRST].unseen == {"group 1": ["BBB"], "group 2": ["BBB"]}  # a missing minute


def test_every_minute_is_decided_on_before_it_can_fill(plain: Life) -> None:
    for number, minute in enumerate(plain.minutes):
        assert {key: len(own) for key, own in minute.targets.items()} == {"group 1": 3, "group 2": 3}
        assert max(minute.state.decided["group 1"]) == open_of(FIRST + number)


def test_the_trades_of_its_symbols_add_up_to_those_of_the_account(plain: Life) -> None:
    for group in GROUPS:
        walked, made = plain.booked("policy", group.name), {}
        for trade in (trade for minute in plain.minutes for trade in minute.trades):
            if trade.key == group.name:
                made.setdefault(trade.time_ns, []).append(trade)
        for row, time_ns in enumerate(walked.time.astype(np.int64).tolist()):
            own = made.pop(time_ns, [])
            assert sum(trade.traded for trade in own) == pytest.approx(walked.traded[row], abs=1e-12)
            costs = sum(trade.costs for trade in own)
            assert costs == pytest.approx((walked.costs - walked.borrowing)[row], abs=1e-12)
            for trade in own:
                (bars,) = (bars for bars in COINS if bars.symbol == trade.symbol)
                assert trade.price == np.float32(bars.open[bars.open_time == time_ns][0])
                assert abs(trade.after * (1 - costs) - trade.before) == pytest.approx(trade.traded, abs=1e-12)
        assert not made


def late(symbols: set[str], minutes: range, by: int) -> Source:
    """The bars of some minutes come so many minutes late."""

    def source(now_ns: int) -> list[Bars]:
        def is_here(bars: Bars) -> np.ndarray:
            minute = (bars.open_time - MONDAY) // MINUTE_NS
            is_late = np.isin(minute, list(minutes)) & (bars.open_time + (1 + by) * MINUTE_NS > now_ns)
            return ~is_late if bars.symbol in symbols else np.ones(len(bars), bool)

        def known(bars: Bars) -> Bars:
            kept = bars.select(is_here(bars))
            return kept if bars.funding is None else kept.with_funding(bars.funding[is_here(bars)])

        return [known(bars) for bars in on_time(now_ns)]

    return source


def play_decided(life: Life, group: Group) -> np.ndarray:
    """Log returns of an account that does in an exam what was decided live."""
    env = GroupExamEnv(MARKET, CONFIG, "cpu", [group.symbols], [open_of(FIRST)], [GROUP.net], [None])
    found = []
    for begins in env.schedule[:, 0].tolist():
        env.begin_segment_unread()
        targets = [
            life.decided[group.name].get(int(time), (0.0,) * 3)
            for time in env.grid.minutes[begins : begins + HORIZON].tolist()
        ]
        actions = torch.tensor([[CONFIG.positions.index(target) for target in row] for row in targets])
        played = env.play(lambda _, action: (action,), actions)
        found.append(played.log_equity[:, 0].numpy())
    return np.concatenate(found)


def test_a_bar_of_one_symbol_that_comes_late_is_seen_as_missing_and_filled_as_it_was(plain: Life) -> None:
    life = life_of(late({"CCC"}, range(74, 95), by=2))
    assert not life.found("late") and life.found("inserted").keys() == {"CCC"}
    assert [minute.unseen for minute in life.minutes[13:15]] == [{}, {"group 1": ["CCC"]}]
    for group in GROUPS:
        booked = life.booked("policy", group.name)
        expected = play_decided(life, group)
        count = len(booked.time)
        assert np.array_equal(np.cumsum(booked.log_returns)[: count - 1].round(9), expected[1:count].round(9))
        before = booked.time.astype(np.int64) <= open_of(74)
        theirs = plain.booked("policy", group.name)
        assert np.array_equal(booked.log_returns[before], theirs.log_returns[before])
    # Groups without it saw nothing of that.
    assert_equal(life.booked("policy", "group 2"), plain.booked("policy", "group 2"))
    assert life.decided["group 1"] != plain.decided["group 1"]
    assert_equal(life.booked("buy and hold", "group 1"), plain.booked("buy and hold", "group 1"))


@pytest.mark.drill  # of single accounts it runs in every test
def test_minutes_that_come_late_as_a_whole_are_held_and_the_rest_is_the_exam_that_holds_there() -> None:
    everything = {bars.symbol for bars in COINS}
    life = life_of(late(everything, range(80, 81), by=1))
    missed = open_of(80)
    assert life.found("late") == {"group 1": [missed], "group 2": [missed]}

    def go_on(accounts: Any, decides_from_ns: int, end_ns: int) -> Any:
        return walk_on(ACTOR.policy, MARKET, CONFIG, MARKET.symbols, accounts, decides_from_ns, end_ns)

    first = go_on({}, open_of(FIRST), missed + 2 * MINUTE_NS)
    held = go_on(first.accounts, missed + MINUTE_NS, missed + 3 * MINUTE_NS)
    rest = go_on(held.accounts, 0, NEVER)
    assert held.held == 2
    for group in GROUPS:
        expected = [
            w for piece in (first, held, rest) for w in piece.walks["policy"] if w.symbol == group.name
        ]
        joined = Walk("", "", *(np.concatenate([getattr(w, c) for w in expected]) for c in COLUMNS))
        assert_equal(life.booked("policy", group.name), joined)


@pytest.mark.drill
def test_sources_that_are_down_are_no_trade_and_said() -> None:
    life = life_of(lambda now_ns: on_time(min(now_ns, time_of(79)) if now_ns < time_of(86) else now_ns))
    silent = life.minutes[81 - FIRST]
    assert not silent.targets
    assert silent.waiting == dict.fromkeys(
        ("group 1", "group 2"), "stale: its newest bar closed 2 minutes ago"
    )
    assert len(life.found("late")["group 1"]) == 6
    ours, theirs = life.booked("buy and hold", "group 1"), exam()["buy and hold"][0]
    assert_equal(ours, theirs)
    booked = life.booked("policy", "group 1")
    down = (booked.time.astype(np.int64) > open_of(80)) & (booked.time.astype(np.int64) <= open_of(86))
    assert down.sum() == 6 and not booked.traded[down].any()


def test_too_few_symbols_wait_and_one_that_comes_later_has_a_group_of_its_own() -> None:
    two = life_of(lambda now_ns: on_time(now_ns)[:2], FIRST, FIRST + 1)
    (reason,) = set(two.minutes[0].waiting.values())
    assert reason == "a group needs 3 symbols of one kind, stocks or coins: there are 2"
    life = life_of(lambda now_ns: on_time(now_ns)[: 3 if now_ns < time_of(62) else 4], FIRST, FIRST + 4)
    assert life.minutes[0].state.groups == {"group 1": ("AAA", "BBB", "CCC")}
    assert life.state.groups == {each.name: each.symbols for each in GROUPS}
    assert min(life.decided["group 2"]) == open_of(62)
    gone = run_minute(ACTOR, life.state, on_time(time_of(64))[1:], time_of(64))
    assert gone.waiting == dict.fromkeys(("group 1", "group 2"), "not all its symbols have bars")
    assert gone.targets.keys() == {"group 3"} and gone.state.groups["group 3"] == ("BBB", "CCC", "DDD")


@pytest.mark.drill
def test_a_restart_after_every_minute_changes_nothing(plain: Life, tmp_path: Path) -> None:
    book = Book.open(tmp_path, {})
    for minute in range(FIRST, FIRST + 12):
        done = run_minute(ACTOR, book.state, on_time(time_of(minute)), time_of(minute))
        assert done.state == plain.minutes[minute - FIRST].state
        book.save(done.state, {}, [{"minute": minute}])
        again = run_minute(ACTOR, book.state, on_time(time_of(minute)), time_of(minute) + 10**10)
        assert not any(again.booked["policy"]) and again.state == done.state and again.targets == done.targets
        book = Book.open(tmp_path, {})
        assert book.state == done.state
    account = book.state.accounts["policy"]["group 1"]
    assert account_of(json.loads(json.dumps(asdict(account)))) == account
