"""Where segments may start, how starts are drawn, and how a market is refreshed."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS
from envs.features import FEATURES, compute
from tests.envs.markets import CONTEXT, HORIZON, NEVER, config_of, constant, market_of, walk


def expected_starts(bars, holdout_start_ns, first_bar):
    """All valid t0 of a symbol, by trying every bar."""
    hole = 60 if bars.asset_class == "crypto" else 100 * 60
    starts = []
    for t0 in range(CONTEXT, len(bars) - HORIZON - 1):
        times = bars.open_time[t0 - CONTEXT : t0 + HORIZON + 2]
        if (np.diff(times) <= hole * MINUTE_NS).all() and times[-1] < holdout_start_ns:
            starts.append(first_bar + t0)
    return starts


def draw(market, count=20_000, seed=0):
    return market.draw_starts(count, torch.Generator().manual_seed(seed))


def test_its_memory_is_the_same_before_and_after_use():
    market = market_of(walk())
    unused = market.num_bytes
    market.cost_rates(config_of(), torch.float32)
    assert market.num_bytes == unused > market.features.nbytes


def test_beside_its_tensors_it_holds_one_symbol_at_a_time():
    bars = [walk(f"S{number}", 20_000, seed=number) for number in range(12)]
    whole = market_of(*bars)
    tracemalloc.start()  # knows of NumPy's memory, not of torch's
    market = market_of(*bars, statistics=whole.statistics, table=whole.features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_symbol = 20_000 * 8 * 12
    assert (
        peak < market.open_time.nbytes + 2 * market.minutes_left.nbytes + one_symbol < 0.6 * market.num_bytes
    )


def test_every_valid_start_is_drawn_and_no_other():
    crypto = walk("AAA", 300, gaps={40: 10, 90: 60, 91: 100, 200: 59})
    stock = walk("BBB", 200, "stock", seed=1, gaps={100: 90 * 60, 150: 101 * 60})
    short = walk("CCC", CONTEXT + HORIZON + 1, seed=2)
    holdout = int(crypto.open_time[250])
    market = market_of(crypto, short, stock, holdout_start_ns=holdout)
    first = expected_starts(crypto, holdout, 0)
    second = expected_starts(stock, holdout, 300 + len(short))
    symbol, start = draw(market)
    assert sorted(set(start.tolist())) == sorted(first + second)
    assert set(symbol.tolist()) == {0, 2}
    assert torch.equal(symbol == 0, start < 300)
    # A symbol's weight is the square root of its number of starts.
    expected = (len(first) ** 0.5) / (len(first) ** 0.5 + len(second) ** 0.5)
    assert (symbol == 0).double().mean() == pytest.approx(expected, abs=0.02)
    # Within a symbol every start is equally likely.
    counts = torch.bincount(start[symbol == 0] - CONTEXT, minlength=1)
    assert counts[counts > 0].double().std() < 3 * counts[counts > 0].double().mean().sqrt()


@pytest.mark.parametrize("factor", [15.5, 1 / 15.5, 3.1, 0.3])
@pytest.mark.parametrize(("asset_class", "minutes"), [("stock", 17 * 60 + 30), ("crypto", 3)])
def test_nothing_spans_a_bar_at_another_instruments_price(asset_class, minutes, factor):
    bars, at = walk("AAA", 600, asset_class, gaps={300: minutes}), 300
    prices = {name: getattr(bars, name).copy() for name in ("open", "high", "low", "close")}
    for price in prices.values():
        price[at:] *= factor
    other = replace(bars, **prices)
    market, whole = market_of(other, constant("BBB")), market_of(bars, constant("BBB"))
    spans = list(zip(market.stretch_first.tolist(), market.stretch_last.tolist(), strict=True))
    assert spans == [(0, at - 1), (at, 599), (600, 1199)]
    _, start = draw(market)
    assert not ((start > at - HORIZON - 2) & (start < at + CONTEXT)).any()
    # Features begin again, and do not know the scale of prices.
    for name, column in zip(FEATURES, compute(other, torch.device("cpu")).T, strict=True):
        alone = [compute(other.rows(*rows), torch.device("cpu"))[:, list(FEATURES).index(name)]
                 for rows in ((0, at), (at, 600))]  # fmt: skip
        assert torch.equal(column, torch.cat(alone)), name
    assert market.volatility[0].item() == pytest.approx(whole.volatility[0].item(), rel=0.01)
    # An exam until any day has the same stretches.
    assert torch.equal(market.until(NEVER).stretch_first, market.stretch_first)
    assert spans[1] not in zip(whole.stretch_first.tolist(), whole.stretch_last.tolist(), strict=True)


def test_a_move_of_up_to_three_is_no_break():
    bars = walk(num_bars=600)
    twice = np.repeat([1.0, 2.9], 300)
    prices = {name: getattr(bars, name) * twice for name in ("open", "high", "low", "close")}
    assert market_of(replace(bars, **prices)).stretch_first.tolist() == [0]


def test_the_shortest_stretch_that_holds_a_segment_has_one_start():
    market = market_of(walk(num_bars=CONTEXT + HORIZON + 2))
    assert draw(market, 10)[1].tolist() == [CONTEXT] * 10
    with pytest.raises(ValueError, match=f"no symbol has {CONTEXT + HORIZON + 2} bars in a row"):
        market_of(walk(num_bars=CONTEXT + HORIZON + 1))


def test_a_symbol_given_twice_is_refused():
    with pytest.raises(ValueError, match="AAA came twice"):
        market_of(walk(), walk())


def test_a_market_with_nothing_before_the_holdout_is_refused():
    bars = walk()
    with pytest.raises(ValueError, match="no symbol has over 15 bars before the holdout"):
        market_of(bars, holdout_start_ns=int(bars.open_time[0]))


def test_statistics_come_from_bars_before_the_holdout_only():
    quiet, wild = walk(num_bars=600), walk(num_bars=600, sigma=0.05, seed=9)
    holdout = int(quiet.open_time[400])
    market = market_of(quiet, holdout_start_ns=holdout)
    joined = quiet.__class__(
        "AAA",
        "crypto",
        quiet.open_time,
        *(
            np.concatenate([getattr(quiet, name)[:400], getattr(wild, name)[400:]])
            for name in ("open", "high", "low", "close", "volume")
        ),
    )
    other = market_of(joined, holdout_start_ns=holdout)
    assert torch.equal(market.statistics.mean, other.statistics.mean)
    assert torch.equal(market.statistics.std, other.statistics.std)
    assert torch.equal(market.volatility, other.volatility)


def test_volatility_is_each_symbols_own_deviation_of_a_bars_log_return():
    bars = [walk("AAA", num_bars=4_000, sigma=0.001), walk("BBB", num_bars=4_000, sigma=0.02, seed=9)]
    volatility = market_of(*bars).volatility
    # Of 4,000 normal returns, the mean absolute value has an error of 1.2 %.
    torch.testing.assert_close(volatility, torch.tensor([0.001, 0.02]), rtol=0.05, atol=0)


def test_given_statistics_are_used_as_they_are():
    first = market_of(walk(num_bars=600))
    second = market_of(walk(num_bars=600, sigma=0.01, seed=4), statistics=first.statistics)
    assert second.statistics is first.statistics
    with pytest.raises(ValueError, match="statistics must be of these features"):
        market_of(walk(), statistics=first.statistics, features={"jump": lambda history: history.close})


def test_a_bar_has_the_same_features_to_the_bit_after_a_refresh():
    bars = walk(num_bars=4_000)
    before = market_of(bars.between(0, int(bars.open_time[3_000])))
    # The first thousand bars are gone, a thousand new ones have arrived.
    trimmed = bars.between(int(bars.open_time[1_000]), 2**62)
    after = market_of(trimmed, statistics=before.statistics)
    # Windows reach back 1,440 bars; the volume of the time of day up to 300 bars of ten days.
    names = [name for name in before.statistics.names if name != "volume_for_the_time_of_day"]
    columns = [before.statistics.names.index(name) for name in names]
    assert torch.equal(before.features[2_600:, columns], after.features[1_600:2_000, columns])


def test_bars_are_found_by_symbol_and_time():
    first, second = walk("AAA"), walk("BBB", seed=1)
    market = market_of(first, second)
    times = [first.open_time[15], second.open_time[17], first.open_time[15] + 1, first.open_time[15]]
    # The last two have no context before them, or no bar after them.
    times = torch.tensor([*times, second.open_time[CONTEXT - 1], second.open_time[-1]])
    symbol, bar, found = market.find(["AAA", "BBB", "AAA", "GONE", "BBB", "BBB"], times)
    assert found.tolist() == [True, True, False, False, False, False]
    assert bar.tolist() == [15, 617, 0, 0, 0, 0]
    assert symbol.tolist() == [0, 1, 0, 0, 0, 0]
