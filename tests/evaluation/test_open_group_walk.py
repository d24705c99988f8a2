"""Accounts over groups that go on in pieces earn what one exam of the same minutes says, to the bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from data_sources.bars import DAY_NS, Bars
from envs.market import Market
from envs.open_group_env import account_of
from evaluation.courses import course_of
from evaluation.exam import Walk, at_flat_cost
from evaluation.group_exam import Group, examine_groups, groups_of
from evaluation.open_walk import OpenWalks, walk_on
from tests.envs.markets import HORIZON, MONDAY, NEVER, config_of, market_of, walk
from tests.envs.test_group_env import awkward_bars, without
from tests.evaluation.test_group_exam import GROUP, policy_on
from tests.evaluation.test_open_walk import COLUMNS, scaled

MINUTE = 60 * 10**9
CONFIG = config_of(
    group=GROUP, episode_bars=4 * HORIZON, borrow_rate=5.0, range_slippage=0.05, volume_slippage=0.001
)
BARS = [*awkward_bars(), *(walk(f"S{number}", 500, "stock", seed=9 + number) for number in range(3))]
MARKET = market_of(*BARS)
POLICY = policy_on(MARKET)
START = MONDAY + 105 * MINUTE
CUTS = [MONDAY + minute * MINUTE for minute in (136, 141, 142, 151, 204, 205, 330)]


def go_on(accounts: Any, end_ns: int, market: Market = MARKET, **given: Any) -> OpenWalks:
    given = {"decides_from_ns": START, "rules": ("buy and hold", "momentum"), **given}
    return walk_on(POLICY, market, CONFIG, market.symbols, accounts, end_ns=end_ns, **given)


def stored(accounts: Any) -> Any:
    """Accounts as a file would bring them back."""
    text = json.dumps({name: {key: asdict(a) for key, a in own.items()} for name, own in accounts.items()})
    return {name: {key: account_of(a) for key, a in own.items()} for name, own in json.loads(text).items()}


def joined(pieces: list[OpenWalks], name: str, key: str) -> Walk:
    own = [walked for piece in pieces for walked in piece.walks.get(name, []) if walked.symbol == key]
    columns = [name for name in COLUMNS if getattr(own[0], name) is not None]
    return Walk(key, "", *(np.concatenate([getattr(part, column) for part in own]) for column in columns))


def in_pieces(ends: list[int], markets: list[Market] | None = None, **given: Any) -> list[OpenWalks]:
    accounts: Any = {}
    pieces = []
    for end, market in zip(ends, markets or [MARKET] * len(ends), strict=True):
        pieces.append(go_on(accounts, end, market, **given))
        assert stored(pieces[-1].accounts) == pieces[-1].accounts
        accounts = stored(pieces[-1].accounts)
    return pieces


def test_pieces_are_one_exam_to_the_bit() -> None:
    groups = groups_of(MARKET, 3)
    whole = examine_groups(POLICY, MARKET, CONFIG, groups, START, NEVER, flat_costs_bps=(3.0,))
    pieces = in_pieces([*CUTS, NEVER], flat_costs_bps=(3.0,))
    assert pieces[-1].is_whole and not any(piece.held for piece in pieces)
    for name in ("policy", at_flat_cost("policy", 3.0), "buy and hold", "momentum"):
        for number, group in enumerate(groups):
            ours, theirs = joined(pieces, name, group.name), whole[name][number]
            count = len(theirs.time)
            assert 0 <= len(ours.time) - count < HORIZON  # an exam leaves up to a segment over
            for column in COLUMNS:
                assert np.array_equal(getattr(ours, column)[:count], getattr(theirs, column)), (name, column)
            account = pieces[-1].accounts[name][group.name]
            assert account.log_equity == pytest.approx(ours.log_returns.sum(), abs=1e-12)
    assert (joined(pieces, "policy", "group 1").traded > 0).sum() > 50


def test_what_may_not_be_decided_trades_nothing_but_what_must_be_sold() -> None:
    first = go_on({}, MONDAY + 145 * MINUTE)
    until = MONDAY + 300 * MINUTE
    second = go_on(first.accounts, NEVER, decides_from_ns=until)
    for walked in second.walks["policy"]:
        before = walked.time.astype(np.int64) <= until
        assert walked.traded[~before].any()
        # DDD is halted from minute 161 on for longer than a hole, EEE ends at 190: what is held of them is sold.
        sold = walked.time[before & (walked.traded > 0)].astype(np.int64) - MONDAY
        assert len(sold) <= 2 and all(sold > 200 * MINUTE)
    assert second.held == sum((w.time.astype(np.int64) <= until).sum() for w in second.walks["policy"])
    same = go_on(first.accounts, MONDAY + 150 * MINUTE, decides_from_ns=NEVER)
    for key, account in same.accounts["policy"].items():
        stood = first.accounts["policy"][key]
        assert (account.units, account.choice) == (stood.units, stood.choice)


def test_a_split_between_two_walks_changes_nothing() -> None:
    bars = [replace(series, funding=None) for series in BARS]
    plain = market_of(*bars)
    split = market_of(*(scaled(series, 0.25) for series in bars), statistics=plain.statistics)
    expected, found = (in_pieces(CUTS[:3], [plain, plain, last]) for last in (plain, split))
    for key in expected[-1].accounts["policy"]:
        ours, theirs = (joined(pieces, "policy", key).log_returns for pieces in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_bar_that_was_corrected_is_no_split() -> None:
    def revised(bars: Bars) -> Bars:
        close = np.where(np.arange(len(bars)) == 138, bars.close * 1.01, bars.close)
        return replace(bars, close=close, high=np.maximum(bars.high, close))

    other = market_of(*map(revised, BARS), statistics=MARKET.statistics)
    pieces = in_pieces(CUTS[:3], [MARKET, MARKET, other])
    before, after = (piece.accounts["buy and hold"]["group 3"] for piece in pieces[1:])
    assert before.next_ns == MONDAY + 139 * MINUTE and before.units == after.units and all(after.units)


@pytest.mark.parametrize(
    ("late", "is_of_all", "known", "within"),
    [
        *(((200,), True, 2, 1e-15), ((201,), True, 2, 1e-15), ((201,), False, 1, 1e-15)),
        # Booked without it: interest on it is not due; where a later bar had it, it was paid at the price there.
        *(((201,), False, 2, 1e-9), ((200, 201), False, 2, 1e-9), ((199, 200, 201), False, 1, 1e-9)),
        *(((201,), False, 3, 1e-6), ((199, 200, 201, 202), False, 4, 1e-6)),
    ],
)
def test_bars_that_come_in_between_walks_cost_interest_and_funding_once(
    late: tuple[int, ...], is_of_all: bool, known: int, within: float
) -> None:
    # Funding is due at every odd minute; without its bar it is paid at the symbol's next one.
    coins = [walk(f"C{number}", 400, seed=number) for number in range(3)]
    rates, there = np.where(np.arange(400) % 2, 1e-4, 0.0), ~np.isin(np.arange(400), late)
    due = np.diff(np.cumsum(rates)[there], prepend=0.0)
    whole = [replace(coin, funding=rates) for coin in coins]
    cut = [replace(coin.select(there), funding=due) for coin in coins]
    before, after = (
        market_of(*bars, statistics=MARKET.statistics)
        for bars in (cut if is_of_all else [*whole[:2], cut[2]], whole)
    )
    stands, end = int(coins[0].open_time[late[-1] + known]), int(coins[0].open_time[late[-1] + 20])
    *_, pieces = in_pieces([stands, stands + MINUTE, end], [before, after, after])
    _, at_once = in_pieces([int(coins[0].open_time[late[0] - 1]), end], [after, after])
    found, expected = (walks.accounts["buy and hold"]["group 1"] for walks in (pieces, at_once))
    assert found.cash == pytest.approx(expected.cash, abs=within) and all(found.units)


@pytest.mark.parametrize("missing", [(), (180,), (180, 181)])
@pytest.mark.parametrize("stands", [180, 181, 182, 183, 184, 200])
def test_funding_that_comes_after_its_bar_was_booked_is_paid_once(
    stands: int, missing: tuple[int, ...]
) -> None:
    # Due at 03:00, and known late; one of the symbols may have no bar then.
    coins = [walk(f"C{number}", 400, "perpetual", seed=number) for number in range(3)]
    coins = [replace(coin, open_time=coin.open_time - MONDAY + MONDAY // DAY_NS * DAY_NS) for coin in coins]
    there = ~np.isin(np.arange(400), missing)

    def funded(rate: float) -> Market:
        rates = np.zeros(400)
        rates[180] = rate
        due = np.diff(np.cumsum(rates)[there], prepend=0.0)
        bars = [coin.with_funding(rates) for coin in coins[:2]]
        return market_of(*bars, coins[2].select(there).with_funding(due), statistics=MARKET.statistics)

    early, late = funded(1e-4), funded(5e-3)
    ends = [int(coins[0].open_time[0]) + (stands + more) * MINUTE for more in (0, 1, 2)]
    *_, pieces = in_pieces([*ends, NEVER], [early, early, late, late], decides_from_ns=ends[0] - 60 * MINUTE)
    _, at_once = in_pieces([ends[0], NEVER], [late, late], decides_from_ns=ends[0] - 60 * MINUTE)
    for name in ("buy and hold", "momentum"):
        found, expected = (walks.accounts[name]["group 1"] for walks in (pieces, at_once))
        assert found.log_equity == pytest.approx(expected.log_equity, abs=2e-5), name
    held = at_once.accounts["buy and hold"]["group 1"]
    _, missed = in_pieces([ends[0], NEVER], [early, early], decides_from_ns=ends[0] - 60 * MINUTE)
    assert missed.accounts["buy and hold"]["group 1"].log_equity > held.log_equity + 3e-3


def test_a_split_is_one_where_a_bar_came_in_since_too() -> None:
    bars = [replace(series, funding=None) for series in BARS]
    for late in (139, 140):  # of the symbol, at which its account stands, and at which its equity was counted
        first = market_of(
            *(without(series, [late]) if series.symbol == "S1" else series for series in bars),
            statistics=MARKET.statistics,
        )
        split = market_of(*(scaled(series, 0.25) for series in bars), statistics=MARKET.statistics)
        before, after = in_pieces(CUTS[1:3], [first, split])
        held, now = (
            {
                symbol: units
                for own in piece.accounts["buy and hold"].values()
                for symbol, units in zip(own.symbols, own.units, strict=True)
            }
            for piece in (before, after)
        )
        assert held["S1"] and now["S1"] == pytest.approx(4 * held["S1"])


def test_a_group_goes_on_with_its_symbols_and_new_symbols_have_a_group_of_their_own() -> None:
    coins = [walk(f"C{number}", 500, seed=number) for number in range(5)]
    known = market_of(*coins[:4], statistics=MARKET.statistics)
    first = go_on({}, CUTS[1], known)
    symbols = {key: account.symbols for key, account in first.accounts["policy"].items()}
    assert symbols == {"group 1": ("C0", "C1", "C2"), "group 2": ("C3", "C0", "C1")}
    more = market_of(*coins, statistics=MARKET.statistics)
    second = go_on(stored(first.accounts), CUTS[4], more)
    symbols |= {"group 3": ("C4", "C0", "C1")}
    assert {key: own.symbols for key, own in second.accounts["policy"].items()} == symbols
    assert second.walks["policy"][2].time[0].astype(np.int64) == START + MINUTE
    # Without a symbol its group stands still, and its others, which have none by now, are cut again.
    fewer = market_of(*coins[1:], statistics=MARKET.statistics)
    third = go_on(stored(second.accounts), CUTS[5], fewer)
    own = third.accounts["policy"]
    assert own["group 1"] == second.accounts["policy"]["group 1"]
    assert own["group 4"] == replace(own["group 4"], symbols=("C1", "C2", "C3"))
    assert [walked.symbol for walked in third.walks["policy"]] == ["group 4", "group 5"]


def test_after_a_hole_of_the_whole_market_accounts_go_on_in_cash_and_ruin_is_final() -> None:
    fall = np.where(np.arange(500) < 120, 1.0, 0.05)

    def crash(bars: Bars) -> Bars:
        return replace(bars, **{n: getattr(bars, n) * fall for n in ("open", "high", "low", "close")})

    coins = [crash(walk(f"C{number}", 500, seed=number)) for number in range(3)]
    gaps = {130: 120}
    calm = [walk(f"D{number}", 500, seed=5 + number, gaps=gaps) for number in range(3)]
    for bars in (coins, calm):
        market = market_of(*bars, statistics=MARKET.statistics)
        ends = [int(bars[0].open_time[minute]) for minute in (129, 131, 200)]
        pieces = in_pieces(ends, [market] * 3)
        held = [piece.accounts["buy and hold"]["group 1"] for piece in pieces]
        if bars is coins:
            course = course_of(market, CONFIG, groups_of(market, 3), ("buy and hold",), lambda _: START, {})
            buy = torch.full((1, 3), CONFIG.positions.index(1.0))
            for row in range(len(course.schedule)):
                course.env.begin_segment_unread()
                course.play(lambda _, actions: (actions,), buy)
                own = course.trades(row)
                walked = course.walks(("buy and hold",))["buy and hold"][0]
                assert sum(trade.traded for trade in own) == pytest.approx(walked.traded[row], abs=1e-12)
                paid = (walked.costs - walked.borrowing)[row]
                assert sum(trade.costs for trade in own) == pytest.approx(paid, abs=1e-12)
                if not course.env.account.alive.all():  # ruined: what it closed is among it
                    assert [trade.symbol for trade in own] == ["C0", "C1", "C2"]
                    break
            assert not held[0].alive and not any(held[2].units)
            assert held[2].log_equity == held[0].log_equity
        else:
            assert len(pieces[1].walks["policy"][0].time) == 1  # the last one before the hole
            walked = pieces[2].walks["policy"][0]
            assert walked.time[0].astype(np.int64) == bars[0].open_time[130 + market.context_bars + 1]
            assert held[0].alive and any(held[0].units) and any(held[2].units)


@pytest.mark.drill  # tests/envs/test_group_env.py says it of segments
def test_bars_of_one_symbol_that_are_missing_move_no_minute_of_the_others() -> None:
    coins = [walk(f"C{number}", 400, seed=number) for number in range(3)]
    market = market_of(*coins, statistics=MARKET.statistics)
    sparse = market_of(*coins[:2], without(coins[2], range(150, 400, 2)), statistics=MARKET.statistics)
    ours, theirs = (joined(in_pieces(CUTS, [m] * len(CUTS)), "policy", "group 1") for m in (sparse, market))
    assert np.array_equal(ours.time, theirs.time)
    same = ours.time.astype(np.int64) < MONDAY + 150 * MINUTE
    assert np.array_equal(ours.log_returns[same], theirs.log_returns[same])


def test_groups_are_cut_as_in_an_exam_where_none_stands() -> None:
    before = [Group("group 1", ("AAA", "BBB", "CCC")), Group("group 4", ("DDD", "AAA", "BBB"))]
    assert groups_of(MARKET, 3, before=[]) == groups_of(MARKET, 3)
    names = [group.name for group in groups_of(MARKET, 3, before=before)]
    assert names == ["group 1", "group 4", "group 2", "group 3"]
