"""Features: what the policy sees of a market, computed causally per symbol.

A feature is a function of :class:`History` whose value at bar t depends on bars up to t alone, even in its
rounding: rolling sums are built by doubling, never as differences of cumulative sums. So a value depends only
on the bars in its window, and stays the same to the bit after older bars are trimmed or newer ones arrive.
Features are scale-free: a symbol's price and volume level cancel out.

``docs/features.md`` lists the features and shows how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import MINUTE_NS, AssetClass, Bars, find_breaks
from data_sources.calendar import new_york_time
from envs.feature_errors import FeatureError, evaluate, import_own
from envs.rolling import lagged, rolling_max, rolling_means
from envs.scales import VOLATILITY_FLOOR, robust_moments

FeatureFunction = Callable[["History"], Tensor]
FEATURES: dict[str, FeatureFunction] = {}

CLIP = 8.0  # normalised features stay within this many standard deviations
LARGEST_RAW = 1e3  # only bad prints exceed it; they must not ruin the statistics
# A symbol's first bars have almost no history: their features are 0 and not part of the statistics.
WARM_UP_BARS = 15
MINUTES_PER_DAY = 1_440
SESSION_OPEN_MINUTE, SESSION_MINUTES = 570, 390  # 09:30 to 16:00 in New York


def feature(function: FeatureFunction) -> FeatureFunction:
    """Register a feature under its function's name; the order of registration is the order of columns."""
    if function.__name__ in FEATURES:
        raise ValueError(f"feature {function.__name__} is already registered; choose another name")
    FEATURES[function.__name__] = function
    return function


class History:
    """One symbol's bars as tensors (B,), with causal building blocks for features.

    Prices and volume are float64, derived series float32. A window that reaches before the first bar is shorter
    there; a lag that does gives 0.
    """

    def __init__(self, bars: Bars, device: torch.device) -> None:
        self.asset_class: AssetClass = bars.asset_class
        self.open, self.high, self.low, self.close, self.volume = (
            torch.from_numpy(np.ascontiguousarray(column)).to(device)
            for column in (bars.open, bars.high, bars.low, bars.close, bars.volume)
        )
        self.open_time = torch.from_numpy(np.ascontiguousarray(bars.open_time)).to(device)
        self.local_minute = torch.from_numpy(local_minutes(bars.open_time, bars.asset_class)).to(device)
        self._bars = bars
        self._volatility: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.open_time)

    @property
    def is_crypto(self) -> bool:
        """Whether the market never closes."""
        return self.asset_class != "stock"

    @cached_property
    def trades(self) -> Tensor:
        """Number of trades, float64; NaN where it is not known, see ``has_trades``."""
        return self._flow("trades")

    @cached_property
    def taker_buy_volume(self) -> Tensor:
        """Volume that takers bought, float64; NaN where it is not known, see ``has_taker_buy_volume``."""
        return self._flow("taker_buy_volume")

    @property
    def has_trades(self) -> Tensor:
        """Mask of the bars whose number of trades is known, (B,) bool."""
        return ~self.trades.isnan()

    @property
    def has_taker_buy_volume(self) -> Tensor:
        """Mask of the bars whose takers' volume is known, (B,) bool."""
        return ~self.taker_buy_volume.isnan()

    def _flow(self, name: str) -> Tensor:
        """Return a column of the order flow; on the device only once a feature asks for it."""
        column = getattr(self._bars, name)
        if column is None:
            return torch.full_like(self.volume, math.nan)
        return torch.from_numpy(np.ascontiguousarray(column)).to(self.volume.device)

    @cached_property
    def log_close(self) -> Tensor:
        """Log of the close, float64: take differences before rounding to float32."""
        return self.close.log()

    @cached_property
    def log_range(self) -> Tensor:
        """Log of high / low."""
        return (self.high / self.low).log().float()

    @cached_property
    def minutes_since_previous(self) -> Tensor:
        """Minutes from the previous bar's open; 1 at the first bar."""
        minutes = (self.open_time - lagged(self.open_time, 1)) / MINUTE_NS
        minutes[:1] = 1.0
        return minutes.float()

    def log_return(self, bars: int) -> Tensor:
        """Log return of the close over ``bars`` bars; 0 where the history is shorter."""
        change = (self.log_close - lagged(self.log_close, bars)).float()
        change[:bars] = 0.0
        return change

    def volatility(self, bars: int) -> Tensor:
        """Volatility per bar, from the high-low ranges of the last ``bars`` bars (Parkinson 1980).

        Ranges exclude overnight jumps, which would dominate the window for hours.
        """
        if not self._volatility:
            # All windows of the built-in features in one pass.
            windows = sorted({15, 60, 240, 1440, bars})
        elif bars not in self._volatility:
            windows = [bars]
        else:
            windows = []
        for window, mean in rolling_means(self.log_range.square(), windows).items():
            self._volatility[window] = (mean / (4 * math.log(2))).sqrt().clamp_(min=VOLATILITY_FLOOR)
        return self._volatility[bars]

    @cached_property
    def mean_volume(self) -> Tensor:
        """Mean volume of the last 240 bars, this one included."""
        return rolling_means(self.volume.float(), [240])[240]


def local_minutes(open_time: NDArray[np.int64], asset_class: AssetClass) -> NDArray[np.int64]:
    """Return minutes since a Monday 00:00 on the exchange's clock: UTC for crypto, New York for stocks."""
    local_time = new_york_time(open_time) if asset_class == "stock" else open_time
    return local_time // MINUTE_NS + 3 * MINUTES_PER_DAY  # 1970-01-01 was a Thursday


def _scale_by_volatility(history: History, move: Tensor, bars: int = 1) -> Tensor:
    return move / (history.volatility(240) * math.sqrt(bars))


def _return_over(bars: int) -> FeatureFunction:
    def scaled_return(history: History) -> Tensor:
        return _scale_by_volatility(history, history.log_return(bars), bars)

    scaled_return.__name__ = f"return_{bars}"
    return feature(scaled_return)


for _bars in (1, 5, 15, 60, 240, 1440):
    _return_over(_bars)


@feature
def jump(history: History) -> Tensor:
    """Log of this open / the previous close: the move between two bars, such as overnight."""
    change = (history.open.log() - lagged(history.log_close, 1)).float()
    change[:1] = 0.0
    return _scale_by_volatility(history, change)


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
    return _scale_by_volatility(history, history.log_range)


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


def _log_ratio(volume: Tensor, usual: Tensor) -> Tensor:
    # A twentieth of the usual volume is added, so the log is finite; 0 where the usual volume is 0.
    ratio = (volume + 0.05 * usual) / (1.05 * usual)
    return torch.where(usual > 0, ratio.log(), torch.zeros_like(usual))


@feature
def volume(history: History) -> Tensor:
    """Log of the volume / its mean over the last 240 bars."""
    return _log_ratio(history.volume.float(), history.mean_volume)


@feature
def volume_trend(history: History) -> Tensor:
    """Log of the mean volume of 15 bars / that of 240."""
    return _log_ratio(rolling_means(history.volume.float(), [15])[15], history.mean_volume)


@feature
def volume_for_the_time_of_day(history: History) -> Tensor:
    """Log of the volume / its mean over the last 300 earlier bars in the same half hour of the day."""
    volumes, window = history.volume.float(), 300
    half_hour = history.local_minute % MINUTES_PER_DAY // 30
    usual = torch.zeros_like(volumes)
    # Each half hour separately: a shared running sum would carry rounding from the future.
    order = torch.argsort(half_hour, stable=True)
    for places in order.split(torch.bincount(half_hour, minlength=48).tolist()):
        usual[places] = lagged(rolling_means(volumes[places], [window])[window], 1)
    return _log_ratio(volumes, usual)


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
    bars: Bars, device: torch.device, functions: Mapping[str, FeatureFunction] | None = None
) -> Tensor:
    """Return the raw features of one symbol, (B, F) float32, never NaN or infinite.

    A break (``data_sources.bars.find_breaks``) begins a new history: no feature looks back across it.

    Raises:
        FeatureError: a feature failed, returned no vector of the bars, or changed its history; or
            envs/own_features.py cannot be run.
    """
    raw = compute_unbounded(bars, device, functions)
    return raw.nan_to_num_(0.0, 0.0, 0.0).clamp_(-LARGEST_RAW, LARGEST_RAW)


@torch.no_grad()
def compute_unbounded(
    bars: Bars, device: torch.device, functions: Mapping[str, FeatureFunction] | None = None
) -> Tensor:
    """Return the features as their functions return them, (B, F) float32, with NaN and infinities."""
    functions = registered_features() if functions is None else functions
    raw = torch.empty(len(bars), len(functions), device=device)
    for first, end in pairwise([0, *find_breaks(bars).tolist(), len(bars)]):
        history = History(bars.rows(first, end), device)
        for column, (name, function) in enumerate(functions.items()):
            raw[first:end, column] = evaluate(name, function, history, end - first)
    return raw


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and deviation (F,) of every feature before the holdout, fixed for the whole training; see scales.py."""

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

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn raw features (B, F) of a symbol into standard deviations, clipped, float16."""
        mean, std = self.mean.to(raw.device), self.std.to(raw.device)
        normalised = ((raw - mean) / std).clamp_(-CLIP, CLIP).half()
        normalised[:WARM_UP_BARS] = 0.0
        return normalised

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain types and CPU tensors."""
        return {"names": list(self.names), "mean": self.mean.cpu(), "std": self.std.cpu()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> FeatureStatistics:
        """Restore from ``state_dict``."""
        return FeatureStatistics(tuple(state["names"]), state["mean"], state["std"])


# --- envs/own_features.py -------------------------------------------------------------------------------------

BUILT_IN = tuple(FEATURES)
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
