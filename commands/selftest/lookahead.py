"""Does anything look ahead on the user's own bars? Part of the self-test.

Bars after a moment are replaced by entirely other ones: whatever was known, decided or filled up to that moment
must stay as it was, to the bit. Then the bars that are held out are replaced: nothing of the training may change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from commands.selftest.foresight import changed_after, features_that_look_ahead
from data_sources.bars import Bars
from data_sources.calendar import DAY_NS, new_york_time
from data_sources.errors import DataError
from data_sources.lake.lake import Lake
from data_sources.load import each_symbol
from data_sources.refresh import DataRequest
from data_sources.simulated import simulated_bars
from envs.features import WARM_UP_BARS
from envs.market import Market, NoSegment
from envs.trading_env import EnvConfig, TradingEnv
from evaluation.provenance import minute_of
from models.policy import Policy
from models.transformer import TransformerConfig
from monitoring.console import Console
from training.assembly import holdout_start_ns, uses_bf16
from training.data_feed import data_request
from training.distributed import Ranks
from training.rollout import Rollout, collect

if TYPE_CHECKING:
    from continuous_training import Settings

SYMBOLS = 4  # of stocks, and as many of crypto
TRAINING_BARS = 30_000  # of each, the newest before the holdout
MOMENTS = 6  # of each kind, after which bars are replaced, for features
SEGMENTS = 3  # of each, in which decisions are looked at
HOLDOUT_SEGMENTS = 64  # of all, played without a change of the training's bars


def tell(settings: Settings, ranks: Ranks, console: Console) -> list[str]:
    """Check some symbols, tell of it, and return what looks ahead, or why it cannot be known."""
    try:
        found, played = what_looks_ahead(bars := some_bars(settings, time.time_ns()), settings, ranks)
    except (DataError, NoSegment) as error:
        return [f"foresight could not be checked: {error}"]
    line = f"no foresight, on {', '.join(played)}"
    if others := [one.symbol for one in bars if one.symbol not in played]:
        line += f" (features alone on {', '.join(others)}, which have too few bars)"
    console.line(f"{line}: {f'FAILED: {len(found)} found' if found else 'passed'}")
    return [f"foresight: {each}" for each in found]


def some_bars(settings: Settings, now_ns: int) -> list[Bars]:
    """Read some symbols that a training would use; nothing is downloaded. Simulated ones where there are none.

    Raises:
        LakeError: the lake cannot be read.
    """
    request, lake = data_request(settings, now_ns), Lake(Path(settings.data_dir))
    kinds = [replace(request, sources=("simulated",), simulated_symbols=SYMBOLS)]
    if "simulated" not in settings.sources:
        kinds = [replace(request, binance_pairs=(), polygon_crypto=()), replace(request, stocks=())]
    found = [bars for kind in kinds for bars in islice(_usable(lake, kind), SYMBOLS)]
    if not found:
        num_bars = TRAINING_BARS + settings.holdout_days * 1_440
        found = simulated_bars(SYMBOLS, num_bars, settings.seed, now_ns)
    holdout_ns = holdout_start_ns(settings, found)
    return [_newest(bars, holdout_ns) for bars in found]


def _usable(lake: Lake, request: DataRequest) -> Iterator[Bars]:
    return (bars for bars, row in each_symbol(lake, request) if not row.dropped)


def _newest(bars: Bars, holdout_ns: int) -> Bars:
    # Those that are held out, and so many before them.
    first = max(0, int(np.searchsorted(bars.open_time, holdout_ns)) - TRAINING_BARS)
    return bars.between(int(bars.open_time[first]), int(bars.open_time[-1]) + 1)


def what_looks_ahead(bars: Sequence[Bars], settings: Settings, ranks: Ranks) -> tuple[list[str], list[str]]:
    """Look for what depends on later bars.

    Args:
        bars: of some symbols.
        settings: of the training; a small transformer stands for its own.
        ranks: where it is checked.

    Returns:
        What looks ahead, a line each, nothing when all is well; and the symbols on which decisions were looked at.

    Raises:
        NoSegment: there are not bars enough for a segment before the holdout.
    """
    holdout_ns = holdout_start_ns(settings, bars)
    if not any(np.searchsorted(one.open_time, holdout_ns) > WARM_UP_BARS for one in bars):
        raise NoSegment(
            f"all bars are held out: fetch older ones, or lower holdout_days={settings.holdout_days}"
        )
    found: dict[str, str] = {}
    for one in bars:
        looks = features_that_look_ahead(one, _moments(one), device=ranks.device)
        for name, place in looks.items():
            what = f"{one.symbol}: feature {name}"
            found[what] = f"{what} sees bars after {_minute(one, place)}"
    checks = _Checks(bars, settings, holdout_ns, ranks)
    for one in bars:
        for what, line in checks.decisions(one):
            found.setdefault(what, line)
    return [*found.values(), *checks.holdout()], checks.played


def _moments(bars: Bars) -> list[int]:
    """Choose bars after which others are put: where time jumps, where days end, and some by chance."""
    random, last = np.random.default_rng(0), len(bars) - 1
    jumps = np.argsort(np.diff(bars.open_time), kind="stable")[-MOMENTS:]
    chosen = {*jumps.tolist(), *random.integers(0, last, MOMENTS).tolist()}
    for time_of_day in (bars.open_time, new_york_time(bars.open_time)):
        ends = np.flatnonzero(np.diff(time_of_day // DAY_NS))
        chosen |= {int(end) for end in random.choice(ends, min(MOMENTS, len(ends)), replace=False)}
    return sorted(chosen)


class _Checks:
    """Rollouts on bars and on the same bars with others after some moment."""

    def __init__(self, bars: Sequence[Bars], settings: Settings, holdout_ns: int, ranks: Ranks) -> None:
        self.bars, self.settings, self.device = bars, settings, ranks.device
        self.bf16 = uses_bf16(settings, ranks)
        self.holdout_ns = holdout_ns
        self.market = self._market(bars)
        self.played: list[str] = []  # symbols on which decisions were looked at

    def decisions(self, bars: Bars) -> Iterator[tuple[str, str]]:
        """Play some segments, each again with other bars after its first, middle and last decision.

        Yields:
            What looked ahead, and the line that tells of it.
        """
        try:
            market = self._market([bars], self.market)
        except NoSegment:
            return  # of this symbol; another one has
        self.played.append(bars.symbol)
        for seed in range(SEGMENTS):
            yield from self._segment(bars, market, seed)

    def _segment(self, bars: Bars, market: Market, seed: int) -> Iterator[tuple[str, str]]:
        truth, end = self._played(market, 1, seed)
        horizon, context = self.settings.horizon, self.settings.context_bars
        for last in (0, horizon // 2, horizon - 1):
            place = end - horizon + last
            # The times stay, so that the same segment is drawn; the check of features changes them, too. So do
            # the scales of features and rewards, which the training takes from all bars before the holdout.
            other = replace(changed_after(bars, place, seed), open_time=bars.open_time)
            twin = replace(self._market([other], market), volatility=market.volatility)
            again, _ = self._played(twin, 1, seed)
            # Who is ruined at the next fill, the first of the other bars, decides nothing more at this one.
            decided = last + int(truth.valid[0, last] & again.valid[0, last])
            # A decision fills at the next open, and what it earned shows at the one after that.
            earned = max(0, last - 1)
            length_of = {"bars": context + last + 1, "valid": last, "rewards": earned, "terminated": earned}
            for name, told in _tensors(truth).items():
                length, seen = length_of.get(name, decided), _tensors(again)[name]
                if name != "next_value" and not torch.equal(told[:, :length], seen[:, :length]):
                    what = f"{bars.symbol}: {name}"
                    yield what, f"{what} up to {_minute(bars, place)} depend on bars after it"

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


def _minute(bars: Bars, place: int) -> str:
    return f"{minute_of(int(bars.open_time[place]))} UTC"
