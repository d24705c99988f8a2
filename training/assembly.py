"""Turn the settings into the parts that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from data_sources.bars import Bars
from data_sources.refresh import LoadedData
from envs.config import EnvConfig
from envs.features import FEATURES, FeatureStatistics
from envs.market import Market
from evaluation.examiner import Exam
from models.policy import Policy
from models.transformer import TransformerConfig
from runtime.control import EXIT_DOES_NOT_FIT, EXIT_NO_DATA, EXIT_SETTING, ExitProgram
from training import checkpoint, validation
from training.checkpoint_writer import BackgroundWriter
from training.distributed import Ranks
from training.learner import LearnerConfig
from training.losses import PPOConfig
from training.memory import Demand, DoesNotFit, MemoryPlan, gpu_memory, plan
from training.progress import Clock
from training.trainer import Session, SessionConfig

if TYPE_CHECKING:
    from continuous_training import Settings


def market_on_device(
    settings: Settings,
    data: LoadedData,
    session: Session | None,
    saved: checkpoint.Restored | None,
    ranks: Ranks,
) -> Market:
    """Put this run's bars on the device; features keep the scale that the training began with.

    Raises:
        ExitProgram: there are no bars to train on, or the checkpoint is of other features.
    """
    if not data.bars:
        raise ExitProgram(
            EXIT_NO_DATA,
            f"No symbol has {settings.min_bars:,} bars: set the keys in .env (see .env.example), check the "
            "network, or try it offline with --demo",
        )
    statistics = session.env.market.statistics if session else None
    if saved and statistics is None:
        statistics = FeatureStatistics.from_state_dict(saved.weights["features"])
    if statistics and (reason := other_features(settings, statistics)):
        raise ExitProgram(EXIT_SETTING, reason)
    try:
        return Market.from_bars(
            data.bars,
            device=ranks.device,
            holdout_start_ns=holdout_start_ns(settings, data.bars),
            context_bars=settings.context_bars,
            horizon=settings.horizon,
            statistics=statistics,
        )
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def holdout_start_ns(settings: Settings, bars: Sequence[Bars]) -> int:
    """Return where the newest ``holdout_days`` of bars begin: nothing that opens at or after it is trained on."""
    newest_ns = max(int(one.open_time[-1]) for one in bars)
    return newest_ns - settings.holdout_days * 86_400 * 10**9


def session_config(settings: Settings, memory: MemoryPlan, ranks: Ranks) -> SessionConfig:
    """Say what this rank's session is made of."""
    device = ranks.device
    env = EnvConfig.from_settings(settings, settings.envs_per_gpu)
    ppo = PPOConfig(
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_coef=settings.clip_coef,
        entropy_coef=settings.entropy_coef,
        value_coef=settings.value_coef,
        advantages=settings.advantages,
    )
    learner = LearnerConfig(
        update_passes=settings.update_passes,
        minibatch_segments=validation.minibatch_segments(settings, ranks.world_size),
        micro_batch_segments=memory.micro_batch_segments,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        final_learning_rate_fraction=settings.final_learning_rate_fraction,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        sharded=settings.parallel == "fsdp",
    )
    return SessionConfig(
        env=env,
        ppo=ppo,
        learner=learner,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        bf16=uses_bf16(settings, ranks),
        seed=settings.seed,
        compile=settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda"),
        memory=memory,
    )


def uses_bf16(settings: Settings, ranks: Ranks) -> bool:
    """Tell whether the trunk computes in bf16."""
    return settings.precision == "bf16" or (settings.precision == "auto" and ranks.device.type == "cuda")


def memory_plan(settings: Settings, market_bytes: int, ranks: Ranks) -> tuple[MemoryPlan, str]:
    """Plan this rank's memory; return the plan, and a warning where others use the GPU, or "".

    Raises:
        ExitProgram: the training does not fit.
    """
    memory_bytes, warning = gpu_memory(ranks.device) if ranks.device.type == "cuda" else (None, "")
    demand = demand_of(settings, market_bytes, ranks.world_size, uses_bf16(settings, ranks))
    try:
        return plan(demand, memory_bytes, settings.micro_batch_segments), warning
    except DoesNotFit as error:
        raise ExitProgram(EXIT_DOES_NOT_FIT, f"This training does not fit: {error}") from error


def demand_of(settings: Settings, market_bytes: int, world_size: int, bf16: bool) -> Demand:
    """Say what a training with these settings asks of one GPU's memory."""
    of_bars = "start_date" if settings.start_date else "history_days"
    if "simulated" in settings.sources:
        of_bars = "simulated_symbols"
    return Demand(
        num_parameters=num_parameters(settings),
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        context_bars=settings.context_bars,
        horizon=settings.horizon,
        envs_per_gpu=settings.envs_per_gpu,
        minibatch_segments=validation.minibatch_segments(settings, world_size),
        num_positions=len(settings.positions),
        bf16=bf16,
        market_bytes=market_bytes,
        num_heads=settings.num_heads,
        shares=world_size if settings.parallel == "fsdp" else 1,
        bars_setting=(of_bars, getattr(settings, of_bars) if of_bars != "start_date" else 0),
    )


def num_parameters(settings: Settings) -> int:
    """Count the policy's weights without making them."""
    length = settings.context_bars + settings.horizon + 1
    sizes = settings.d_model, settings.num_layers, settings.num_heads
    with torch.device("meta"):
        trunk = TransformerConfig(len(FEATURES), *sizes, length)
        env = EnvConfig.from_settings(settings, settings.envs_per_gpu)
        return Policy(trunk, env.num_account_features, len(env.positions)).num_parameters()


def unlike(settings: Settings, saved: checkpoint.Restored) -> str:
    """Say why a checkpoint cannot go on with these settings, "" where it can."""
    before = saved.weights["config"]
    for name in ("d_model", "num_layers", "num_heads", "positions", "context_bars", "horizon"):
        if before[name] != getattr(settings, name):
            return (
                f"{name}={getattr(settings, name)}, but {saved.path} was trained with {name}={before[name]}: "
                "set it back, or start anew with another --checkpoint-dir"
            )
    return ""


def other_features(settings: Settings, statistics: FeatureStatistics) -> str:
    """Say why a training cannot go on with the features of this program, "" where it can."""
    if statistics.names == tuple(FEATURES):
        return ""
    return (
        f"the training in {settings.checkpoint_dir} began with other features: "
        f"{', '.join(statistics.names)}; use those, or start anew with another --checkpoint-dir"
    )


def save(
    settings: Settings,
    clock: Clock,
    session: Session,
    fingerprint: str,
    metrics: Mapping[str, Any],
    writer: BackgroundWriter,
    exam: Exam | None = None,
) -> None:
    """Have a checkpoint written in the background (all ranks hand in their state, rank 0 writes)."""
    weights, resume = session.checkpoint(clock)
    weights |= {
        "config": asdict(settings),
        "data_fingerprint": fingerprint,
        "data_cutoff_ns": clock.cutoff_ns,
        "trained_until_ns": clock.trained_until_ns,
        "metrics": dict(metrics),
        "exam": exam.record if exam and not weights["step"] else {},  # it is of whole epochs
    }
    writer.save(weights, resume)
