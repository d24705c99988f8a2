"""Baselines that a policy must beat, as actions of the same ledger, on the same bars, at the same costs.

Those of one's own are functions in ``evaluation/own_baselines.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from envs.feature_errors import FeatureError, describe, import_own, place_of
from envs.market import Market

BUY_AND_HOLD, ALWAYS_FLAT, MOMENTUM = "buy and hold", "always flat", "momentum"
BASELINES = (BUY_AND_HOLD, ALWAYS_FLAT, MOMENTUM)
# A day of crypto, near four sessions of a stock. Over a shorter past the sign turns so often that fees and
# slippage alone decide the result, and a rule that always loses is no bar to clear.
MOMENTUM_BARS = 1_440


def actions_after(
    name: str, market: Market, positions: Sequence[float], bars: Tensor, first_bars: Tensor
) -> Tensor:
    """Return a baseline's actions after given bars have closed, as indices of ``positions``.

    - buy and hold: the largest position that is not above 1, from the first decision on;
    - always flat: cash;
    - momentum: the position closest to the sign of the return over the past ``MOMENTUM_BARS`` closed bars; cash
      while a symbol has fewer.

    Args:
        name: one of ``BASELINES``.
        market: has the bars.
        positions: the targets.
        bars: (H, S) int64, the newest closed bar at each decision.
        first_bars: (S,) int64, the first bar of each symbol.

    Raises:
        ValueError: 0 is not among the positions.
    """
    if 0.0 not in positions:
        raise ValueError(f"positions={','.join(map(str, positions))} must have 0 among them")
    if name == MOMENTUM:
        return _momentum(market, positions, bars, first_bars)
    target = max(p for p in positions if p <= 1) if name == BUY_AND_HOLD else 0.0
    return torch.full_like(bars, positions.index(target))


def _momentum(market: Market, positions: Sequence[float], bars: Tensor, first_bars: Tensor) -> Tensor:
    close = market.quotes[:, 1]
    past = bars - MOMENTUM_BARS
    # Before a break, prices are another symbol's.
    newest_break = torch.searchsorted(market.breaks, bars, right=True)
    first_bars = torch.maximum(first_bars, F.pad(market.breaks, (1, 0))[newest_break])
    moved = torch.where(past < first_bars, 0.0, close[bars] - close[past.clamp(min=0)])
    # Of two equally close positions, the smaller one.
    nearest = [
        positions.index(min(positions, key=lambda p: (abs(p - sign), abs(p)))) for sign in (-1.0, 0.0, 1.0)
    ]
    return torch.tensor(nearest, device=bars.device)[moved.sign().long() + 1]


# --- evaluation/own_baselines.py ----------------------------------------------------------------------------

OWN_FILE = Path(__file__).with_name("own_baselines.py")
NUM_CUTS = (
    12  # of each symbol's bars, after which later ones are taken away to see whether a rule looks ahead
)


@dataclass(frozen=True)
class Past:
    """One symbol's closed bars in a row, the newest last, (n,) each; a rule at bar t may use bars up to t."""

    symbol: str
    asset_class: str  # "stock", "crypto" or "perpetual"
    open_time: Tensor  # int64 ns UTC
    open: Tensor  # float64
    close: Tensor  # float64

    def log_return(self, bars: int) -> Tensor:
        """Return the log return of the close over so many bars, 0 where there are fewer before."""
        log_close = self.close.log()
        moved = torch.zeros_like(log_close)
        if bars < len(moved):
            moved[bars:] = log_close[bars:] - log_close[:-bars]
        return moved

    def until(self, count: int) -> Past:
        """Return the first bars."""
        columns = (self.open_time[:count], self.open[:count], self.close[:count])
        return Past(self.symbol, self.asset_class, *(column.clone() for column in columns))


BaselineFunction = Callable[[Past], Tensor]
_registered: dict[str, BaselineFunction] = {}


def baseline(function: BaselineFunction) -> BaselineFunction:
    """Register a baseline under its function's name, with spaces."""
    name = function.__name__.replace("_", " ")
    if name in _registered:
        raise ValueError(f"baseline {function.__name__} is already registered; choose another name")
    _registered[name] = function
    return function


def own_baselines() -> dict[str, BaselineFunction]:
    """Return the baselines of one's own by name.

    Raises:
        FeatureError: evaluation/own_baselines.py cannot be run.
    """
    import_own("evaluation.own_baselines", OWN_FILE, "baselines of your own")
    return dict(_registered)


def own_actions(
    function: BaselineFunction, market: Market, symbols: Sequence[str], positions: Sequence[float]
) -> Tensor:
    """Return a baseline's action after every bar of some symbols, (B,) int64 indices of ``positions``.

    The position nearest to what it wants; of two equally near ones the smaller; cash where it wants no number.

    Raises:
        FeatureError: it failed, returned something else, or looks ahead.
    """
    actions = torch.full((len(market.open_time),), positions.index(0.0), device=market.device)
    targets = torch.tensor(sorted(positions, key=abs), dtype=torch.float64, device=market.device)
    places = torch.tensor([positions.index(p) for p in sorted(positions, key=abs)], device=market.device)
    breaks = market.breaks.tolist()
    for symbol in symbols:
        number = market.symbols.index(symbol)
        first, last = market.offsets[number : number + 2].tolist()
        ends = [first, *(at for at in breaks if first < at < last), last]
        # Before a break, prices are another symbol's.
        for begin, end in itertools.pairwise(ends):
            past = Past(
                symbol,
                market.asset_classes[number],
                market.open_time[begin:end],
                *(market.quotes[begin:end, column].double() for column in (0, 1)),
            )
            wanted = _wanted(function, past)
            _check_cuts(function, past, wanted)
            nearest = (wanted[:, None] - targets).abs().argmin(1)
            actions[begin:end] = torch.where(wanted.isnan(), places[0], places[nearest])
    return actions


def _wanted(function: BaselineFunction, past: Past) -> Tensor:
    """Return what a baseline wants after each bar, (n,) float64."""
    try:
        wanted = function(past)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise FeatureError(f"baseline {function.__name__} failed: {describe(error, OWN_FILE)}") from error
    if not isinstance(wanted, Tensor) or wanted.shape != past.close.shape:
        shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise FeatureError(
            f"{place_of(function)}: baseline {function.__name__} must return a position for every bar, a tensor "
            f"of shape ({len(past.close)},), was {shape}"
        )
    return wanted.double()


def _check_cuts(function: BaselineFunction, past: Past, wanted: Tensor) -> None:
    length = len(past.close)
    for number in range(1, NUM_CUTS + 1):
        cut = max(1, length * number // (NUM_CUTS + 1))
        then = _wanted(function, past.until(cut))
        if not torch.equal(then.nan_to_num(9e9), wanted[:cut].nan_to_num(9e9)):
            raise FeatureError(
                f"{place_of(function)}: baseline {function.__name__} looks ahead, or depends on more than its "
                f"past: without the bars after number {cut} of {past.symbol} it wants another position before them"
            )
