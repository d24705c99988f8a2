"""stable-baselines3's PPO on gym-trading-env: the other side of training_peers.py.

Runs in the peers' virtual environment: ``python benchmarks/training_sb3.py NAME THREADS``.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path

import gym_trading_env.environments as peer
import gymnasium
import numpy as np
import pandas as pd
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import training_settings as s
from models.transformer import TransformerConfig, Trunk

NUM_BARS = 10_000  # every environment copies its table: 64 of 100,000 bars would be slower, and 6 GB
OWN_FEATURES = 2  # that the environment adds: last position, real position


def make_env(num_features: int) -> gymnasium.Env:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 1e-3, NUM_BARS)))
    names = ("open", "high", "low", "close")
    frame = pd.DataFrame(
        dict(zip(names, (close, close * 1.001, close * 0.999, close), strict=True)),
        index=pd.date_range("2024-01-01", periods=NUM_BARS, freq="min"),
    )
    for number in range(num_features - OWN_FEATURES):
        frame[f"feature_{number}"] = 1_000 * frame["close"].pct_change(number + 1).fillna(0.0)
    return peer.TradingEnv(
        df=frame,
        positions=list(s.POSITIONS),
        windows=s.CONTEXT,
        trading_fees=s.FEE,
        borrow_interest_rate=1e-7,
        max_episode_duration=10 * s.HORIZON,
        verbose=0,
    )


class TransformerExtractor(BaseFeaturesExtractor):
    """Our own trunk over the window, anew for every step; the newest bar's vector is what counts."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, s.WIDTH)
        bars, features = space.shape
        self.trunk = Trunk(TransformerConfig(features, s.WIDTH, s.LAYERS, s.HEADS, bars))

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        return self.trunk(window)[:, -1]


class TorchTransformerExtractor(BaseFeaturesExtractor):
    """torch's own encoder, causal and pre-norm, with learned positions: what is at hand without our trunk."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, s.WIDTH)
        bars, features = space.shape
        self.embed = nn.Linear(features, s.WIDTH)
        self.positions = nn.Parameter(torch.zeros(bars, s.WIDTH))
        layer = nn.TransformerEncoderLayer(
            s.WIDTH, s.HEADS, 4 * s.WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(s.WIDTH)
        self.encoder = nn.TransformerEncoder(layer, s.LAYERS, norm, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(bars))

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        x = self.embed(window) + self.positions
        return self.encoder(x, mask=self.mask, is_causal=True)[:, -1]


class MLPExtractor(BaseFeaturesExtractor):
    """Two layers over the flattened window."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, s.WIDTH)
        inputs = int(np.prod(space.shape))
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, s.WIDTH), nn.Tanh(), nn.Linear(s.WIDTH, s.WIDTH), nn.Tanh()
        )

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        return self.layers(window)


class Times(BaseCallback):
    """Notes when a rollout begins and ends."""

    began, ended = 0.0, 0.0

    def _on_rollout_start(self) -> None:
        self.began = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.ended = time.perf_counter()

    def _on_step(self) -> bool:
        return True


def contender(
    extractor: type[BaseFeaturesExtractor] | None, num_features: int, horizon: int = s.HORIZON
) -> s.Contender:
    warnings.resetwarnings()  # importing gym_trading_env makes every warning of the process an error
    warnings.simplefilter("ignore")
    if extractor:
        towers = {"pi": [s.WIDTH], "vf": [s.WIDTH]}
        policy = {"features_extractor_class": extractor, "net_arch": towers}
    else:
        policy = None
    model = PPO(
        "MlpPolicy",
        DummyVecEnv([partial(make_env, num_features)] * s.NUM_ENVS),
        learning_rate=s.LEARNING_RATE,
        n_steps=horizon,
        batch_size=s.MINIBATCH,
        n_epochs=s.PASSES,
        gamma=s.GAMMA,
        gae_lambda=s.LAMBDA,
        clip_range=s.CLIP,
        ent_coef=s.ENTROPY,
        vf_coef=s.VALUE,
        max_grad_norm=s.MAX_GRAD_NORM,
        policy_kwargs=policy,
        seed=0,
        device="cpu",
    )

    def iterate() -> tuple[float, float]:
        times = Times()
        model.learn(s.NUM_ENVS * horizon, callback=times, reset_num_timesteps=False)
        return times.ended - times.began, time.perf_counter() - times.ended

    parameters = sum(p.numel() for p in model.policy.parameters())
    return s.Contender(iterate, s.NUM_ENVS * horizon, parameters)


if __name__ == "__main__":
    s.serve(
        {
            "transformer": partial(contender, TransformerExtractor, s.FEATURES, s.SHORT_HORIZON),
            "torch-transformer": partial(contender, TorchTransformerExtractor, s.FEATURES, s.SHORT_HORIZON),
            "mlp": partial(contender, MLPExtractor, s.FEATURES),
            "mlp-few": partial(contender, MLPExtractor, s.FEW_FEATURES),
            "default": partial(contender, None, s.FEW_FEATURES),
        }
    )
