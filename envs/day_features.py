"""The features of the group "day": the minute of the hour, and where the price is in its day.

A day is the market's own: from midnight UTC for crypto, New York for stocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from envs.history import History
from envs.rolling import running


def hour_sine(history: History) -> Tensor:
    """Sine of the minute of the hour."""
    return _angle(history, 60).sin()


def hour_cosine(history: History) -> Tensor:
    """Cosine of the minute of the hour."""
    return _angle(history, 60).cos()


def quarter_hour_sine(history: History) -> Tensor:
    """Sine of the minute of the quarter hour: orders of programs come at its begin."""
    return _angle(history, 15).sin()


def quarter_hour_cosine(history: History) -> Tensor:
    """Cosine of the minute of the quarter hour."""
    return _angle(history, 15).cos()


def below_day_high(history: History) -> Tensor:
    """Log of the close / the day's high so far, per volatility of an hour: 0 at the high."""
    return _distance(history, running(history.high, history.bar_of_day, torch.maximum))


def above_day_low(history: History) -> Tensor:
    """Log of the close / the day's low so far, per volatility of an hour: 0 at the low."""
    return _distance(history, running(history.low, history.bar_of_day, torch.minimum))


def above_day_average(history: History) -> Tensor:
    """Log of the close / the day's volume-weighted average price so far (VWAP), per volatility of an hour."""
    typical = (history.high + history.low + history.close) / 3
    traded = running(history.volume, history.bar_of_day, torch.add)
    paid = running(history.volume * typical, history.bar_of_day, torch.add)
    return _distance(history, torch.where(traded > 0, paid / traded, history.close))


def above_previous_close(history: History) -> Tensor:
    """Log of the close / the last close of the day before, per volatility of an hour; 0 on the first day."""
    place = torch.arange(len(history), device=history.close.device) - history.bar_of_day - 1
    before = history.close[place.clamp(min=0)]
    return _distance(history, torch.where(place >= 0, before, history.close))


def _distance(history: History, price: Tensor) -> Tensor:
    return history.in_volatilities((history.close / price).log().float(), 60)


def _angle(history: History, minutes: int) -> Tensor:
    return (history.local_minute % minutes).float() * (2 * math.pi / minutes)


DAY_FEATURES = (
    hour_sine,
    hour_cosine,
    quarter_hour_sine,
    quarter_hour_cosine,
    below_day_high,
    above_day_low,
    above_day_average,
    above_previous_close,
)
