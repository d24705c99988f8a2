"""Features only look back, stay finite, and mean what docs/features.md states."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commands.selftest.lookahead import features_that_look_ahead
from data_sources.bars import MINUTE_NS, Bars
from envs.features import (
    CLIP,
    FEATURES,
    GROUPS,
    FeatureStatistics,
    chosen_features,
    compute,
    feature,
    lagged,
    local_minutes,
    rolling_max,
    rolling_means,
)
from tests.envs.markets import market_of, walk

CPU = torch.device("cpu")


PLACES = [0, 1, 2, 13, 14, 59, 63, 240, 699, 700, 1024, 1439, 1440, 1500, 2047, 2498]


@pytest.mark.parametrize("asset_class", ["crypto", "stock"])
@pytest.mark.parametrize("name", [name for name in FEATURES if name not in GROUPS["panel"]])
def test_no_feature_sees_a_later_bar(name, asset_class):
    bars = walk(num_bars=2_500, asset_class=asset_class, seed=5, gaps={700: 3000, 1500: 45})
    assert features_that_look_ahead(bars, PLACES, {name: FEATURES[name]}) == {}


def test_a_feature_that_peeks_is_caught_with_the_bar_at_which_it_did():
    def peeks(history):
        return history.log_close.roll(-1).float()

    def whole_mean(history):
        return history.log_return(1) - history.log_return(1).mean()

    def rounds(history):  # right except for the last bits, because of a sum over all bars
        return (history.volume.float().flip(0).cumsum(0).flip(0) + history.volume.float()).log()

    functions = {"peeks": peeks, "jump": FEATURES["jump"], "whole_mean": whole_mean, "rounds": rounds}
    found = features_that_look_ahead(walk(num_bars=300), [100, 200], functions)
    assert found == {"peeks": 100, "whole_mean": 100, "rounds": 100}


def test_the_feature_of_the_documentation_works_and_does_not_look_ahead():
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    before = set(FEATURES)
    try:
        exec(code, {})
        [name] = set(FEATURES) - before
        own = {name: FEATURES[name]}
        assert features_that_look_ahead(walk(num_bars=2_500), PLACES, own) == {}
        # The market includes it under its name.
        market = market_of(walk(num_bars=2_500))
        assert market.statistics.names[-1] == name
        assert market.features[:, -1].float().std() > 0.5
    finally:
        for name in set(FEATURES) - before:
            del FEATURES[name]


def test_every_feature_varies_where_it_can():
    bars = walk(num_bars=12_000, asset_class="stock", gaps=dict.fromkeys(range(390, 12_000, 390), 1050))
    part = np.random.default_rng(0).random(12_000)
    bars = replace(bars, trades=np.ceil(9 * part + 1), taker_buy_volume=bars.volume * part)
    functions = chosen_features(("symbol", "day", "flow"))
    spread = dict(zip(functions, compute(bars, CPU, functions).std(0).tolist(), strict=True))
    constant = [name for name, std in spread.items() if std < 1e-3]
    assert constant == ["is_crypto", "taker_flow_is_known", "trades_are_known"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80),
    st.sampled_from([1e-9, 1.0, 1e9]),
    st.sampled_from([0.0, 1e-12, 1e15]),
    st.integers(0, 99),
)
def test_features_are_finite_on_dead_tiny_and_wild_markets(num_bars, price, volume, seed):
    random = np.random.default_rng(seed)
    close = price * np.exp(np.cumsum(random.choice([0.0, 0.0, 3.0, -3.0], num_bars)))
    steps = random.choice([1, 1, 1, 100_000], num_bars)
    times = np.cumsum(steps).astype(np.int64) * MINUTE_NS
    bars = Bars("AAA", "stock", times, close, close, close, close, volume * (random.random(num_bars) > 0.5))
    assert torch.isfinite(compute(bars, CPU)).all()


def test_normalised_features_have_unit_spread_and_a_bound():
    market = market_of(walk(num_bars=5_000))
    values = market.features.double()
    assert values.abs().max() <= CLIP
    assert values.mean(0).abs().max() < 0.05
    varied = values.std(0) > 0
    # A little less where values were clipped.
    assert ((values.std(0)[varied] - 1).abs() < 0.15).all()


def test_price_and_volume_levels_cancel_out():
    bars = walk(num_bars=2_000)
    scaled = replace(
        bars,
        **{name: getattr(bars, name) * 1024 for name in ("open", "high", "low", "close")},
        volume=bars.volume * 4096,
    )
    torch.testing.assert_close(compute(bars, CPU), compute(scaled, CPU), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("window", [1, 2, 3, 15, 16, 60, 240, 300])
def test_rolling_mean_and_max_are_those_of_the_window(window):
    series = torch.from_numpy(np.random.default_rng(0).normal(size=257))
    means, best = rolling_means(series, [window, 7])[window], rolling_max(series, window)
    for t in range(257):
        part = series[max(0, t - window + 1) : t + 1]
        assert means[t] == pytest.approx(float(part.mean()), abs=1e-12)
        assert best[t] == part.max()


def test_a_lag_longer_than_the_history_is_all_zeros():
    assert lagged(torch.ones(3), 5).tolist() == [0.0, 0.0, 0.0]
    assert lagged(torch.arange(4), 1).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("moment", "minute"),
    [
        ((2024, 1, 8, 14, 30), 570),  # winter: 09:30 in New York
        ((2024, 7, 8, 13, 30), 570),  # summer
        ((2024, 3, 11, 13, 30), 570),  # the Monday after the clocks went forward
        ((2024, 11, 4, 14, 30), 570),  # the Monday after they went back
        ((2024, 1, 8, 4, 59), -1),  # still Sunday there
    ],
)
def test_stocks_live_by_the_clock_of_new_york(moment, minute):
    open_time = int(datetime(*moment, tzinfo=UTC).timestamp()) * 1_000_000_000
    week = 7 * 1440
    assert local_minutes(np.array([open_time]), "stock")[0] % week == minute % week
    utc = moment[3] * 60 + moment[4]
    assert local_minutes(np.array([open_time]), "crypto")[0] % week == utc


def test_volume_is_compared_with_its_own_time_of_day():
    # Thirty days; volume is 5 in a single half hour of the day and 1 otherwise.
    times = np.arange(30 * 1440, dtype=np.int64) * MINUTE_NS
    busy = (times // MINUTE_NS % 1440) // 30 == 20
    price = np.full(len(times), 10.0)
    bars = Bars("AAA", "crypto", times, price, price, price, price, np.where(busy, 5.0, 1.0))
    column = compute(bars, CPU, {"x": FEATURES["volume_for_the_time_of_day"]})[:, 0]
    assert column[2 * 1440 :].abs().max() < 1e-5
    plain = compute(bars, CPU, {"x": FEATURES["volume"]})[:, 0]
    assert plain[20 * 1440 + 600] > 1


def test_returns_are_in_units_of_volatility():
    bars = walk(num_bars=3_000)
    raw = compute(bars, CPU, {"x": FEATURES["return_15"]})[:, 0]
    ranges = np.log(bars.high / bars.low)
    volatility = math.sqrt((ranges[2_000 - 239 : 2_001] ** 2).mean() / (4 * math.log(2)))
    expected = math.log(bars.close[2_000] / bars.close[1_985]) / volatility / math.sqrt(15)
    assert raw[2_000] == pytest.approx(expected, rel=1e-4)
    assert raw[:15].abs().max() == 0


def test_a_name_cannot_be_registered_twice_and_shapes_are_checked():
    with pytest.raises(ValueError, match="jump is already registered"):
        feature(FEATURES["jump"])
    with pytest.raises(ValueError, match=r"feature flat must have shape \(600,\), was \(1,\)"):
        compute(walk(), CPU, {"flat": lambda history: torch.zeros(1)})


def test_statistics_survive_plain_types():
    statistics = market_of(walk()).statistics
    again = FeatureStatistics.from_state_dict(statistics.state_dict())
    assert again.names == statistics.names
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.std, statistics.std)
