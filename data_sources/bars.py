"""Bars: the record of market data that leaves this package, and the rules for it."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

# A spot pair is "crypto"; a perpetual future trades round the clock, too, and its holders pay each other funding.
AssetClass = Literal["stock", "crypto", "perpetual"]
MINUTE_NS = 60_000_000_000
HOUR_NS = 60 * MINUTE_NS
DAY_NS = 24 * HOUR_NS
COLUMNS = ("open_time", "open", "high", "low", "close", "volume")
FLOW_COLUMNS = ("trades", "taker_buy_volume")  # not every source has them
# No source has earlier bars: Polygon's flat files of stocks begin in September 2003, of crypto and Binance later.
FIRST_DATE = datetime.date(2003, 1, 1)
LARGEST_JUMP = 3.0
BREAK_GAP_NS = 4 * MINUTE_NS


@dataclass(frozen=True, eq=False)
class Bars:
    """Minute bars of one symbol, oldest first.

    ``open_time`` is the start of the minute, int64 nanoseconds UTC, on whole minutes and strictly
    ascending. Minutes without a bar are absent, never invented. Prices are float64 in quote
    currency, finite and above zero, with low <= open, close <= high; volume is float64 in shares or
    coins, finite and not negative. ``funding``, None where there is none, is finite: the sum of the funding rates
    from after the open of the bar before to this one's, which a long position pays. All arrays have shape
    (num_bars,).

    Order flow: ``trades`` is the number of trades, ``taker_buy_volume`` the part of the volume whose buyer crossed
    the spread. Both are float64, NaN at bars whose source does not have it (never 0 in its place), and None where
    no bar has it. At other bars trades are whole, and 0 exactly where the volume is; 0 <= taker_buy_volume <=
    volume. Of several bars they add up, to NaN if one is not known; a split changes only taker_buy_volume.

    Raises:
        ValueError: an array breaks one of these rules; names the symbol, the rule and the first place.
    """

    symbol: str
    asset_class: AssetClass
    open_time: NDArray[np.int64]
    open: NDArray[np.float64]
    high: NDArray[np.float64]
    low: NDArray[np.float64]
    close: NDArray[np.float64]
    volume: NDArray[np.float64]
    trades: NDArray[np.float64] | None = None
    taker_buy_volume: NDArray[np.float64] | None = None
    funding: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        shape = self.open_time.shape
        if len(shape) != 1 or self.open_time.dtype != np.int64:
            raise ValueError(
                f"{self.symbol}: open_time must be a vector of int64, was {self.open_time.dtype}"
            )
        for name in (*self.columns[1:], *(() if self.funding is None else ("funding",))):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float64:
                raise ValueError(
                    f"{self.symbol}: {name} must be float64 of shape {shape}, was {array.dtype} of {array.shape}"
                )
        self._require("open_time on whole minutes", self.open_time % MINUTE_NS == 0)
        self._require("open_time strictly ascending", np.diff(self.open_time) > 0)
        for name in ("open", "high", "low", "close"):
            price = getattr(self, name)
            self._require(f"{name} finite and above zero", np.isfinite(price) & (price > 0))
        self._require("volume finite and not negative", np.isfinite(self.volume) & (self.volume >= 0))
        if self.funding is not None:
            self._require("funding finite", np.isfinite(self.funding))
        self._require("low <= open and close", self.low <= np.minimum(self.open, self.close))
        self._require("high >= open and close", self.high >= np.maximum(self.open, self.close))
        self._check_flow()

    def _check_flow(self) -> None:
        trades, taker = self.trades, self.taker_buy_volume
        if trades is not None:
            is_count = np.isfinite(trades) & (trades == np.floor(trades))
            self._require("trades whole", np.isnan(trades) | is_count)
            agrees = np.where(self.volume > 0, trades > 0, trades == 0)
            self._require("trades 0 exactly where the volume is", np.isnan(trades) | agrees)
        if taker is not None:
            self._require(
                "taker_buy_volume from 0 to the volume",
                np.isnan(taker) | ((taker >= 0) & (taker <= self.volume)),
            )

    @classmethod
    def known_valid(cls, symbol: str, asset_class: AssetClass, columns: Mapping[str, NDArray[Any]]) -> Bars:
        """Return bars of COLUMNS, perhaps with flow, that are known to be valid, without looking at a value."""
        bars = object.__new__(cls)
        for name, value in {"symbol": symbol, "asset_class": asset_class, **columns}.items():
            object.__setattr__(bars, name, value)
        return bars

    @classmethod
    def of_columns(cls, symbol: str, asset_class: AssetClass, columns: Mapping[str, NDArray[Any]]) -> Bars:
        """Return bars of COLUMNS and of those FLOW_COLUMNS that have a value; raises as the constructor."""
        names = [name for name in FLOW_COLUMNS if name in columns and not np.isnan(columns[name]).all()]
        return cls(symbol, asset_class, **{name: columns[name] for name in (*COLUMNS, *names)})

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that these bars have: COLUMNS, and perhaps of FLOW_COLUMNS."""
        return (*COLUMNS, *(name for name in FLOW_COLUMNS if getattr(self, name) is not None))

    def __len__(self) -> int:
        return len(self.open_time)

    def _require(self, rule: str, holds: NDArray[np.bool_]) -> None:
        if not holds.all():
            first = int(np.argmin(holds))
            raise ValueError(f"{self.symbol}: {rule} is broken at bar {first} of {len(self)}")

    def between(self, start_ns: int, end_ns: int) -> Bars:
        """Return the bars that open in [start_ns, end_ns), as views."""
        first, end = np.searchsorted(self.open_time, (start_ns, end_ns)).tolist()
        return self.rows(first, end)

    def rows(self, first: int, end: int) -> Bars:
        """Return the bars first to end - 1, as views."""
        columns = {name: getattr(self, name)[first:end] for name in self.columns}
        bars = Bars.known_valid(self.symbol, self.asset_class, columns)
        return bars if self.funding is None else bars.with_funding(self.funding[first:end])

    def select(self, mask: NDArray[np.bool_]) -> Bars:
        """Return the bars where ``mask`` is true, as copies, without their funding, which would change."""
        columns = {name: getattr(self, name)[mask] for name in self.columns}
        return Bars.of_columns(self.symbol, self.asset_class, columns)

    def with_funding(self, rates: NDArray[np.float64]) -> Bars:
        """Return the same bars with this ``funding``, finite float64 of as many bars."""
        bars = copy.copy(self)
        object.__setattr__(bars, "funding", rates)
        return bars


def join_columns(pieces: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Concatenate columns by name; where only some pieces have a column of the flow, the others have NaN in it."""
    names = dict.fromkeys(name for piece in pieces for name in piece)
    return {
        name: np.concatenate(
            [piece[name] if name in piece else np.full(len(piece["open_time"]), np.nan) for piece in pieces]
        )
        for name in names
    }


def find_breaks(bars: Bars) -> NDArray[np.int64]:
    """Return the indices of bars that open at under a third or over three times the previous close, after a gap.

    Another company took the ticker, a coin was redenominated, a split is unknown: what is before says nothing
    about what follows, and no position lives through it at these prices. Three missing minutes are a gap, as
    is a night: of a new level within a session ``quality.bad_ticks`` leaves out as many rows.
    """
    # Gaps first: few bars follow one, and only their prices are compared.
    places = np.flatnonzero(np.diff(bars.open_time) >= BREAK_GAP_NS) + 1
    ratio = bars.open[places] / bars.close[places - 1]
    return places[(ratio > LARGEST_JUMP) | (ratio < 1 / LARGEST_JUMP)]


def bars_of_frame(frame: pd.DataFrame, symbol: str, asset_class: AssetClass) -> Bars:
    """Return a frame's rows as bars.

    Args:
        frame: one row per closed minute, oldest first, with the columns open_time, open, high, low, close and
            volume; it may have trades and taker_buy_volume, empty where not known. ``open_time`` is the start of
            the minute: times (without a zone: UTC), ISO 8601 text, or int64 nanoseconds since 1970.
        symbol: its name.
        asset_class: "crypto" for coins, "perpetual" for perpetual futures, "stock" for US stocks.

    Raises:
        ValueError: a column is missing or has no numbers, or the rows are not valid bars; names which.
    """
    import pandas as pd  # half a second, and training does without it

    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(f"{symbol}: the frame must have {', '.join(COLUMNS)}; {', '.join(missing)} missing")
    if asset_class not in get_args(AssetClass):
        raise ValueError(f"{symbol}: asset_class must be crypto, perpetual or stock, was {asset_class}")
    times = frame["open_time"]
    form = None if times.dtype.kind in "iM" else "ISO8601"  # text
    try:
        open_time = pd.DatetimeIndex(pd.to_datetime(times, utc=True, format=form)).as_unit("ns").asi8.copy()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{symbol}: open_time must be times such as 2026-11-20 14:30") from error
    columns: dict[str, NDArray[Any]] = {"open_time": open_time}
    for name in (*COLUMNS[1:], *(name for name in FLOW_COLUMNS if name in frame)):
        try:
            # A copy: pandas may return a read-only view, and torch warns of those.
            columns[name] = np.array(frame[name], np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{symbol}: {name} must be numbers") from error
    return Bars.of_columns(symbol, asset_class, columns)
