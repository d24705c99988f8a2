"""Look-ahead checks on the user's own bars, the first part of the self-test.

All rows of the vendor, then all bars, after some moment are replaced by unrelated ones: everything known, decided
or filled up to that moment must stay the same, bit for bit. Then the bars of the holdout are replaced: nothing in
training may change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from commands.selftest.vendor_rows import load_through_a_lake
from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS, AssetClass, Bars
from data_sources.calendar import new_york_time
from data_sources.errors import DataError
from data_sources.lake.lake import Lake
from data_sources.load import each_symbol
from data_sources.simulated import simulated_bars
from data_sources.sources import DataRequest
from envs.config import EnvConfig
from envs.feature_checks import (
    check_own_features,
    choose_moments,
    features_that_look_across,
    features_that_look_ahead,
)
from envs.feature_errors import FeatureError
from envs.features import GROUPS, WARM_UP_BARS, own_features, panel_of, registered_features
from envs.group_env import GroupEnv
from envs.later_bars import change_bars_after, replace_bars_after
from envs.market import Market, NoSegment
from evaluation.provenance import minute_of
from models.policy import Policy, precision_on
from models.transformer import TransformerConfig
from training.data_feed import data_request, holdout_start_ns
from training.distributed import Ranks
from training.environments import AnyEnv, make_env, play_segment
from training.rollout import Rollout

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

CLASSES: tuple[AssetClass, ...] = ("stock", "crypto", "perpetual")
SYMBOLS = 4  # of each class
TRAINING_BARS = 30_000  # per symbol, the newest before the holdout
CUTS = 6  # of each kind per symbol, after which bars are replaced to check features
# The last rows before a cut, and the factor of their prices: prints, crashes, and a level that stays.
EXCURSIONS = ((1, 10.0), (2, 0.7), (3, 0.3), (5, 4.0))
ROWS_BEFORE, ROWS_AFTER = 1_500, 500  # such a cut
DECISION_MINUTES = (
    6_000  # of bars before the holdout, to check decisions where features look at other symbols
)
SEGMENTS = 3  # per symbol, to check decisions
HOLDOUT_SEGMENTS = 64  # of all symbols, to check that the holdout is unused


def run(settings: Settings, ranks: Ranks) -> list[str]:
    """Check some symbols and log a summary; return what looks ahead, or why the check is not possible."""
    try:
        bars = load_bars(settings, time.time_ns())
        found, played = find_look_ahead(bars, settings, ranks)
        own = check_own_features(bars)
    except (DataError, NoSegment, FeatureError) as error:
        return [f"look-ahead could not be checked: {error}"]
    for warning in own.warnings:
        log.warning(warning)
    found += own.errors
    line = f"no look-ahead on {', '.join(played)}"
    if others := [series.symbol for series in bars if series.symbol not in played]:
        line += f" (features only on {', '.join(others)}: too few bars)"
    log.info(f"{line}: {f'FAILED, {len(found)} found' if found else 'passed'}")
    return [f"look-ahead: {finding}" for finding in found]


def load_bars(settings: Settings, now_ns: int) -> list[Bars]:
    """Read some of the training's symbols from the lake, without a download; simulate some if it has none.

    Raises:
        LakeError: the lake cannot be read.
    """
    request, lake = data_request(settings, now_ns), Lake(Path(settings.data_dir))
    request = replace(request, simulated_symbols=SYMBOLS)
    found = [bars for kind in CLASSES for bars in islice(_load_usable(lake, request, kind), SYMBOLS)]
    if not found:
        num_bars = TRAINING_BARS + settings.holdout_days * 1_440
        found = simulated_bars(SYMBOLS, num_bars, settings.seed, now_ns)
    holdout_ns = holdout_start_ns(settings, found)
    return [_drop_oldest(bars, holdout_ns) for bars in found]


def _load_usable(lake: Lake, request: DataRequest, asset_class: AssetClass) -> Iterator[Bars]:
    return (bars for bars, row in each_symbol(lake, request, [asset_class]) if not row.dropped)


def _drop_oldest(bars: Bars, holdout_ns: int) -> Bars:
    """Keep the holdout and ``TRAINING_BARS`` before it."""
    first = max(0, int(np.searchsorted(bars.open_time, holdout_ns)) - TRAINING_BARS)
    return bars.between(int(bars.open_time[first]), int(bars.open_time[-1]) + 1)


def find_look_ahead(bars: Sequence[Bars], settings: Settings, ranks: Ranks) -> tuple[list[str], list[str]]:
    """Find everything that depends on later bars, or on bars of the holdout.

    Args:
        bars: one series per symbol.
        settings: the training's; a small transformer takes the place of its own.
        ranks: only the device is used.

    Returns:
        One line per finding, and the symbols on which decisions were checked.

    Raises:
        NoSegment: no segment fits before the holdout.
    """
    holdout_ns = holdout_start_ns(settings, bars)
    if not any(np.searchsorted(series.open_time, holdout_ns) > WARM_UP_BARS for series in bars):
        raise NoSegment(
            f"all bars are held out: fetch older ones, or lower holdout_days={settings.holdout_days}"
        )
    found: dict[str, str] = {}
    for series, cut in bars_that_change(bars, settings.extended_hours):
        subject = f"{series.symbol}: rows"
        line = f"{series.symbol}: bars up to {_minute(series, cut)} depend on later rows of the vendor"
        found.setdefault(subject, line)
    # Those of the panel see nothing of a symbol alone.
    alone = {name: each for name, each in registered_features().items() if name not in GROUPS["panel"]}
    for series in bars:
        cuts = features_that_look_ahead(series, _choose_cuts(series), alone, ranks.device)
        for name, cut in cuts.items():
            subject = f"{series.symbol}: feature {name}"
            found[subject] = f"{subject} sees bars after {_minute(series, cut)}"
    moments = choose_moments(bars, CUTS)
    for name, (symbol, moment) in features_that_look_across(bars, moments, device=ranks.device).items():
        subject = f"{symbol}: feature {name}"
        found.setdefault(
            subject, f"{subject} sees bars after {minute_of(moment)} UTC, perhaps of another symbol"
        )
    checks = _RolloutChecks(bars, settings, holdout_ns, ranks)
    for findings in [checks.check_group()] if checks.size else map(checks.check_decisions, bars):
        for subject, line in findings:
            found.setdefault(subject, line)
    return [*found.values(), *checks.check_holdout()], checks.played


def bars_that_change(bars: Sequence[Bars], extended_hours: bool) -> Iterator[tuple[Bars, int]]:
    """Yield series, and an index up to which their bars depend on the vendor's later rows.

    Rows are checked and merged before they are bars. Up to a cut, two lakes get the same rows; the last ones leave
    the price level. Then one gets the rows that came, at the old level, and the other one gets unrelated rows.

    Args:
        bars: one series per symbol.
        extended_hours: as in the settings.

    Raises:
        LakeError: no temporary folder can be written.
    """
    random = np.random.default_rng(0)
    usable = [series for series in bars if len(series) > ROWS_AFTER]
    for seed, (length, factor) in enumerate(EXCURSIONS if usable else ()):
        cuts = [int(random.integers(length, len(series) - length)) for series in usable]
        came, others = [], []
        for series, cut in zip(usable, cuts, strict=True):
            first = max(0, cut - ROWS_BEFORE)
            columns = {name: getattr(series, name)[first : cut + ROWS_AFTER].copy() for name in COLUMNS}
            for name in COLUMNS[1:5]:
                columns[name][cut + 1 - length - first : cut + 1 - first] *= factor
            rows = replace(series, **columns)
            came.append((rows, cut + 1 - first))
            others.append((replace_bars_after(rows, cut - first, seed), cut + 1 - first))
        expected, actual = (load_through_a_lake(rows, extended_hours) for rows in (came, others))
        for series, cut in zip(usable, cuts, strict=True):
            end_ns = int(series.open_time[cut]) + 1
            ours, theirs = (loaded[series.symbol].between(0, end_ns) for loaded in (expected, actual))
            if any(not np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in COLUMNS):
                yield series, cut


def _choose_cuts(bars: Bars) -> list[int]:
    """Choose cuts at the largest gaps, at ends of UTC and New York days, and at random."""
    random, last = np.random.default_rng(0), len(bars) - 1
    gaps = np.argsort(np.diff(bars.open_time), kind="stable")[-CUTS:]
    chosen = {*gaps.tolist(), *random.integers(0, last, CUTS).tolist()}
    for time_of_day in (bars.open_time, new_york_time(bars.open_time)):
        ends = np.flatnonzero(np.diff(time_of_day // DAY_NS))
        chosen |= {int(end) for end in random.choice(ends, min(CUTS, len(ends)), replace=False)}
    return sorted(chosen)


class _RolloutChecks:
    """Compares rollouts on the given bars with rollouts on bars that differ after some moment."""

    def __init__(self, bars: Sequence[Bars], settings: Settings, holdout_ns: int, ranks: Ranks) -> None:
        self.bars, self.settings, self.device = bars, settings, ranks.device
        self.precision = precision_on(ranks.device, settings.precision)
        self.holdout_ns = holdout_ns
        self.market = self._make_market(bars)
        self.sees_others = "panel" in settings.features or bool(own_features())
        self.played: list[str] = []  # symbols on which decisions were checked
        self.config = EnvConfig.from_settings(settings)
        group, is_stock = self.config.group, [series.asset_class == "stock" for series in bars]
        if group:  # a smaller one where fewer symbols were loaded
            size = min(group.size, max(is_stock.count(True), is_stock.count(False)))
            self.config = replace(self.config, group=replace(group, size=size))
        self.size = size if group else 0  # symbols of a group; 0: an account per symbol

    def check_decisions(self, bars: Bars) -> Iterator[tuple[str, str]]:
        """Play some segments, and replay each with bars replaced after its first, middle and last decision.

        Yields:
            The subject of a finding, and a line about it.
        """
        others = [series for series in self.bars if series is not bars] if self.sees_others else []
        if others:  # fewer bars of each, so that their panel is quick
            span = self.holdout_ns - DECISION_MINUTES * MINUTE_NS, self.holdout_ns
            bars, *others = (series.between(*span) for series in (bars, *others))
        try:
            market = self._make_market([bars], self.market, others)
        except NoSegment:
            return  # other symbols have one
        self.played.append(bars.symbol)
        for seed in range(SEGMENTS):
            yield from self._check_segment(bars, others, market, seed)

    def _check_segment(
        self, bars: Bars, others: Sequence[Bars], market: Market, seed: int
    ) -> Iterator[tuple[str, str]]:
        expected, env = self._roll_out(market, 1, seed)
        end, horizon = int(env.cursor[0]), self.settings.horizon
        for last in (0, horizon // 2, horizon - 1):
            cut = end - horizon + last
            # Times stay the same, so that the same segment is drawn; the feature check replaces them too. The
            # scales of features and rewards stay too: training takes them from all bars before the holdout.
            other = replace(replace_bars_after(bars, cut, seed), open_time=bars.open_time)
            later = change_bars_after(others, int(bars.open_time[cut]), seed)
            twin = replace(self._make_market([other], market, later), volatility=market.volatility)
            actual, _ = self._roll_out(twin, 1, seed)
            for name in self._names_that_differ(expected, actual, last):
                subject = f"{bars.symbol}: {name}"
                yield subject, f"{subject} up to {_minute(bars, cut)} depend on later bars"

    def check_group(self) -> Iterator[tuple[str, str]]:
        """Play segments of groups, and replay each with the bars of all symbols replaced after a decision.

        Yields:
            The subject of a finding, and a line about it.
        """
        span = self.holdout_ns - DECISION_MINUTES * MINUTE_NS, self.holdout_ns
        bars = [window for series in self.bars if len(window := series.between(*span))]
        market, horizon = self._make_market(bars, self.market), self.settings.horizon
        self.played += [series.symbol for series in bars]
        for seed in range(SEGMENTS):
            expected, env = self._roll_out(market, self.size, seed)
            assert isinstance(env, GroupEnv)
            for last in (0, horizon // 2, horizon - 1):
                moment = int(env.grid.minutes[env.minute[0] - horizon + last])
                others = []
                for number, series in enumerate(bars):
                    cut = int(np.searchsorted(series.open_time, moment, side="right")) - 1
                    other = replace_bars_after(series, cut, seed + number) if cut >= 0 else series
                    others.append(replace(other, open_time=series.open_time))
                twin = replace(self._make_market(others, market), volatility=market.volatility)
                actual, _ = self._roll_out(twin, self.size, seed)
                for name in self._names_that_differ(expected, actual, last):
                    subject = f"a group: {name}"
                    yield subject, f"{subject} up to {minute_of(moment)} UTC depend on later bars"

    def _names_that_differ(self, expected: Rollout, actual: Rollout, last: int) -> Iterator[str]:
        """Yield what two rollouts, whose bars are the same up to decision ``last``, differ in up to there."""
        # An account that the next fill ruins, on the first replaced bar, does not decide at this one.
        decided = last + int((expected.valid[:, last] & actual.valid[:, last]).all())
        # A decision fills at the next open; its reward is known at the open after that.
        earned, context = max(0, last - 1), self.settings.context_bars
        lengths = {"bars": context + last + 1, "valid": last, "rewards": earned, "terminated": earned}
        for name, value in _tensors(expected).items():
            length, other_value = lengths.get(name, decided), _tensors(actual)[name]
            if name != "next_value" and not torch.equal(value[:, :length], other_value[:, :length]):
                yield name

    def check_holdout(self) -> Iterator[str]:
        """Play many segments with and without the holdout's bars replaced; yield a line per difference."""
        others = []
        for series in self.bars:
            cut = int(np.searchsorted(series.open_time, self.holdout_ns)) - 1
            others.append(replace(replace_bars_after(series, cut, seed=0), open_time=series.open_time))
        market, twin = self.market, self._make_market(others)
        for name in ("mean", "std"):
            if not torch.equal(getattr(market.statistics, name), getattr(twin.statistics, name)):
                yield f"the {name} of features depends on the holdout"
        if not torch.equal(market.volatility, twin.volatility):
            yield "the scale of rewards depends on the holdout"
        num_envs = HOLDOUT_SEGMENTS // max(1, self.size) * max(1, self.size)
        expected, _ = self._roll_out(market, num_envs, seed=0)
        actual, _ = self._roll_out(twin, num_envs, seed=0)
        for name, value in _tensors(expected).items():
            if not torch.equal(value, _tensors(actual)[name]):
                yield f"training's {name} depend on the holdout"

    def _make_market(
        self, bars: Sequence[Bars], known: Market | None = None, others: Sequence[Bars] = ()
    ) -> Market:
        statistics = known.statistics if known else None
        panel = panel_of([*bars, *others], self.device)
        return Market.from_settings(bars, self.settings, self.device, self.holdout_ns, statistics, panel)

    def _roll_out(self, market: Market, num_envs: int, seed: int) -> tuple[Rollout, AnyEnv]:
        """Play one segment per account; return it, and the environment after it."""
        env = make_env(market, replace(self.config, num_envs=num_envs), self.device, seed)
        torch.manual_seed(seed)
        length = self.settings.context_bars + self.settings.horizon + 1
        trunk = TransformerConfig(market.num_features, 64, 2, 4, length)
        policy = Policy(trunk, env.num_account_features, len(self.settings.positions), self.precision)
        for layer in (policy.head.logits, policy.head.value):
            nn.init.normal_(layer.weight)  # an untrained head would ignore its input
        generator = torch.Generator(self.device).manual_seed(seed)
        return play_segment(env, policy.to(self.device), generator, chunk_segments=16), env


def _tensors(rollout: Rollout) -> dict[str, Tensor]:
    return {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor)}


def _minute(bars: Bars, index: int) -> str:
    return f"{minute_of(int(bars.open_time[index]))} UTC"
