"""A session can take a segment back, and takes up states of other devices as far as they fit."""

from __future__ import annotations

from pathlib import Path

import torch

from continuous_training import Settings, train
from data_sources.simulated import simulated_bars
from envs.market import Market
from envs.trading_env import EnvConfig
from tests.training.rollouts import ALONE, small_learner, small_policy
from training.control import Control
from training.session import Session, SessionConfig

NEVER = 2**62


def small_session() -> Session:
    env = EnvConfig(num_envs=8, context_bars=8, horizon=8, episode_bars=16)
    bars = simulated_bars(2, 600, 0, 1_767_225_600 * 10**9)
    market = Market.from_bars(bars, device="cpu", holdout_start_ns=NEVER, context_bars=8, horizon=8)
    learner = small_learner(small_policy()).config
    return Session(market, SessionConfig(env, learner, 16, 1, 2, False, 0), ALONE, None)


def test_a_segment_that_is_taken_back_is_played_the_same_again() -> None:
    session = small_session()
    session.collect(1.0)  # so that accounts are under way
    first = session.collect(0.5)
    totals = session.env.statistics.totals.clone()
    session.rewind()
    again = session.collect(0.5)
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(first.rewards, again.rewards)
    assert torch.equal(first.accounts, again.accounts)
    assert torch.equal(session.env.statistics.totals, totals)


class CountingControl(Control):
    """Counts the signs of life."""

    beats = 0

    def beat(self) -> None:
        self.beats += 1

    def listen(self) -> None:
        """Leave the signals alone."""


def test_the_watchdog_hears_of_every_chunk_and_micro_batch_of_an_epoch(tmp_path: Path) -> None:
    # One rollout, or one optimizer step, may take longer than HANG_SECONDS.
    beats = []
    for micro in (8, 1):
        folder = tmp_path / str(micro)
        settings = Settings(
            sources=("simulated",),
            end_date="2026-01-31",
            holdout_days=0,
            simulated_symbols=2,
            simulated_bars=3_000,
            envs_per_gpu=8,
            context_bars=8,
            horizon=8,
            episode_bars=16,
            d_model=16,
            num_layers=1,
            num_heads=2,
            batch_size=64,
            micro_batch_segments=micro,
            epochs=1,
            runs=1,
            checkpoint_dir=str(folder / "checkpoints"),
            data_dir=str(folder / "data"),
            log_dir=str(folder / "logs"),
        )
        control = CountingControl()
        train(settings, control)
        beats.append(control.beats)
    assert beats[1] - beats[0] == 7 + settings.update_passes * 7


def test_a_random_state_of_another_kind_of_device_is_left_out() -> None:
    session = small_session()
    before = session.learner.generator.get_state()
    session._restore_generator(torch.zeros(16, dtype=torch.uint8))  # a CUDA generator's
    assert torch.equal(session.learner.generator.get_state(), before)
