"""Groups of features: which a training sees, and that those of the day and of order flow are the plain ones."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from continuous_training import Settings
from data_sources.bars import MINUTE_NS, AssetClass, Bars
from data_sources.calendar import new_york_time
from envs.config import FEATURE_GROUPS
from envs.features import BUILT_IN, GROUPS, chosen_features, compute
from envs.market import Market
from evaluation.trained_policy import TrainedPolicy, feature_schema
from tests.envs.markets import walk
from tests.training.checkpoints import untrained
from training.checkpoint import Checkpoint

CPU = torch.device("cpu")
# Of the 24 features that there were before there were groups, as folders that were exported then have it.
FIRST_SCHEMA = "f8e3f3e2588b93bf8b88afda1e20b4209f4a9ecc12c85ffc95dfbe2525f6c0d3"


def test_a_group_has_the_features_that_the_setting_names() -> None:
    assert tuple(GROUPS) == FEATURE_GROUPS
    assert [name for names in GROUPS.values() for name in names] == list(BUILT_IN)
    assert tuple(chosen_features()) == GROUPS["symbol"]
    assert tuple(chosen_features(("flow", "symbol"))) == GROUPS["symbol"] + GROUPS["flow"]
    with pytest.raises(
        ValueError, match=r"^features=.*has moon, which is unknown; use some of: symbol, day, "
    ):
        Settings(features=("symbol", "moon"))
    with pytest.raises(ValueError, match=r"^features= must name at least one of: symbol, day, "):
        Settings(features=())
    settings = Settings(features=("day",), context_bars=8, horizon=16, episode_bars=64)
    assert Market.from_settings([walk()], settings, CPU, 2**62).statistics.names == GROUPS["day"]


def test_a_checkpoint_keeps_its_groups_and_one_of_before_has_the_first(tmp_path: Path) -> None:
    assert feature_schema(chosen_features()) == FIRST_SCHEMA
    path = untrained(tmp_path)
    saved = Checkpoint.read(path).with_resume()
    older = {name: value for name, value in saved.config.items() if name != "features"}
    replace(saved, config=older).save(keep=1)
    trained = TrainedPolicy.read(path, Settings)
    assert trained.settings.features == ("symbol",)
    assert trained.market([walk()]).statistics.names == GROUPS["symbol"]
    saved = Checkpoint.read(path)
    assert saved.mismatch(trained.settings) == ""
    other = replace(trained.settings, features=("symbol", "flow"))
    expected = (
        f"features=symbol,flow, but {path} was trained with features=symbol: set it back, or start a new"
    )
    assert saved.mismatch(other).startswith(expected)
    assert "features" in asdict(other)
    with pytest.raises(ValueError, match=r"^features=\('flow',\), but .* was trained with features="):
        TrainedPolicy.read(path, Settings, features=("flow",))


def awkward(asset_class: AssetClass) -> Bars:
    """Nights, missing minutes, a day with one bar, minutes without trades, unknown flow, and a quiet price."""
    gaps = {40: 3, 300: 1_050, 500: 1_050, 501: 1_440, 900: 61}
    bars = walk("AAA", 1_500, asset_class, seed=4, gaps=gaps)
    random = np.random.default_rng(1)
    volume = bars.volume * (random.random(1_500) > 0.2)
    volume[300:303] = 0.0  # a day that begins without trades
    trades = np.where(volume > 0, random.integers(1, 50, 1_500), 0).astype(np.float64)
    taker = volume * random.random(1_500)
    trades[random.random(1_500) > 0.7] = np.nan
    taker[600:700] = np.nan
    return replace(bars, volume=volume, trades=trades, taker_buy_volume=taker)


def plain_features(bars: Bars, t: int) -> dict[str, float]:
    """The features of day and flow at bar t, from a loop over the bars up to it."""
    minutes = (new_york_time(bars.open_time) if bars.asset_class == "stock" else bars.open_time) // MINUTE_NS
    day = minutes // 1_440
    today = [u for u in range(t + 1) if day[u] == day[t]]
    before = [u for u in range(t + 1) if day[u] < day[t]]
    window = slice(max(0, t - 239), t + 1)
    volatility = max(1e-5, math.sqrt(np.mean(np.log(bars.high / bars.low)[window] ** 2) / (4 * math.log(2))))

    def distance(price: float) -> float:
        return math.log(bars.close[t] / price) / volatility / math.sqrt(60)

    paid = sum(bars.volume[u] * (bars.high[u] + bars.low[u] + bars.close[u]) / 3 for u in today)
    traded = sum(bars.volume[u] for u in today)
    values = {
        f"{name}_{part}": function(2 * math.pi * minutes[t] / length)
        for name, length in (("hour", 60), ("quarter_hour", 15))
        for part, function in (("sine", math.sin), ("cosine", math.cos))
    }
    values |= {
        "below_day_high": distance(max(bars.high[u] for u in today)),
        "above_day_low": distance(min(bars.low[u] for u in today)),
        "above_day_average": distance(paid / traded) if traded else 0.0,
        "above_previous_close": distance(bars.close[before[-1]]) if before else 0.0,
    }
    trades, taker = bars.trades, bars.taker_buy_volume
    assert trades is not None and taker is not None
    for length in (1, 5, 15, 60):
        known = [u for u in range(max(0, t - length + 1), t + 1) if not math.isnan(taker[u])]
        volume = sum(bars.volume[u] for u in known)
        bought = sum(2 * taker[u] - bars.volume[u] for u in known)
        values[f"taker_flow_{length}"] = bought / volume if volume else 0.0
    counted = [u for u in range(max(0, t - 239), t + 1) if not math.isnan(trades[u])]
    usual, size = plain_means(trades, counted), 0.0
    if not math.isnan(trades[t]) and trades[t] > 0:
        size = plain_log_ratio(bars.volume[t] / trades[t], plain_means(bars.volume, counted) / usual)
    return values | {
        "taker_flow_is_known": float(not math.isnan(taker[t])),
        "trades_are_known": float(not math.isnan(trades[t])),
        "trades": 0.0 if math.isnan(trades[t]) else plain_log_ratio(trades[t], usual),
        "trade_size": size,
    }


def plain_means(values: NDArray[np.float64], places: list[int]) -> float:
    return float(np.mean(values[places])) if places else 0.0


def plain_log_ratio(value: float, usual: float) -> float:
    return math.log((value + 0.05 * usual) / (1.05 * usual)) if usual > 0 else 0.0


@pytest.mark.parametrize("asset_class", ["crypto", "stock"])
def test_features_of_day_and_flow_are_those_of_a_plain_loop(asset_class: AssetClass) -> None:
    bars = awkward(asset_class)
    names = GROUPS["day"] + GROUPS["flow"]
    functions = chosen_features(("day", "flow"))
    raw = compute(bars, CPU, functions)
    for t in (0, 1, 14, 39, 40, 239, 240, 299, 300, 301, 302, 303, 499, 500, 501, 502, 650, 705, 900, 1_499):
        expected = plain_features(bars, t)
        assert set(expected) == set(names)
        for name, value in zip(names, raw[t].tolist(), strict=True):
            assert value == pytest.approx(expected[name], abs=2e-5), (name, t)
    # Older bars do not matter, not even for their rounding.
    recent = compute(bars.rows(240, 1_500), CPU, functions)
    assert torch.equal(recent[520:], raw[760:])


def test_what_a_source_does_not_have_is_zero_beside_a_mask_of_zero() -> None:
    assert not compute(walk(), CPU, chosen_features(("flow",))).any()
