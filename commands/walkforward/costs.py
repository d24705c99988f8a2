"""What a walk takes, measured before it starts: two epochs, a part of an exam, a few decisions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from commands.walkforward.schedule import Window
from data_sources.bars import DAY_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.config import EnvConfig
from envs.market import Market, NoSegment
from evaluation.baselines import BASELINES
from evaluation.exam import CHAMPION, POLICY
from evaluation.group_exam import examine_accounts
from evaluation.open_walk import walk_on
from models.ensemble import Decider, Ensemble, View
from runtime.files import free_bytes, make_folder
from training.data_feed import data_request, holdout_start_ns, make_market
from training.distributed import Ranks
from training.environments import bytes_of_bars
from training.memory import plan_memory
from training.progress import TrainingProgress
from training.trainer import Trainer

if TYPE_CHECKING:
    from continuous_training import Settings

TIMED_EPOCHS, TIMED_SEGMENTS = 2, 4
TIMED_BARS = 64  # decisions of an open walk
STATE_FOLD = 3  # a resume state is two moments, and accounts, beside weights of size one
KEPT_WEIGHTS = 6  # two checkpoints, the champion, one without its title, the first, one being written
KEPT_STATES = 3


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of a walk's parts."""

    load_seconds: float  # bars to features, once a window, and once more to trade on
    epoch_seconds: float
    exam_seconds: float
    walk_seconds: float  # a day of decisions with all contestants
    weights_bytes: int

    def seconds(self, epochs: int, exams: int, windows: int, days: int, is_warm: bool) -> float:
        """Return what so much work takes."""
        walks = 2 if is_warm else 1  # the record walks, too
        return (
            windows * 2 * self.load_seconds
            + epochs * self.epoch_seconds
            + exams * self.exam_seconds
            + walks * days * self.walk_seconds
        )

    def disk_bytes(self, trainings: int, champions: int) -> int:
        """Return what is kept at most, of so many trainings at once and champions that decide together."""
        kept = trainings * (KEPT_WEIGHTS + STATE_FOLD * KEPT_STATES) + champions - 1
        return kept * self.weights_bytes


def measure_costs(
    settings: Settings, window: Window, lake: Lake, device: torch.device, champions: int = 1
) -> Costs:
    """Time the parts of a walk on the first window's bars; nothing of it is kept. So many champions will decide.

    Raises:
        ExitProgram: there are no bars, or too few to train on.
        DoesNotFit: the training does not fit the GPU.
        FeatureError: a feature of one's own looks ahead, or cannot be used.
    """
    ranks = Ranks(0, 1, device)
    with _Stopwatch() as loading:
        data = load(lake, data_request(settings, window.start_ns))
        market = make_market(settings, data.bars, ranks, None)
    plan = plan_memory(settings, bytes_of_bars(market, settings), ranks)
    trainer = Trainer(market, settings, ranks, plan, TrainingProgress(cutoff_ns=window.start_ns))
    for _ in range(TIMED_EPOCHS):  # the first one warms up
        with _Stopwatch() as epoch:
            trainer.metrics(trainer.update(trainer.collect()) or {})
    holdout_ns = holdout_start_ns(settings, data.bars)
    return Costs(
        loading.seconds,
        epoch.seconds,
        _exam_seconds(trainer, market, holdout_ns, window.start_ns),
        _walk_seconds(trainer, market, settings, window.start_ns, champions),
        4 * trainer.policy.num_parameters(),
    )


def _exam_seconds(trainer: Trainer, market: Market, start_ns: int, end_ns: int) -> float:
    config = trainer.env.config
    total = max(1, _most_bars(market, start_ns, end_ns) // config.horizon)
    try:
        # The first one warms up.
        for segments in (1, min(TIMED_SEGMENTS, total)):
            with _Stopwatch() as watch:
                examine_accounts(
                    trainer.policy, market, config, market.symbols, start_ns, end_ns, max_segments=segments
                )
    except NoSegment:
        return 0.0
    return watch.seconds / segments * total


def _walk_seconds(trainer: Trainer, market: Market, settings: Settings, end_ns: int, champions: int) -> float:
    config, policy = EnvConfig.from_settings(settings, 1), trainer.policy
    deciders: dict[str, Decider | None] = {POLICY: policy}
    if champions > 1:
        deciders = {POLICY: Ensemble([policy] * champions, [View(0, 0)] * champions), CHAMPION: policy}
    times = market.open_time[market.open_time < end_ns].sort().values.unique()
    start_ns = int(times[-min(len(times), TIMED_BARS)])
    try:
        with _Stopwatch() as watch:
            walk_on(
                deciders,
                market,
                config,
                market.symbols,
                {},
                start_ns,
                end_ns,
                rules=BASELINES,
                flat_costs_bps=(0.0, 1.0, 2.0, 5.0, 10.0),
            )
    except NoSegment:
        return 0.0
    days = len(torch.unique(times // DAY_NS))
    return watch.seconds / min(len(times), TIMED_BARS) * len(times) / days


def _most_bars(market: Market, start_ns: int, end_ns: int) -> int:
    inside = (market.open_time >= start_ns) & (market.open_time < end_ns)
    counts = torch.cat((inside.new_zeros(1).long(), inside.cumsum(0)))[market.offsets]
    return int(counts.diff().max())


class _Stopwatch:
    def __enter__(self) -> _Stopwatch:
        self.seconds, self._began = 0.0, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began


def free_in(folder: Path) -> float:
    """Return the free bytes of a folder's disk, which is made; infinite where the file system does not say."""
    make_folder(folder)
    found = free_bytes(folder)
    return math.inf if found is None else found
