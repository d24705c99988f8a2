"""Our training with the sizes of training_settings.py: ``python benchmarks/training_ours.py NAME THREADS``."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import training_settings as s
from benchmarks.env_throughput import market_of
from envs.config import EnvConfig
from models.linear import Linear
from models.transformer import TransformerConfig
from tests.training.reencoding import WindowLearner, collect_by_windows
from training.compilation import compile_accounts, compile_objective
from training.distributed import Ranks
from training.learner import Learner, LearnerConfig
from training.losses import PPOConfig
from training.trainer import Session, SessionConfig

RANKS = Ranks(0, 1, torch.device("cpu"))
MICRO_BATCH = 16  # segments; what a setting would say
MICRO_BATCH_OF_WINDOWS = 8  # of the wide MLP: 6 MB of windows instead of 12


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent to 1e-7; torch's own, and the compiler's, take two to four times as long on CPUs."""
    return 2.0 * torch.sigmoid(2.0 * x) - 1.0


class WindowMLP(nn.Module):
    """Two layers over the flattened window of each bar, in the place of the trunk."""

    def __init__(self, config: TransformerConfig, num_features: int) -> None:
        super().__init__()
        self.config = config
        self.num_features = num_features  # that are looked at
        self.window = Linear(s.CONTEXT * num_features, config.d_model)
        self.second = Linear(config.d_model, config.d_model)

    def forward_flops(self, length: int, num_last: int) -> int:
        """Count the operations over one segment."""
        return 2 * num_last * (self.window.weight.numel() + self.second.weight.numel())

    def forward(self, bars: Tensor, num_last: int) -> Tensor:
        """(B, S, F) -> (B, num_last, D)."""
        seen = bars[:, bars.shape[1] + 1 - num_last - s.CONTEXT :, : self.num_features].contiguous()
        # What unfold does; the compiler would divide twice for every number of it.
        sizes = len(seen), num_last, self.window.in_features
        windows = seen.as_strided(sizes, (seen.stride(0), self.num_features, 1)).contiguous()
        return tanh(self.second(tanh(self.window(windows))))


def make_session(
    advantages: str = "gae", horizon: int = s.HORIZON, micro_batch: int = MICRO_BATCH
) -> Session:
    market = market_of(60_000, 32, "cpu", horizon)
    env = EnvConfig(
        num_envs=s.NUM_ENVS,
        context_bars=s.CONTEXT,
        horizon=horizon,
        episode_bars=10 * s.HORIZON,
        positions=s.POSITIONS,
        crypto_fee_bps=1e4 * s.FEE,
        slippage_bps=0.0,
    )
    ppo = PPOConfig(s.GAMMA, s.LAMBDA, s.CLIP, s.ENTROPY, s.VALUE, advantages)
    learner = LearnerConfig(
        update_passes=s.PASSES,
        minibatch_segments=s.MINIBATCH // horizon,
        micro_batch_segments=micro_batch,
        learning_rate=s.LEARNING_RATE,
        warmup_steps=1,
        final_learning_rate_fraction=1.0,
        weight_decay=0.0,
        max_grad_norm=s.MAX_GRAD_NORM,
    )
    config = SessionConfig(env, ppo, learner, s.WIDTH, s.LAYERS, s.HEADS, bf16=False, seed=0)
    return Session(market, config, RANKS, saved=None)


def production(session: Session, compiled: bool) -> s.Contender:
    if compiled:  # as a session does that was given a plan of its memory
        sizes = session.config.learner.micro_batch_segments, s.CONTEXT, s.HORIZON
        reason = compile_objective(session.objective, *sizes, RANKS) or compile_accounts(
            session.env, session.policy, RANKS
        )
        if reason:
            raise SystemExit(f"not compiled: {reason}")

    def iterate() -> tuple[float, float]:
        start = time.perf_counter()
        rollout = session.collect(1.0)
        middle = time.perf_counter()
        session.update(rollout, 0.0, lambda: False)
        return middle - start, time.perf_counter() - middle

    return s.Contender(
        iterate, s.NUM_ENVS * s.HORIZON, session.policy.num_parameters(), session.flops_per_transition()
    )


def transformer(advantages: str = "gae", compiled: bool = False) -> s.Contender:
    return production(make_session(advantages), compiled)


def mlp(num_features: int, compiled: bool = False) -> s.Contender:
    micro_batch = MICRO_BATCH_OF_WINDOWS if num_features > s.FEW_FEATURES else MICRO_BATCH
    session = make_session(micro_batch=micro_batch)
    session.policy.trunk = WindowMLP(session.policy.trunk.config, num_features)
    session.learner = Learner(session.objective, session.config.learner, RANKS, seed=0)
    return production(session, compiled)


def encoded_anew() -> s.Contender:
    session = make_session(horizon=s.SHORT_HORIZON)
    learner = WindowLearner(session.objective, session.config.learner, RANKS, seed=0)

    def iterate() -> tuple[float, float]:
        start = time.perf_counter()
        scale = math.sqrt(1.0 - s.GAMMA**2)
        rollout = collect_by_windows(session.env, session.policy, learner.generator, reward_scale=scale)
        middle = time.perf_counter()
        learner.update_by_windows(rollout, s.MINIBATCH)
        return middle - start, time.perf_counter() - middle

    per_decision = (1 + 3 * s.PASSES) * session.policy.trunk.forward_flops(s.CONTEXT, 1)
    return s.Contender(iterate, s.NUM_ENVS * s.SHORT_HORIZON, session.policy.num_parameters(), per_decision)


if __name__ == "__main__":
    s.serve(
        {
            "transformer": transformer,
            "compiled": partial(transformer, compiled=True),
            "hindsight": partial(transformer, advantages="hindsight"),
            "hindsight-compiled": partial(transformer, advantages="hindsight", compiled=True),
            "mlp": partial(mlp, s.FEATURES),
            "mlp-compiled": partial(mlp, s.FEATURES, compiled=True),
            "mlp-few": partial(mlp, s.FEW_FEATURES),
            "mlp-few-compiled": partial(mlp, s.FEW_FEATURES, compiled=True),
            "encoded-anew": encoded_anew,
        }
    )
