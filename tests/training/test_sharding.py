"""Shards are the bits of the whole, from the first weights on, and a dry run of them waits for no rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import training.trainer
from data_sources.simulated import simulated_bars
from envs.market import Market
from models.policy import Policy
from tests.training.rollouts import (
    ALONE,
    CONTEXT,
    HORIZON,
    SETTINGS,
    made_up_rollout,
    small_learner,
    small_policy,
)
from training import sharding
from training.compilation import compile_objective, dry_run
from training.distributed import Ranks
from training.losses import Objective
from training.memory import MemoryNeeds, MemoryPlan
from training.parallel import load_weights, new_policy
from training.progress import TrainingProgress
from training.sharding import Sharded
from training.trainer import Trainer

SIZES = small_policy().sizes


@contextmanager
def one_rank(rank: int, world_size: int) -> Iterator[Ranks]:
    """Be one of several ranks, whose collectives leave what they are to fill."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, ALONE.device)
    finally:
        distributed.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("width", "world_size"), [(32, 2), (32, 3), (4, 6)]
)  # uneven, and ranks without rows
def test_together_the_ranks_hold_the_bits_of_an_unsharded_policy(width: int, world_size: int) -> None:
    trunk = SIZES["trunk"] | {"d_model": width, "num_heads": 2, "feature_encoding": "piecewise"}
    sizes = SIZES | {"trunk": trunk}
    whole = new_policy(sizes, False, 7, ALONE, sharded=True)  # alone there is nothing to shard
    after = torch.get_rng_state()
    loaded, held = new_policy(sizes, False, 8, ALONE, sharded=False), []
    for rank in range(world_size):
        with one_rank(rank, world_size) as ranks:
            policy = new_policy(sizes, False, 7, ranks, sharded=True)
            assert torch.equal(torch.get_rng_state(), after)
            for name, buffer in whole.named_buffers():
                assert torch.equal(policy.get_buffer(name), buffer), name
            parallel = Sharded(Objective(policy, SETTINGS), ranks)
            held.append({name: local(weight).clone() for name, weight in policy.state_dict().items()})
            assert sum(p.numel() for p in parallel.parameters) < whole.num_parameters()
            load_weights(policy, loaded.state_dict())
            for ours, weight in zip(parallel.parameters, loaded.parameters(), strict=True):
                assert torch.equal(
                    ours, parallel.shard(ours, weight)
                )  # the optimizer's view, and its moments
            with pytest.raises(RuntimeError, match="another network"):
                load_weights(policy, Policy.from_sizes(SIZES | {"num_positions": 5}).state_dict())
    for name, weight in whole.state_dict().items():
        parts = [shards[name] for shards in held]
        if name.startswith("trunk"):
            assert torch.equal(torch.cat(parts), weight), name
        else:
            assert all(torch.equal(part, weight) for part in parts), name


def test_a_dry_run_of_shards_communicates_nothing_and_what_follows_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    for kind in (sharding.DefaultAllGather, sharding.DefaultReduceScatter):
        monkeypatch.setattr(kind, "__call__", lambda self, **_: calls.append(type(self).__name__))
    with one_rank(1, 2) as ranks:
        settings = replace(SETTINGS, parallel="fsdp")
        objective = Objective(new_policy(SIZES, False, 0, ranks, sharded=True), settings)
        dry_run(objective, 2, CONTEXT, HORIZON, ranks)
        assert calls == [] and all(p.grad is None for p in objective.policy.parameters())
        assert isinstance(objective.policy.trunk, FSDPModule)
        learner = small_learner(objective, ranks, sharded=True)
        learner.update(made_up_rollout(small_policy(), 4), run_fraction=0.0)
    assert set(calls) == {"DefaultAllGather", "DefaultReduceScatter"}


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("full"), RuntimeError("no compiler")])
def test_after_a_dry_run_that_failed_in_the_middle_of_a_backward_the_policy_is_a_fresh_one(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(torch, "compile", lambda method, **_: method)
    for name in ("compile_accounts", "compile_hindsight"):
        monkeypatch.setattr(training.trainer, name, lambda *_: "")
    tried: list[tuple[Policy, int]] = []

    def fails_once(objective: Objective, num_segments: int, *others: Any) -> str:
        policy = objective.policy
        tried.append((policy, num_segments))
        if len(tried) == 1:
            policy.trunk.blocks[-1].register_full_backward_hook(lambda *_: fail())
        return compile_objective(objective, num_segments, *others)

    def fail() -> None:
        raise failure

    monkeypatch.setattr(training.trainer, "compile_objective", fails_once)
    settings = replace(SETTINGS, parallel="fsdp", compile="on", envs_per_gpu=8)
    bars = simulated_bars(2, 600, 0, 1_767_225_600 * 10**9)
    market = Market.from_bars(
        bars, device="cpu", holdout_start_ns=2**62, context_bars=CONTEXT, horizon=HORIZON
    )
    plan = MemoryPlan(MemoryNeeds.of(settings, 0, 2, precision="fp32"), 2**30, 4, recompute=True)
    with one_rank(1, 2) as ranks:
        trainer = Trainer(market, settings, ranks, plan, TrainingProgress())
        assert trainer.policy is not tried[0][0] and trainer.policy.trunk.recompute
        out_of_memory = isinstance(failure, torch.OutOfMemoryError)
        assert [segments for _, segments in tried] == ([4, 2] if out_of_memory else [4])
        assert trainer.not_compiled == ("" if out_of_memory else "RuntimeError: no compiler")
        expected = new_policy(trainer.policy.sizes, False, settings.seed, ranks, sharded=True).state_dict()
        for name, weight in trainer.policy.state_dict().items():
            assert torch.equal(local(weight), local(expected[name])), name
        assert trainer.update(trainer.collect()) is not None
