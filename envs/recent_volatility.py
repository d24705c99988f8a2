"""How much a symbol moves just now, beside its typical move. Shapes: N = segments, T = decisions of each."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.ahead import AT_ONCE, LARGEST_MOVE
from envs.market import Market

LOOK_BACK = 16  # moves


def recent_volatility(market: Market, bars: Tensor) -> Tensor:
    """Return the root mean square of the last moves up to the bars (N, T), (N, T) float32, without a host sync.

    Moves are from close to close, in their symbol's typical move of a bar and at most ``LARGEST_MOVE``: the last
    ``LOOK_BACK`` ones of the bar's stretch, and a typical one beside them. So it is at least a quarter, and 1
    where no move is known yet, as for bar -1. It is known when the bar closes.
    """
    return torch.cat([_recent_volatility(market, part) for part in bars.split(AT_ONCE)])


def _recent_volatility(market: Market, bars: Tensor) -> Tensor:
    stretch = torch.searchsorted(market.stretch_first, bars.contiguous(), right=True) - 1
    symbol = torch.searchsorted(market.offsets, bars.contiguous(), right=True) - 1
    seen = bars[..., None] - torch.arange(LOOK_BACK, -1, -1, device=bars.device)
    price = market.quotes[seen.clamp(min=0), 1].double().log()
    moves = price.diff(dim=-1) / market.volatility[symbol.clamp(min=0)].double()[..., None]
    begins = market.stretch_first[stretch.clamp(min=0)]
    is_known = (seen[..., :-1] >= begins[..., None]) & (bars >= 0)[..., None]
    squares = torch.where(is_known, moves.clamp(-LARGEST_MOVE, LARGEST_MOVE).square(), 0.0)
    return ((1.0 + squares.sum(-1)) / (1.0 + is_known.sum(-1))).sqrt().float()
