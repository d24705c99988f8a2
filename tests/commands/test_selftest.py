"""The self-test: its references are right, the policy learns, and look-ahead is caught."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import commands
from commands.selftest import (
    TRIALS,
    Result,
    Sizes,
    Trial,
    earns,
    foresees_nothing,
    lookahead,
    report,
    run_trial,
    stays_flat,
)
from commands.selftest.known_markets import (
    apply_rule,
    draw_paths,
    expected_profit,
    find_best_rule,
    mean_reversion,
    persistent_sign,
)
from continuous_training import Settings
from data_sources.simulated import simulated_bars
from envs.features import FEATURES
from runtime.control import ExitProgram
from training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
NOW_NS = 1_700_000_000 * 10**9
SMALL = Sizes(
    num_symbols=4,
    num_bars=6_000,
    exam_symbols=4,
    num_envs=64,
    context_bars=32,
    horizon=64,
    d_model=32,
    num_layers=1,
    update_passes=3,
    minibatch_segments=16,
    exam_segments=4,
)


def trial(name: str) -> Trial:
    return next(trial for trial in TRIALS if trial.name == name)


def make_result(**figures: float) -> Result:
    zeros = dict.fromkeys(
        (
            "policy",
            "reference",
            "foresight",
            "random",
            "buy_and_hold",
            "time_flat",
            "standard_error",
            "seconds",
        ),
        0.0,
    )
    return Result("any", 0, **(zeros | figures))


def test_the_filter_of_signs_equals_bayes_rule_over_all_hidden_paths() -> None:
    strength, persistence = 0.7, 0.8
    returns = np.random.default_rng(0).standard_normal((1, 6))
    forecast = persistent_sign(strength, persistence).forecast(returns)[0]
    for known in range(1, 7):
        up = total = 0.0
        for path in itertools.product((-1, 1), repeat=known + 1):
            chance = 0.5
            for before, after in itertools.pairwise(path):
                chance *= persistence if before == after else 1 - persistence
            for sign, seen in zip(path, returns[0, :known], strict=False):
                chance *= math.exp(-0.5 * (seen - strength * sign) ** 2)
            total += chance
            up += chance * path[-1]
        assert forecast[known - 1] == pytest.approx(strength * up / total, rel=1e-9)


def test_the_filter_of_distances_equals_the_conditional_mean_of_normal_variables() -> None:
    # All quantities are linear in independent normals: distance 0, then a shock and a fair move per bar.
    spread, persistence, num_bars = 2.0, 0.9, 5
    shock = spread * math.sqrt(1 - persistence**2)
    fair = math.sqrt(1 - shock**2)
    num = 1 + 2 * num_bars
    distance, rows, ahead = np.eye(num)[0] * spread, [], []
    for t in range(num_bars):
        own, others = np.eye(num)[1 + t] * shock, np.eye(num)[1 + num_bars + t] * fair
        rows.append((persistence - 1) * distance + own + others)
        distance = persistence * distance + own
        ahead.append((persistence - 1) * distance)
    seen = np.stack(rows)
    returns = np.random.default_rng(1).standard_normal((1, num_bars))
    forecast = mean_reversion(spread, persistence).forecast(returns)[0]
    for t in range(num_bars):
        known = seen[: t + 1]
        expected = ahead[t] @ known.T @ np.linalg.solve(known @ known.T, returns[0, : t + 1])
        assert forecast[t] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("market", [persistent_sign(0.2, 0.98), mean_reversion(3.0, 0.95)])
def test_returns_have_unit_noise_and_the_forecast_is_calibrated(market) -> None:  # type: ignore[no-untyped-def]
    paths = draw_paths(market, 20, 5_000, seed=0)
    assert paths.noise.std() == pytest.approx(1.0, abs=0.01)
    forecast = market.forecast(paths.returns)[:, :-1]
    # Calibrated: regressing the expectation on the forecast gives a slope of one.
    slope = (forecast * paths.expectation[:, 1:]).sum() / (forecast**2).sum()
    assert slope == pytest.approx(1.0, abs=0.06)


def test_positions_follow_the_thresholds() -> None:
    forecast = np.array([[0.0, 0.6, 0.3, 0.1, -0.6, -0.3, 0.2, 0.4, 0.9]])
    assert apply_rule((0.5, 0.2), forecast).tolist() == [[0, 1, 1, 0, -1, -1, 0, 0, 1]]
    assert apply_rule((0.5, -0.25), forecast).tolist() == [[0, 1, 1, 1, -1, -1, -1, 0, 1]]


def test_expected_profit_counts_expectations_and_turnover() -> None:
    positions = np.array([[1, 1, -1, 0]], dtype=np.int8)
    expectation = np.array([[9.0, 0.1, 0.2, -0.3]])
    # Held over the next bar: 0.1 + 0.2 + 0.3; traded 1 + 0 + 2.
    assert expected_profit(positions, expectation, cost=0.05) == pytest.approx((0.6 - 0.15) / 3)


def test_the_best_rule_beats_its_neighbours_and_never_trades_in_pure_noise() -> None:
    market = persistent_sign(0.2, 0.98)
    rule = find_best_rule(market, 0.2, num_symbols=8)
    paths = draw_paths(market, 32, 5_000, seed=9)
    forecast = market.forecast(paths.returns)
    best = expected_profit(apply_rule(rule, forecast), paths.expectation, 0.2)
    assert best > 0.07
    for enter, leave in ((0.0, 0.0), (0.15, 0.1), (0.19, -0.19)):
        assert best > expected_profit(apply_rule((enter, leave), forecast), paths.expectation, 0.2)
    assert find_best_rule(trial("pure_noise").market, 0.2)[0] == math.inf


@pytest.mark.slow
def test_the_program_learns_a_known_market_on_fresh_paths() -> None:
    short = replace(trial("persistent_sign"), cost=0.05, epochs=30, judge=earns(0.6))
    result = run_trial(Settings(), short, SMALL, 0, ALONE)
    assert result.failure == "", result
    assert result.foresight > 0.5 > result.reference > 0.08
    assert result.random < -0.03
    assert len(result.curve) == 30 and result.curve[-1] > result.curve[0]


@pytest.mark.slow
def test_a_feature_that_knows_the_next_bar_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(trial("foresight"), epochs=8)
    honest = run_trial(Settings(), short, SMALL, 0, ALONE)
    assert honest.failure == "", honest

    def next_move(history) -> torch.Tensor:  # type: ignore[no-untyped-def]
        move = torch.zeros_like(history.close)
        move[:-1] = (history.close[1:] / history.close[:-1]).log() * 1e3
        return move.float()

    monkeypatch.setitem(FEATURES, "next_move", next_move)
    leaking = run_trial(Settings(), short, SMALL, 0, ALONE)
    assert "something looks ahead" in leaking.failure


def test_verdicts() -> None:
    assert earns(0.95)(make_result(policy=0.096, reference=0.1)) == ""
    assert "earned 94% of the reference" in earns(0.95)(make_result(policy=0.094, reference=0.1))
    assert stays_flat(make_result(policy=-0.001, time_flat=0.99)) == ""
    assert "must stay flat" in stays_flat(make_result(policy=-0.02, time_flat=0.8))
    assert foresees_nothing(make_result(policy=0.01, standard_error=0.003)) == ""
    assert "looks ahead" in foresees_nothing(make_result(policy=0.02, standard_error=0.003))


@pytest.mark.drill
def test_the_command_exits_with_1_and_the_reason_if_a_trial_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = replace(SMALL, num_envs=16, minibatch_segments=8, context_bars=8, horizon=16, exam_segments=1)
    untrained = tuple(replace(trial(name), epochs=1) for name in ("persistent_sign", "pure_noise"))
    monkeypatch.setattr(commands.selftest, "TRIALS", untrained)
    monkeypatch.setattr(commands.selftest, "Sizes", lambda: sizes)
    monkeypatch.setattr(lookahead, "load_bars", lambda *_: simulated_bars(1, 3_000, 0, NOW_NS))
    report_dir, log_dir = str(tmp_path / "reports"), str(tmp_path / "logs")
    settings = Settings(report_dir=report_dir, log_dir=log_dir, holdout_days=1, horizon=16, episode_bars=64)
    with pytest.raises(ExitProgram) as end:
        commands.selftest_command(settings, seeds=2)
    printed = capsys.readouterr()
    failures = str(end.value)
    assert end.value.code == 1
    assert "no look-ahead on SIM000: passed" in printed.out
    assert failures.count("persistent_sign, seed ") == 2
    assert "% of the reference" in failures
    results = json.loads((tmp_path / "reports" / "selftest" / "selftest.json").read_text())
    assert len(results) == 4
    assert all(
        str(path) in printed.out.replace("\n", "") for path in (tmp_path / "reports" / "selftest").iterdir()
    )


def test_the_report_holds_every_result_and_draws_every_trial(tmp_path: Path) -> None:
    results = [
        replace(
            make_result(policy=0.05, reference=0.1, seconds=3.0), trial=trial.name, curve=[-0.1, 0.0, 0.04]
        )
        for trial in TRIALS
    ]
    table, picture = report.write(tmp_path / "new", TRIALS, results)
    rows = json.loads(table.read_text())
    assert [row["trial"] for row in rows] == [trial.name for trial in TRIALS]
    assert all(row["share"] == 0.5 and row["passed"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
