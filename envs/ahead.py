"""What came after each bar: moves and volatilities over several horizons, to learn and to judge forecasts by.

Targets alone: nothing that decides may read them. Shapes: K = horizons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.market import Market

HORIZONS = (1, 5, 15, 60)  # bars
LARGEST_MOVE = 8.0  # volatilities; larger ones count as this, so that no crash decides alone
AT_ONCE = 64  # rows of bars: bounds the memory of all opens ahead of them


def moves_ahead(market: Market, bars: Tensor) -> Tensor:
    """Return what came after the bars (N, T), in volatilities: (N, T, 2, K) float32, without a host sync.

    A decision after bar t fills at the open of bar t + 1. The first of the two is the log move from that open to
    the one h bars later, over sqrt(h); the second is the root mean square of the h moves from open to open in
    between. Both are in their symbol's typical move of a bar, and at most ``LARGEST_MOVE``. NaN where one of these
    opens is not known, beyond a hole, a break of the prices or the last bar before the holdout, and for bar -1.
    """
    return torch.cat([_moves_ahead(market, part) for part in bars.split(AT_ONCE)])


def _moves_ahead(market: Market, bars: Tensor) -> Tensor:
    horizons = torch.tensor(HORIZONS, device=bars.device)
    stretch = torch.searchsorted(market.stretch_first, bars.contiguous(), right=True) - 1
    symbol = torch.searchsorted(market.offsets, bars.contiguous(), right=True) - 1
    fills = bars[..., None] + 1 + torch.arange(max(HORIZONS) + 1, device=bars.device)
    price = market.quotes[fills.clamp(0, len(market.quotes) - 1), 0].double().log()
    price = price / market.volatility[symbol.clamp(min=0)].double()[..., None]
    moves = (price[..., horizons] - price[..., :1]) / horizons.sqrt()
    squares = price.diff(dim=-1).square().cumsum(-1)
    volatility = (squares[..., horizons - 1] / horizons).sqrt()
    is_known = fills[..., horizons] <= market.stretch_last[stretch][..., None]
    is_known &= ((stretch >= 0) & (bars >= 0))[..., None]
    both = torch.stack((moves, volatility), dim=-2).clamp(-LARGEST_MOVE, LARGEST_MOVE)
    return torch.where(is_known[..., None, :], both, torch.nan).float()
