"""Look-ahead on the user's own bars: the program has none, and every planted one is named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from commands.selftest import lookahead
from continuous_training import Settings
from data_sources.bars import DAY_NS, Bars
from envs.features import FEATURES, FeatureStatistics, History
from envs.grid import Grid
from envs.market import Market
from training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
NOW_NS = 1_700_000_000 * 10**9
SETTINGS = Settings(
    sources=("simulated",), simulated_bars=4_000, holdout_days=1, context_bars=16, horizon=32, episode_bars=64
)


@pytest.fixture(scope="module")
def bars() -> list[Bars]:
    return lookahead.load_bars(SETTINGS, NOW_NS)[:2]


def test_nothing_looks_ahead(bars: list[Bars]) -> None:
    assert lookahead.find_look_ahead(bars, SETTINGS, ALONE) == ([], ["SIM000", "SIM001"])


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.drill), 1])
def test_groups_are_checked_too(bars: list[Bars], monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    tokens = Grid.tokens
    monkeypatch.setattr(Grid, "tokens", lambda grid, places: tokens(grid, places + ahead))
    monkeypatch.setattr(
        lookahead, "features_that_look_ahead", lambda *_: {}
    )  # which take long, and are above
    settings = replace(SETTINGS, account="group", features=("symbol", "panel"))
    found, played = lookahead.find_look_ahead(bars, settings, ALONE)
    assert played == ["SIM000", "SIM001"]
    assert all(line.startswith("a group: ") for line in found) and bool(found) == bool(ahead)


def test_cleaning_that_looks_ahead_is_named(bars: list[Bars], monkeypatch: pytest.MonkeyPatch) -> None:
    both = [bars[0], replace(bars[1], asset_class="stock")]
    assert list(lookahead.bars_that_change(both, extended_hours=True)) == []

    def comes_back(open_time: np.ndarray, open_price: np.ndarray, close: np.ndarray) -> np.ndarray:
        before, after = np.roll(close, 1), np.roll(close, -1)
        return (abs(np.log(close / before)) > 0.2) & (abs(np.log(after / before)) < 0.2)

    monkeypatch.setattr("data_sources.load.bad_ticks", comes_back)
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert [line.split(" up to ")[0] for line in found] == ["SIM000: bars", "SIM001: bars"]
    assert found[0].endswith(" depend on later rows of the vendor")


def test_a_feature_that_sees_the_next_bar_is_named(bars: list[Bars], monkeypatch: pytest.MonkeyPatch) -> None:
    def next_close(history: History) -> torch.Tensor:
        return history.close.roll(-1).log().float()

    monkeypatch.setitem(FEATURES, "next_close", next_close)
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert sum("SIM000: feature next_close sees bars after 2023-11-1" in line for line in found) == 1
    assert any(line.startswith("SIM001: bars up to 2023-11-1") for line in found)


def test_observations_that_are_a_bar_ahead_are_named(
    bars: list[Bars], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = Market.windows
    monkeypatch.setattr(Market, "windows", lambda self, first, length: windows(self, first + 1, length))
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert {line.split(": ")[1].split(" up to ")[0] for line in found} >= {"bars", "log_policy", "values"}
    assert not any("feature" in line for line in found)


def test_fills_at_a_later_price_are_named(bars: list[Bars], monkeypatch: pytest.MonkeyPatch) -> None:
    play_segment = lookahead.play_segment

    def late(*args, **kwargs):  # type: ignore[no-untyped-def]
        rollout = play_segment(*args, **kwargs)
        rollout.rewards = rollout.rewards.roll(-1, dims=1)
        return rollout

    monkeypatch.setattr(lookahead, "play_segment", late)
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert found and all(": rewards up to " in line for line in found)


def test_scales_measured_on_the_holdout_are_named(bars: list[Bars], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = FeatureStatistics.measure
    all_bars = [len(series) for series in bars]
    monkeypatch.setattr(FeatureStatistics, "measure", lambda names, raws, _: measure(names, raws, all_bars))
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert "the mean of features depends on the holdout" in found
    assert "training's bars depend on the holdout" in found


def test_simulated_bars_are_checked_if_the_lake_has_none(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path / "lake"), min_bars=100)
    assert [series.symbol for series in lookahead.load_bars(settings, NOW_NS)] == [
        "SIM000",
        "SIM001",
        "SIM002",
        "SIM003",
    ]


def test_a_feature_that_looks_ahead_only_at_the_end_of_the_day_is_named(
    bars: list[Bars], monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_open_overnight(history: History) -> torch.Tensor:
        day = history.open_time // DAY_NS
        return torch.where(day != day.roll(-1), history.open.roll(-1), 0.0).float()

    monkeypatch.setitem(FEATURES, "next_open_overnight", next_open_overnight)
    found, _ = lookahead.find_look_ahead(bars, SETTINGS, ALONE)
    assert found[0].startswith("SIM000: feature next_open_overnight sees bars after 2023-11-1")


def test_a_long_holdout_leaves_bars_before_it(tmp_path: Path) -> None:
    settings = replace(SETTINGS, simulated_bars=70_000, holdout_days=45)
    bars = lookahead.load_bars(settings, NOW_NS)
    assert {len(series) for series in bars} == {70_000}  # 64,800 of them in the holdout
    settings = Settings(data_dir=str(tmp_path / "lake"), holdout_days=45)
    (number,) = {len(series) for series in lookahead.load_bars(settings, NOW_NS)}
    assert number == 45 * 1_440 + lookahead.TRAINING_BARS


def test_symbols_with_too_few_bars_for_decisions_are_listed(
    bars: list[Bars], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    new = bars[1].between(int(bars[1].open_time[-1_000]), NOW_NS)  # all in the holdout
    monkeypatch.setattr(lookahead, "load_bars", lambda *_: [bars[0], new])
    caplog.set_level(logging.INFO, logger="continuous_training")
    assert lookahead.run(SETTINGS, ALONE) == []
    assert caplog.messages == ["no look-ahead on SIM000 (features only on SIM001: too few bars): passed"]


def test_too_few_bars_are_a_failure_in_one_line() -> None:
    settings = Settings(sources=("simulated",), simulated_bars=4_000, holdout_days=14)
    (line,) = lookahead.run(settings, ALONE)
    assert line.startswith("look-ahead could not be checked: all bars are held out")
