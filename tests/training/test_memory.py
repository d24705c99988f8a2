"""The memory plan: counted against what a backward keeps, the same after a restart, honest where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal, TypeVar

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from continuous_training import PRESETS, Settings
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.training.rollouts import ALONE, CONTEXT, HORIZON, SETTINGS, made_up_rollout, small_policy
from training import compilation, memory
from training.distributed import Ranks
from training.losses import Objective
from training.memory import (
    ACTIVATION_BYTES,
    INPUT_BYTES,
    DoesNotFit,
    MemoryNeeds,
    MemoryPlan,
    gpu_memory,
    plan,
    plan_memory,
)

T = TypeVar("T")
GIB = 2**30
FULL = MemoryNeeds.of(Settings(), market_bytes=2 * GIB, world_size=1, precision="bf16")
SMALL = MemoryNeeds.of(Settings(**PRESETS["small"]), market_bytes=2 * GIB, world_size=1, precision="bf16")


def kept_for_the_backward(
    num_layers: int, precision: str, recompute: bool = False, encoding: str = "linear"
) -> int:
    """Count the bytes that a forward leaves for its backward, weights excluded."""
    batch, length, width = 3, 24, 64
    policy = Policy(TransformerConfig(5, width, num_layers, 4, length, encoding), 9, 3, precision)
    policy.trunk.recompute = recompute
    weights = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(torch.randn(batch, length, 5), torch.randn(batch, length // 2, 9))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_block_keeps_what_the_plan_counts(precision: str, recompute: bool) -> None:
    block = kept_for_the_backward(4, precision, recompute) - kept_for_the_backward(3, precision, recompute)
    if not recompute:
        block -= 12 * 64**2 * memory.COPY_BYTES[precision]  # of the weights, which the plan counts as state
    counted = (INPUT_BYTES if recompute else ACTIVATION_BYTES)[precision]
    assert block / (3 * 24 * 64) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_what_is_kept_of_encoded_features(precision: str) -> None:
    more = kept_for_the_backward(1, precision, encoding="piecewise") - kept_for_the_backward(1, precision)
    assert more == 3 * 24 * 30 * INPUT_BYTES[precision]  # six columns more for each of five features
    encoded, plain = (
        MemoryNeeds.of(Settings(feature_encoding=encoding), GIB, 1, precision)  # type: ignore[arg-type]
        for encoding in ("piecewise", "linear")
    )
    per_segment = encoded.segment_bytes(recompute=False) - plain.segment_bytes(recompute=False)
    assert per_segment == (64 + 128) * 6 * 24 * INPUT_BYTES[precision]


def test_recomputing_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        policy = small_policy()
        policy.trunk.recompute = recompute
        rollout = made_up_rollout(policy, 4)
        logits, values = policy(rollout.bars, rollout.accounts)
        (logits.square().sum() + values.square().sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    for kept, computed in zip(*gradients, strict=True):
        assert torch.equal(kept, computed)


@pytest.mark.parametrize(
    ("gib", "precision", "segments", "recompute"),
    [(80, "bf16", 128, False), (80, "fp32", 128, False), (40, "bf16", 128, False), (24, "bf16", 32, False)],
)
def test_the_full_model_gets_what_its_weights_leave(
    gib: int, precision: str, segments: int, recompute: bool
) -> None:
    chosen = plan(replace(FULL, precision=precision), gib * GIB)
    assert (chosen.micro_batch_segments, chosen.recompute) == (segments, recompute)
    assert chosen.needed_bytes <= memory.USABLE * gib * GIB
    assert FULL.minibatch_segments % segments == 0


def test_the_same_memory_gives_the_same_plan_and_less_of_everything_fits_less() -> None:
    assert plan(FULL, 40 * GIB) == plan(FULL, 40 * GIB)
    most = plan(FULL, 40 * GIB).micro_batch_segments
    for larger in (replace(FULL, num_layers=20, num_parameters=10**9), replace(FULL, context_bars=512)):
        assert plan(larger, 40 * GIB).micro_batch_segments < most
    assert plan(SMALL, 8 * GIB).micro_batch_segments == 32  # a whole optimizer step


def test_blocks_are_recomputed_before_training_is_refused() -> None:
    long = replace(FULL, context_bars=6_000, market_bytes=GIB)
    assert plan(long, 24 * GIB).recompute
    assert not plan(long, 80 * GIB).recompute


def test_shares_make_room_for_what_one_gpu_cannot_hold() -> None:
    large = replace(FULL, num_parameters=2_500_000_000, d_model=4_096)
    with pytest.raises(DoesNotFit, match="parallel to fsdp"):
        plan(large, 40 * GIB)
    assert plan(replace(large, shards=8), 40 * GIB).micro_batch_segments >= 1


def test_ddp_keeps_gradients_a_second_time() -> None:
    alone = MemoryNeeds.of(Settings(), 2 * GIB, world_size=1, precision="bf16")
    four = MemoryNeeds.of(Settings(batch_size=4 * 65_536), 2 * GIB, world_size=4, precision="bf16")
    assert four.state_bytes - alone.state_bytes == 4 * alone.num_parameters
    sharded = MemoryNeeds.of(Settings(batch_size=4 * 65_536, parallel="fsdp"), 2 * GIB, 4, precision="bf16")
    assert sharded.state_bytes < alone.state_bytes


def test_an_exam_needs_the_champion_and_what_is_sharded_whole() -> None:
    # A champion takes the place of the gradients; the whole policy beside it may be more than a rank's shard.
    for replicas in (1, 4):
        needs = replace(FULL, replicas=replicas)
        assert needs.exam_bytes > needs.num_parameters * (12 + 4 + 4 * (replicas > 1))
        assert MemoryPlan(needs, 80 * GIB, 1).needed_bytes == MemoryPlan(needs, 80 * GIB, 1).training_bytes
    large = replace(FULL, num_parameters=2_500_000_000, d_model=4_096, num_layers=12, shards=8)
    chosen = MemoryPlan(large, 80 * GIB, 1)
    assert chosen.needed_bytes == large.exam_bytes > chosen.training_bytes
    assert large.exam_bytes > 8 * large.num_parameters
    assert f"; an exam {large.exam_bytes / GIB:.1f} GiB" in str(chosen)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "set d_model to "),
        ({"market_bytes": 30 * GIB}, "set history_days to "),
        ({"envs_per_gpu": 200_000}, "set envs_per_gpu to "),
        ({"horizon": 90_000, "envs_per_gpu": 1}, "set horizon to "),
    ],
)
def test_what_cannot_fit_is_refused_with_the_one_setting_to_change(changes: dict, advice: str) -> None:
    with pytest.raises(DoesNotFit, match=advice) as refusal:
        plan(replace(FULL, **changes), 8 * GIB)
    assert "the GPU has 8.0 GiB" in str(refusal.value) and "\n" not in str(refusal.value)
    if not changes:
        width = int(str(refusal.value).split("d_model to ")[1].split(",")[0])
        fitting = MemoryNeeds.of(Settings(d_model=width), 2 * GIB, 1, precision="bf16")
        assert plan(fitting, 8 * GIB).micro_batch_segments >= 1


def test_what_people_set_stays_while_it_fits_and_is_lowered_where_it_does_not() -> None:
    assert plan(FULL, 80 * GIB, 48).micro_batch_segments == 48
    assert plan(FULL, 24 * GIB, 512).micro_batch_segments == 32
    assert plan(FULL, None, 512).micro_batch_segments == 512
    assert plan(FULL, None).micro_batch_segments == 16
    assert plan(replace(FULL, envs_per_gpu=509, minibatch_segments=509), None).micro_batch_segments == 16


def test_memory_that_others_hold_is_not_planned_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (39 * GIB, 40 * GIB))
    assert gpu_memory(torch.device("cuda")) == 40 * GIB
    assert caplog.messages == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 40 * GIB))
    assert memory.USABLE * gpu_memory(torch.device("cuda")) == pytest.approx(20 * GIB)
    assert "other programs hold 20.0 GiB" in caplog.text


def on_two_gpus(run: Callable[[Ranks], T]) -> list[T]:
    """Run it as two ranks, each a thread with its own gloo group and the number of its own GPU."""
    store = HashStore()

    def as_rank(rank: int) -> T:
        return run(Ranks(rank, 2, torch.device("cuda", rank), ProcessGroupGloo(store, rank, 2)))

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(as_rank, range(2)))


@pytest.mark.filterwarnings("ignore:You are using a Backend:UserWarning")  # without a default group
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("room", "set_by_user", "expected"),
    [
        ([(16, False), (4, False)], None, (4, False)),
        ([(4, False), (16, False)], None, (4, False)),
        ([(16, False), (8, False)], 12, (8, False)),
        ([(16, False), (16, False)], 12, (12, False)),
        ([(16, False), (2, True)], None, (2, True)),  # on a rank that need not recompute, too
        ([(4, False), (8, True)], None, (4, True)),
        ([(16, False), (0, True)], None, None),
    ],
)
def test_ranks_with_more_or_less_free_memory_plan_the_same(
    monkeypatch: pytest.MonkeyPatch,
    parallel: Literal["ddp", "fsdp"],
    room: list[tuple[int, bool]],
    set_by_user: int | None,
    expected: tuple[int, bool] | None,
) -> None:
    settings = replace(
        SETTINGS, precision="bf16", parallel=parallel, num_layers=40, batch_size=64 * HORIZON
    )  # of which a rank takes 32 segments
    settings = replace(settings, micro_batch_segments=set_by_user)
    needs = MemoryNeeds.of(settings, GIB, 2, precision="bf16")
    free = [
        int((needs.fixed_bytes + (segments + 0.1) * needs.segment_bytes(recompute)) / memory.USABLE)
        for segments, recompute in room
    ]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu.index], free[gpu.index]))

    def planned(ranks: Ranks) -> tuple[int, bool] | str:
        try:
            chosen = plan_memory(settings, GIB, ranks)
        except DoesNotFit as error:
            return str(error)
        return chosen.micro_batch_segments, chosen.recompute

    first, second = on_two_gpus(planned)
    assert first == second
    if expected:
        assert first == expected
    else:  # the rank whose GPU is large enough leaves with the other one's reason
        assert isinstance(first, str) and first.startswith("on rank 1, it needs ")


def test_a_half_micro_batch_is_tried_once_and_then_it_does_not_fit() -> None:
    whole = MemoryPlan(FULL, 80 * GIB, 128)
    assert whole.smaller().micro_batch_segments == 64
    with pytest.raises(DoesNotFit):
        MemoryPlan(FULL, 80 * GIB, 1).smaller()


def test_a_rehearsal_leaves_no_gradient_and_tells_of_too_little_memory(monkeypatch) -> None:
    policy = small_policy()
    objective = Objective(policy, SETTINGS)
    compilation.dry_run(objective, 2, CONTEXT, HORIZON, ALONE)
    assert all(p.grad is None for p in policy.parameters())

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(policy, "encode", full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        compilation.dry_run(objective, 2, CONTEXT, HORIZON, ALONE)
    other = SimpleNamespace(device=ALONE.device, any=lambda flag: True)  # a rank beside us ran out
    with pytest.raises(torch.OutOfMemoryError, match="another rank"):
        compilation.dry_run(Objective(small_policy(), SETTINGS), 2, CONTEXT, HORIZON, other)
