"""The features of the group "flow": the order flow of the symbol, with a mask where its source has none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from envs.history import FLOW_WINDOWS, History
from envs.rolling import log_ratio, rolling_means


def taker_flow_is_known(history: History) -> Tensor:
    """Return 1 where the bar has its takers' volume, else 0."""
    return history.has_taker_buy_volume.float()


def _taker_flow_over(bars: int) -> Callable[[History], Tensor]:
    def taker_flow(history: History) -> Tensor:
        return history.taker_flow(bars)

    taker_flow.__name__ = f"taker_flow_{bars}"
    return taker_flow


def trades_are_known(history: History) -> Tensor:
    """Return 1 where the bar has its number of trades, else 0."""
    return history.has_trades.float()


def trades(history: History) -> Tensor:
    """Log of the number of trades / its mean over the known ones of the last 240 bars; 0 where not known."""
    usual, _ = _known_means(history)
    return torch.where(history.has_trades, log_ratio(history.trades, usual), torch.zeros_like(usual)).float()


def trade_size(history: History) -> Tensor:
    """Log of the volume per trade / that of the last 240 bars; 0 where there is no trade, or not known."""
    usual_trades, usual_volume = _known_means(history)
    size, usual = history.volume / history.trades, usual_volume / usual_trades
    has_trades = history.has_trades & (history.trades > 0)
    return torch.where(has_trades, log_ratio(size, usual), torch.zeros_like(usual)).float()


def _known_means(history: History) -> tuple[Tensor, Tensor]:
    """Return the means of trades and volume over those of the last 240 bars whose trades are known."""
    is_known, zero = history.has_trades, torch.zeros_like(history.volume)
    share, trades, volume = (
        rolling_means(torch.where(is_known, series, zero), [240])[240]
        for series in (torch.ones_like(zero), history.trades, history.volume)
    )
    share = share.clamp(min=1 / 240)  # none is known: both means are 0
    return trades / share, volume / share


FLOW_FEATURES = (
    taker_flow_is_known,
    *(_taker_flow_over(bars) for bars in FLOW_WINDOWS),
    trades_are_known,
    trades,
    trade_size,
)
