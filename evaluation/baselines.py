"""Baselines that a policy must beat, as actions of the same ledger, on the same bars, at the same costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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
