"""One account over many symbols: of one symbol it is the plain ledger, and its exposure stays under the cap."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from evaluation.portfolio import Fill, Portfolio
from tests.envs.account_reference import ReferenceAccount
from tests.envs.markets import config_of

CONFIG = config_of(borrow_rate=0.5, ruin_fraction=0.2)
MINUTE_NS = 60 * 10**9
YEAR_MINUTES = 365.25 * 24 * 60


def fill(
    minute: int, symbol: str = "AAA", target: float | None = None, price: float = 100.0, **given: float
) -> Fill:
    plain = {"rate": 6e-4, "volume": 1e6, "funding": 0.0, "borrows": True}
    return Fill(10**18 + minute * MINUTE_NS, symbol, target, price, **(plain | given))  # type: ignore[arg-type]


def test_of_one_symbol_it_is_the_ledger() -> None:
    random = np.random.default_rng(0)
    price = 100 * np.exp(np.cumsum(random.normal(0, 2e-3, 300)))
    targets = random.choice([-1.0, 0.0, 1.0], 300)
    funding = np.where(np.arange(300) % 40, 0.0, random.normal(0, 1e-3, 300))
    # Half of a cap of 2 is all of its equity; alone, a short position that loses would meet the cap.
    portfolio, account = Portfolio(gross=2.0, num_symbols=2), ReferenceAccount(0.2, held=0.0)
    for t in range(299):
        portfolio.follow([fill(t, target=targets[t], price=price[t], funding=funding[t])], CONFIG)
        borrow = 0.5 / YEAR_MINUTES
        # The reference pays the interest of a minute at its end, by the value at its start.
        account.fill(targets[t], price[t], price[t + 1], 6e-4, borrow, funding=funding[t + 1])
        assert portfolio.cash + portfolio.units.get("AAA", 0.0) * price[t] == pytest.approx(portfolio.equity)
    portfolio.follow([fill(299, price=price[299], funding=funding[299])], CONFIG)
    assert portfolio.equity == pytest.approx(account.equity(price[299]), abs=1e-9)
    assert portfolio.costs == pytest.approx(account.costs, abs=1e-9)
    assert portfolio.funding == pytest.approx(account.funding, abs=1e-9)


@pytest.mark.parametrize("arrives", [75, 90, 250])
def test_funding_that_is_known_late_is_paid_once_for_what_was_held_then(arrives: int) -> None:
    prices = 100 * np.exp(np.cumsum(np.random.default_rng(2).normal(0, 1e-3, 300)))
    found, expected = (Portfolio(gross=1.0, num_symbols=1) for _ in range(2))
    due = fill(74).time_ns  # the first bar of an hour
    for t, price in enumerate(prices):
        one = fill(t, target={0: 1.0, 80: -1.0}.get(t), price=price, rate=0.0, borrows=False)
        is_due = one.time_ns == due
        late = {"AAA": [(due, 4e-3), (due + 10**15, 1.0)]} if t == arrives else {}  # the other has not filled
        found.follow([one], CONFIG, late)
        expected.follow([replace(one, funding=4e-3 if is_due else 0.0)], CONFIG)
        found = Portfolio(**json.loads(json.dumps(asdict(found))))
    assert found.funding == pytest.approx(expected.funding) and expected.funding > 3e-3
    assert len(found.charged["AAA"]) < 10


@pytest.mark.parametrize("gross", [0.5, 1.0, 2.0])
def test_exposure_stays_under_the_cap_and_no_money_appears(gross: float) -> None:
    random = np.random.default_rng(1)
    names = [f"S{n}" for n in range(8)]
    price = dict.fromkeys(names, 100.0)
    portfolio, most = Portfolio(gross, len(names)), 0.0
    free, start = Portfolio(gross, len(names)), 0.0
    for t in range(400):
        price = {name: p * np.exp(random.normal(0.002, 0.01)) for name, p in price.items()}
        here = [name for name in names if random.random() < 0.8]  # others have no bar in this minute
        wants = {n: float(random.choice([-1, 0, 1])) if random.random() < 0.1 else None for n in here}
        fills = [fill(t, n, wants[n], price[n]) for n in here]
        portfolio.follow(fills, CONFIG)
        free.follow([replace(f, rate=0.0) for f in fills], replace(CONFIG, borrow_rate=0.0))
        if len(here) == len(names):
            most = max(most, portfolio.exposure)
        start += 1
    assert gross * 0.5 < most <= gross * 1.001
    assert portfolio.trades and portfolio.costs > 0
    assert Portfolio(**asdict(portfolio)) == portfolio


def test_ruin_is_final_and_interest_is_paid_for_what_is_borrowed() -> None:
    portfolio = Portfolio(gross=2.0, num_symbols=1)
    portfolio.follow([fill(0, target=1.0)], CONFIG)
    assert portfolio.cash < -0.9
    portfolio.follow([fill(60 * 24 * 365, price=100.0)], CONFIG)
    assert portfolio.borrowing == pytest.approx(0.5, abs=0.01)
    portfolio.follow([fill(60 * 24 * 365 + 1, price=60.0)], CONFIG)
    assert not portfolio.alive and not portfolio.units
    portfolio.follow([fill(60 * 24 * 365 + 2, target=1.0)], CONFIG)
    assert not portfolio.units
