"""Days and bars to train on, counted as a plain loop does, and the warning that follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from commands.check.days import check_days
from continuous_training import Settings
from data_sources.bars import DAY_NS
from data_sources.lake.lake import Lake
from data_sources.progress import WarningCollector
from data_sources.refresh import refresh
from envs.market import Market
from tests.envs.markets import CONTEXT, HORIZON, market_of, walk
from training.data_feed import data_request
from training.enough_days import count_training_bars, count_training_days, find_shortage, shortage_in

REAL = Settings(sources=("binance",), allow_spot_shorts=True, epochs=200, envs_per_gpu=64, horizon=128)
ENOUGH = {"crypto": 716, "stock": 60}


def test_days_and_bars_before_the_holdout_are_counted_by_asset_class() -> None:
    series = [
        walk("AAA", 3000, gaps={500: 4000}),  # a hole of two days and more
        walk("BBB", 2000, seed=1, gaps={1000: 70}),
        walk("CCC", 600, "stock", seed=2, gaps={300: 1000}),
    ]
    holdout_ns = int(series[0].open_time[2500])
    market = market_of(*series, holdout_start_ns=holdout_ns)
    before = [(bars.asset_class, bars.open_time[bars.open_time < holdout_ns]) for bars in series]
    for kind in ("crypto", "stock"):
        times = np.concatenate([times for own, times in before if own == kind])
        assert count_training_days(market)[kind] == len({int(time) // DAY_NS for time in times})
    assert count_training_bars(market) == sum(len(times) for _, times in before)


@pytest.mark.parametrize(
    ("days", "num_bars", "expected"),
    [
        (ENOUGH, 27_000_000, ""),
        (ENOUGH | {"stock": 14}, 27_000_000, "heart: 14 days of stock bars to train on, where 60 begin to tell"),
        (ENOUGH, 120_000, "heart: a run learns 41 times from each bar. Trust exams alone; set feature_noise to 1"),
        ({"stock": 10}, 86_000, "fetch more days, or set feature_noise to 1, or lower epochs"),
    ],
)  # fmt: skip
def test_few_days_and_many_passes_are_named_with_what_to_do(
    days: dict[str, int], num_bars: int, expected: str
) -> None:
    text = find_shortage(days, num_bars, REAL, world_size=1)
    assert expected in text
    assert bool(text) == bool(expected) and "\n" not in text


def test_noise_that_is_on_is_not_advised() -> None:
    assert "feature_noise" not in find_shortage({"stock": 10}, 86_000, replace(REAL, feature_noise=0.5), 1)


def test_twice_the_ranks_learn_twice_as_often() -> None:
    assert not find_shortage(ENOUGH, 500_000, REAL, world_size=1)
    assert "learns 20 times" in find_shortage(ENOUGH, 500_000, REAL, world_size=2)


def test_bars_that_are_made_up_are_never_too_few() -> None:
    market = Market.from_bars(
        [walk("AAA", 300)], device="cpu", holdout_start_ns=2**62, context_bars=CONTEXT, horizon=HORIZON
    )
    assert "1 days of crypto" in shortage_in(market, REAL, 1)
    assert not shortage_in(market, replace(REAL, sources=("simulated",)), 1)


def test_check_counts_the_days_of_the_lake(tmp_path: Path) -> None:
    folder = tmp_path / "bars"
    folder.mkdir()
    bars = walk("AAPL", 8 * 1440, "stock")  # from a Wednesday on
    rows = "\n".join(
        f"{time // 10**9},{o},{h},{low},{c},{v}"
        for time, o, h, low, c, v in zip(
            bars.open_time, bars.open, bars.high, bars.low, bars.close, bars.volume, strict=True
        )
    )
    (folder / "AAPL.csv").write_text("timestamp,open,high,low,close,volume\n" + rows)
    settings = Settings(
        sources=("files",), files_dir=str(folder), data_dir=str(tmp_path / "lake"), holdout_days=2,
        start_date="2019-12-01", extended_hours=True, min_bars=100,
    )  # fmt: skip
    request = data_request(settings, int(bars.open_time[-1]) + DAY_NS)
    assert list(check_days(settings, request, 1)) == []  # an empty lake: a start will see
    refresh(Lake(tmp_path / "lake"), request, request.end_ns, WarningCollector())
    (line,) = check_days(settings, request, 1)
    assert (line.topic, line.level) == (
        "days",
        "warning",
    ) and f"with the bars in {tmp_path / 'lake'}, days will be" in line.text
    assert ": 5 days of stock bars to train on" in line.text
    assert list(check_days(replace(settings, holdout_days=10), request, 1)) == []
