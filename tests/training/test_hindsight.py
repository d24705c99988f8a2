"""Hindsight: every choice is valued as if it had been made, and nothing that was made is valued otherwise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from envs.counterfactuals import accounts_in_every_position, growth_of_every_choice
from envs.market import YEAR_NS
from tests.envs.account_reference import ReferenceAccount
from tests.envs.markets import HORIZON, env_of, funded, market_of, walk
from tests.training.rollouts import calm_and_wild, made_up_hindsight, policy_for, rollout_of
from training import hindsight as recursion
from training.hindsight import Hindsight, choice_values, compiled_choice_values, hindsight_advantages
from training.rollout import Rollout


def valued(hindsight: Hindsight, n: int, t: int, held: int, valid: torch.Tensor) -> float:
    """The definition of v, written out as a recursion."""
    if t == hindsight.growth.shape[1] or not valid[n, t]:
        return float(hindsight.values[n, t, held])
    expected = sum(
        math.exp(float(hindsight.log_policy[n, t, held, k])) * chosen(hindsight, n, t, held, k, valid)
        for k in range(hindsight.growth.shape[-1])
    )
    return 0.2 * float(hindsight.values[n, t, held]) + 0.8 * expected


def chosen(hindsight: Hindsight, n: int, t: int, held: int, k: int, valid: torch.Tensor) -> float:
    if hindsight.only_cash is not None and hindsight.only_cash[n, t]:
        k = hindsight.cash
    future = 0.0 if hindsight.ends[n, t, held, k] else valued(hindsight, n, t + 1, k, valid)
    return float(hindsight.growth[n, t, held, k]) + 0.9 * future


@pytest.mark.parametrize("num_held", [3, 4])
@pytest.mark.parametrize("bell", [False, True])
def test_choices_are_worth_their_definition(num_held: int, bell: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hindsight = made_up_hindsight(generator, 2, num_held)
    short = Hindsight(
        hindsight.growth[:, :4].double(),
        hindsight.ends[:, :4],
        hindsight.log_policy[:, :4].double(),
        hindsight.values[:, :5].double(),
        hindsight.held[:, :4],
    )
    short.ends[1, 2, :, 1] = True
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1, 3] = False
    if bell:
        short.only_cash, short.cash = torch.zeros(2, 4, dtype=torch.bool), 1
        short.only_cash[0, 1:3] = True
    q, expected = choice_values(short, valid, 0.9, 0.8)
    for n, t, held, k in itertools.product(range(2), range(4), range(num_held), range(3)):
        assert float(q[n, t, held, k]) == pytest.approx(chosen(short, n, t, held, k, valid), rel=1e-12)
    advantages, returns = hindsight_advantages(short, valid, 0.9, 0.8)
    for n, t in itertools.product(range(2), range(4)):
        held = int(short.held[n, t])
        assert torch.equal(returns[n, t], expected[n, t, held])
        assert torch.equal(advantages[n, t], q[n, t, held] - returns[n, t])


def test_under_the_policy_advantages_add_up_to_nothing() -> None:
    hindsight = made_up_hindsight(torch.Generator().manual_seed(1), 4)
    valid = torch.ones(4, hindsight.growth.shape[1], dtype=torch.bool)
    advantages, _ = hindsight_advantages(hindsight, valid, 0.9, 0.8)
    own = hindsight.held[..., None, None].expand(-1, -1, 1, 3)
    policy = hindsight.log_policy.gather(2, own).squeeze(2).exp()
    nothing = torch.zeros(advantages.shape[:2])
    torch.testing.assert_close((policy * advantages).sum(-1), nothing, atol=1e-5, rtol=0)


def test_who_would_have_been_ruined_by_a_choice_has_no_future_behind_it() -> None:
    # Bars of 40 % ruin most accounts that are not flat; being flat never does.
    env = env_of(market_of(walk(sigma=0.4)), num_envs=64)
    rollout = rollout_of(env, policy_for(env), chunk=64, hindsight=True)
    assert rollout.hindsight is not None
    held = rollout.hindsight.held[..., None, None].expand(-1, -1, 1, 3)
    own = rollout.hindsight.ends.gather(2, held).squeeze(2)
    chosen_ends = own.gather(2, rollout.actions[..., None]).squeeze(-1)
    # Up to the drift of the exposure, who was ruined is who is said to be.
    said, was = chosen_ends[rollout.valid], rollout.terminated[rollout.valid]
    assert was.sum() > 10 and (said == was).float().mean() > 0.97
    assert not own[..., 1][rollout.valid & (rollout.hindsight.held == 1)].any()
    assert own[..., [0, 2]][rollout.valid].any()


def test_before_the_bell_every_choice_is_cash() -> None:
    # Tuesday 2026-01-06, 19:20 to 21:20 UTC; in winter New York closes at 21:00.
    bars = walk(asset_class="stock", num_bars=120)
    late = replace(bars, open_time=bars.open_time - bars.open_time[0] + 1_767_727_200 * 10**9)
    env = env_of(market_of(late), flat_before_close=20)
    rollout = rollout_of(env, policy_for(env), hindsight=True)
    assert rollout.hindsight is not None and rollout.hindsight.only_cash is not None
    only_cash = rollout.hindsight.only_cash
    assert only_cash.any() and not only_cash.all()
    advantages, _ = hindsight_advantages(rollout.hindsight, rollout.valid, 0.9, 0.8)
    assert advantages[only_cash].abs().max() < 1e-6
    assert advantages[~only_cash].abs().max() > 1e-3


def test_growth_copies_nothing_from_the_host_after_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy to a GPU makes the host wait for all that is queued there.
    env = env_of(market_of(walk()))
    env.begin_segment()
    fills, positions = env.segment.fills_ahead(), env.config.positions
    first = growth_of_every_choice(fills, positions, torch.zeros(()))

    def copied(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made of the host's numbers")

    monkeypatch.setattr(torch, "tensor", copied)
    assert torch.equal(growth_of_every_choice(fills, positions, torch.zeros(())), first)


@pytest.mark.parametrize("bell", [False, True])
@pytest.mark.parametrize("num_held", [3, 4])
def test_the_compiled_recursion_is_the_plain_one(
    num_held: int, bell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By threes of eight steps: the first part is shorter. The compiler itself: test_compilation.py.
    monkeypatch.setattr(recursion, "UNROLLED_STEPS", 3)
    monkeypatch.setattr(recursion, "compiled", lambda function, device: function)
    generator = torch.Generator().manual_seed(2)
    hindsight = made_up_hindsight(generator, 5, num_held)
    valid = torch.rand(5, hindsight.growth.shape[1], generator=generator) < 0.8
    if bell:
        hindsight.only_cash, hindsight.cash = torch.rand(valid.shape, generator=generator) < 0.4, 1
    plain = choice_values(hindsight, valid, 0.97, 0.9)
    quick = compiled_choice_values(hindsight, valid, 0.97, 0.9)
    torch.testing.assert_close(quick, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [(-1.0, 0.0, 1.0), (0.0, 0.5, 2.0), (-1.0, 1.0)])
def test_growth_is_what_a_ledger_of_plain_floats_earns(positions: tuple[float, ...]) -> None:
    # A weekend after every tenth bar, so that every segment holds one: it costs more than a minute does.
    # Funding of a stock: no such thing is traded, and the ledger does not mind.
    bars = funded(walk(asset_class="stock", gaps=dict.fromkeys(range(10, 600, 10), 3_900)))
    costs = {"stock_fee_bps": 7.0, "range_slippage": 0.1, "borrow_rate": 5.0}
    env = env_of(market_of(bars), positions=positions, **costs)
    env.begin_segment()
    places = torch.searchsorted(env.market.open_time, env.state_dict()["open_time"])
    growth = growth_of_every_choice(env.segment.fills_ahead(), positions, torch.zeros(()))
    held_targets = positions if 0.0 in positions else (*positions, 0.0)
    assert growth.shape == (env.config.num_envs, HORIZON, len(held_targets), len(positions))
    rate = (env.config.stock_fee_bps + env.config.slippage_bps) / 1e4
    for n, t in itertools.product((0, 3), range(HORIZON)):
        fill = env.market.quotes[places[n] + 1 + t].double()
        following, *_, funding = env.market.quotes[places[n] + 2 + t].double().tolist()
        opens = env.market.open_time[places[n] + 1 + t :][:2].tolist()
        borrow = 5.0 * (opens[1] - opens[0]) / YEAR_NS
        for (j, held), (k, target) in itertools.product(enumerate(held_targets), enumerate(positions)):
            account = ReferenceAccount(
                ruin_equity=0.0,
                held=held if held in positions else None,
                cash=1 - held,
                units=held / float(fill[0]),
            )
            cost = rate + 0.1 * float(fill[3])
            earned = account.fill(target, float(fill[0]), following, cost, borrow, funding=funding)
            assert float(growth[n, t, j, k]) == pytest.approx(earned, abs=2e-7)


def rewarded_and_grown(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rewards, growth of what was chosen, and where nothing was held before: no drift sets these apart."""
    assert rollout.hindsight is not None
    held = rollout.hindsight.held
    rows = rollout.hindsight.growth.gather(2, held[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
    grown = rows.gather(2, rollout.actions[..., None]).squeeze(-1)
    return rollout.rewards, grown, held == 1


def test_what_was_chosen_grew_as_it_was_rewarded() -> None:
    env = env_of(calm_and_wild())
    rewards, grown, flat = rewarded_and_grown(rollout_of(env, policy_for(env), hindsight=True))
    # Equal but for the drift of the exposure since the last trade.
    assert (grown - rewards).abs().max() < 0.05 * rewards.abs().max()
    # The first decision of a fresh account, and whatever follows a decision to be flat, has no drift.
    assert flat[:, 0].all() and flat.float().mean() > 0.1
    torch.testing.assert_close(grown[flat], rewards[flat], rtol=1e-4, atol=1e-5)


def test_with_impact_it_did_so_too_however_equity_had_moved() -> None:
    # An order pays for what it is worth in money: half the equity, half the impact.
    given = {"volume_slippage": 0.05, "account_value": 500.0, "ruin_fraction": 1e-6, "episode_bars": 640}
    env = env_of(market_of(walk(num_bars=2_000)), **given)
    policy = policy_for(env)
    compared = 0
    for _ in range(6):
        lost = env.account.log_equity < -0.3
        rewards, grown, flat = rewarded_and_grown(rollout_of(env, policy, hindsight=True))
        torch.testing.assert_close(grown[flat], rewards[flat], rtol=1e-4, atol=1e-4)
        compared += int(flat[lost].sum())
    assert compared > 20


@pytest.mark.parametrize("positions", [(-1.0, 0.0, 1.0), (0.0, 0.5, 2.0), (-1.0, 1.0)])
@pytest.mark.parametrize("account_value", [50.0, 1e3, 1e9])
def test_with_impact_what_a_fresh_account_chooses_grows_as_it_is_rewarded(
    positions: tuple[float, ...], account_value: float
) -> None:
    # Orders far below the bars' volume, about as large, and far above it, where the most is paid.
    given = {
        "volume_slippage": 0.05,
        "account_value": account_value,
        "range_slippage": 0.1,
        "borrow_rate": 5.0,
    }
    market = market_of(walk(asset_class="stock", gaps=dict.fromkeys(range(10, 600, 10), 3_900)))
    cash = positions.index(0.0) if 0.0 in positions else len(positions)
    plain = env_of(market, positions=positions, borrow_rate=5.0, range_slippage=0.1)
    env = env_of(market, positions=positions, **given)
    for chosen in range(len(positions)):
        rewards = []
        for played in (env, plain):
            played.restart(seed=chosen)
            played.begin_segment()
            if played is env:
                growth = growth_of_every_choice(played.segment.fills_ahead(), positions, torch.zeros(()))
            rewards.append(played.step(torch.full((16,), chosen))[0])
            for _ in range(HORIZON - 1):
                played.step(torch.full((16,), chosen))
        torch.testing.assert_close(growth[:, 0, cash, chosen], rewards[0], rtol=0, atol=2e-7)
        if chosen != cash:
            assert (rewards[0] < rewards[1]).all()


def test_the_account_that_is_held_is_seen_as_it_is_and_the_others_as_just_reached() -> None:
    env = env_of(market_of(walk()))
    rollout = rollout_of(env, policy_for(env))
    accounts = rollout.accounts
    seen = accounts_in_every_position(accounts, env.config.positions)
    held = accounts[..., :3].argmax(-1)
    own = held[..., None, None].expand(-1, -1, 1, accounts.shape[-1])
    torch.testing.assert_close(seen.gather(2, own).squeeze(2), accounts, rtol=0, atol=0)
    assert torch.equal(seen[..., :3], torch.eye(3).expand_as(seen[..., :3]))
    other = torch.arange(3) != held[..., None]
    assert (seen[..., 3:5][other] == 0).all()
    assert (accounts[..., 3:5] != 0).any()
    assert torch.equal(seen[..., 5:], accounts[..., None, 5:].expand_as(seen[..., 5:]))


def test_the_policy_and_the_critic_are_asked_what_they_would_say_in_every_position() -> None:
    env = env_of(market_of(walk()))
    policy = policy_for(env)
    rollout = rollout_of(env, policy, hindsight=True)
    assert rollout.hindsight is not None
    own = rollout.hindsight.held[..., None]
    log_policy = rollout.hindsight.log_policy.gather(2, own[..., None].expand(-1, -1, 1, 3)).squeeze(2)
    torch.testing.assert_close(log_policy, rollout.log_policy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        rollout.hindsight.values[:, :-1].gather(2, own).squeeze(2), rollout.values, rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        for j in range(3):
            accounts = accounts_in_every_position(rollout.accounts, env.config.positions)[:, :, j]
            logits, values = policy(rollout.bars, accounts)
            torch.testing.assert_close(
                rollout.hindsight.log_policy[:, :, j], torch.log_softmax(logits, -1), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(rollout.hindsight.values[:, :-1, j], values, rtol=1e-4, atol=1e-5)
