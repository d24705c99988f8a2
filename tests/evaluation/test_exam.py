"""An exam agrees with a plain ledger, walks the same bars for all contestants, and sees nothing ahead."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from data_sources.bars import DAY_NS
from envs import compiled as compiled_steps
from envs.config import EnvConfig
from envs.market import YEAR_NS, Market, NoSegment
from envs.walk_env import ExamEnv
from evaluation import baselines
from evaluation import exam as exam_module
from evaluation.exam import Walk, examine
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.account_reference import ReferenceAccount
from tests.envs.markets import CONTEXT, HORIZON, NEVER, config_of, funded, market_of, walk

CONFIG = config_of(num_envs=9, episode_bars=64 * HORIZON, borrow_rate=5.0, range_slippage=0.05)
PAST = 20  # bars of the momentum rule, here


@pytest.fixture(autouse=True)
def short_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOMENTUM_BARS", PAST)


def policy_of(market: Market, seed: int = 0) -> Policy:
    torch.manual_seed(60 + seed)  # one that trades, long and short
    policy = Policy(TransformerConfig(market.num_features, 16, 1, 2, CONTEXT + HORIZON + 1), 9, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    return policy


COIN, STOCK = funded(walk("AAA", 300, gaps={150: 300})), walk("BBB", 260, "stock", seed=1)
TRAINED_UNTIL = int(COIN.open_time[60])
MARKET = market_of(COIN, STOCK, holdout_start_ns=TRAINED_UNTIL)


def exam(market: Market = MARKET, **given: object) -> dict[str, list[Walk]]:
    given = {"symbols": ("AAA", "BBB"), "start_ns": TRAINED_UNTIL, "end_ns": NEVER, **given}
    return examine(policy_of(MARKET), market, CONFIG, **given)


@pytest.fixture(scope="module")
def walks() -> dict[str, list[Walk]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "MOMENTUM_BARS", PAST)
        return exam()


def target_of(name: str, closes: np.ndarray, bar: int) -> float:
    if name == "buy and hold":
        return 1.0
    if name == "always flat" or bar < PAST:
        return 0.0
    return float(np.sign(np.float32(closes[bar]) - np.float32(closes[bar - PAST])))


@pytest.mark.parametrize("name", ["buy and hold", "always flat", "momentum"])
@pytest.mark.parametrize("bars", [COIN, STOCK], ids=["coin", "stock"])
def test_a_baseline_earns_what_an_account_in_plain_floats_earns(
    walks: dict[str, list[Walk]], name: str, bars: object
) -> None:
    number = [COIN, STOCK].index(bars)
    played = walks[name][number]
    fills = np.searchsorted(bars.open_time, played.time.astype(np.int64))
    assert np.array_equal(bars.open_time[fills], played.time.astype(np.int64))
    opens = bars.open.astype(np.float32).astype(float)
    assert np.array_equal(opens[fills], played.price)
    spread = ((bars.high - bars.low) / bars.open).astype(np.float32)
    fee = (CONFIG.crypto_fee_bps if number == 0 else CONFIG.stock_fee_bps) + CONFIG.slippage_bps
    account = ReferenceAccount(1e-6, held=0.0)
    positions = set()
    for t, fill in enumerate(fills):
        if t and fill != fills[t - 1] + 1:  # after a hole the account continues in cash
            account = ReferenceAccount(1e-6, held=0.0, cash=account.equity(opens[fills[t - 1] + 1]))
        before = account.equity(opens[fill])
        costs, borrowed, traded = account.costs, account.borrow_costs, account.traded
        funding = account.funding
        borrow = CONFIG.borrow_rate * (bars.open_time[fill + 1] - bars.open_time[fill]) / YEAR_NS
        target = target_of(name, bars.close, fill - 1)
        rate = fee / 1e4 + CONFIG.range_slippage * spread[fill]
        due = 0.0 if bars.funding is None else bars.funding[fill + 1]
        earned = account.fill(target, opens[fill], opens[fill + 1], rate, borrow, funding=due)
        assert played.log_returns[t] == pytest.approx(earned, abs=1e-7)
        paid = account.costs - costs + account.borrow_costs - borrowed
        assert played.costs[t] == pytest.approx(paid / before, abs=1e-7)
        assert played.funding[t] == pytest.approx((account.funding - funding) / before, abs=1e-7)
        assert played.traded[t] == pytest.approx((account.traded - traded) / before, abs=1e-7)
        held = account.units * opens[fill] / (account.cash + account.units * opens[fill])
        assert played.position[t] == pytest.approx(held, abs=1e-6)
        positions.add(round(played.position[t]))
    assert (played.funding != 0).any() == (bars is COIN and name != "always flat")
    assert positions == {"buy and hold": {1}, "always flat": {0}, "momentum": {-1, 1}}[name]


def test_the_laws_of_the_baselines(walks: dict[str, list[Walk]]) -> None:
    for flat in walks["always flat"]:
        for values in (flat.log_returns, flat.position, flat.costs, flat.traded):
            assert not values.any()
    stock = walks["buy and hold"][1]
    last = np.searchsorted(STOCK.open_time, stock.time[-1].astype(np.int64)) + 1
    moved = float(np.float32(STOCK.open[last])) / stock.price[0]
    # Bought once, for a cost rate c: 1 / (1 + c) of the money becomes shares.
    rate = stock.costs.sum() / (1 - stock.costs.sum())
    assert stock.log_returns.sum() == pytest.approx(np.log(moved) - np.log1p(rate), abs=1e-7)
    assert (stock.traded > 0).sum() == 1


@cache
@torch.no_grad()
def encode_alone(seed: int, bar: int) -> torch.Tensor:
    """Encode a decision, (1, W): segments begin every H bars from the day's first bar with its context."""
    market = MARKET.until(NEVER)
    day, start = int(market.open_time[bar]) // DAY_NS, bar
    stretch = max(first for first in market.stretch_first.tolist() if first <= bar)
    while start > stretch + CONTEXT and int(market.open_time[start - 1]) // DAY_NS == day:
        start -= 1
    start += (bar - start) // HORIZON * HORIZON
    tokens = market.features[start - CONTEXT : bar + 1].float()[None]
    return policy_of(MARKET, seed).encode(tokens, bar - start + 1)[:, -1]


@cache
@torch.no_grad()
def step_by_step(seed: int, config: EnvConfig, symbol: str) -> np.ndarray:
    """Rows of an account's time, position, equity after it, fees and borrowing: one env, one step at a time.

    A time of 0 is after its ruin.
    """
    policy, market = policy_of(MARKET, seed), MARKET.until(NEVER)
    env = ExamEnv(market, config, market.device, [(symbol, TRAINED_UNTIL)])
    rows = []
    for _ in range(env.num_segments):
        env.begin_segment()
        projected = torch.stack([encode_alone(seed, int(env.cursor) + h) for h in range(HORIZON)], 1)
        times = market.open_time[env.cursor + torch.arange(1, HORIZON + 1)]
        for h in range(HORIZON):
            logits, _ = policy.head.decide(projected[:, h], env.account_observations())
            price, time = env.segment.price[h].clone(), times[h] * env.alive
            _, ruined, _ = env.step(logits.argmax(-1))
            account = env.account
            value = account.units * price
            exposure = value / (account.cash + value)  # the cash is what is left after this fill
            exposure[ruined] = torch.nan  # sold since
            equity = account.log_equity.exp()
            rows.append(torch.cat((time, exposure, equity, env.last_fill[2], env.last_fill[3])))
    return torch.stack(rows).double().numpy().T


# Large orders, orders that do not count, ruin, leverage, and an exam's first bar in the middle of a segment.
AWKWARD = {
    "plain": {},
    "large orders": {"volume_slippage": 0.02, "account_value": 300.0, "positions": (-1.0, 0.0, 2.0)},
    "flat at night and ruined": {"flat_before_close": 3, "ruin_fraction": 0.99, "range_slippage": 0.3},
}


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_policy_acts_as_it_does_step_by_step(
    case: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The function that is compiled, as it is without the compiler; and few segments ahead, so that some go on.
    monkeypatch.setattr(compiled_steps, "compiled", lambda function, device: function)
    monkeypatch.setattr(exam_module, "ENCODED_SEGMENTS", 3)
    config = replace(CONFIG, **AWKWARD[case])
    two = {"policy": policy_of(MARKET), "champion": policy_of(MARKET, seed=1)}
    walks = examine(two, MARKET, config, ("AAA", "BBB"), TRAINED_UNTIL, NEVER, compiled=compiled)
    were_ruined: list[bool] = []
    positions, paid = set[float](), 0.0
    for seed, name in enumerate(two):
        for played in walks[name]:
            time, position, equity, fees, borrowed = step_by_step(seed, config, played.symbol)
            lived = time > 0
            assert np.array_equal(played.time.astype(np.int64)[lived], time[lived].astype(np.int64))
            were_ruined.append(not lived.all())
            known = ~np.isnan(position)
            np.testing.assert_allclose(played.position[known], position[known], atol=1e-6)
            np.testing.assert_allclose(np.cumsum(played.log_returns), np.log(equity), atol=1e-6)
            before = played.equity_before
            np.testing.assert_allclose(played.costs * before, fees + borrowed, atol=1e-6)
            np.testing.assert_allclose(played.borrowing * before, borrowed, atol=1e-9)
            positions |= set(played.position.round())
            paid += borrowed.sum()
    assert len(positions) >= 3 and paid > 0
    assert any(were_ruined) == (case == "flat at night and ruined")


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own when it loads its compiler
def test_a_compiled_exam_is_the_plain_one(walks: dict[str, list[Walk]]) -> None:
    for name, contestant in exam(compiled=True).items():
        for ours, plain in zip(contestant, walks[name], strict=True):
            for column in ("position", "log_returns", "costs", "traded", "borrowing"):
                np.testing.assert_allclose(getattr(ours, column), getattr(plain, column), atol=1e-6)


def test_the_trunk_reads_every_segment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exam_module, "ENCODED_SEGMENTS", 1)  # as many symbols as that, or more
    read: list[int] = []
    policy = policy_of(MARKET)
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda bars, count: read.append(len(bars)) or encode(bars, count))
    walked = examine(policy, MARKET, CONFIG, ("AAA", "BBB"), TRAINED_UNTIL, NEVER, chunk_segments=1)
    market, segments = MARKET.until(NEVER), 0
    for number, own in enumerate(walked["policy"]):
        decided = (
            torch.searchsorted(
                market.open_time[slice(*market.offsets[number : number + 2])],
                torch.from_numpy(own.time.astype(np.int64)),
            )
            - 1
            + market.offsets[number]
        )
        segments += len(market.segment_starts(number, decided, HORIZON).unique())
    assert read == [1] * segments


def test_an_exam_may_end_after_so_many_segments(walks: dict[str, list[Walk]]) -> None:
    for name, contestant in exam(max_segments=2).items():
        for short, full in zip(contestant, walks[name], strict=True):
            assert len(short.time) == 2 * HORIZON
            np.testing.assert_array_equal(short.time, full.time[: 2 * HORIZON])
            np.testing.assert_allclose(short.log_returns, full.log_returns[: 2 * HORIZON], atol=1e-9)


def test_all_contestants_walk_the_same_bars_after_the_training_and_before_the_end(
    walks: dict[str, list[Walk]],
) -> None:
    assert list(walks) == ["policy", "buy and hold", "always flat", "momentum"]
    for contestant in walks.values():
        assert [(walk.symbol, walk.asset_class) for walk in contestant] == [
            ("AAA", "crypto"),
            ("BBB", "stock"),
        ]
        for walked, of_policy in zip(contestant, walks["policy"], strict=True):
            assert np.array_equal(walked.time, of_policy.time)
            assert walked.time.min().astype(np.int64) > TRAINED_UNTIL
            assert len(walked.time) % HORIZON == 0
            for values in (walked.position, walked.log_returns, walked.costs, walked.traded):
                assert values.shape == walked.time.shape
                assert values.dtype == np.float64
    end = int(COIN.open_time[120])
    for walked in exam(end_ns=end)["policy"]:
        assert walked.time.max().astype(np.int64) < end


def test_no_decision_sees_a_later_bar(walks: dict[str, list[Walk]]) -> None:
    random = np.random.default_rng(5)
    for first in (100, 111, 200):
        scale = np.where(np.arange(300) < first, 1.0, random.uniform(0.5, 2.0, 300))
        changed = replace(
            COIN, **{name: getattr(COIN, name) * scale for name in ("open", "high", "low", "close", "volume")}
        )
        market = market_of(changed, STOCK, holdout_start_ns=TRAINED_UNTIL)
        other = exam(market)
        cut = COIN.open_time[first]
        for name, contestant in walks.items():
            time = contestant[0].time.astype(np.int64)
            filled, earned = time < cut, time + 60 * 10**9 < cut
            assert filled.any() and not filled.all()
            assert np.array_equal(contestant[0].position[filled], other[name][0].position[filled])
            assert np.array_equal(contestant[0].log_returns[earned], other[name][0].log_returns[earned])
            assert np.array_equal(contestant[1].log_returns, other[name][1].log_returns)


def test_the_chunk_size_changes_nothing(walks: dict[str, list[Walk]]) -> None:
    for size in (1, 3):
        for own, other in zip(walks["policy"], exam(chunk_segments=size)["policy"], strict=True):
            np.testing.assert_allclose(own.log_returns, other.log_returns, atol=1e-7)


def test_several_policies_walk_side_by_side(walks: dict[str, list[Walk]]) -> None:
    both = examine(
        {"policy": policy_of(MARKET), "champion": policy_of(MARKET, seed=1)},
        MARKET,
        CONFIG,
        ("AAA", "BBB"),
        TRAINED_UNTIL,
        NEVER,
    )
    assert list(both) == ["policy", "champion", "buy and hold", "always flat", "momentum"]
    for name, contestant in walks.items():
        for own, other in zip(contestant, both[name], strict=True):
            np.testing.assert_allclose(own.log_returns, other.log_returns, atol=1e-9)
    assert not np.array_equal(both["champion"][0].position, both["policy"][0].position)


def test_no_random_stream_and_no_weight_is_touched() -> None:
    torch.manual_seed(3)
    policy = policy_of(MARKET)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    state, starts = torch.get_rng_state(), MARKET.starts.clone()
    examine(policy, MARKET, CONFIG, ("AAA",), TRAINED_UNTIL, NEVER)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(MARKET.starts, starts)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_without_costs_and_with_half_of_them() -> None:
    paid = [exam(cost_scale=scale)["buy and hold"][0].costs.sum() for scale in (0.0, 0.5, 1.0)]
    assert paid[0] == 0
    assert paid[1] == pytest.approx(paid[2] / 2, rel=1e-2)


def test_the_ruined_stay_on_the_same_bars() -> None:
    wild = walk("AAA", 300, sigma=0.3)
    market = market_of(wild)
    walks = examine(
        policy_of(market),
        market,
        replace(CONFIG, ruin_fraction=0.9),
        ("AAA",),
        int(wild.open_time[20]),
        NEVER,
    )
    (held,) = walks["buy and hold"]
    assert len(held.time) == len(walks["always flat"][0].time)
    last = held.traded.nonzero()[0][-1]  # the liquidation
    assert last < len(held.time) - 1
    assert held.position[: last + 1].all()
    assert not held.log_returns[last + 1 :].any() and not held.position[last + 1 :].any()


def test_symbols_without_bars_are_skipped_unless_all_are() -> None:
    old = walk("CCC", 50)
    market = market_of(old, COIN)
    walks = exam(market, symbols=("CCC", "AAA"))
    assert [walk.symbol for walk in walks["policy"]] == ["AAA"]
    with pytest.raises(NoSegment, match="no place has the 18 bars of a segment after its start"):
        exam(start_ns=int(COIN.open_time[290]))
    with pytest.raises(NoSegment, match="no symbol has 26 bars in a row"):
        exam(end_ns=int(COIN.open_time[5]))
    with pytest.raises(ValueError, match="ZZZ is not among the 2 symbols of the market"):
        exam(symbols=("ZZZ",))
    with pytest.raises(ValueError, match=r"positions=-1.0,1.0 must have 0 among them"):
        examine(
            policy_of(MARKET), MARKET, replace(CONFIG, positions=(-1.0, 1.0)), ("AAA",), TRAINED_UNTIL, NEVER
        )


def test_baselines_take_the_nearest_positions_there_are() -> None:
    bars = torch.tensor([[60], [61], [62]])
    for positions, held, momentum in (
        ((0.0, 0.5, 2.0), 0.5, {0.0, 0.5}),
        ((-0.5, 0.0, 1.0), 1.0, {-0.5, 1.0}),
    ):
        bought = baselines.actions_after("buy and hold", MARKET, positions, bars, torch.zeros(1))
        assert {positions[action] for action in bought.flatten().tolist()} == {held}
        every = torch.arange(300)[:, None]
        rule = baselines.actions_after(
            "momentum", MARKET, positions, every, torch.zeros(1, dtype=torch.int64)
        )
        assert {positions[action] for action in rule[PAST:].flatten().tolist()} == momentum
        assert {positions[action] for action in rule[:PAST].flatten().tolist()} == {0.0}


def same(first: list[Walk], second: list[Walk]) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("time", "position", "log_returns", "costs", "traded")
    )


def test_flat_costs_take_the_place_of_fees_and_slippage(walks: dict[str, list[Walk]]) -> None:
    dear = exam(flat_costs_bps=(0.0, 3.0))
    assert list(dear) == ["policy", "policy at 0 bps", "policy at 3 bps", *list(walks)[1:]]
    assert all(same(dear[name], walks[name]) for name in walks)
    for free, paying in zip(dear["policy at 0 bps"], dear["policy at 3 bps"], strict=True):
        borrows = np.abs(free.position - 0.5) > 0.5 + 1e-6  # short, or beyond 1
        assert free.traded.sum() > 0
        # The rest is the cost of borrowing, which cash and a long position do not have.
        assert free.costs[~borrows].max() < 1e-6 < free.costs[borrows].min()
        assert paying.traded.sum() > 0
        borrowing = paying.costs - 3e-4 * paying.traded
        assert borrowing.min() > -1e-12 and np.median(borrowing) < 1e-4


def test_impossible_flat_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="a flat cost must be 0 or more and under 5000 bps, was 6000"):
        exam(flat_costs_bps=(1.0, 6000.0))


def test_an_exam_reports_its_progress() -> None:
    reported: list[tuple[int, int]] = []
    walks = exam(on_segment=lambda *place: reported.append(place), chunk_segments=2)
    done, totals = zip(*reported, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0]
    assert all(0 < later - earlier <= 2 for earlier, later in itertools.pairwise((0, *done)))
    longest = max(len(walk.time) for walk in walks["policy"]) // HORIZON
    assert totals[0] > longest  # reading counts, too
