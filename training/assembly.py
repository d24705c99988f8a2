"""Turn the settings into the parts that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from data_sources.refresh import LoadedData
from envs.env_config import EnvConfig
from envs.features import FEATURES, FeatureStatistics
from envs.market import Market
from training import checkpoint, validation
from training.background import BackgroundWriter
from training.cli import Leave
from training.clock import Clock
from training.control import EXIT_NO_DATA, EXIT_SETTING
from training.distributed import Ranks
from training.evaluation.examiner import Exam
from training.learner import LearnerConfig
from training.ppo import PPOConfig
from training.session import Session, SessionConfig

STATE_BYTES = 16  # per parameter: weight, gradient and the optimizer's two moments


def market_on_device(
    settings: Any,
    data: LoadedData,
    session: Session | None,
    saved: checkpoint.Restored | None,
    ranks: Ranks,
) -> Market:
    """Put this run's bars on the device; features keep the scale that the training began with."""
    statistics = session.env.market.statistics if session else None
    if saved and statistics is None:
        statistics = FeatureStatistics.from_state_dict(saved.weights["features"])
    if statistics and (reason := other_features(settings, statistics)):
        raise Leave(EXIT_SETTING, reason)
    try:
        return Market.from_bars(
            data.bars,
            device=ranks.device,
            holdout_start_ns=holdout_start_ns(settings, data),
            context_bars=settings.context_bars,
            horizon=settings.horizon,
            statistics=statistics,
        )
    except ValueError as error:
        raise Leave(EXIT_NO_DATA, str(error)) from error


def holdout_start_ns(settings: Any, data: LoadedData) -> int:
    """Return where the newest ``holdout_days`` of bars begin: nothing that opens at or after it is trained on."""
    newest_ns = max(int(bars.open_time[-1]) for bars in data.bars)
    return newest_ns - settings.holdout_days * 86_400 * 10**9


def session_config(settings: Any, ranks: Ranks) -> SessionConfig:
    """Say what this rank's session is made of."""
    device = ranks.device
    env = EnvConfig.from_settings(settings, settings.envs_per_gpu)
    learner = LearnerConfig(
        ppo=PPOConfig(
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            clip_coef=settings.clip_coef,
            entropy_coef=settings.entropy_coef,
            value_coef=settings.value_coef,
            advantages=settings.advantages,
        ),
        update_passes=settings.update_passes,
        minibatch_segments=validation.minibatch_segments(settings, ranks.world_size),
        micro_batch_segments=settings.micro_batch_segments
        or micro_batch_that_fits(
            memory_of(device),
            settings.d_model,
            settings.num_layers,
            settings.context_bars + settings.horizon,
            uses_bf16(settings, ranks),
        ),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        final_learning_rate_fraction=settings.final_learning_rate_fraction,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    return SessionConfig(
        env=env,
        learner=learner,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        bf16=uses_bf16(settings, ranks),
        seed=settings.seed,
        compile=settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda"),
    )


def uses_bf16(settings: Any, ranks: Ranks) -> bool:
    """Tell whether the trunk computes in bf16."""
    return settings.precision == "bf16" or (settings.precision == "auto" and ranks.device.type == "cuda")


def memory_of(device: torch.device) -> int | None:
    """Return the bytes that a GPU has in all, whoever uses them now; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def micro_batch_that_fits(
    memory_bytes: int | None, d_model: int, num_layers: int, segment_bars: int, bf16: bool
) -> int:
    """Size a micro-batch, in segments, for a GPU's memory; the same after every restart.

    Weights, gradients and the optimizer's two moments take STATE_BYTES per parameter, of which the blocks hold
    12 x d_model^2 a layer. Activations take about 34 bytes per unit of width, layer and bar in bf16
    (Korthikanti et al. 2022, arXiv:2205.05198, section 4, without attention scores, which are not kept);
    float32 twice that. Half of what is left stays free for bars and the allocator's rounding.

    Args:
        memory_bytes: of the GPU in all; None on a CPU.
        d_model: width of the transformer.
        num_layers: its blocks.
        segment_bars: bars of a segment.
        bf16: whether the transformer computes in bf16.
    """
    if memory_bytes is None:
        return 16  # larger ones fall out of a CPU's cache
    left = memory_bytes - STATE_BYTES * 12 * d_model**2 * num_layers
    per_segment = activation_bytes(d_model, num_layers, segment_bars, bf16)
    return max(1, min(128, left // 2 // per_segment))


def activation_bytes(d_model: int, num_layers: int, segment_bars: int, bf16: bool) -> int:
    """Return what the activations of one segment take; see ``micro_batch_that_fits``."""
    return (34 if bf16 else 68) * d_model * num_layers * segment_bars


def unlike(settings: Any, saved: checkpoint.Restored) -> str:
    """Say why a checkpoint cannot go on with these settings, "" where it can."""
    before = saved.weights["config"]
    for name in ("d_model", "num_layers", "num_heads", "positions", "context_bars", "horizon"):
        if before[name] != getattr(settings, name):
            return (
                f"{name}={getattr(settings, name)}, but {saved.path} was trained with {name}={before[name]}: "
                "set it back, or start anew with another --checkpoint-dir"
            )
    return ""


def other_features(settings: Any, statistics: FeatureStatistics) -> str:
    """Say why a training cannot go on with the features of this program, "" where it can."""
    if statistics.names == tuple(FEATURES):
        return ""
    return (
        f"the training in {settings.checkpoint_dir} began with other features: "
        f"{', '.join(statistics.names)}; use those, or start anew with another --checkpoint-dir"
    )


def save(
    settings: Any,
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
