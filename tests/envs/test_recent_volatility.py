"""How much a symbol moves just now is what a loop finds, and is known when the bar closes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from data_sources.bars import Bars
from envs.ahead import LARGEST_MOVE
from envs.market import Market
from envs.recent_volatility import LOOK_BACK, recent_volatility
from tests.envs.markets import market_of
from tests.envs.test_ahead import HOLDOUT, awkward_bars


def expected_volatility(market: Market, bars: list[Bars], number: int, bar: int) -> float:
    """Of one bar, by its definition."""
    series, typical = bars[number], float(market.volatility[number])
    begins = market.stretch_first[market.stretch_first <= market.offsets[number] + bar].max()
    first = max(int(begins - market.offsets[number]), bar - LOOK_BACK)
    moves = [math.log(series.close[i + 1] / series.close[i]) / typical for i in range(first, bar)]
    squares = [min(abs(move), LARGEST_MOVE) ** 2 for move in moves]
    return math.sqrt((1.0 + sum(squares)) / (1.0 + len(squares)))


def test_it_is_what_a_loop_over_the_bars_finds() -> None:
    bars = awkward_bars()
    market = market_of(*bars, holdout_start_ns=HOLDOUT)
    offsets = market.offsets.tolist()
    places = [
        (number, bar)
        for number, series in enumerate(bars)
        for bar in range(len(series))
        if series.open_time[bar] < HOLDOUT  # beyond it are no stretches
    ]
    found = recent_volatility(market, torch.tensor([[offsets[s] + bar for s, bar in places]]))[0]
    expected = np.array([expected_volatility(market, bars, *place) for place in places])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)
    assert expected.min() < 0.9 and expected.max() > 1.5  # it varies
    firsts = market.stretch_first.clone()
    assert (recent_volatility(market, firsts[:, None]) == 1.0).all() and len(firsts) > 5
    assert (recent_volatility(market, torch.full((2, 3), -1)) == 1.0).all()


def test_no_later_bar_changes_it() -> None:
    bars = awkward_bars()
    market = market_of(*bars, holdout_start_ns=HOLDOUT)
    for number, series in enumerate(bars):
        last = 50 if len(series) > 50 else 10
        later = np.arange(len(series)) > last
        names = "open", "high", "low", "close"
        columns = {name: np.where(later, 9.0, getattr(series, name)) for name in names}
        changed = [replace(other, **columns) if other is series else other for other in bars]
        others = replace(market_of(*changed, holdout_start_ns=HOLDOUT), volatility=market.volatility)
        seen = market.offsets[number] + torch.arange(last + 1)[:, None]
        assert torch.equal(recent_volatility(market, seen), recent_volatility(others, seen))
        after = market.offsets[number] + torch.arange(last + 1, len(series))[:, None]
        is_known = series.open_time[0] < HOLDOUT
        assert is_known != torch.equal(recent_volatility(market, after), recent_volatility(others, after))
