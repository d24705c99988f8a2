"""Accounts that go on in pieces earn what one exam of the same bars says, to the bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from data_sources.bars import Bars
from envs.late_funding import KEPT_NS
from envs.market import Market
from envs.open_group_env import account_of
from evaluation.exam import Walk, examine
from evaluation.open_walk import OpenWalks, walk_on
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import CONTEXT, HORIZON, NEVER, config_of, funded, market_of, walk

CONFIG = config_of(episode_bars=4 * HORIZON, borrow_rate=5.0, range_slippage=0.05, volume_slippage=0.001)
COIN, STOCK = funded(walk("AAA", 300, asset_class="perpetual")), walk("BBB", 260, "stock", seed=1)
MARKET = market_of(COIN, STOCK)
START = int(COIN.open_time[60])
SYMBOLS = ("AAA", "BBB")
COLUMNS = ("time", "price", "position", "log_returns", "costs", "traded", "borrowing", "funding")


def policy_of(market: Market) -> Policy:
    torch.manual_seed(60)  # one that trades, long and short
    policy = Policy(TransformerConfig(market.num_features, 16, 1, 2, CONTEXT + HORIZON + 1), 9, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    return policy


POLICY = policy_of(MARKET)


def go_on(accounts: Any, end_ns: int, market: Market = MARKET, **given: Any) -> OpenWalks:
    given = {"decides_from_ns": START, **given}
    return walk_on(POLICY, market, CONFIG, SYMBOLS, accounts, end_ns=end_ns, **given)


def stored(accounts: Any) -> Any:
    """Accounts as a file would bring them back."""
    text = json.dumps({name: {s: asdict(a) for s, a in own.items()} for name, own in accounts.items()})
    return {n: {s: account_of(a) for s, a in own.items()} for n, own in json.loads(text).items()}


def in_pieces(
    ends: list[int], markets: list[Market] | None = None
) -> tuple[dict[str, list[Walk]], OpenWalks]:
    """Walk up to each end in turn; return the walks of all pieces joined, and the last piece."""
    accounts: Any = {}
    pieces = []
    for end, market in zip(ends, markets or [MARKET] * len(ends), strict=True):
        pieces.append(go_on(accounts, end, market))
        accounts = stored(pieces[-1].accounts)
    joined = {}
    for name in pieces[0].walks:
        joined[name] = [
            Walk(
                symbol,
                "",
                *(
                    np.concatenate(
                        [getattr(w, field) for p in pieces for w in p.walks[name] if w.symbol == symbol]
                    )
                    for field in COLUMNS
                ),
            )
            for symbol in SYMBOLS
        ]
    return joined, pieces[-1]


CUTS = [int(COIN.open_time[bar]) for bar in (64, 101, 102, 103, 190, 191)]


def test_pieces_are_one_exam_to_the_bit() -> None:
    whole = examine(POLICY, MARKET, CONFIG, SYMBOLS, START, NEVER)
    joined, _ = in_pieces([*CUTS, NEVER])
    for name, walks in joined.items():
        for own, theirs in zip(walks, whole[name], strict=True):
            count = len(theirs.time)
            assert 0 <= len(own.time) - count < HORIZON  # an exam leaves up to a segment over
            for field in COLUMNS:
                assert np.array_equal(getattr(own, field)[:count], getattr(theirs, field)), (name, field)
    assert {-1, 0, 1} == set(np.round(np.concatenate([w.position for w in joined["policy"]])).astype(int))


def test_every_bar_whose_outcome_is_known_is_walked_once() -> None:
    joined, last = in_pieces([*CUTS, NEVER])
    for walked, bars in zip(joined["policy"], (COIN, STOCK), strict=True):
        first = int(np.searchsorted(bars.open_time, START)) + 1
        assert walked.time.astype(np.int64).tolist() == bars.open_time[first:-1].tolist()
        account = last.accounts["policy"][walked.symbol]
        assert account.next_ns == bars.open_time[-2]
        assert account.log_equity == pytest.approx(walked.log_returns.sum(), abs=1e-12)
    assert last.is_whole and not last.held


def test_a_policy_decides_nothing_on_bars_that_it_was_chosen_on() -> None:
    first = go_on({}, CUTS[1])
    until = int(COIN.open_time[150])
    second = go_on(first.accounts, CUTS[-1], decides_from_ns=until)
    for walked in second.walks["policy"]:
        before = walked.time.astype(np.int64) <= until
        assert not walked.traded[before].any()
        assert walked.traded[~before].any()
    assert second.held == 2 * (150 - 99)


def scaled(bars: Bars, factor: float) -> Bars:
    prices = {name: getattr(bars, name) * factor for name in ("open", "high", "low", "close")}
    return replace(bars, **prices, volume=bars.volume / factor)


def test_a_split_between_two_walks_changes_nothing() -> None:
    after = market_of(scaled(COIN, 0.25), scaled(STOCK, 0.25), statistics=MARKET.statistics)
    plain, _ = in_pieces(CUTS[:2])
    split, _ = in_pieces(CUTS[:2], [MARKET, after])
    for name, walks in plain.items():
        for own, theirs in zip(walks, split[name], strict=True):
            assert own.log_returns == pytest.approx(theirs.log_returns, abs=1e-6)


@pytest.mark.parametrize("late", [101, 102])
def test_a_bar_that_comes_in_between_two_walks_costs_neither_interest_nor_funding_twice(late: int) -> None:
    # Accounts stand at the bar before it, and count with the one after it. Funding is due at every odd minute;
    # without its bar it is paid at the next one.
    rates = np.where(np.arange(len(COIN)) % 2, 1e-4, 0.0)
    there = np.arange(len(COIN)) != late
    postponed = rates + np.append(0.0, np.where(there, 0.0, rates)[:-1])
    without = replace(COIN.select(there), funding=postponed[there])
    markets = [
        market_of(coin, STOCK, statistics=MARKET.statistics)
        for coin in (without, replace(COIN, funding=rates))
    ]
    end = int(COIN.open_time[late + 20])
    _, pieces = in_pieces([int(COIN.open_time[late + 2]), end], markets)
    _, whole = in_pieces([end], markets[1:])
    assert pieces.accounts == whole.accounts
    assert pieces.accounts["policy"]["AAA"].units


MINUTE = 60 * 10**9
NEW_YEAR = 1_767_225_600 * 10**9


def perpetual(rates: dict[int, float], length: int = 300) -> Bars:
    """A perpetual future from 00:00 on; ``rates`` are of minutes."""
    coin = walk("AAA", length, "perpetual", seed=3)
    funding = np.zeros(length)
    funding[list(rates)] = list(rates.values())
    shifted = coin.open_time - coin.open_time[0] + NEW_YEAR
    return replace(coin, open_time=shifted).with_funding(funding)


def without_costs(rates: list[dict[int, float]], ends: list[int], length: int = 300) -> dict[str, float]:
    """What each contestant has at the end, where the rates were known piece by piece and nothing else costs."""
    accounts: Any = {}
    config = config_of(borrow_rate=0.0, positions=(-1.0, 0.0, 1.0))
    for known, end in zip(rates, ends, strict=True):
        coin = perpetual(known, length)
        market = market_of(coin, statistics=MARKET.statistics)
        last = int(coin.open_time[end]) if end < length else NEVER
        start = NEW_YEAR + 70 * MINUTE
        walks = walk_on(
            policy_of(MARKET), market, config, ["AAA"], accounts, decides_from_ns=start, end_ns=last
        )
        accounts = stored(walks.accounts)
        assert accounts == walks.accounts
    return {name: own["AAA"].log_equity for name, own in accounts.items()}


@pytest.mark.parametrize("is_zero_before", [True, False])
@pytest.mark.parametrize("stands", [120, 121, 122, 123, 150])
def test_funding_that_comes_after_its_bar_was_booked_is_paid_once(stands: int, is_zero_before: bool) -> None:
    # Due at 01:30 and 02:00, of which the latter is known late, or was charged by another rate.
    early = {90: 2e-3, 120: 0.0 if is_zero_before else 1e-3}
    late = {90: 2e-3, 120: -3e-3}
    ends = [stands, stands + 1, stands + 2, 250, NEVER]
    found = without_costs([early, early, *[late] * 3], ends)
    expected = without_costs([late], [NEVER])
    missed = without_costs([early], [NEVER])
    for name in ("policy", "buy and hold"):
        assert found[name] == pytest.approx(expected[name], abs=2e-5)
    assert abs(missed["buy and hold"] - expected["buy and hold"]) > 2e-3
    # To the bit, where it is known in time.
    assert without_costs([late] * 4, [stands, stands + 1, 200, NEVER]) == expected


def test_a_first_row_of_funding_may_come_late_and_a_lost_ledger_gives_nothing_back() -> None:
    rates = {120: 3e-3}
    found = without_costs([{}, {}, rates, {}, rates], [119, 140, 160, 180, NEVER])
    assert found["buy and hold"] == pytest.approx(without_costs([rates], [NEVER])["buy and hold"], abs=2e-5)
    held = without_costs([rates, {}], [160, 161])["buy and hold"]
    assert held == pytest.approx(without_costs([rates], [161])["buy and hold"], abs=1e-12)


def test_what_is_older_than_the_newest_days_stays_as_it_was_booked() -> None:
    length, rates = KEPT_NS // MINUTE + 300, {120: 3e-3}
    booked = without_costs([{}, rates], [length - 40, NEVER], length)
    assert booked == without_costs([{}], [NEVER], length)


def test_after_a_hole_accounts_go_on_in_cash_and_ruin_is_final() -> None:
    fall = np.where(np.arange(300) < 120, 1.0, 0.1)
    crash = replace(COIN, **{n: getattr(COIN, n) * fall for n in ("open", "high", "low", "close")})
    holes = walk("BBB", 260, "stock", seed=1, gaps={130: 7_000})
    market = market_of(crash, holes, statistics=MARKET.statistics)
    ends = [int(holes.open_time[129]), int(holes.open_time[130]), NEVER]
    accounts: Any = {}
    pieces = []
    for end in ends:
        pieces.append(go_on(accounts, end, market))
        accounts = stored(pieces[-1].accounts)
    stock = next(walked for walked in pieces[-1].walks["policy"] if walked.symbol == "BBB")
    assert stock.time[0].astype(np.int64) == holes.open_time[130 + CONTEXT + 1]
    ruined = [piece.accounts["buy and hold"]["AAA"] for piece in pieces]
    assert not ruined[0].alive and ruined[0].log_equity < np.log(CONFIG.ruin_fraction)
    assert ruined[2].log_equity == pytest.approx(ruined[0].log_equity, abs=1e-12)
    assert ruined[2].next_ns == crash.open_time[-2]
    assert accounts["buy and hold"]["BBB"].alive


def test_a_walk_that_is_late_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.open_walk.ENCODED_SEGMENTS", 2)  # so many at once
    calls = iter([False, True])
    first = go_on({}, NEVER, is_late=lambda: next(calls))
    assert not first.is_whole
    second = go_on(first.accounts, NEVER)
    whole = go_on({}, NEVER)
    assert second.accounts == whole.accounts
