"""A policy comes out of its checkpoint unchanged, or with one clear reason why not."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from continuous_training import Settings
from evaluation.trained_policy import TrainedPolicy
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import market_of, walk
from tests.training.checkpoints import small
from training.checkpoint import Checkpoint, CheckpointError

SETTINGS = Settings(d_model=32, num_layers=1, num_heads=4, context_bars=4, horizon=8, episode_bars=16)


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    market = market_of(walk("AAA", 100, "stock"))
    torch.manual_seed(1)
    policy = Policy(TransformerConfig(market.num_features, 32, 1, 4, 13), 9, 3)
    saved = replace(
        small(tmp_path, 1, 2),
        model=policy.state_dict(),
        model_config=policy.sizes,
        config=asdict(SETTINGS),
        features=market.statistics.state_dict(),
    )
    saved.save(keep=1)
    return saved


def again(saved: Checkpoint, **changes: Any) -> Path:
    changed = replace(saved, path=saved.path.with_name("run1_epoch3.pt"), epoch=3, **changes)
    changed.save(keep=9)
    return changed.path


def test_weights_settings_and_statistics_come_back(saved: Checkpoint) -> None:
    trained = TrainedPolicy.read(saved.path, Settings)
    assert trained.settings == SETTINGS
    assert not trained.policy.training
    for name, value in trained.policy.state_dict().items():
        assert torch.equal(value, saved.model[name])
    assert trained.statistics.names == saved.statistics.names


def test_settings_of_another_version_are_ignored_and_changes_applied(saved: Checkpoint) -> None:
    older = again(saved, config=saved.config | {"moon_phase": True})
    trained = TrainedPolicy.read(older, Settings, stock_fee_bps=2.0)
    assert trained.settings.stock_fee_bps == 2.0
    assert trained.env_config(3).num_envs == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 64}, r"d_model=64, but .* was trained with d_model=32"),
        ({"positions": (0.0, 1.0)}, r"positions=\(0.0, 1.0\), but .* was trained with"),
        ({"stock_fee_bps": -1.0}, "stock_fee_bps"),
    ],
)
def test_impossible_changes_are_refused(saved: Checkpoint, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainedPolicy.read(saved.path, Settings, **change)


def test_other_formats_and_features_are_refused(saved: Checkpoint, tmp_path: Path) -> None:
    features = saved.features | {"names": ["moon", *saved.statistics.names[1:]]}
    with pytest.raises(CheckpointError, match=r"on other features than this program computes: .*moon"):
        TrainedPolicy.read(again(saved, features=features), Settings)
    path = tmp_path / "other.pt"
    torch.save(torch.load(saved.path, weights_only=True) | {"format": 0}, path)
    with pytest.raises(CheckpointError, match="has format 0, this program reads 1"):
        TrainedPolicy.read(path, Settings)


def test_a_checkpoint_with_symbols_of_another_spelling_still_loads(saved: Checkpoint) -> None:
    older = again(saved, config=saved.config | {"stocks": ("AAPL", "brk-b", "top:9")})
    assert TrainedPolicy.read(older, Settings).settings.stocks == ("AAPL", "top:9")
