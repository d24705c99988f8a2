"""History: one symbol's bars as tensors, with the causal building blocks that features are made of."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import MINUTE_NS, AssetClass, Bars
from data_sources.calendar import new_york_time
from envs.feature_errors import FeatureError
from envs.rolling import lagged, rolling_means
from envs.scales import VOLATILITY_FLOOR

if TYPE_CHECKING:
    from envs.panel import Peers

MINUTES_PER_DAY = 1_440
LARGEST_RAW = 1e3  # only bad prints exceed it; they must not ruin the statistics
# A symbol's first bars have almost no history: their features are 0 and not part of the statistics.
WARM_UP_BARS = 15
FLOW_WINDOWS = (1, 5, 15, 60)  # of the built-in features, which one pass computes


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
        self._peers: Peers | None = None
        self._volatility: dict[int, Tensor] = {}
        self._taker_flow: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.open_time)

    def join(self, peers: Peers | None) -> None:
        """Make it part of a panel; None: of none any more."""
        self._peers = peers

    @property
    def peers(self) -> Peers:
        """The other symbols of its asset class at the same minutes.

        Raises:
            FeatureError: it is not part of a panel: this is a feature of the others, seen by another one.
        """
        if self._peers is None:
            raise FeatureError(
                "a feature that peers are asked for must not ask its own peers: ask for another one"
            )
        return self._peers

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

    def in_volatilities(self, move: Tensor, bars: int = 1) -> Tensor:
        """Return a log move over ``bars`` bars in standard deviations of such moves."""
        return move / (self.volatility(240) * math.sqrt(bars))

    @cached_property
    def mean_volume(self) -> Tensor:
        """Mean volume of the last 240 bars, this one included."""
        return rolling_means(self.volume.float(), [240])[240]

    @cached_property
    def bar_of_day(self) -> Tensor:
        """Number of earlier bars of the same day on the market's clock, (B,) int64."""
        day = self.local_minute // MINUTES_PER_DAY
        place = torch.arange(len(self), device=day.device)
        begins = (place == 0) | (day != lagged(day, 1))
        return place - torch.where(begins, place, 0).cummax(0).values

    def taker_flow(self, bars: int) -> Tensor:
        """Volume that takers bought less what they sold, per volume, over ``bars`` bars: -1 to 1, float32.

        Bars whose takers are not known do not count; 0 where none is.
        """
        if bars not in self._taker_flow:
            windows = FLOW_WINDOWS if bars in FLOW_WINDOWS else (bars,)
            is_known, zero = self.has_taker_buy_volume, torch.zeros_like(self.volume)
            signed = rolling_means(
                torch.where(is_known, 2 * self.taker_buy_volume - self.volume, zero), windows
            )
            traded = rolling_means(torch.where(is_known, self.volume, zero), windows)
            for window in windows:
                share = torch.where(traded[window] > 0, signed[window] / traded[window], zero)
                self._taker_flow[window] = share.float()
        return self._taker_flow[bars]


def local_minutes(open_time: NDArray[np.int64], asset_class: AssetClass) -> NDArray[np.int64]:
    """Return minutes since a Monday 00:00 on the exchange's clock: UTC for crypto, New York for stocks."""
    local_time = new_york_time(open_time) if asset_class == "stock" else open_time
    return local_time // MINUTE_NS + 3 * MINUTES_PER_DAY  # 1970-01-01 was a Thursday
