"""The probe recovers what was planted, finds nothing in noise, and judges nothing that was fitted or chosen on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import probe_command
from commands.probe import chosen_models, parse_costs
from continuous_training import Settings
from data_sources.bars import DAY_NS, MINUTE_NS, Bars
from envs.ahead import HORIZONS
from envs.market import Market
from evaluation import forecasts
from evaluation.forecasts import BarTable, Moments, fit_ridge, fit_trees, targets_of
from evaluation.probe import EMBARGO_NS, Probe, cut_days, probe, rank_correlation, walk_forward
from evaluation.stale_opens import stale_opens
from runtime.control import EXIT_NO_DATA, EXIT_SETTING, ExitProgram
from tests.envs.markets import FREE, MONDAY, config_of, market_of, walk

SIGMA = 1e-3
START_NS = MONDAY // DAY_NS * DAY_NS
FEATURES = {"signal": lambda history: history.volume.log(), "other": lambda history: history.log_return(3)}


def planted(
    strength: float, seed: int = 0, days: int = 26, squared: bool = False, symbol: str = "AAA"
) -> Bars:
    """Bars whose log volume, a standard normal, correlates with the move after the next open."""
    random = np.random.default_rng(seed)
    size = days * 1_440
    signal, noise = random.standard_normal((2, size))
    known = (signal**2 - 1) / math.sqrt(2) if squared else signal
    moves = SIGMA * (strength * known + math.sqrt(1 - strength**2) * noise)
    log_open = np.cumsum(
        np.concatenate([[0.0, 0.0], moves[:-2]])
    )  # the move from t + 1 to t + 2 follows signal t
    opens = 100.0 * np.exp(log_open)
    close = np.append(opens[1:], opens[-1]) * np.exp(random.normal(0, SIGMA / 10, size))
    open_time = START_NS + np.arange(size, dtype=np.int64) * MINUTE_NS
    return Bars(
        symbol, "crypto", open_time, opens, np.maximum(opens, close), np.minimum(opens, close), close,
        np.exp(signal),
    )  # fmt: skip


def market_and_edges(*bars: Bars) -> tuple[Market, list[int]]:
    edges = cut_days(np.concatenate([series.open_time for series in bars]))
    return market_of(*bars, holdout_start_ns=edges[0], features=FEATURES).until(2**62), edges


def probed(*bars: Bars, **given: object) -> Probe:
    market, edges = market_and_edges(*bars)
    return probe("ridge", market, config_of(**FREE), edges, **given)


def test_a_planted_signal_is_recovered_with_its_correlation_and_its_price() -> None:
    strength = 0.1
    found = probed(planted(strength), planted(strength, 1, symbol="BBB"), costs_bps=(0.0, 5.0, 100.0))
    assert (found.num_days, found.num_judged_days) == (16, 10)
    for ic in found.rank_ic:
        # Of two normal variables, Spearman's correlation follows from Pearson's; later moves dilute the first.
        expected = 6 / math.pi * math.asin(strength / math.sqrt(ic.horizon) / 2)
        assert ic.value == pytest.approx(expected, abs=0.015)
        assert ic.interval is not None and ic.late_interval is not None
        assert ic.late_interval[0] < 0 < ic.late_interval[1]  # all of it is in the first bar
    first = found.rank_ic[0].interval
    assert first is not None and 0 < first[0] < 0.0955 < first[1]
    free = found.ladder[0]
    # A sign that is drawn anew at every bar: the mean of a half-normal is earned, and the position traded once.
    price_bps = 1e4 * SIGMA * strength * math.sqrt(2 / math.pi)
    assert found.signs[0].margin.turnover == pytest.approx(1.0, rel=0.05)
    assert found.signs[0].margin.gross_bps == pytest.approx(price_bps, rel=0.25)
    assert free.margin.turnover == pytest.approx(1.0, rel=0.05)
    assert free.margin.gross_bps == free.margin.net_bps == pytest.approx(price_bps, rel=0.25)
    low, high = free.margin.break_even_interval or (math.nan, math.nan)
    assert low < price_bps < high
    assert free.late.net_interval is not None and free.late.net_interval[0] < 0 < free.late.net_interval[1]
    _, dear, too_dear = found.ladder
    assert dear.margin.turnover < 0.2 and dear.margin.net_bps < free.margin.net_bps / 2
    assert too_dear.rule is None and too_dear.margin.turnover == 0 and too_dear.margin.break_even_bps is None


def test_pure_noise_has_intervals_around_0() -> None:
    found = probed(planted(0.0, 20), planted(0.0, 21, symbol="BBB"))
    for ic in found.rank_ic:
        for interval in (ic.interval, ic.late_interval):
            assert interval is not None and interval[0] < 0 < interval[1]
    for rung in found.ladder:
        assert rung.margin.gross_interval is not None
        low, high = rung.margin.gross_interval
        assert low <= 0 <= high


def test_trees_find_what_no_line_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(forecasts, "NUM_TREES", 30)
    bars = planted(0.15, squared=True, days=10)
    market, edges = market_and_edges(bars)
    ridge, trees = (probe(model, market, config_of(**FREE), edges) for model in ("ridge", "trees"))
    assert abs(ridge.rank_ic[0].value) < 0.03 < 0.05 < trees.rank_ic[0].value


def test_later_bars_change_no_forecast_and_no_purged_row() -> None:
    """Whatever happens from the second edge on, the part before it is forecast as before, to the bit."""
    bars = planted(0.1, days=10)
    market, edges = market_and_edges(bars)
    late = bars.open_time >= edges[1]
    other = planted(0.3, seed=9, days=10)
    columns = {
        name: np.where(late, getattr(other, name), getattr(bars, name))
        for name in bars.columns
        if name != "open_time"
    }
    changed, same_edges = market_and_edges(replace(bars, **columns))
    assert same_edges == edges
    results = []
    for own in (market, changed):
        rows, forecast = walk_forward(fit_ridge, own, BarTable.of(own), edges)
        results.append(forecast[bars.open_time[rows] < edges[1]])
    assert len(results[0]) == 2_880 and np.array_equal(*results)

    table = BarTable.of(market)
    known = table.rows_before(edges[0] - EMBARGO_NS, max(HORIZONS))
    ends = bars.open_time[known + 1 + max(HORIZONS)]
    assert ends.max() == edges[0] - DAY_NS - MINUTE_NS


def test_ridge_is_the_closed_form_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    market, _ = market_and_edges(planted(0.2, days=7))
    table = BarTable.of(market)
    rows = table.rows_before(2**62, max(HORIZONS))
    targets = targets_of(table, rows)
    features = market.features[torch.from_numpy(rows)].double().numpy()
    scaled = (features - features.mean(0)) / features.std(0)
    penalty = math.sqrt(forecasts.PENALTY * len(rows)) * np.eye(2)
    expected, *_ = np.linalg.lstsq(
        np.vstack([scaled, penalty]),
        np.vstack([targets.numpy() - targets.numpy().mean(0), np.zeros((2, len(HORIZONS)))]),
    )
    for size in (1 << 16, 999):
        monkeypatch.setattr(forecasts, "CHUNK_ROWS", size)
        forecast = fit_ridge(market, torch.from_numpy(rows), targets)(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(forecast, scaled @ expected + targets.numpy().mean(0), atol=1e-6)


def test_a_feature_that_never_varies_counts_for_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(500, 3, generator=random, dtype=torch.float64)
    features[:, 1] = 7.0
    targets = features[:, :1] * 2.0
    coefficients, intercept = Moments.measure(iter([(features, targets)])).solve(penalty=0.0001)
    assert coefficients[:, 0].tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-3)
    assert intercept.item() == pytest.approx(0.0, abs=1e-3)


def test_equal_values_share_their_rank() -> None:
    one = np.tile([1.0, 1.0, 2.0, 3.0], 50)
    assert rank_correlation(one, one) == pytest.approx(1.0)
    assert rank_correlation(one, np.tile([2.0, 2.0, 1.0, 0.0], 50)) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(one, np.ones(200))) and math.isnan(
        rank_correlation(one[:50], one[:50])
    )


def test_stale_opens_are_named_once() -> None:
    fresh = walk("FRESH", 400, seed=1)
    opens = np.append(fresh.open[:1], fresh.close[:-1])
    high, low = np.maximum(fresh.high, opens), np.minimum(fresh.low, opens)
    stale = replace(fresh, symbol="STALE", open=opens, high=high, low=low)
    market = market_of(fresh, stale)
    text = stale_opens(market, ["FRESH", "STALE"], 0, 2**62)
    assert text.startswith("Nearly all opens of STALE repeat the previous close")
    assert stale_opens(market, ["FRESH"], 0, 2**62) == ""
    assert stale_opens(market, ["STALE"], int(fresh.open_time[350]), 2**62) == ""  # too few to tell


def test_the_command_prints_json_and_leaves_the_holdout_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        sources=("simulated",),
        simulated_symbols=2,
        simulated_bars=16 * 1_440,
        holdout_days=6,
        end_date="2026-01-31",
        log_dir=str(tmp_path / "logs"),
        data_dir=str(tmp_path / "data"),
        device="cpu",
    )
    probe_command(settings, costs="0,3", trees=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["last"] == "2026-01-25" and found["forecast_from"] == "2026-01-20"
    (ridge,) = found["models"]
    assert [row["horizon"] for row in ridge["rank_ic"]] == list(HORIZONS)
    assert [row["rule"]["horizon"] for row in ridge["signs"]] == list(HORIZONS)
    assert [row["cost_bps"] for row in ridge["ladder"]] == [0.0, 3.0]
    assert ridge["rank_ic"][0]["value"] > 0.05  # the simulated market is easy on purpose
    assert found["features"][0] == "return_1" and found["warning"] == ""
    assert len(chosen_models(False)) == 1
    with pytest.raises(ExitProgram, match="days are too few to fit, choose and judge on") as refusal:
        probe_command(replace(settings, holdout_days=12), trees=False)
    assert refusal.value.code == EXIT_NO_DATA
    with pytest.raises(
        ExitProgram, match=r"No symbol has 2,000 bars in .* python continuous_training.py data"
    ):
        probe_command(replace(settings, sources=("binance",)), trees=False)
    with pytest.raises(ExitProgram, match="--costs 0,x must be basis points") as refusal:
        probe_command(settings, costs="0,x")
    assert refusal.value.code == EXIT_SETTING


def test_trees_that_are_asked_for_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightgbm", None)
    assert chosen_models(None) == ["ridge"]
    with pytest.raises(ValueError, match="--trees needs lightgbm, which is not installed"):
        chosen_models(True)
    with pytest.raises(ValueError, match="need lightgbm"):
        market, _ = market_and_edges(planted(0.1, days=7))
        fit_trees(market, torch.arange(100), torch.zeros(100, 4))
    assert parse_costs("2,0,.5") == (0.0, 0.5, 2.0)
