"""Markets in which symbols tell of each other: forecasts and best policies are exact, one symbol tells nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from commands.selftest import TRIALS, Sizes, Trial, run_trial
from commands.selftest.best_policy import POSITIONS, solve, solve_chain
from commands.selftest.cross_markets import LEADERS, hidden_edge, leaders
from commands.selftest.known_markets import Array, draw_paths, expected_profit
from continuous_training import Settings
from training.distributed import Ranks

CROSS = [trial for trial in TRIALS if trial.market.forecast_alone]
BY_NAME = [pytest.param(trial, id=trial.name) for trial in CROSS]


def profit_of(policy: tuple[int, ...], values: Array, chances: Array, cost: float) -> float:
    """Mean reward of a policy, from cash on: the index of a position for every (held, value)."""
    num = len(values)
    states = list(itertools.product(range(3), range(num)))
    step, reward = np.zeros((2, len(states), len(states)))[0], np.zeros(len(states))
    for number, (held, value) in enumerate(states):
        chosen = policy[number]
        reward[number] = POSITIONS[chosen] * values[value] - cost * abs(POSITIONS[chosen] - POSITIONS[held])
        for following in range(num):
            step[number, states.index((chosen, following))] = chances[value, following]
    reached = np.linalg.matrix_power(0.5 * (np.eye(len(states)) + step), 4_096)  # averages out periods
    return float(reached[states.index((1, 0))] @ reward)


@pytest.mark.parametrize("cost", [0.0, 0.3, 0.8, 2.5])
def test_dynamic_programming_finds_the_best_of_all_policies(cost: float) -> None:
    values, chances = np.array([-0.7, 1.0]), np.array([[0.6, 0.4], [0.2, 0.8]])
    choice, profit = solve_chain(values, chances, cost)
    best = max(profit_of(policy, values, chances, cost) for policy in itertools.product(range(3), repeat=6))
    assert profit == pytest.approx(best, abs=1e-6)
    assert profit_of(tuple(choice.ravel().tolist()), values, chances, cost) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("trial", BY_NAME)
def test_the_best_policy_earns_what_was_computed_and_no_rule_earns_more(trial: Trial) -> None:
    paths = draw_paths(trial.market, 8, 20_000, seed=5)  # the leaders' moves are in all
    followers = slice(len(trial.market.names), None)
    forecast = trial.market.forecast(paths.returns)[followers]
    expectation = paths.expectation[followers]
    assert trial.market.process is not None
    persistence, deviation = trial.market.process(8)
    assert forecast.std() == pytest.approx(deviation, rel=0.01)
    assert np.corrcoef(forecast[:, 1:].ravel(), forecast[:, :-1].ravel())[0, 1] == pytest.approx(
        persistence, abs=0.01
    )
    best = solve(persistence, deviation, trial.cost)
    earned = expected_profit(best.apply(forecast), expectation, trial.cost)
    assert earned == pytest.approx(best.profit, rel=0.01)
    for factor in (0.7, 1.3):  # as if trading cost less, or more
        other = solve(persistence, deviation, factor * trial.cost)
        assert earned > expected_profit(other.apply(forecast), expectation, trial.cost)


@pytest.mark.parametrize("trial", BY_NAME)
def test_who_sees_one_symbol_earns_nothing(trial: Trial) -> None:
    assert trial.market.process is not None and trial.market.forecast_alone is not None
    best = solve(*trial.market.process(16), trial.cost)
    alone = solve(*trial.market.process_alone, trial.cost)
    assert 0.0 <= alone.profit < 0.002 * best.profit
    paths = draw_paths(trial.market, 64, 5_000, seed=6)
    forecast = trial.market.forecast_alone(paths.returns)
    assert forecast.std() == pytest.approx(trial.market.process_alone[1], rel=0.02)
    assert expected_profit(alone.apply(forecast), paths.expectation, trial.cost) < 0.02 * best.profit


def test_followers_do_what_the_leaders_did_a_bar_before() -> None:
    paths = draw_paths(leaders(0.3), 5, 20_000, seed=0)
    assert [series.symbol for series in paths.bars] == [*LEADERS, "SELF002", "SELF003", "SELF004"]
    assert paths.returns.std(axis=1) == pytest.approx(np.ones(5), abs=0.02)
    forecast = leaders(0.3).forecast(paths.returns)
    assert np.allclose(forecast[:, :-1], paths.expectation[:, 1:])
    for lag in (1, 2, 3):
        own = (paths.returns[:, lag:] * paths.returns[:, :-lag]).mean(1)
        assert np.abs(own).max() < 0.03  # white noise, to who sees one symbol


def test_the_forecasts_behind_a_factor_are_the_conditional_means_of_normal_variables() -> None:
    # All quantities are linear in independent normals: the first residuals, innovations, and factors.
    persistence, factor, num_symbols, num_bars = -0.6, 0.8, 3, 4
    deviation = np.sqrt(1 - factor**2)
    num = num_symbols * num_bars + num_bars
    unit, residual = np.eye(num), np.zeros((num_symbols, num))
    seen, ahead = [], []
    for t in range(num_bars):
        for symbol in range(num_symbols):
            first = 1.0 if t else 1 / np.sqrt(1 - persistence**2)
            shock = deviation * first * unit[t * num_symbols + symbol]
            residual[symbol] = persistence * residual[symbol] + shock
        seen.append(residual + factor * unit[num_symbols * num_bars + t])
        ahead.append(persistence * residual.copy())
    market = hidden_edge(persistence, factor)
    returns = np.random.default_rng(1).standard_normal((num_symbols, num_bars))
    assert market.forecast_alone is not None
    for symbol, t in itertools.product(range(num_symbols), range(num_bars)):
        alone = np.stack([row[symbol] for row in seen[: t + 1]])
        every = np.concatenate(seen[: t + 1])
        for forecast, known, values in (
            (market.forecast, every, returns[:, : t + 1].T.ravel()),
            (market.forecast_alone, alone, returns[symbol, : t + 1]),
        ):
            expected = ahead[t][symbol] @ known.T @ np.linalg.solve(known @ known.T, values)
            assert forecast(returns)[symbol, t] == pytest.approx(expected, rel=1e-9)


@pytest.mark.drill
@pytest.mark.parametrize("trial", BY_NAME)
def test_the_program_learns_from_the_others_and_nothing_from_one_symbol(trial: Trial) -> None:
    sizes = Sizes(num_bars=20_000, num_envs=64, exam_segments=4, d_model=32, num_layers=1)
    ranks = Ranks(0, 1, torch.device("cpu"))
    short = replace(trial, most_symbols=8)
    seeing, alone = (
        run_trial(Settings(), replace(short, features=features), sizes, 0, ranks)
        for features in (trial.features, ("symbol",))
    )
    assert seeing.share > 0.6 and alone.share < 0.1, (seeing, alone)
    assert seeing.alone is not None and abs(seeing.alone) < 0.05 * seeing.reference
