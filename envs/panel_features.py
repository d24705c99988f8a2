"""The features of the group "panel": the other symbols of the asset class at the same minute, closed bars only.

With one symbol there are no others: the residuals are its own returns, and everything else is 0 (the beta 1).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from envs.history import FLOW_WINDOWS, History
from envs.rolling import log_ratio, rolling_means

HORIZONS = (1, 2, 3, 5, 15, 60, 240)
Feature = Callable[[History], Tensor]


def _named(name: str, function: Feature) -> Feature:
    function.__name__ = name
    return function


def _market_return(bars: int) -> Feature:
    return _named(
        f"market_return_{bars}", lambda history: _scaled(history, history.peers.log_return(bars), bars)
    )


def _weighted_market_return(bars: int) -> Feature:
    def function(history: History) -> Tensor:
        return _scaled(history, history.peers.log_return(bars, weighted=True), bars)

    return _named(f"weighted_market_return_{bars}", function)


def _residual(bars: int) -> Feature:
    def function(history: History) -> Tensor:
        explained = history.peers.beta * history.peers.log_return(bars)
        return _scaled(history, history.log_return(bars) - explained, bars)

    return _named(f"residual_{bars}", function)


def _leader_return(name: str, number: int, bars: int) -> Feature:
    def function(history: History) -> Tensor:
        return _scaled(history, history.peers.leader_log_return(number, bars), bars)

    return _named(f"{name}_{bars}", function)


def _scaled(history: History, move: Tensor, bars: int) -> Tensor:
    return history.in_volatilities(move, bars)


def beta(history: History) -> Tensor:
    """Slope of the symbol's returns on those of the others, over 1,440 bars."""
    return history.peers.beta


def dispersion(history: History) -> Tensor:
    """Log of the deviation of all symbols' returns at this minute / its mean over 240 bars."""
    spread = history.peers.spread("return_1")
    return log_ratio(spread, rolling_means(spread, [240])[240])


def market_volume(history: History) -> Tensor:
    """Mean over the others of the log of volume / its mean over 240 bars."""
    return history.peers.mean("volume")


def _share_up(bars: int) -> Feature:
    return _named(f"share_up_{bars}", lambda history: history.peers.share_up(f"return_{bars}"))


def _market_flow(bars: int) -> Feature:
    return _named(f"market_flow_{bars}", lambda history: history.peers.mean(f"taker_flow_{bars}"))


def _rank(name: str) -> Feature:
    return _named(f"{name}_rank", lambda history: history.peers.rank(name))


PANEL_FEATURES = (
    *map(_market_return, HORIZONS),
    *map(_weighted_market_return, HORIZONS),
    *map(_residual, HORIZONS),
    *(_leader_return("leader_return", 0, bars) for bars in (1, 5, 15, 60)),
    *(_leader_return("second_leader_return", 1, bars) for bars in (1, 5, 15, 60)),
    beta,
    dispersion,
    *map(_share_up, (1, 15, 60)),
    *map(_rank, ("return_1", "return_15", "return_60", "volume", "taker_flow_5")),
    market_volume,
    *map(_market_flow, FLOW_WINDOWS),
)
