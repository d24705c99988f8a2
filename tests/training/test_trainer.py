"""A trainer resumes in the middle of an update, and loads states of other devices as far as they fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import training.trainer
from continuous_training import Settings, train
from data_sources.simulated import simulated_bars
from envs.market import Market
from models.transformer import ATTENTION_SCALE
from runtime.control import Control
from tests.training.rollouts import ALONE, SETTINGS
from training.checkpoint import Checkpoint, newest
from training.losses import Objective
from training.memory import DoesNotFit, MemoryNeeds, MemoryPlan, num_parameters
from training.progress import TrainingProgress
from training.rollout import REWARD_LIMIT
from training.trainer import Trainer
from training.validation import policy_sizes

NEVER = 2**62


def small_trainer(
    saved: Checkpoint | None = None, memory: MemoryPlan | None = None, envs_per_gpu: int = 8, **given: Any
) -> Trainer:
    """Make a trainer; what has a memory plan is compiled, or seems to be."""
    bars = simulated_bars(2, 600, 0, 1_767_225_600 * 10**9)
    market = Market.from_bars(bars, device="cpu", holdout_start_ns=NEVER, context_bars=8, horizon=8)
    settings = replace(
        SETTINGS,
        d_model=16,
        num_layers=1,
        num_heads=2,
        envs_per_gpu=envs_per_gpu,
        context_bars=8,
        feature_noise=0.5,
        **given,
    )
    if memory:
        settings = replace(settings, compile="on")
    needs = MemoryNeeds.of(settings, market.num_bytes, world_size=1, precision="fp32")
    plan = memory or MemoryPlan(needs, None, micro_batch_segments=2)
    progress = TrainingProgress.of(saved) if saved else TrainingProgress()
    return Trainer(market, settings, ALONE, plan, progress, saved)


def an_epoch(trainer: Trainer, stop_at: int = -1) -> dict[str, Any] | None:
    """Play and learn; return the figures, unless it is stopped before that optimizer step."""
    asked = itertools.count()
    losses = trainer.update(trainer.collect(), lambda: next(asked) == stop_at)
    if losses is None:
        return None
    figures = trainer.metrics(losses)
    return {name: value for name, value in figures.items() if not name.startswith("perf/")}


def saved_and_loaded(trainer: Trainer, folder: Path) -> Checkpoint:
    saved = trainer.checkpoint("", {}, {"line": {}})
    assert saved.exam == ({} if saved.step else {"line": {}})
    return saved_and_loaded_as(saved, folder)


def saved_and_loaded_as(saved: Checkpoint, folder: Path) -> Checkpoint:
    saved = replace(saved, path=folder / saved.name)
    saved.save(keep=16)
    found, warnings = newest(folder)
    assert found is not None and (found.path, warnings) == (saved.path, [])
    return found


@pytest.mark.parametrize(
    ("stop_at", "given"), [(0, {}), (3, {}), (3, {"forecast_coef": 0.5, "stochastic_depth": 0.5})]
)
def test_a_stopped_update_is_saved_and_finished_by_the_next_start(
    tmp_path: Path, stop_at: int, given: dict[str, Any]
) -> None:
    unbroken, stopped = small_trainer(**given), small_trainer(**given)
    for trainer in (unbroken, stopped):
        an_epoch(trainer)  # so that accounts are under way
    assert an_epoch(stopped, stop_at) is None
    saved = saved_and_loaded(stopped, tmp_path)
    assert saved.path.name == ("run1_epoch1_step3.pt" if stop_at else "run1_epoch1.pt")
    resumed = small_trainer(saved, **given)
    assert an_epoch(resumed) == an_epoch(unbroken)
    assert an_epoch(resumed) == an_epoch(unbroken)  # and the segment after it is a new one
    for name, weights in unbroken.objective.state_dict().items():
        assert torch.equal(weights, resumed.objective.state_dict()[name]), name


def test_a_training_of_before_attention_had_a_scale_goes_on_without_one(tmp_path: Path) -> None:
    fresh = small_trainer()
    assert fresh.policy.sizes["trunk"]["attention_scale"] == ATTENTION_SCALE
    for scale in (ATTENTION_SCALE, None):  # of before, where there is none
        saved = fresh.checkpoint("", {}, {})
        if scale is None:
            del saved.model_config["trunk"]["attention_scale"]
        saved = saved_and_loaded_as(saved, tmp_path / str(scale))
        resumed = small_trainer(saved)
        assert resumed.policy.sizes["trunk"]["attention_scale"] == (scale or 1.0)
        assert saved.policy(ALONE.device, "fp32").sizes == resumed.policy.sizes
        assert {block.attention.scale for block in resumed.policy.trunk.blocks} == {scale or 1.0}


def test_the_symbol_in_which_the_critic_is_worst_is_named_and_clipped_rewards_are_counted() -> None:
    trainer = small_trainer(envs_per_gpu=16)
    rollout = trainer.collect()
    assert rollout.hindsight is not None
    names = trainer.env.state_dict()["symbols"]
    assert set(names) == {"SIM000", "SIM001"}
    odd = torch.tensor([name == "SIM001" for name in names])
    scale = REWARD_LIMIT * math.sqrt(1 - trainer.settings.gamma**2)
    rollout.rewards[odd, 3] = -scale
    rollout.hindsight.growth[odd, 3] = -scale
    figures = trainer.metrics(trainer.update(rollout) or {})
    assert figures["loss/outlying_symbol"] == "SIM001"
    assert figures["loss/outlier_ratio"] > 10
    assert figures["rollout/clipped_rewards"] == int(odd.sum())
    errors, decisions, _ = trainer.learner.by_segment
    expected = (errors[odd].sum() / decisions[odd].sum()) / (errors[~odd].sum() / decisions[~odd].sum())
    assert figures["loss/outlier_ratio"] == pytest.approx(float(expected))


def test_a_loss_that_is_not_finite_is_of_a_symbol() -> None:
    trainer = small_trainer(envs_per_gpu=16)
    rollout = trainer.collect()
    assert rollout.hindsight is not None
    odd = trainer.env.state_dict()["symbols"].index("SIM001")
    rollout.hindsight.growth[odd] = math.nan
    figures = trainer.metrics(trainer.update(rollout) or {})
    assert (figures["loss/outlying_symbol"], figures["loss/outlier_ratio"]) == ("SIM001", math.inf)


def test_a_stopped_update_that_does_not_fit_any_more_is_played_anew(tmp_path: Path) -> None:
    stopped = small_trainer()
    assert an_epoch(stopped, 3) is None
    resumed = small_trainer(saved_and_loaded(stopped, tmp_path), envs_per_gpu=4)
    assert resumed.collect().num_segments == 4
    steps = resumed.learner.optimizer_steps
    assert an_epoch(resumed) is not None
    assert resumed.learner.optimizer_steps == steps + 2


class DeafControl(Control):
    def listen(self) -> None:
        """Leave the signals alone."""


def test_every_chunk_and_micro_batch_of_an_epoch_is_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One rollout, or one optimizer step, may take longer than HANG_SECONDS.
    counts = []
    for micro in (8, 1):
        folder = tmp_path / str(micro)
        settings = Settings(
            sources=("simulated",),
            end_date="2026-01-31",
            holdout_days=0,
            simulated_symbols=2,
            simulated_bars=3_000,
            envs_per_gpu=8,
            context_bars=8,
            horizon=8,
            episode_bars=16,
            d_model=16,
            num_layers=1,
            num_heads=2,
            batch_size=64,
            micro_batch_segments=micro,
            epochs=1,
            runs=1,
            checkpoint_dir=str(folder / "checkpoints"),
            data_dir=str(folder / "data"),
            log_dir=str(folder / "logs"),
        )
        beats: list[None] = []
        for module in ("rollout", "learner"):
            monkeypatch.setattr(f"training.{module}.heartbeat", partial(beats.append, None))
        train(settings, DeafControl())
        counts.append(len(beats))
    assert counts[1] - counts[0] == 7 + settings.update_passes * 7


def test_a_random_state_of_another_kind_of_device_is_left_out() -> None:
    trainer = small_trainer()
    before = trainer.learner.generator.get_state()
    trainer._restore_generator(torch.zeros(16, dtype=torch.uint8))  # a CUDA generator's
    assert torch.equal(trainer.learner.generator.get_state(), before)


def test_a_rehearsal_that_runs_out_of_memory_halves_the_micro_batch_once(monkeypatch) -> None:
    tried: list[int] = []

    def out_of_memory_above(most: int) -> Callable[..., str]:
        def compile_objective(objective: Objective, num_segments: int, *others: object) -> str:
            tried.append(num_segments)
            if num_segments > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return ""

        return compile_objective

    demand = MemoryNeeds(
        1_000, 16, 1, 8, 8, 8, minibatch_segments=8, num_positions=3, precision="fp32", market_bytes=0
    )
    plan = MemoryPlan(demand, 2**30, 8)
    monkeypatch.setattr(training.trainer, "compile_accounts", lambda env, policy, ranks: "")
    monkeypatch.setattr(training.trainer, "compile_hindsight", lambda objective, env, ranks: "")
    monkeypatch.setattr(training.trainer, "compile_objective", out_of_memory_above(4))
    trainer = small_trainer(memory=plan)
    assert tried == [8, 4]
    assert trainer.memory_plan == replace(plan, micro_batch_segments=4)
    assert trainer.learner.micro_batch_segments == 4
    monkeypatch.setattr(training.trainer, "compile_objective", out_of_memory_above(2))
    with pytest.raises(DoesNotFit, match=r"the GPU has 1\.0 GiB"):
        small_trainer(memory=plan)


def test_accounts_for_which_no_memory_is_left_are_a_training_that_does_not_fit(monkeypatch) -> None:
    def out_of_memory(*others: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    demand = MemoryNeeds(
        1_000, 16, 1, 8, 8, 8, minibatch_segments=8, num_positions=3, precision="fp32", market_bytes=0
    )
    monkeypatch.setattr(training.trainer, "compile_objective", lambda *sizes: "")
    monkeypatch.setattr(training.trainer, "compile_accounts", out_of_memory)
    with pytest.raises(DoesNotFit, match=r"the GPU has 1\.0 GiB"):
        small_trainer(memory=MemoryPlan(demand, 2**30, 8))


def test_the_policy_has_the_sizes_that_the_memory_plan_counts() -> None:
    trainer = small_trainer()
    num_features = trainer.env.market.num_features
    assert trainer.policy.sizes == policy_sizes(trainer.settings, num_features)
    assert trainer.policy.num_parameters() == num_parameters(trainer.settings)
