"""What came after each bar is what a loop finds, and nothing beyond a hole, a break or the holdout is used."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from data_sources.bars import MINUTE_NS, Bars, find_breaks
from envs.ahead import HORIZONS, LARGEST_MOVE, moves_ahead
from envs.market import HOLE_NS, Market
from tests.envs.markets import MONDAY, market_of, walk

HOLDOUT = MONDAY + 400 * MINUTE_NS


def awkward_bars() -> list[Bars]:
    """Symbols with a hole, a break, a wild move, too few bars, none before the holdout, and a night."""
    broken = walk("BROKEN", 180, seed=1)
    for name in ("open", "high", "low", "close"):
        getattr(broken, name)[120:] *= 20.0
    wild = walk("WILD", 180, seed=2)
    wild.open[100] *= 1.5
    wild.high[100] *= 1.5
    late = walk("LATE", 80, seed=3)
    return [
        replace(late, open_time=late.open_time + 1_000 * MINUTE_NS),
        walk("HOLES", 230, gaps={20: 100, 60: 30, 150: 61}),
        broken,
        wild,
        walk("SHORT", 20, seed=4),
        walk("STOCK", 180, "stock", seed=5, gaps={100: 17 * 60}),
    ]


def expected_ahead(market: Market, bars: list[Bars], number: int, bar: int) -> np.ndarray:
    """(2, K) of one bar, by its definition."""
    series, volatility = bars[number], float(market.volatility[number])
    hole_ns = HOLE_NS["stock" if series.asset_class == "stock" else "crypto"]
    ends = set(find_breaks(series).tolist())
    result = np.full((2, len(HORIZONS)), math.nan)
    for column, horizon in enumerate(HORIZONS):
        reach = range(bar + 1, bar + 2 + horizon)
        if reach[-1] >= len(series) or series.open_time[reach[-1]] >= HOLDOUT:
            continue
        steps = series.open_time[bar + 1 : reach[-1] + 1] - series.open_time[bar : reach[-1]]
        if steps.max() > hole_ns or ends & set(reach):
            continue
        moves = [math.log(series.open[i + 1] / series.open[i]) / volatility for i in reach[:-1]]
        result[0, column] = sum(moves) / math.sqrt(horizon)
        result[1, column] = math.sqrt(sum(move**2 for move in moves) / horizon)
    return result.clip(-LARGEST_MOVE, LARGEST_MOVE)


def test_it_is_what_a_loop_over_the_bars_finds() -> None:
    bars = awkward_bars()
    market = market_of(*bars, holdout_start_ns=HOLDOUT)
    numbers = range(int(market.offsets[-1]))
    found = moves_ahead(market, torch.tensor(numbers)[:, None])[:, 0].numpy()
    symbols = np.searchsorted(market.offsets.numpy(), numbers, side="right") - 1
    offsets = market.offsets.tolist()
    expected = [
        expected_ahead(market, bars, s, b - offsets[s]) for b, s in zip(numbers, symbols, strict=True)
    ]
    np.testing.assert_allclose(found, np.array(expected), rtol=2e-4, atol=2e-4)
    known = ~np.isnan(found)
    assert 0.2 < known.mean() < 0.9 and (np.abs(found[known]) == LARGEST_MOVE).any()
    assert not known[symbols == 0].any() and known[symbols == 5].any()
    # Everywhere before a longer horizon is known, so is a shorter one, and both or none of the two.
    assert (known[..., :-1] >= known[..., 1:]).all() and (known[:, 0] == known[:, 1]).all()


def test_no_bar_of_the_holdout_and_no_minus_one_is_a_target() -> None:
    bars = [walk("AAA"), walk("BBB", seed=1)]
    market = market_of(*bars, holdout_start_ns=HOLDOUT)
    changed = []
    for series in bars:
        later = series.open_time >= HOLDOUT
        changed.append(replace(series, **{name: np.where(later, 9.0, getattr(series, name)) for name in
                                          ("open", "high", "low", "close")}))  # fmt: skip
    other = market_of(*changed, holdout_start_ns=HOLDOUT)
    places = torch.arange(len(market.open_time)).view(-1, 8)
    assert torch.equal(moves_ahead(market, places).nan_to_num(99), moves_ahead(other, places).nan_to_num(99))
    assert moves_ahead(market, torch.full((1, 3), -1)).isnan().all()
