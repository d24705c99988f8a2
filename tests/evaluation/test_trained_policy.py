"""A policy comes out of its checkpoint as it went in, or with one clear reason why not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from continuous_training import Settings
from evaluation.trained_policy import TrainedPolicy
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import market_of, walk
from training import checkpoint

SETTINGS = Settings(d_model=32, num_layers=1, num_heads=4, context_bars=4, horizon=8, episode_bars=16)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    market = market_of(walk("AAA", 100, "stock"))
    torch.manual_seed(1)
    trunk = TransformerConfig(market.num_features, 32, 1, 4, 13)
    weights = {
        "run": 1,
        "epoch": 2,
        "model": Policy(trunk, 9, 3).state_dict(),
        "model_config": {"trunk": asdict(trunk), "num_account_features": 9, "num_positions": 3},
        "config": asdict(SETTINGS),
        "features": market.statistics.state_dict(),
    }
    return checkpoint.save(tmp_path, weights, {}, keep=1), weights


def again(folder: Path, weights: dict[str, Any], **changes: Any) -> Path:
    return checkpoint.save(folder, weights | {"epoch": 3} | changes, {}, keep=9)


def test_weights_settings_and_statistics_come_back(saved: tuple[Path, dict[str, Any]]) -> None:
    path, weights = saved
    trained = TrainedPolicy.read(path, Settings)
    assert trained.settings == SETTINGS
    assert not trained.policy.training
    for name, value in trained.policy.state_dict().items():
        assert torch.equal(value, weights["model"][name])
    assert trained.statistics.names == tuple(weights["features"]["names"])


def test_settings_of_another_version_are_left_out_and_changes_taken(
    saved: tuple[Path, dict[str, Any]],
) -> None:
    path, weights = saved
    older = again(path.parent, weights, config=weights["config"] | {"moon_phase": True})
    trained = TrainedPolicy.read(older, Settings, stock_fee_bps=2.0)
    assert trained.settings.stock_fee_bps == 2.0
    assert trained.env_config(3).num_envs == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"d_model": 64}, r"d_model=64, but .* was trained with d_model=32"),
        ({"positions": (0.0, 1.0)}, r"positions=\(0.0, 1.0\), but .* was trained with"),
        ({"stock_fee_bps": -1.0}, "stock_fee_bps"),
    ],
)
def test_changes_that_cannot_be_are_refused(
    saved: tuple[Path, dict[str, Any]], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        TrainedPolicy.read(saved[0], Settings, **change)


def test_other_formats_and_features_are_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    path, weights = saved
    features = weights["features"] | {"names": ["moon", *weights["features"]["names"][1:]]}
    with pytest.raises(
        checkpoint.CheckpointError, match=r"on other features than this program computes: .*moon"
    ):
        TrainedPolicy.read(again(path.parent, weights, features=features), Settings)
    with pytest.raises(checkpoint.CheckpointError, match="has format 0, this program reads 1"):
        TrainedPolicy.read(again(path.parent, weights, format=0), Settings)
