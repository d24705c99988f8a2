"""Turn the settings into the parts that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_sources.bars import Bars
from data_sources.refresh import LoadedData
from envs.features import FEATURES, FeatureStatistics
from envs.market import Market
from models.policy import uses_bf16
from runtime.control import EXIT_DOES_NOT_FIT, EXIT_NO_DATA, EXIT_SETTING, ExitProgram
from training.checkpoint import Checkpoint
from training.distributed import Ranks
from training.memory import DoesNotFit, MemoryNeeds, MemoryPlan, gpu_memory, plan
from training.trainer import Trainer

if TYPE_CHECKING:
    from continuous_training import Settings


def market_on_device(
    settings: Settings,
    data: LoadedData,
    trainer: Trainer | None,
    saved: Checkpoint | None,
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
    statistics = trainer.env.market.statistics if trainer else None
    if saved and statistics is None:
        statistics = saved.statistics
    if statistics and (reason := other_features(settings, statistics)):
        raise ExitProgram(EXIT_SETTING, reason)
    try:
        holdout_ns = holdout_start_ns(settings, data.bars)
        return Market.from_settings(data.bars, settings, ranks.device, holdout_ns, statistics)
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def holdout_start_ns(settings: Settings, bars: Sequence[Bars]) -> int:
    """Return where the newest ``holdout_days`` of bars begin: nothing that opens at or after it is trained on."""
    newest_ns = max(int(one.open_time[-1]) for one in bars)
    return newest_ns - settings.holdout_days * 86_400 * 10**9


def memory_plan(settings: Settings, market_bytes: int, ranks: Ranks) -> tuple[MemoryPlan, str]:
    """Plan this rank's memory; return the plan, and a warning where others use the GPU, or "".

    Raises:
        ExitProgram: the training does not fit.
    """
    memory_bytes, warning = gpu_memory(ranks.device) if ranks.device.type == "cuda" else (None, "")
    bf16 = uses_bf16(settings.precision, ranks.device)
    needs = MemoryNeeds.of(settings, market_bytes, ranks.world_size, bf16)
    try:
        return plan(needs, memory_bytes, settings.micro_batch_segments), warning
    except DoesNotFit as error:
        raise ExitProgram(EXIT_DOES_NOT_FIT, f"This training does not fit: {error}") from error


def unlike(settings: Settings, saved: Checkpoint) -> str:
    """Say why a checkpoint cannot go on with these settings, "" where it can."""
    before = saved.config
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
