"""Checkpoints of random weights, and of hardly any, in a second."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from continuous_training import Settings
from envs.config import EnvConfig
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.data_sources.vendors.loopback import ns
from tests.envs.markets import market_of, walk
from training.checkpoint import Checkpoint, ResumeState, name_of

NOW = ns("2026-11-20T12:00:31")
PAIRS = ("BTCUSDT", "ETHUSDT")


def untrained(folder: Path, **changes: Any) -> Path:
    """Save a checkpoint of random weights, as the training writes it."""
    settings = Settings(
        sources=("binance",), binance_pairs=PAIRS, history_days=3, holdout_days=1, d_model=32, num_layers=1,
        num_heads=4, feature_encoding="linear", context_bars=8, horizon=16, episode_bars=64,
        data_dir=str(folder / "data"), log_dir=str(folder / "logs"),
    )  # fmt: skip
    settings = replace(settings, **changes)
    market = market_of(walk("AAA", 3000))
    torch.manual_seed(1)
    seen = EnvConfig.from_settings(settings, 1).num_account_features
    trunk = TransformerConfig(market.num_features, 32, 1, 4, 25, settings.feature_encoding)
    policy = Policy(trunk, seen, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    saved = replace(
        small(folder / "checkpoints", 1, 2),
        transitions=2048,
        model=policy.state_dict(),
        model_config=policy.sizes,
        config=asdict(settings),
        symbols=list(PAIRS),
        features=market.statistics.state_dict(),
        data_cutoff_ns=NOW,
        trained_until_ns=NOW,
        metrics={"exam/return_percent": 1.5, "ppo/kl": 0.01},
    )
    saved.save(keep=1)
    return saved.path


def small(folder: Path, run: int, epoch: int, num_values: int = 1000) -> Checkpoint:
    """A checkpoint of no policy, whose values are the epoch."""
    values = torch.full((num_values,), float(epoch))
    return Checkpoint(
        path=folder / name_of(run, epoch), run=run, epoch=epoch, transitions=0, model={"w": values},
        model_config={}, symbols=["AAPL"], features={}, config={}, data_fingerprint="0123456789abcdef",
        data_cutoff_ns=0, trained_until_ns=0, metrics={},
        resume=ResumeState(clock={"epoch": epoch}, learner={"moments": values.clone()}, ranks=[]),
    )  # fmt: skip
