"""Checkpoints of random weights that differ in size, context and scale, for ensembles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from continuous_training import Settings
from evaluation.trained_policy import TrainedPolicy
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.training.checkpoints import untrained
from training.checkpoint import Checkpoint


def save_member(
    folder: Path, seed: int, d_model: int = 32, context_bars: int = 8, scale: float = 1.0, **changes: Any
) -> Path:
    """Save a checkpoint; ``scale``: of its features' deviations; ``changes``: of its settings and contents."""
    known = {field: changes.pop(field) for field in Checkpoint.__dataclass_fields__ if field in changes}
    path = untrained(folder, d_model=d_model, context_bars=context_bars, **changes)
    saved = Checkpoint.read(path).with_resume()
    torch.manual_seed(seed)
    network = TransformerConfig(len(saved.statistics.names), d_model, 1, 4, context_bars + 17)
    policy = Policy(network, 9, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    features = saved.features | {"std": saved.features["std"] * scale}
    replace(saved, model=policy.state_dict(), model_config=policy.sizes, features=features, **known).save(
        keep=1
    )
    return path


def save_members(folder: Path) -> list[Path]:
    """Save three of different size, context and scale."""
    return [
        save_member(folder / "a", 1),
        save_member(folder / "b", 2, d_model=16, context_bars=12, scale=1.5),
        save_member(folder / "c", 3, context_bars=5),
    ]


def read_alone(paths: list[Path]) -> list[TrainedPolicy]:
    """Read each by itself."""
    return [TrainedPolicy.read(path, Settings) for path in paths]
