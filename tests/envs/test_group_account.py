"""Accounts over groups: the ledger in tensors is the plain one, and obeys the laws of money and of the caps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from envs.account import AccountState, advance
from envs.group_account import GroupState, advance_group, project
from tests.envs.group_reference import Meeting, ReferenceGroup, within_caps

DOUBLE = torch.float64
SIZE, GROUPS, STEPS = 5, 16, 20
NAMES = [f"S{number}" for number in range(SIZE)]


def draw(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=DOUBLE)


def made_up(seed: int, with_impact: bool, sigma: float) -> dict[str, torch.Tensor]:
    """Return what violent markets meet, (STEPS + 1, GROUPS, SIZE) each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS + 1, GROUPS, SIZE)
    moves = sigma * torch.randn(shape, generator=generator, dtype=DOUBLE)
    is_perpetual = torch.rand(GROUPS, SIZE, generator=generator) < 0.3
    terms = {
        "price": 50 * moves.cumsum(0).exp(),
        "cost_rate": draw(generator, *shape, high=0.02),
        "borrow": draw(generator, *shape, high=1e-3) * ~is_perpetual,
        "is_filled": torch.rand(shape, generator=generator) < 0.8,
        "funding": 1e-2 * torch.randn(shape, generator=generator, dtype=DOUBLE) * is_perpetual,
        "margin": (0.05 * is_perpetual).to(DOUBLE).expand(shape),
    }
    # Money is borrowed at the one rate of all that borrow.
    terms["borrow"] = terms["borrow"].amax(-1, keepdim=True) * ~is_perpetual
    if with_impact:
        terms["impact"] = draw(generator, *shape, high=0.1)
    return terms


def fills_at(terms: dict[str, torch.Tensor], t: int) -> dict[str, torch.Tensor]:
    now = {name: values[t] for name, values in terms.items() if name != "funding"}
    now |= {"next_price": terms["price"][t + 1], "next_cost_rate": terms["cost_rate"][t + 1]}
    now |= {"funding": terms["funding"][t + 1]} if "funding" in terms else {}
    if "impact" in terms:
        now |= {"next_impact": terms["impact"][t + 1], "impact_limit": torch.full_like(now["price"], 0.03)}
    return now


@pytest.mark.parametrize(("with_impact", "sigma"), [(False, 0.01), (True, 0.15)])
def test_the_tensor_ledger_is_the_plain_one(with_impact: bool, sigma: float) -> None:
    terms, generator = made_up(1, with_impact, sigma), torch.Generator().manual_seed(2)
    state = GroupState.fresh(GROUPS, SIZE, 0, DOUBLE, torch.device("cpu"))
    plain = [ReferenceGroup(ruin_equity=0.4) for _ in range(GROUPS)]
    ruins = 0
    for t in range(STEPS):
        # Some symbols keep their target, so that they trade only where the caps move them.
        wanted = torch.randint(-2, 3, (GROUPS, SIZE), generator=generator).to(DOUBLE) / 2
        wanted = wanted * state.alive[:, None]
        weight = project(wanted, 2.0, 0.3)
        state, fill = advance_group(state, weight, state.choice, ruin_equity=0.4, **fills_at(terms, t))
        ruins += int(fill.ruined.sum())
        for number, account in enumerate(plain):
            here, there = (meetings(terms, at, number) for at in (t, t + 1))
            targets = dict(zip(NAMES, wanted[number].tolist(), strict=True))
            log_return = account.fill(within_caps(targets, 2.0, 0.3), here, there)
            assert math.isclose(fill.log_return[number], log_return, abs_tol=1e-9)
            assert account.ruined != bool(state.alive[number])
    totals = [[getattr(account, name) for account in plain] for name in ("costs", "traded", "funding")]
    assert ruins > 3 if sigma > 0.1 else ruins == 0
    assert all(sum(map(abs, total)) > 0.1 for total in totals)


def meetings(terms: dict[str, torch.Tensor], t: int, number: int) -> dict[str, Meeting]:
    met = {}
    for place, name in enumerate(NAMES):
        own = {key: float(values[t, number, place]) for key, values in terms.items()}
        impact = own.pop("impact", 0.0)
        rate, is_filled = own.pop("cost_rate"), bool(own.pop("is_filled"))

        def cost(order: float, rate: float = rate, impact: float = impact) -> float:
            return rate + min(abs(order) * impact, 0.03)

        met[name] = Meeting(cost=cost, is_filled=is_filled, **own)
    return met


def test_a_group_of_one_is_an_account() -> None:
    terms = {name: values[..., :1] for name, values in made_up(3, True, 0.05).items()}
    terms["is_filled"] = torch.ones_like(terms["is_filled"])
    terms.pop("margin")
    generator = torch.Generator().manual_seed(4)
    group = GroupState.fresh(GROUPS, 1, 0, DOUBLE, torch.device("cpu"))
    single = AccountState.fresh(GROUPS, DOUBLE, torch.device("cpu"))
    for t in range(STEPS):
        target = torch.randint(-2, 3, (GROUPS,), generator=generator).to(DOUBLE) * single.alive
        fills = fills_at(terms, t)
        alone = {name: values[:, 0] for name, values in fills.items() if name != "is_filled"}
        group, fill = advance_group(group, target[:, None], group.choice, ruin_equity=0.5, **fills)
        single, own = advance(single, target, ruin_equity=0.5, **alone)
        assert_close(group.log_equity, single.log_equity, rtol=0, atol=1e-12)
        for name in ("log_return", "traded", "costs", "borrow_cost", "funding"):
            alive = single.alive | own.ruined
            assert_close(getattr(fill, name)[alive], getattr(own, name)[alive], rtol=0, atol=1e-12)
        assert torch.equal(group.alive, single.alive)
    assert 0 < int(single.alive.sum()) < GROUPS


def test_nothing_is_made_or_lost_without_costs_at_constant_prices() -> None:
    terms = made_up(5, False, 0.0)
    for name in ("cost_rate", "borrow", "funding", "margin"):
        terms[name] = torch.zeros_like(terms[name])
    generator = torch.Generator().manual_seed(6)
    state = GroupState.fresh(GROUPS, SIZE, 0, DOUBLE, torch.device("cpu"))
    for t in range(STEPS):
        wanted = torch.randint(-1, 2, (GROUPS, SIZE), generator=generator).to(DOUBLE)
        state, fill = advance_group(
            state, project(wanted, 3.0, 1.0), state.choice, ruin_equity=0.1, **fills_at(terms, t)
        )
        assert_close(state.log_equity, torch.zeros(GROUPS, dtype=DOUBLE), rtol=0, atol=1e-12)
        assert float(fill.traded.sum()) > 0


def test_caps_hold_after_costs_and_shuffled_symbols_have_shuffled_results() -> None:
    terms, generator = made_up(7, False, 0.02), torch.Generator().manual_seed(8)
    terms["is_filled"] = torch.ones_like(terms["is_filled"])
    state = twin = GroupState.fresh(GROUPS, SIZE, 0, DOUBLE, torch.device("cpu"))
    order = torch.randperm(SIZE, generator=generator)
    for t in range(STEPS):
        wanted = torch.randint(-2, 3, (GROUPS, SIZE), generator=generator).to(DOUBLE)
        # All orders differ from what is held, so that nothing drifts.
        wanted = wanted + 1e-3 * torch.rand(GROUPS, SIZE, generator=generator, dtype=DOUBLE)
        weight = project(wanted, 1.5, 0.2)
        assert bool((weight * wanted >= 0).all()) and bool((weight.abs() <= wanted.abs() + 1e-12).all())
        state, _ = advance_group(state, weight, state.choice, ruin_equity=0.01, **fills_at(terms, t))
        shuffled = {name: values[:, order] for name, values in fills_at(terms, t).items()}
        twin, _ = advance_group(
            twin, project(wanted[:, order], 1.5, 0.2), twin.choice, ruin_equity=0.01, **shuffled
        )
        value = state.units * terms["price"][t]
        exposure = (value / (state.cash + value.sum(-1))[:, None])[state.alive]
        assert float(exposure.abs().sum(-1).max()) <= 1.5 + 1e-9
        assert float(exposure.sum(-1).abs().max()) <= 0.2 + 1e-9
        assert_close(state.units[:, order], twin.units, rtol=0, atol=1e-12)
        assert_close(state.log_equity, twin.log_equity, rtol=0, atol=1e-12)


def test_opposite_groups_sum_to_minus_their_costs() -> None:
    """What one side wins the other loses, while equities stay near 1."""
    terms, generator = made_up(9, False, 1e-4), torch.Generator().manual_seed(10)
    terms["is_filled"] = torch.ones_like(terms["is_filled"])
    wanted = torch.randint(-1, 2, (GROUPS, SIZE), generator=generator).to(DOUBLE) / SIZE
    sides = []
    for sign in (1, -1):
        state = GroupState.fresh(GROUPS, SIZE, 0, DOUBLE, torch.device("cpu"))
        fills = fills_at(terms, 0) | {"cost_rate": torch.zeros(GROUPS, SIZE, dtype=DOUBLE)}
        fills |= {"margin": None, "borrow": torch.zeros(GROUPS, SIZE, dtype=DOUBLE)}
        state, _ = advance_group(state, sign * wanted, state.choice, ruin_equity=0.1, **fills)
        sides.append(state.log_equity.exp() - 1)
    assert_close(sides[0], -sides[1], rtol=0, atol=1e-12)
    assert float(sides[0].abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("wanted", "weights"),
    [
        ((0.5, 0.5, -0.5, 0.0), (0.25, 0.25, -0.5, 0.0)),
        ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
        ((1.0, 1.0, -1.0, -1.0), (0.5, 0.5, -0.5, -0.5)),
        ((-1.0, -1.0, -1.0, 0.5), (-1 / 6, -1 / 6, -1 / 6, 0.5)),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_weights_within_the_caps_by_hand(wanted: tuple[float, ...], weights: tuple[float, ...]) -> None:
    found = project(torch.tensor(wanted, dtype=DOUBLE), 2.0, 0.0)
    assert_close(found, torch.tensor(weights, dtype=DOUBLE))
    plain = within_caps(dict(zip(NAMES, wanted, strict=False)), 2.0, 0.0)
    assert_close(torch.tensor(list(plain.values()), dtype=DOUBLE), found)
