"""Auxiliary heads: what the trunk's output says of the next bars. No part of a policy, its files and exports.

Forecasts give the trunk more to learn from than rewards do (UNREAL: Jaderberg et al. 2016, arXiv:1611.05397).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Forecaster(nn.Module):
    """Linear forecasts of moves and volatilities; they begin at 0 and draw no random number.

    Shapes: D = d_model, K = horizons.
    """

    def __init__(self, d_model: int, num_horizons: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * num_horizons, d_model, device=device))
        self.bias = nn.Parameter(torch.zeros(2 * num_horizons, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn the trunk's output (..., D) into forecasts (..., 2, K), as ``envs.ahead.moves_ahead`` has them."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias).unflatten(-1, (2, -1))
