"""Does anything look ahead on the user's own bars? Part of the self-test.

Bars after a moment are replaced by entirely other ones: whatever was known, decided or filled up to that moment
must stay as it was, to the bit. Then the bars that are held out are replaced: nothing of the training may change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sources.bars import Bars
from data_sources.errors import DataError
from data_sources.lake import Lake
from data_sources.loading import each_symbol
from data_sources.refresh import DataRequest
from data_sources.simulated import simulated_bars
from envs.foresight import changed_after, features_that_look_ahead
from envs.market import Market, NoSegment
from envs.trading_env import EnvConfig, TradingEnv
from models.policy import Policy
from models.transformer import TransformerConfig
from training.assembly import holdout_start_ns, uses_bf16
from training.cli import Leave
from training.console import Console
from training.control import EXIT_NO_DATA
from training.distributed import Ranks
from training.fresh_bars import data_request
from training.rollout import Rollout, collect

SYMBOLS = 4  # of stocks, and as many of crypto
NEWEST_BARS = 60_000  # of each
SEGMENTS = 3  # of each, in which decisions are looked at
HOLDOUT_SEGMENTS = 64  # of all, played without a change of the training's bars


def tell(settings: Any, ranks: Ranks, console: Console) -> list[str]:
    """Check some symbols, tell of it, and return what looks ahead.

    Raises:
        Leave: the lake cannot be read, or holds too little for a check.
    """
    try:
        bars = some_bars(settings, time.time_ns())
        found = what_looks_ahead(bars, settings, ranks)
    except (DataError, ValueError) as error:
        raise Leave(EXIT_NO_DATA, f"foresight could not be checked: {error}") from error
    names = ", ".join(one.symbol for one in bars)
    console.line(f"no foresight, on {names}: {f'FAILED: {len(found)} found' if found else 'passed'}")
    return [f"foresight: {line}" for line in found]


def some_bars(settings: Any, now_ns: int) -> list[Bars]:
    """Read some symbols that a training would use; nothing is downloaded. Simulated ones where there are none.

    Raises:
        LakeError: the lake cannot be read.
    """
    request, lake = data_request(settings, now_ns), Lake(Path(settings.data_dir))
    kinds = [replace(request, sources=("simulated",), simulated_symbols=SYMBOLS)]
    if "simulated" not in settings.sources:
        kinds = [replace(request, binance_pairs=(), polygon_crypto=()), replace(request, stocks=())]
    found = [bars for kind in kinds for bars in islice(_usable(lake, kind), SYMBOLS)]
    return found or simulated_bars(SYMBOLS, NEWEST_BARS, settings.seed, now_ns)


def _usable(lake: Lake, request: DataRequest) -> Iterator[Bars]:
    for bars, row in each_symbol(lake, request):
        if not row.dropped:
            newest = bars.open_time[-NEWEST_BARS:]
            yield bars.between(int(newest[0]), int(newest[-1]) + 1)


def what_looks_ahead(bars: Sequence[Bars], settings: Any, ranks: Ranks) -> list[str]:
    """Return what looks ahead, a line each; nothing when all is well.

    Args:
        bars: of some symbols.
        settings: of the training; a small transformer stands for its own.
        ranks: where it is checked.

    Raises:
        ValueError: there are not bars enough for a segment before the holdout.
    """
    found: list[str] = []
    for one in bars:
        places = np.linspace(0, len(one) - 1, SEGMENTS + 2).astype(int)[1:-1].tolist()
        for name, place in features_that_look_ahead(one, places, device=ranks.device).items():
            found.append(f"{one.symbol}: feature {name} sees bars after {_time(one, place)}")
    checks = _Checks(bars, settings, ranks)
    for seed in range(SEGMENTS):
        for one in bars:
            found += checks.decisions(one, seed)
    return [*found, *checks.holdout()]


class _Checks:
    """Rollouts on bars and on the same bars with others after some moment."""

    def __init__(self, bars: Sequence[Bars], settings: Any, ranks: Ranks) -> None:
        self.bars, self.settings, self.device = bars, settings, ranks.device
        self.bf16 = uses_bf16(settings, ranks)
        self.holdout_ns = holdout_start_ns(settings, bars)
        self.market = self._market(bars)

    def decisions(self, bars: Bars, seed: int) -> Iterator[str]:
        """Play one segment, and again with other bars after its first, middle and last decision."""
        try:
            market = self._market([bars], self.market)
        except NoSegment:
            return  # of this symbol; another one has
        truth, end = self._played(market, 1, seed)
        horizon, context = self.settings.horizon, self.settings.context_bars
        for last in (0, horizon // 2, horizon - 1):
            place = end - horizon + last
            # The times stay, so that the same segment is drawn; the check of features changes them, too. So do
            # the scales of features and rewards, which the training takes from all bars before the holdout.
            other = replace(changed_after(bars, place, seed), open_time=bars.open_time)
            twin = replace(self._market([other], market), volatility=market.volatility)
            again, _ = self._played(twin, 1, seed)
            # A decision fills at the next open and is held until the one after it. Who is ruined there decides
            # nothing more, so a ruin at the first of the other bars is told one decision early.
            decided = last + int(truth.valid[0, last] & again.valid[0, last])
            known = {
                "bars": context + last + 1,
                "rewards": max(0, last - 1),
                "terminated": max(0, last - 1),
                "valid": last,
            }
            for name, told in _tensors(truth).items():
                length = known.get(name, decided)
                seen = _tensors(again)[name]
                if name != "next_value" and not torch.equal(told[:, :length], seen[:, :length]):
                    yield f"{bars.symbol}: {name} up to {_time(bars, place)} depend on bars after it"

    def holdout(self) -> Iterator[str]:
        """Play many segments, and again with other bars in the holdout."""
        others = []
        for one in self.bars:
            place = int(np.searchsorted(one.open_time, self.holdout_ns)) - 1
            others.append(replace(changed_after(one, place, seed=0), open_time=one.open_time))
        market, twin = self.market, self._market(others)
        for name in ("mean", "std"):
            if not torch.equal(getattr(market.statistics, name), getattr(twin.statistics, name)):
                yield f"the {name} of features depends on bars that are held out"
        if not torch.equal(market.volatility, twin.volatility):
            yield "the scale of rewards depends on bars that are held out"
        truth, _ = self._played(market, HOLDOUT_SEGMENTS, seed=0)
        again, _ = self._played(twin, HOLDOUT_SEGMENTS, seed=0)
        for name, told in _tensors(truth).items():
            if not torch.equal(told, _tensors(again)[name]):
                yield f"{name} of training depend on bars that are held out"

    def _market(self, bars: Sequence[Bars], known: Market | None = None) -> Market:
        return Market.from_bars(
            bars,
            device=self.device,
            holdout_start_ns=self.holdout_ns,
            context_bars=self.settings.context_bars,
            horizon=self.settings.horizon,
            statistics=known.statistics if known else None,
        )

    def _played(self, market: Market, num_envs: int, seed: int) -> tuple[Rollout, int]:
        # One segment of every account, and the bar after the first account's last decision.
        env = TradingEnv(market, EnvConfig.from_settings(self.settings, num_envs), self.device, seed)
        torch.manual_seed(seed)
        length = self.settings.context_bars + self.settings.horizon + 1
        trunk = TransformerConfig(market.num_features, 64, 2, 4, length)
        policy = Policy(trunk, env.num_account_features, len(self.settings.positions), self.bf16)
        for layer in (policy.head.logits, policy.head.value):
            nn.init.normal_(layer.weight)  # an untrained policy would not listen to what it sees
        generator = torch.Generator(self.device).manual_seed(seed)
        rollout = collect(env, policy.to(self.device), generator, chunk_segments=16)
        return rollout, int(env.cursor[0])


def _tensors(rollout: Rollout) -> dict[str, Tensor]:
    return {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor)}


def _time(bars: Bars, place: int) -> str:
    return f"{datetime.fromtimestamp(int(bars.open_time[place]) / 1e9, UTC):%Y-%m-%d %H:%M} UTC"
