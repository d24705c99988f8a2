"""Forecasts beside PPO: their loss and figures, that they learn, and that no policy and no file knows of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.ahead import HORIZONS, moves_ahead
from envs.config import GroupConfig
from envs.group_env import GroupEnv
from envs.recent_volatility import recent_volatility
from evaluation.probe import rank_correlation
from models.forecaster import Forecaster
from tests.envs.markets import config_of, env_of, market_of, walk
from tests.training.rollouts import (
    SETTINGS,
    calm_and_wild,
    made_up_rollout,
    policy_for,
    rollout_of,
    small_learner,
    small_policy,
)
from tests.training.test_trainer import an_epoch, saved_and_loaded, small_trainer
from training.forecasts import FORECAST_FIGURES, forecast_loss, rank_correlations
from training.group_rollout import collect_groups
from training.losses import Objective
from training.memory import num_parameters
from training.rollout import collect


def test_ranks_are_spearmans_with_ties_and_holes() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 400, 5, generator=generator)
    other += one
    one[:, 1] = one[:, 1].round()  # many ties
    other[:, 2] = other[:, 2].round()
    one[torch.rand(one.shape, generator=generator) < 0.2] = torch.nan
    other[torch.rand(one.shape, generator=generator) < 0.2] = torch.nan
    other[:, 4] = 3.0  # never varies
    found = rank_correlations(one, other)
    expected = [rank_correlation(a, b) for a, b in zip(one.T.numpy(), other.T.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert found[:4].min() > 0.3 and found[4].isnan()


def test_the_loss_adds_up_over_micro_batches_and_counts_what_is_known() -> None:
    forecasts, ahead = torch.randn(2, 6, 8, 2, len(HORIZONS), generator=torch.Generator().manual_seed(0))
    ahead[:, :3, 1, 2] = torch.nan
    forecasts.requires_grad_()
    whole = forecast_loss(forecasts, ahead, 48)
    parts = [forecast_loss(forecasts[rows], ahead[rows], 48) for rows in torch.arange(6).split(2)]
    torch.testing.assert_close(sum(parts), whole)
    known = ~ahead.isnan()
    expected = 0.5 * (forecasts - ahead)[known].square().sum() / (48 * 2 * len(HORIZONS))
    torch.testing.assert_close(whole, expected)
    (gradient,) = torch.autograd.grad(whole, forecasts)
    assert ((gradient != 0) == known).all()


def test_forecasts_are_of_what_comes_after_each_decision_and_change_no_decision() -> None:
    market = calm_and_wild()
    env, twin = env_of(market), env_of(market)
    policy = policy_for(env)
    plain = rollout_of(env, policy, hindsight=True)
    heads = Forecaster(32, len(HORIZONS), torch.device("cpu"))
    torch.nn.init.normal_(heads.weight)
    generator = torch.Generator().manual_seed(7)
    first = twin.begin_segment()[:, :1]  # only to know where the segment begins
    cursor = twin.cursor
    twin = env_of(market)
    rollout = collect(twin, policy, generator, 16, hindsight=True, forecaster=heads)
    for name in ("bars", "actions", "log_policy", "values", "rewards"):
        assert torch.equal(getattr(plain, name), getattr(rollout, name)), name
    assert torch.equal(rollout.bars[:, :1], first)
    assert rollout.ahead is not None and rollout.forecasts is not None
    steps = torch.arange(rollout.horizon)
    newest = cursor[:, None] + steps
    torch.testing.assert_close(rollout.ahead, moves_ahead(market, newest), equal_nan=True)
    assert torch.equal(rollout.volatility, recent_volatility(market, newest))  # type: ignore[arg-type]
    with torch.no_grad():
        again = heads(policy.hidden(rollout.bars, rollout.horizon))
    torch.testing.assert_close(rollout.forecasts, again, rtol=1e-4, atol=1e-5)


def test_of_a_group_a_minute_without_a_bar_has_no_target() -> None:
    bars = [walk("AAA"), walk("BBB", seed=1, gaps={100: 3, 200: 5, 300: 2})]
    market = market_of(*bars)
    config = config_of(group=GroupConfig(2, 1.0, 0.0))
    env = GroupEnv(market, config, "cpu", seed=0)
    heads = Forecaster(32, len(HORIZONS), torch.device("cpu"))
    missing = 0
    for _ in range(20):
        rollout = collect_groups(env, policy_for(env), torch.Generator().manual_seed(0), 16, forecaster=heads)
        assert rollout.ahead is not None
        tokens = rollout.bars[:, -config.horizon - 1 :]
        is_known = (tokens[:, 1:] != 0).any(-1)  # a symbol's first features are 0
        repeats = is_known & (tokens[:, 1:] == tokens[:, :-1]).all(-1)
        assert rollout.ahead[repeats].isnan().all()
        assert rollout.volatility is not None and (rollout.volatility[repeats] == 1.0).all()
        assert (rollout.volatility[~repeats] != 1.0).any()
        missing += int(repeats.sum())
    assert missing > 0


def test_they_learn_what_can_be_known_and_help_no_policys_file(tmp_path: Path) -> None:
    plain, trainer = small_trainer(), small_trainer(forecast_coef=1.0)
    for name, weights in plain.policy.state_dict().items():
        assert torch.equal(weights, trainer.policy.state_dict()[name]), name
    figures = [an_epoch(trainer) or {} for _ in range(4)]
    assert set(FORECAST_FIGURES) <= set(figures[0])
    assert not set(FORECAST_FIGURES) & set(an_epoch(plain) or {})
    assert figures[-1]["loss/forecast"] < 0.9 * figures[0]["loss/forecast"]
    saved = saved_and_loaded(trainer, tmp_path)
    assert list(saved.model) == list(plain.policy.state_dict())
    assert saved.model_config == plain.policy.sizes
    assert saved.resume is not None and set(saved.resume.learner["forecaster"]) == {"weight", "bias"}


def test_a_training_may_begin_and_end_to_learn_forecasts(tmp_path: Path) -> None:
    first = small_trainer()
    an_epoch(first)
    begun = small_trainer(saved_and_loaded(first, tmp_path / "a"), forecast_coef=0.5)
    moments = first.learner.optimizer.state_dict()["state"]
    assert begun.learner.optimizer.state_dict()["state"].keys() == moments.keys()
    an_epoch(begun)
    ended = small_trainer(saved_and_loaded(begun, tmp_path / "b"))
    before, after = (each.learner.optimizer.state_dict()["state"] for each in (begun, ended))
    assert after.keys() == moments.keys() < before.keys()
    assert all(torch.equal(after[n]["exp_avg"], before[n]["exp_avg"]) for n in after)
    assert an_epoch(ended) is not None


def test_they_count_as_weights_and_are_inspected_for_corruption() -> None:
    settings = replace(SETTINGS, forecast_coef=0.5)
    heads = 2 * len(HORIZONS) * (settings.d_model + 1)
    assert num_parameters(settings) == num_parameters(SETTINGS) + heads
    learner = small_learner(Objective(small_policy(), settings), forecast_coef=0.5)
    learner.update(made_up_rollout(learner.policy, 4, has_forecasts=True), run_fraction=0.0)
    assert learner.find_corruption() == ("", "")
    with torch.no_grad():
        learner.parallel.parameters[-1][0] += 1.0
    assert "weight forecaster.bias changed" in learner.find_corruption()[0]


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # see test_compilation.py
def test_a_compiled_objective_forecasts_and_skips_blocks_the_same() -> None:
    from tests.training.rollouts import ALONE, CONTEXT, HORIZON
    from training.compilation import compile_objective

    settings = replace(SETTINGS, forecast_coef=0.5, stochastic_depth=0.5)
    plain, compiled = (Objective(small_policy(num_layers=1), settings) for _ in range(2))
    assert compile_objective(compiled, 2, CONTEXT, HORIZON, ALONE) == ""
    rollout = made_up_rollout(plain.policy, 4, has_forecasts=True)
    rollout.depth = torch.tensor([[0.0], [2.0], [2.0], [0.0]])
    for objective in (plain, compiled):
        learner = small_learner(objective, forecast_coef=0.5)
        for group in learner.optimizer.param_groups:
            group["eps"] = 1e-4
        learner.update(rollout, run_fraction=0.0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)
