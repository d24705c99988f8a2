"""Features: what the policy sees of a market, computed causally per symbol.

A feature is a function of :class:`History` whose value at bar t depends on bars up to t alone, even in its
rounding: rolling sums are built by doubling, never as differences of cumulative sums. So a value depends only
on the bars in its window, and stays the same to the bit after older bars are trimmed or newer ones arrive.
Features are scale-free: a symbol's price and volume level cancel out.

``docs/features.md`` lists the features and shows how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sources.bars import Bars
from envs.config import FIRST_FEATURES
from envs.day_features import DAY_FEATURES
from envs.feature_errors import FeatureError, evaluate, import_own
from envs.flow_features import FLOW_FEATURES
from envs.history import LARGEST_RAW, MINUTES_PER_DAY, WARM_UP_BARS, History, local_minutes
from envs.panel import Panel
from envs.panel_features import PANEL_FEATURES
from envs.rolling import lagged, log_ratio, rolling_max, rolling_means
from envs.scales import robust_moments

__all__ = [
    "History",
    "feature",
    "lagged",
    "local_minutes",
    "rolling_max",
    "rolling_means",
]  # for own features

FeatureFunction = Callable[[History], Tensor]
FEATURES: dict[str, FeatureFunction] = {}

CLIP = 8.0  # normalised features stay within this many standard deviations
SESSION_OPEN_MINUTE, SESSION_MINUTES = 570, 390  # 09:30 to 16:00 in New York
SAME_TIME_BARS = 300  # of the same half hour of the day: of ten days, where every minute has a bar


def feature(function: FeatureFunction) -> FeatureFunction:
    """Register a feature under its function's name; the order of registration is the order of columns."""
    if function.__name__ in FEATURES:
        raise ValueError(f"feature {function.__name__} is already registered; choose another name")
    FEATURES[function.__name__] = function
    return function


def _return_over(bars: int) -> FeatureFunction:
    def scaled_return(history: History) -> Tensor:
        return history.in_volatilities(history.log_return(bars), bars)

    scaled_return.__name__ = f"return_{bars}"
    return feature(scaled_return)


for _bars in (1, 5, 15, 60, 240, 1440):
    _return_over(_bars)


@feature
def jump(history: History) -> Tensor:
    """Log of this open / the previous close: the move between two bars, such as overnight."""
    change = (history.open.log() - lagged(history.log_close, 1)).float()
    change[:1] = 0.0
    return history.in_volatilities(change)


@feature
def volatility_quarter_hour(history: History) -> Tensor:
    """Log of the volatility of 15 bars / that of 240."""
    return (history.volatility(15) / history.volatility(240)).log()


@feature
def volatility_hour(history: History) -> Tensor:
    """Log of the volatility of 60 bars / that of 1,440."""
    return (history.volatility(60) / history.volatility(1440)).log()


@feature
def volatility_level(history: History) -> Tensor:
    """Log of the volatility of 1,440 bars: a quiet stock or a wild coin."""
    return history.volatility(1440).log()


@feature
def bar_range(history: History) -> Tensor:
    """Log of high / low, in volatilities."""
    return history.in_volatilities(history.log_range)


@feature
def close_in_bar(history: History) -> Tensor:
    """Position of the close between this bar's low (-1) and high (+1); 0 where they are equal."""
    return _position_in_range(history.close, history.low, history.high)


def _position_in_range(price: Tensor, low: Tensor, high: Tensor) -> Tensor:
    width = high - low
    return torch.where(width > 0, 2 * (price - low) / width - 1, torch.zeros_like(width)).float()


@feature
def close_in_hour(history: History) -> Tensor:
    """Position of the close between the low (-1) and the high (+1) of the last 60 bars."""
    return _position_in_range(history.close, -rolling_max(-history.low, 60), rolling_max(history.high, 60))


@feature
def close_in_four_hours(history: History) -> Tensor:
    """Position of the close between the low (-1) and the high (+1) of the last 240 bars."""
    return _position_in_range(history.close, -rolling_max(-history.low, 240), rolling_max(history.high, 240))


@feature
def volume(history: History) -> Tensor:
    """Log of the volume / its mean over the last 240 bars."""
    return log_ratio(history.volume.float(), history.mean_volume)


@feature
def volume_trend(history: History) -> Tensor:
    """Log of the mean volume of 15 bars / that of 240."""
    return log_ratio(rolling_means(history.volume.float(), [15])[15], history.mean_volume)


@feature
def volume_for_the_time_of_day(history: History) -> Tensor:
    """Log of the volume / its mean over the last 300 earlier bars in the same half hour of the day."""
    volumes = history.volume.float()
    half_hour = history.local_minute % MINUTES_PER_DAY // 30
    # A column for each half hour that there is: a shared running sum would carry rounding from the future.
    counts = torch.bincount(half_hour, minlength=48)
    column, num_columns = (counts > 0).cumsum(0) - 1, int((counts > 0).sum())
    order = torch.argsort(half_hour, stable=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(order))
    place = torch.empty_like(order)
    place[order] = (torch.arange(len(order), device=order.device) - first) * num_columns
    place += column[half_hour]
    table = volumes.new_zeros(int(counts.max()), num_columns)
    table.view(-1)[place] = volumes
    means = rolling_means(table, [SAME_TIME_BARS])[SAME_TIME_BARS]
    usual = lagged(means, 1).view(-1)[place]
    return log_ratio(volumes, usual)


@feature
def minutes_since_previous_bar(history: History) -> Tensor:
    """Log of the minutes since the previous bar: 0 for consecutive bars, 7 overnight."""
    return history.minutes_since_previous.log()


def _angle(history: History, period: int) -> Tensor:
    return (history.local_minute % period).float() * (2 * math.pi / period)


@feature
def day_sine(history: History) -> Tensor:
    """Sine of the time of day, UTC for crypto and New York for stocks."""
    return _angle(history, MINUTES_PER_DAY).sin()


@feature
def day_cosine(history: History) -> Tensor:
    """Cosine of the time of day, UTC for crypto and New York for stocks."""
    return _angle(history, MINUTES_PER_DAY).cos()


@feature
def session_clock(history: History) -> Tensor:
    """Time in a stock's session, -1 at 09:30 to +1 at 16:00 New York; 0 for crypto."""
    minute = (history.local_minute % MINUTES_PER_DAY).float() - SESSION_OPEN_MINUTE
    clock = (2 * minute / SESSION_MINUTES - 1).clamp_(-1.5, 1.5)
    return torch.zeros_like(clock) if history.is_crypto else clock


@feature
def week_sine(history: History) -> Tensor:
    """Sine of the time in the week."""
    return _angle(history, 7 * MINUTES_PER_DAY).sin()


@feature
def week_cosine(history: History) -> Tensor:
    """Cosine of the time in the week."""
    return _angle(history, 7 * MINUTES_PER_DAY).cos()


@feature
def is_crypto(history: History) -> Tensor:
    """Return +1 for crypto, -1 for stocks."""
    return torch.full((len(history),), 1.0 if history.is_crypto else -1.0, device=history.close.device)


def compute(
    bars: Bars,
    device: torch.device,
    functions: Mapping[str, FeatureFunction] | None = None,
    panel: Panel | None = None,
) -> Tensor:
    """Return the raw features of one symbol, (B, F) float32, never NaN or infinite.

    A break (``data_sources.bars.find_breaks``) begins a new history: no feature looks back across it.

    Args:
        bars: of the symbol.
        device: of the result.
        functions: name -> feature; default: all registered ones.
        panel: the market that the symbol is in; default: it is alone.

    Raises:
        FeatureError: a feature failed, returned no vector of the bars, or changed its history; or
            envs/own_features.py cannot be run.
    """
    raw = compute_unbounded(bars, device, functions, panel)
    return raw.nan_to_num_(0.0, 0.0, 0.0).clamp_(-LARGEST_RAW, LARGEST_RAW)


@torch.no_grad()
def compute_unbounded(
    bars: Bars,
    device: torch.device,
    functions: Mapping[str, FeatureFunction] | None = None,
    panel: Panel | None = None,
) -> Tensor:
    """Return the features as their functions return them, (B, F) float32, with NaN and infinities."""
    functions = registered_features() if functions is None else functions
    panel = panel_of([bars], device, functions) if panel is None else panel
    raw = torch.empty(len(bars), len(functions), device=device)
    for first, end, history in panel.histories(bars):
        for column, (name, function) in enumerate(functions.items()):
            raw[first:end, column] = evaluate(name, function, history, end - first)
    return raw


def panel_of(
    bars: Sequence[Bars],
    device: torch.device | str,
    functions: Mapping[str, FeatureFunction] | None = None,
    members: Collection[str] | None = None,
) -> Panel:
    """Return the panel of a market, whose features may ask their peers for any registered one or ``functions``."""
    return Panel(bars, device, registered_features() | dict(functions or {}), members)


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and deviation (F,) of every feature before the holdout, fixed for the whole training; see scales.py.

    Of an ensemble of several trainings both are (G, F): each feature is scaled G times, side by side.
    """

    names: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @staticmethod
    def measure(
        names: Sequence[str], raws: Iterable[Tensor], training_bars: Sequence[int]
    ) -> FeatureStatistics:
        """Measure over the first ``training_bars[s]`` bars of each symbol, without its warm-up.

        Args:
            names: of the F features.
            raws: per symbol, (B, F); consumed one at a time, so a generator saves memory.
            training_bars: per symbol, the number of bars before the holdout.

        Raises:
            ValueError: no symbol has enough bars before the holdout.
        """
        given = zip(raws, training_bars, strict=True)
        parts = (raw[WARM_UP_BARS:num_bars].double() for raw, num_bars in given)
        count, mean, std = robust_moments(parts, len(names))
        if not count:
            raise ValueError(
                f"no symbol has over {WARM_UP_BARS} bars before the holdout: "
                "fetch older bars or lower holdout_days"
            )
        return FeatureStatistics(tuple(names), mean.float(), std.float())

    def of(self, names: Sequence[str]) -> FeatureStatistics:
        """Return those of some features."""
        places = [self.names.index(name) for name in names]
        return FeatureStatistics(tuple(names), self.mean[places], self.std[places])

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn raw features (B, F) of a symbol into standard deviations (B, num_columns), clipped, float16."""
        mean, std = self.mean.to(raw.device), self.std.to(raw.device)
        normalised = ((raw.unsqueeze(-2) - mean) / std).clamp_(-CLIP, CLIP).half().flatten(1)
        normalised[:WARM_UP_BARS] = 0.0
        return normalised

    @property
    def num_columns(self) -> int:
        """Columns of scaled features: G x F."""
        return self.mean.numel()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain types and CPU tensors."""
        return {"names": list(self.names), "mean": self.mean.cpu(), "std": self.std.cpu()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> FeatureStatistics:
        """Restore from ``state_dict``."""
        return FeatureStatistics(tuple(state["names"]), state["mean"], state["std"])


# --- groups, of which the setting ``features`` names some ------------------------------------------------------

GROUPS: dict[str, tuple[str, ...]] = {"symbol": tuple(FEATURES)}
for _group, _functions in {"day": DAY_FEATURES, "flow": FLOW_FEATURES, "panel": PANEL_FEATURES}.items():
    GROUPS[_group] = tuple(feature(function).__name__ for function in _functions)
BUILT_IN = tuple(FEATURES)


def chosen_features(groups: Iterable[str] = FIRST_FEATURES) -> dict[str, FeatureFunction]:
    """Return the features of some groups and all of one's own, in the order of their columns.

    Raises:
        FeatureError: envs/own_features.py cannot be run.
    """
    left_out = set(BUILT_IN) - {name for group in groups for name in GROUPS.get(group, ())}
    return {name: function for name, function in registered_features().items() if name not in left_out}


# --- envs/own_features.py -------------------------------------------------------------------------------------

OWN_FILE = Path(__file__).with_name("own_features.py")


def registered_features() -> dict[str, FeatureFunction]:
    """Return all features by name, the built-in ones first.

    Raises:
        FeatureError: envs/own_features.py cannot be run.
    """
    if _own_error:
        raise FeatureError(_own_error)
    return dict(FEATURES)


def own_features() -> dict[str, FeatureFunction]:
    """Return the features that are not built in; raises as ``registered_features``."""
    return {name: function for name, function in registered_features().items() if name not in BUILT_IN}


def read_own_features() -> dict[str, FeatureFunction]:
    """Run envs/own_features.py again and return its functions, which remember nothing of earlier calls."""
    registered = dict(FEATURES)
    for name in FEATURES.keys() - set(BUILT_IN):
        del FEATURES[name]
    try:
        names = {"__name__": "envs.own_features", "__file__": str(OWN_FILE)}
        exec(compile(OWN_FILE.read_bytes(), str(OWN_FILE), "exec"), names)
        return {name: function for name, function in FEATURES.items() if name not in BUILT_IN}
    finally:
        FEATURES.clear()
        FEATURES.update(registered)


_own_error = ""
try:  # here, so that they are registered wherever features are computed
    import_own("envs.own_features", OWN_FILE)
except FeatureError as error:
    _own_error = str(error)
    for _name in FEATURES.keys() - set(BUILT_IN):  # those before the error: all belong together
        del FEATURES[_name]
