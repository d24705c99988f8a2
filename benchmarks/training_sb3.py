"""stable-baselines3's PPO on gym-trading-env: the other side of training_peers.py.

Runs in the peers' virtual environment: ``python benchmarks/training_sb3.py CONTENDER THREADS``.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path

import gym_trading_env.environments as trading
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

from benchmarks import peers
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
    return trading.TradingEnv(
        df=frame,
        positions=list(peers.POSITIONS),
        windows=peers.CONTEXT,
        trading_fees=peers.FEE,
        borrow_interest_rate=1e-7,
        max_episode_duration=10 * peers.HORIZON,
        verbose=0,
    )


class TransformerExtractor(BaseFeaturesExtractor):
    """Our own trunk over the window of every step; the policy sees the newest bar's vector."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, peers.WIDTH)
        bars, features = space.shape
        self.trunk = Trunk(TransformerConfig(features, peers.WIDTH, peers.LAYERS, peers.HEADS, bars))

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        return self.trunk(window)[:, -1]


class TorchTransformerExtractor(BaseFeaturesExtractor):
    """torch's own encoder, causal and pre-norm, with learned positions: the usual choice without our trunk."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, peers.WIDTH)
        bars, features = space.shape
        self.embed = nn.Linear(features, peers.WIDTH)
        self.positions = nn.Parameter(torch.zeros(bars, peers.WIDTH))
        layer = nn.TransformerEncoderLayer(
            peers.WIDTH, peers.HEADS, 4 * peers.WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(peers.WIDTH)
        self.encoder = nn.TransformerEncoder(layer, peers.LAYERS, norm, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(bars))

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        x = self.embed(window) + self.positions
        return self.encoder(x, mask=self.mask, is_causal=True)[:, -1]


class MLPExtractor(BaseFeaturesExtractor):
    """Two layers over the flattened window."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, peers.WIDTH)
        inputs = int(np.prod(space.shape))
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, peers.WIDTH),
            nn.Tanh(),
            nn.Linear(peers.WIDTH, peers.WIDTH),
            nn.Tanh(),
        )

    def forward(self, window: Tensor) -> Tensor:
        """(B, C, F) -> (B, D)."""
        return self.layers(window)


class Times(BaseCallback):
    """Record when a rollout begins and ends."""

    began, ended = 0.0, 0.0

    def _on_rollout_start(self) -> None:
        self.began = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.ended = time.perf_counter()

    def _on_step(self) -> bool:
        return True


def make_contender(
    extractor: type[BaseFeaturesExtractor] | None, num_features: int, horizon: int = peers.HORIZON
) -> peers.Contender:
    warnings.resetwarnings()  # importing gym_trading_env makes every warning of the process an error
    warnings.simplefilter("ignore")
    if extractor:
        towers = {"pi": [peers.WIDTH], "vf": [peers.WIDTH]}
        policy = {"features_extractor_class": extractor, "net_arch": towers}
    else:
        policy = None
    model = PPO(
        "MlpPolicy",
        DummyVecEnv([partial(make_env, num_features)] * peers.NUM_ENVS),
        learning_rate=peers.LEARNING_RATE,
        n_steps=horizon,
        batch_size=peers.MINIBATCH,
        n_epochs=peers.PASSES,
        gamma=peers.GAMMA,
        gae_lambda=peers.LAMBDA,
        clip_range=peers.CLIP,
        ent_coef=peers.ENTROPY,
        vf_coef=peers.VALUE,
        max_grad_norm=peers.MAX_GRAD_NORM,
        policy_kwargs=policy,
        seed=0,
        device="cpu",
    )

    def iterate() -> tuple[float, float]:
        times = Times()
        model.learn(peers.NUM_ENVS * horizon, callback=times, reset_num_timesteps=False)
        return times.ended - times.began, time.perf_counter() - times.ended

    parameters = sum(p.numel() for p in model.policy.parameters())
    return peers.Contender(iterate, peers.NUM_ENVS * horizon, parameters)


CONTENDERS = {
    "stable-baselines3, transformer": partial(
        make_contender, TransformerExtractor, peers.FEATURES, peers.SHORT_HORIZON
    ),
    "stable-baselines3, torch's transformer": partial(
        make_contender, TorchTransformerExtractor, peers.FEATURES, peers.SHORT_HORIZON
    ),
    "stable-baselines3, MLP of 7 features": partial(make_contender, MLPExtractor, peers.FEW_FEATURES),
    "stable-baselines3, MLP of 24 features": partial(make_contender, MLPExtractor, peers.FEATURES),
    "stable-baselines3, its own MlpPolicy of 7 features": partial(make_contender, None, peers.FEW_FEATURES),
}

if __name__ == "__main__":
    peers.serve(CONTENDERS[sys.argv[1]], int(sys.argv[2]))
