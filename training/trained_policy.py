"""A policy taken from a checkpoint, with all that it needs to be used: settings, feature statistics, a market."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data_sources.bars import Bars
from envs.env_config import EnvConfig
from envs.features import FEATURES, FeatureStatistics
from envs.market import Market
from models.policy import Policy
from models.transformer import TransformerConfig
from training import checkpoint
from training.acting import NEVER_NS, Actor


@dataclass(frozen=True)
class TrainedPolicy:
    """What a checkpoint holds, ready for use. ``weights`` is the file as ``training.checkpoint`` wrote it."""

    path: Path
    weights: Mapping[str, Any]
    settings: Any
    policy: Policy
    statistics: FeatureStatistics

    @classmethod
    def read(
        cls,
        path: Path,
        settings_class: Callable[..., Any],
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> TrainedPolicy:
        """Read a checkpoint; on a CPU in float32, on a GPU in the precision of its settings.

        Args:
            path: a file that the training wrote.
            settings_class: the settings dataclass; settings that it no longer has are left out.
            device: where the policy is to be.
            **changes: settings that are to be others than those of the training.

        Raises:
            CheckpointError: it is missing or damaged, of another format or version, or of other features than
                this program computes.
            ValueError: a changed setting is wrong, or one that the weights depend on.
        """
        device = torch.device(device)
        weights = checkpoint.load(path, device)
        checkpoint.require_format(path, weights)
        try:
            return cls._from_weights(path, weights, settings_class, device, changes)
        except KeyError as error:
            reason = f"it has no {error.args[0]}"
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
        raise checkpoint.CheckpointError(f"{path} is of another version of this program: {reason}")

    @classmethod
    def _from_weights(
        cls,
        path: Path,
        weights: Mapping[str, Any],
        settings_class: Callable[..., Any],
        device: torch.device,
        changes: dict[str, Any],
    ) -> TrainedPolicy:
        config = weights["config"]
        for name in ("d_model", "num_layers", "num_heads", "positions", "context_bars"):
            if changes.get(name, config[name]) != config[name]:
                raise ValueError(f"{name}={changes[name]}, but {path} was trained with {name}={config[name]}")
        known = {field.name for field in fields(settings_class)}  # type: ignore[arg-type]
        settings = settings_class(**{k: v for k, v in config.items() if k in known} | changes)
        statistics = FeatureStatistics.from_state_dict(weights["features"])
        if statistics.names != tuple(FEATURES):
            other = sorted(set(statistics.names) ^ set(FEATURES)) or ["their order"]
            raise checkpoint.CheckpointError(
                f"{path} was trained on other features than this program computes: {', '.join(other)}"
            )
        model = weights["model_config"]
        longest = model["trunk"]["max_length"] - settings.context_bars - 1
        if settings.horizon > longest:
            raise ValueError(f"horizon={settings.horizon} must be at most {longest} with {path}")
        bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
        policy = Policy(
            TransformerConfig(**model["trunk"]), model["num_account_features"], model["num_positions"], bf16
        )
        policy.load_state_dict(weights["model"])
        return cls(path, weights, settings, policy.to(device).eval(), statistics)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.policy.parameters()).device

    def env_config(self, num_envs: int) -> EnvConfig:
        """Say what the accounts are like, as they were in training unless the settings were changed."""
        return EnvConfig.from_settings(self.settings, num_envs)

    @property
    def actor(self) -> Actor:
        """The policy at work on the newest bars."""
        return Actor(self.policy, self.statistics, self.env_config(1))

    def market(self, bars: Sequence[Bars]) -> Market:
        """Put bars on the policy's device, scaled as in training; none of them is held out.

        Raises:
            ValueError: no symbol has enough bars for a segment.
        """
        return Market.from_bars(
            bars,
            device=self.device,
            holdout_start_ns=NEVER_NS,
            context_bars=self.settings.context_bars,
            horizon=self.settings.horizon,
            statistics=self.statistics,
        )


def device_for_use() -> torch.device:
    """Return where a policy is used: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
