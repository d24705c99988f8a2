"""benchmarks/real_bars.py on files of bars: all contestants meet the same fills, and the JSON has all figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import real_bars
from continuous_training import Settings
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.simulated import simulated_bars
from envs.config import EnvConfig
from envs.market import Market
from evaluation.exam import POLICY
from evaluation.measures import margin
from evaluation.trained_policy import NEVER_NS
from tests.program import TINY

COLUMNS = ("open", "high", "low", "close", "volume")
SIZES = real_bars.SIZES | {
    name: TINY[name]
    for name in ("d_model", "num_layers", "num_heads", "envs_per_gpu", "context_bars", "horizon", "episode_bars")
} | {"batch_size": 32, "epochs": 1, "learning_rate": 1e-2, "device": "cpu"}  # fmt: skip
DAYS, MINUTES = 14, 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two coins, two hours of every day."""
    times = np.arange(DAYS)[:, None] * DAY_NS + np.arange(MINUTES) * MINUTE_NS + 20_000 * DAY_NS
    for bars, symbol in zip(
        simulated_bars(2, DAYS * MINUTES, 0, 20_000 * DAY_NS), ("BTCUSDT", "ETHUSDT"), strict=True
    ):
        table = {name: getattr(bars, name) for name in COLUMNS} | {
            "timestamp": pd.to_datetime(times.ravel(), utc=True)
        }
        (tmp_path / "bars" / "coins").mkdir(parents=True, exist_ok=True)
        pd.DataFrame(table).to_parquet(tmp_path / "bars" / "coins" / f"{symbol}.parquet")
    return tmp_path / "bars"


def test_every_contestant_is_in_the_table_and_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "found.json"
    real_bars.run(Settings(**SIZES), folder, costs="5", times=0, trees=False, output=output)
    rows = json.loads(output.read_text())
    assert {row["cost_bps"] for row in rows} == {5.0}
    names = [
        "product, seed 0",
        "product, seed 0, by its exams",
        "buy and hold",
        "always flat",
        "momentum",
        "ridge, best rule",
    ]
    assert [row["name"] for row in rows] == names
    printed = capsys.readouterr().out
    assert (
        "**coins**: 2 symbols, 3,360 bars, 24 features; trained to 2024-10-09 in 1 epoch, chosen from 2024-10-11"
        in printed
    )
    assert "109 trials, 1 of them trainings, the others rules on the days of choice." in printed
    assert (
        printed.count("| 5 | ridge, best rule |") == 1 and printed.count("Nearly all opens of BTCUSDT") == 1
    )


def test_several_seeds_also_decide_together_and_at_no_cost_signs_trade(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "found.json"
    real_bars.run(
        Settings(**SIZES), folder, costs="0", seeds=2, times=0.1, last_days=12, trees=False, output=output
    )
    assert " in 2 epochs, chosen" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(output.read_text())}
    assert list(rows)[:5] == [
        "product, seed 0",
        "product, seed 0, by its exams",
        "product, seed 1",
        "product, seed 1, by its exams",
        "product, 2 seeds as an ensemble",
    ]
    together = rows["product, 2 seeds as an ensemble"]
    assert together["training_bps"] is None and rows["product, seed 1"]["training_bps"] is not None
    earned = {rows[name]["judged"]["gross_bps"] for name in list(rows)[:5:2]}
    assert len(earned) == 3  # three policies
    sign = rows["ridge, sign of the next bar"]["judged"]
    assert sign["turnover"] > 0.1 and sign["net_bps"] == sign["gross_bps"]


def test_rules_meet_the_fills_of_the_exam(folder: Path, tmp_path: Path) -> None:
    """The positions of a walk earn the same in the rules' ledger, at the same bars, to rounding."""
    changes = {"files_dir": str(folder / "coins"), "data_dir": str(tmp_path / "lake"), "slippage_bps": 0.0}
    changes |= {"seed": 1}  # with which it trades
    settings = Settings(**SIZES | changes | dict.fromkeys(real_bars.FEES, 1.0))
    bars = real_bars.read_bars(settings, last_days=6)
    assert sum(map(len, bars)) == 2 * 6 * MINUTES
    start_ns = int(bars[0].open_time[-1]) // DAY_NS * DAY_NS
    choice_ns = start_ns - 3 * DAY_NS
    known = Market.from_settings(bars, settings, torch.device("cpu"), choice_ns)
    market = known.until(NEVER_NS)
    trained = real_bars.train(known, market, settings, choice_ns, start_ns)
    config = EnvConfig.from_settings(settings)
    walks = real_bars.walk({POLICY: trained.last, "cash": None}, market, config, start_ns, NEVER_NS)
    assert not any(walk.traded.any() for walk in walks["cash"])
    traded = sum(float(walk.traded.sum()) for walk in walks[POLICY])
    for name in (POLICY, "buy and hold", "momentum"):
        decisions = real_bars.decisions_of(market, settings, walks[name])
        replayed = margin(real_bars.replay(market, decisions, walks[name], 1.0, late=0))
        assert replayed.net_bps == pytest.approx(margin(walks[name]).net_bps, abs=1e-6)
        assert replayed.turnover == pytest.approx(margin(walks[name]).turnover, abs=1e-9)
    assert traded > 0


def test_a_folder_without_bars_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="must have CSV or Parquet files, or folders with some: there are none"
    ):
        real_bars.folders_of(tmp_path, [])
    (tmp_path / "AAPL.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="--markets stocks must be among: "):
        real_bars.folders_of(tmp_path, ["stocks"])
