"""Baselines: what a policy must beat, as actions of the same ledger, at the same bars and costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from envs.market import Market

BUY_AND_HOLD, ALWAYS_FLAT, MOMENTUM = "buy and hold", "always flat", "momentum"
BASELINES = (BUY_AND_HOLD, ALWAYS_FLAT, MOMENTUM)
# A day of crypto, near four sessions of a stock. Over a shorter past the sign turns so often that fees and
# slippage alone decide the result, and a rule that always loses is no bar to clear.
MOMENTUM_BARS = 1_440


def actions_of_bars(name: str, market: Market, positions: Sequence[float]) -> Tensor:
    """Return what a baseline does after each bar has closed, (B,) int64 indices of ``positions``.

    - buy and hold: the largest position that is not above 1, from the first decision on;
    - always flat: cash;
    - momentum: the position next to the sign of the return over the past ``MOMENTUM_BARS`` closed bars; cash
      while a symbol has fewer.

    Raises:
        ValueError: 0 is not among the positions, or no such baseline.
    """
    if 0.0 not in positions:
        raise ValueError(f"positions={','.join(map(str, positions))} must have 0 among them")
    if name == MOMENTUM:
        return _momentum(market, positions)
    if name not in BASELINES:
        raise ValueError(f"{name} is no baseline; there are: {', '.join(BASELINES)}")
    wanted = max(p for p in positions if p <= 1) if name == BUY_AND_HOLD else 0.0
    return torch.full((market.num_bars,), positions.index(wanted), device=market.device)


def _momentum(market: Market, positions: Sequence[float]) -> Tensor:
    close = market.quotes[:, 1]
    past = torch.zeros_like(close)
    for first, last in zip(market.offsets[:-1].tolist(), market.offsets[1:].tolist(), strict=True):
        own = close[first:last]
        past[first + MOMENTUM_BARS : last] = own[MOMENTUM_BARS:] - own[:-MOMENTUM_BARS]
    # Of two positions that are as near, the smaller one.
    nearest = [
        positions.index(min(positions, key=lambda p: (abs(p - sign), abs(p)))) for sign in (-1.0, 0.0, 1.0)
    ]
    return torch.tensor(nearest, device=market.device)[past.sign().long() + 1]
