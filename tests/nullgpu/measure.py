"""Run two epochs, an exam, a checkpoint and a resume of these settings on the null GPU, and print what they cost.

    python -m tests.nullgpu.build python -m tests.nullgpu.measure --preset full --compile on --ranks 4

One JSON object: launches and host syncs of a rollout and an update, peak memory against the plan, graph breaks and
recompilations, seconds of preparation. With ``--ranks``, this is rank 0 of so many, whose collectives do nothing
(torch's fake process group).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.distributed
import typer
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from benchmarks.env_throughput import market_of, random_walk
from commands.cli import command_from
from continuous_training import PRESETS, Settings
from envs import walk_env
from envs.market import Market
from evaluation.exam import examine
from tests.envs.markets import moved
from tests.nullgpu.gpu import counting, is_null_gpu
from training import checkpoint
from training.checkpoint_writer import CheckpointWriter, Snapshot
from training.distributed import Ranks
from training.memory import MemoryPlan, plan_memory
from training.progress import TrainingProgress
from training.trainer import Trainer

GIB = 2**30


def measure(
    settings: Settings,
    num_ranks: Annotated[int, typer.Option("--ranks", help="rank 0 of so many")] = 1,
    with_exam: Annotated[bool, typer.Option("--exam/--no-exam", help="walk segments of an exam")] = True,
    with_resume: Annotated[bool, typer.Option("--resume", help="save, load, and compare")] = False,
) -> None:
    """Measure one training on the null GPU; print one JSON object."""
    if not is_null_gpu():
        raise SystemExit(
            "this is for the null GPU: python -m tests.nullgpu.build python -m tests.nullgpu.measure"
        )
    torch.set_float32_matmul_precision("high")  # as distributed.start
    ranks = Ranks(0, num_ranks, torch.device("cuda", 0))
    if num_ranks > 1:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
        settings = replace(settings, batch_size=settings.batch_size * num_ranks)
    market = moved(market_of(60_000, 8, "cpu", settings.horizon, settings.context_bars), ranks.device)
    market_of_next_run = moved(moved(market, "cpu"), ranks.device)  # the plan holds two
    plan = plan_memory(settings, market.num_bytes, ranks)
    began = time.perf_counter()
    trainer = new_trainer(market, settings, ranks, plan)
    found: dict[str, Any] = {
        "prepared_seconds": round(time.perf_counter() - began, 1),
        "not_compiled": trainer.not_compiled,
        "parameters": trainer.policy.num_parameters(),
        "micro_batch_segments": trainer.memory_plan.micro_batch_segments,
        "recompute": trainer.memory_plan.recompute,
        "plan": str(trainer.memory_plan),
        "planned_gib": trainer.memory_plan.needed_bytes / GIB,
        "preparation_peak_gib": peak_gib(),
        "graphs": counters["stats"]["unique_graphs"],
    }
    epoch(trainer)  # allocations and lazy set-up
    torch.cuda.reset_peak_memory_stats()
    graphs = counters["stats"]["unique_graphs"]
    found |= epoch(trainer)
    found["epoch_peak_gib"] = peak_gib()
    found["recompilations"] = counters["stats"]["unique_graphs"] - graphs
    found["graph_breaks"] = sum(counters["graph_break"].values())
    if with_exam:
        found |= exam(trainer, settings)
    assert market_of_next_run.num_bytes == market.num_bytes  # still there
    found["peak_gib"] = max(value for name, value in found.items() if name.endswith("peak_gib"))
    if with_resume:
        found["resumes"] = resumes(trainer, settings)
    typer.echo(json.dumps(found, indent=1))


def new_trainer(
    market: Market,
    settings: Settings,
    ranks: Ranks,
    plan: MemoryPlan,
    saved: checkpoint.Checkpoint | None = None,
) -> Trainer:
    """Make a trainer, but multiply no large matrices for MFU: they are not part of the plan.

    Nor does DDP copy rank 0's weights: it joins them, sends them and copies the parts, of which the null GPU does
    only the last.
    """
    progress = TrainingProgress.of(saved) if saved else TrainingProgress()
    no_copy = patch("torch.nn.parallel.distributed._sync_module_states", lambda *_, **__: None)
    with no_copy, patch("training.metrics.matmul_rate", lambda *_: 1e12):
        trainer = Trainer(market, settings, ranks, plan, progress, saved)
    if isinstance(trainer.learner.parallel.objective, DistributedDataParallel):
        trainer.learner.parallel.objective.register_comm_hook(None, averaged)
    return trainer


def averaged(_, bucket):  # without types: DDP compares them, and they would be strings
    """Return a bucket as it is: the fake process group has no results, which DDP would wait for."""
    done = torch.futures.Future(devices=[bucket.buffer().device])
    done.set_result(bucket.buffer())
    return done


def peak_gib() -> float:
    """Return the largest memory of tensors since the last reset."""
    return torch.cuda.max_memory_allocated() / GIB


def epoch(trainer: Trainer) -> dict[str, Any]:
    """Train one epoch; return what its two phases cost."""
    found: dict[str, Any] = {}
    rollout = counted(trainer.collect, "rollout", found)
    losses = counted(lambda: trainer.update(rollout), "update", found)
    counted(lambda: trainer.metrics(losses), "metrics", found)
    return found


def counted(run: Callable[[], Any], name: str, found: dict[str, Any]) -> Any:
    """Run it, and note its launches, the seconds of the host, and where it waited."""
    began = time.perf_counter()
    with counting() as counts:
        result = run()
    found[f"{name}_seconds"] = round(time.perf_counter() - began, 3)
    found[f"{name}_launches"], found[f"{name}_syncs"] = counts.launches, counts.syncs
    found[f"{name}_waits"] = dict(counts.places.most_common(5))
    return result


def exam(trainer: Trainer, settings: Settings) -> dict[str, Any]:
    """Walk one segment and two; return what the second one costs, and the exam's peak memory."""
    market, found = trainer.env.market, dict[str, Any]()
    policy = trainer.full_policy()
    end_ns = int(random_walk("any", 60_000, 0).open_time[-1])
    start_ns = end_ns - 8 * settings.horizon * 60 * 10**9
    torch.cuda.reset_peak_memory_stats()
    walk = walk_env._walk  # looks up bars, so on the CPU
    on_host = patch("envs.walk_env._walk", lambda market, *place: walk(moved(market, "cpu"), *place))
    # The walks depend on numbers that the null GPU does not compute.
    without_walks = patch("evaluation.exam.walks_of", lambda *_: {})
    with on_host, without_walks, patch("evaluation.exam.Reader.read", read_as_much):
        for number in (1, 2):
            run = partial(
                examine,
                {"policy": policy, "champion": policy},
                market,
                trainer.env.config,
                market.symbols,
                start_ns,
                end_ns,
                chunk_segments=min(trainer.learner.micro_batch_segments, settings.envs_per_gpu),
                max_segments=number,
                compiled=trainer.env.compiled,
            )
            counted(run, f"exam{number}", found)
    launches = found["exam2_launches"] - found["exam1_launches"]
    seconds = round(found["exam2_seconds"] - found["exam1_seconds"], 3)
    return {"exam_segment_launches": launches, "exam_segment_seconds": seconds, "exam_peak_gib": peak_gib()}


def read_as_much(reader: Any, rows: torch.Tensor, check_stop: Callable[[], None]) -> torch.Tensor:
    """Run the trunk as often as the exam would: which segments those are, the null GPU does not find."""
    market, horizon = reader._market, reader._horizon
    places = torch.zeros(reader._chunk_segments, market.context_bars + horizon + 1, dtype=torch.int64)
    for _ in range(-(-rows.numel() // reader._chunk_segments)):
        encoded = reader._policy.encode(market.features[places.to(rows.device)].float(), horizon + 1)
    return encoded.new_zeros(len(rows), horizon, rows.shape[1], encoded.shape[-1])


def resumes(trainer: Trainer, settings: Settings) -> bool:
    """Whether a trainer that resumes from a checkpoint has the same state as the one that wrote it."""
    symbol = trainer.env._symbol
    # Nothing was drawn: what lies there may be no symbol's number.
    symbol.copy_(torch.zeros(symbol.shape, dtype=symbol.dtype))
    with tempfile.TemporaryDirectory() as folder:
        trainer.settings = replace(settings, checkpoint_dir=folder)
        with CheckpointWriter(Path(folder), keep=1, wanted=True) as writer:
            writer.save(trainer.checkpoint("", {}, {}))
            writer.finish()
        saved, warnings = checkpoint.newest(Path(folder))
        assert saved is not None, (writer.newest, warnings)
    quick = replace(settings, compile="off")
    resumed = new_trainer(trainer.env.market, quick, trainer.ranks, trainer.memory_plan, saved)
    again = Snapshot().take(resumed.checkpoint("", {}, {}))
    return bits_of(saved) == bits_of(again)


def bits_of(saved: checkpoint.Checkpoint) -> Any:
    """Return weights, moments and counters: bytes, since what was not computed may be NaN.

    Not the accounts, which look up their bars: nothing is found where nothing is computed.
    """
    assert saved.resume is not None
    learner = saved.resume.learner
    kept = saved.model, saved.resume.clock, learner["optimizer"]["state"], learner["optimizer_steps"]
    return tree_map_only(torch.Tensor, lambda tensor: tensor.numpy().tobytes(), kept)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command_from(Settings, PRESETS, measure))
    app()
