"""Checks of features on real bars: nothing looks ahead, nothing is random, every value is one that can be used.

A feature is run on bars whose later part is replaced by unrelated ones; up to the cut, its values must stay the
same to the bit. Features of one's own (envs/own_features.py) are checked so at thousands of cuts before every
training: at gaps, ends of days and large moves, and at every minute of the day. That finds a feature that looks
ahead at a few bars only, but no test can find one that looks up prices elsewhere, such as in a file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import DAY_NS, FLOW_COLUMNS, MINUTE_NS, Bars
from data_sources.calendar import new_york_time
from envs.feature_errors import FeatureError, place_of
from envs.features import (
    FEATURES,
    LARGEST_RAW,
    WARM_UP_BARS,
    FeatureFunction,
    compute,
    compute_unbounded,
    own_features,
    panel_of,
    read_own_features,
    registered_features,
)
from envs.later_bars import bars_around, change_bars_after, differs, names_that_differ, replace_bars_after

CPU = torch.device("cpu")
CUTS_PER_BAR, FEWEST_CUTS = 1 / 1_000, 1_500  # the latter of all symbols together
# Of this thread, for windows: features of Python loops would take hours, and get fewer cuts.
MOST_SECONDS, MOST_SECONDS_PER_BAR = 10.0, 2e-6
WINDOW_BARS, CUTS_PER_WINDOW = 2_048, 16  # cuts lie in a window's second half
ACROSS_MOMENTS = 100  # at which bars of all symbols change, where a feature looks at other ones
ACROSS_SYMBOLS = 12  # of these symbols at a time
FULL_CUTS = 3  # per symbol, with all of its bars: one in each third
USUAL_SHARE = 0.01  # of bars that may have no finite value, or one out of bounds, without a warning
FIX = "correct envs/own_features.py, or take the feature out"


@dataclass
class FeatureReport:
    """What is wrong with features of one's own: a line per fault; with ``errors`` nothing may be trained."""

    names: list[str] = field(default_factory=list)  # of the features that were checked
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_own_features(bars: Sequence[Bars], fewest_cuts: int = FEWEST_CUTS) -> FeatureReport:
    """Check the features of envs/own_features.py, at about a second per million bars.

    Args:
        bars: of all symbols that are trained on.
        fewest_cuts: after which later bars are replaced, of all symbols together.
    """
    own = own_features()
    report = FeatureReport(list(own))
    if not own:
        return report
    checks = _OwnChecks(bars, own, fewest_cuts)
    try:
        checks.compare_orders()
        for series in bars:
            checks.look_ahead(series)
        checks.look_across()
    except FeatureError as error:
        report.errors = [*checks.faults.values(), str(error)]
        return report
    checks.judge_values()
    report.errors, report.warnings = list(checks.faults.values()), checks.warnings
    return report


def features_that_look_ahead(
    bars: Bars,
    cuts: Sequence[int],
    functions: Mapping[str, FeatureFunction] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """Find features whose values up to a bar depend on later bars; a single bit counts.

    Args:
        bars: of one symbol, real or simulated.
        cuts: indices of bars. All bars after a cut are replaced, one cut at a time.
        functions: name -> feature; default: all registered features.
        device: where features are computed.

    Returns:
        Name -> the first of ``cuts`` at which the feature saw a later bar; empty if none looks ahead.
    """
    functions, device = FEATURES if functions is None else functions, torch.device(device)
    expected = compute(bars, device, functions)
    found: dict[str, int] = {}
    for seed, cut in enumerate(cuts):
        actual = compute(replace_bars_after(bars, cut, seed), device, functions)
        for name in names_that_differ(functions, expected[: cut + 1], actual[: cut + 1]):
            found.setdefault(name, cut)
    return found


def features_that_look_across(
    bars: Sequence[Bars],
    moments: Sequence[int],
    functions: Mapping[str, FeatureFunction] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[str, int]]:
    """Find features whose values up to a moment depend on later bars of any symbol; a single bit counts.

    Args:
        bars: of all symbols.
        moments: ns; all bars that open later change, one moment at a time.
        functions: name -> feature; default: all registered features.
        device: where features are computed.

    Returns:
        Name -> the symbol at which it saw a later bar, and when; empty if none looks ahead.
    """
    functions = registered_features() if functions is None else functions
    found: dict[str, tuple[str, int]] = {}
    for moment in moments:
        window = bars_around(bars, moment)
        others = change_bars_after(window, moment, seed=moment // MINUTE_NS)
        expected, actual = (dict(_raw(each, functions, device)) for each in (window, others))
        for series in window:
            count = int(np.searchsorted(series.open_time, moment, side="right"))
            if count:
                one, other = expected[series.symbol][:count], actual[series.symbol][:count]
                for name in names_that_differ(functions, one, other):
                    found.setdefault(name, (series.symbol, moment))
    return found


def _raw(
    bars: Sequence[Bars], functions: Mapping[str, FeatureFunction], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    panel = panel_of(bars, device, functions)
    for series in bars:
        yield series.symbol, compute_unbounded(series, torch.device(device), functions, panel)


class _OwnChecks:
    """Runs the checks symbol by symbol. The first fault of a feature is kept, and ends its checks."""

    def __init__(self, bars: Sequence[Bars], own: Mapping[str, FeatureFunction], fewest_cuts: int) -> None:
        self.own, self._bars = own, bars
        self._panel = panel_of(bars, CPU, own)
        self.faults: dict[str, str] = {}
        self.warnings: list[str] = []
        num_bars = max(1, sum(map(len, bars)))
        self._cuts_per_bar = max(CUTS_PER_BAR, fewest_cuts / num_bars)
        self._seconds_per_bar = MOST_SECONDS / num_bars + MOST_SECONDS_PER_BAR
        self._cuts_at_minute = np.zeros(DAY_NS // MINUTE_NS, dtype=np.int64)
        self._bad = dict.fromkeys(("is NaN or infinite", "is out of bounds"), np.zeros(len(own)))
        self._num_values = 0
        self._seed = 0

    @property
    def are_over(self) -> bool:
        """Whether every feature has its fault."""
        return len(self.faults) == len(self.own)

    def compare_orders(self) -> None:
        """Compare the features of each symbol alone with those computed in the training's order, twice."""
        for bars in self._bars:
            before = [getattr(bars, name).copy() for name in bars.columns]
            raw = compute_unbounded(bars, CPU, self._fresh(), self._panel)
            self._count_values(raw)
            self._compare(bars, raw, compute_unbounded(bars, CPU, self.own, self._panel))
            pairs = zip(bars.columns, before, strict=True)
            changed = [
                name
                for name, column in pairs
                if not np.array_equal(column, getattr(bars, name), equal_nan=name in FLOW_COLUMNS)
            ]
            if changed:  # unseen by torch
                raise FeatureError(
                    f"a feature of your own changes {', '.join(changed)} of its history: {FIX}"
                )
        for bars in {series.asset_class: series for series in reversed(self._bars)}.values():
            # Again, after all others; and among the built-in ones, whose building blocks it may change.
            alone = compute_unbounded(bars, CPU, self._fresh())
            self._compare(bars, alone, compute_unbounded(bars, CPU, self.own))
            compute_unbounded(bars.rows(0, WINDOW_BARS), CPU, registered_features())

    def look_ahead(self, bars: Bars) -> None:
        """Replace later bars: after a few cuts of the whole history, and after many of short windows."""
        alone, twin = self._fresh(), self._fresh()
        size = len(bars)
        end = time.thread_time() + self._seconds_per_bar * size
        raw = compute_unbounded(bars, CPU, alone)
        for third, within in enumerate(np.random.default_rng(size).random(FULL_CUTS).tolist()):
            self._look_ahead_at(bars, int((size - 1) * (third + within) / FULL_CUTS), raw, twin)
        for first, cuts in self._windows(bars):
            if self.are_over or time.thread_time() > end:
                return
            window = bars.rows(first, first + WINDOW_BARS)
            expected = compute_unbounded(window, CPU, alone)
            for cut in cuts:
                self._look_ahead_at(window, cut - first, expected, twin)

    def look_across(self) -> None:
        """Change later bars of all symbols at once, where a feature looks at other symbols."""
        if not self._panel.is_used:
            return
        random, size = np.random.default_rng(0), min(ACROSS_SYMBOLS, len(self._bars))
        for moment in choose_moments(self._bars, ACROSS_MOMENTS):
            some = [self._bars[number] for number in random.choice(len(self._bars), size, replace=False)]
            for name, (symbol, _) in features_that_look_across(some, [moment], self.own).items():
                self.faults.setdefault(
                    name,
                    f"{place_of(self.own[name])}: feature {name} looks ahead: its value at {symbol}'s bar of "
                    f"{_minute(moment)} UTC or one before depends on later bars; {FIX}",
                )

    def judge_values(self) -> None:
        """Turn the counts of unusable values into an error where there is no other, else into warnings."""
        for kind, counts in self._bad.items():
            for name, count in zip(self.own, counts.tolist(), strict=True):
                share = count / max(1, self._num_values)
                line = f"{place_of(self.own[name])}: feature {name} {kind} at {{}} of bars, {{}}: {FIX}"
                meaning = (
                    "which counts as 0" if kind.startswith("is NaN") else f"which counts as {LARGEST_RAW:g}"
                )
                if share == 1:
                    self.faults.setdefault(name, line.format("100 %", "so it says nothing"))
                elif share > USUAL_SHARE:
                    self.warnings.append(line.format(f"{100 * share:.1f} %", meaning))

    def _fresh(self) -> dict[str, FeatureFunction]:
        """Return the functions with module state of their own: what they remember of other bars is gone."""
        again = read_own_features()
        return {name: again.get(name, function) for name, function in self.own.items()}

    def _compare(self, bars: Bars, alone: Tensor, among_others: Tensor) -> None:
        for name in names_that_differ(self.own, alone, among_others):
            self.faults.setdefault(
                name,
                f"{place_of(self.own[name])}: feature {name} has other values when {bars.symbol} is computed "
                "again: it must follow from its history alone, without random numbers, a clock, or memory of "
                f"other symbols; {FIX}",
            )

    def _look_ahead_at(
        self, bars: Bars, cut: int, expected: Tensor, functions: Mapping[str, FeatureFunction]
    ) -> None:
        self._seed += 1
        later = len(bars) - cut - 1
        # Sometimes fewer bars follow: a feature may know how many there are.
        num_later = later // 2 if self._seed % 3 == 0 and later >= 256 else later
        twin = replace_bars_after(bars, cut, self._seed, num_later)
        actual = compute_unbounded(twin, CPU, functions)[: cut + 1]
        for name in names_that_differ(self.own, expected[: cut + 1], actual):
            column = list(self.own).index(name)
            bar = int(differs(expected[: cut + 1, column], actual[:, column]).nonzero()[0])
            self.faults.setdefault(
                name,
                f"{place_of(self.own[name])}: feature {name} looks ahead: its value at {bars.symbol}'s bar of "
                f"{_minute(int(bars.open_time[bar]))} UTC depends on later bars; {FIX}",
            )

    def _count_values(self, raw: Tensor) -> None:
        values = raw[WARM_UP_BARS:]
        self._num_values += len(values)
        is_finite = values.isfinite()
        out = is_finite & (values.abs() > LARGEST_RAW)
        for kind, bad in zip(self._bad, (~is_finite, out), strict=True):
            self._bad[kind] = self._bad[kind] + bad.sum(0).numpy()

    def _windows(self, bars: Bars) -> Iterator[tuple[int, list[int]]]:
        """Yield the first bar of a window, and cuts in its second half."""
        size = len(bars)
        num_windows = -(-int(size * self._cuts_per_bar + 1) // CUTS_PER_WINDOW)
        minute = bars.open_time // MINUTE_NS % len(self._cuts_at_minute)
        random = np.random.default_rng(size)
        for place in _choose_places(bars, num_windows, random):
            first = max(0, min(place - WINDOW_BARS * 3 // 4, size - WINDOW_BARS))
            start = first + (min(WINDOW_BARS, size - first) // 2 if first else 0)
            inside = np.arange(start, max(start, min(size, first + WINDOW_BARS) - 1))
            # The minutes of the day that were cut least so far come first.
            order = np.lexsort((random.random(len(inside)), self._cuts_at_minute[minute[inside]]))
            chosen = {place, *inside[order[: CUTS_PER_WINDOW - 1]].tolist()}
            self._cuts_at_minute[minute[list(chosen)]] += 1
            yield first, sorted(chosen)


def _choose_places(bars: Bars, count: int, random: np.random.Generator) -> list[int]:
    """Choose bars to cut after: half of them where something special follows, the others spread over all."""
    size = len(bars)
    if size < 2:
        return []
    per_kind = -(-count // 16)
    moves, volume = np.diff(np.log(bars.close)), bars.volume[1:]
    gaps = np.diff(bars.open_time)
    special = [_largest(values, per_kind) for values in (gaps, moves, -moves, np.abs(moves), volume, -volume)]
    for time_of_day in (bars.open_time, new_york_time(bars.open_time)):
        ends = np.flatnonzero(np.diff(time_of_day // DAY_NS))
        special.append(random.choice(ends, min(per_kind, len(ends)), replace=False))
    spread = (np.arange(count // 2 + 1) + random.random(count // 2 + 1)) / (count // 2 + 1) * (size - 1)
    return [int(place) for place in (*np.concatenate(special), *spread.astype(np.int64))]


def choose_moments(bars: Sequence[Bars], count: int) -> list[int]:
    """Choose times of bars (ns): half of them where something special follows in some symbol."""
    random = np.random.default_rng(count)
    usable = [series for series in bars if len(series) > 1]
    places = [(series, _choose_places(series, count, random)) for series in usable]
    times = np.unique(
        np.concatenate([series.open_time[np.minimum(place, len(series) - 1)] for series, place in places])
        if places
        else np.empty(0, np.int64)
    )
    return sorted(random.choice(times, min(count, len(times)), replace=False).tolist())


def _largest(values: NDArray[np.generic], count: int) -> NDArray[np.int64]:
    return np.argpartition(values, -count)[-count:] if count < len(values) else np.arange(len(values))


def _minute(time_ns: int) -> str:
    return str(np.datetime64(time_ns, "ns").astype("datetime64[m]")).replace("T", " ")
