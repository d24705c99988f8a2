"""Forecasts of the market ahead: their loss beside PPO's, and how well they rank what came.

Shapes: N = segments, T = decisions of each, K = horizons; the 2 are moves and volatilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.ahead import HORIZONS

FORECAST_FIGURES = [
    f"forecast/{kind}_rank_ic_{horizon}" for kind in ("move", "volatility") for horizon in HORIZONS
]


def forecast_loss(forecasts: Tensor, ahead: Tensor, num_decisions: int | Tensor) -> Tensor:
    """Return half the mean squared error, (); what is not known of ``ahead``, NaN, counts as no error.

    Args:
        forecasts: (N, T, 2, K).
        ahead: (N, T, 2, K), see ``envs.ahead.moves_ahead``.
        num_decisions: of the whole minibatch on this rank, so that micro-batches add up.
    """
    errors = torch.where(ahead.isnan(), 0.0, forecasts - ahead.nan_to_num(0.0))
    return 0.5 * errors.square().mean((-2, -1)).sum() / num_decisions


def rank_correlations(forecasts: Tensor, ahead: Tensor) -> Tensor:
    """Return Spearman's correlation of every column of (n, C) with that of (n, C) where both are known, (C,).

    Without a host sync. Equal values share the mean of their ranks. NaN where one side never varies.
    """
    is_known = ~(forecasts.isnan() | ahead.isnan())
    weight = is_known.double()
    count = weight.sum(0)
    one, other = (_ranks(torch.where(is_known, values, torch.inf)) for values in (forecasts, ahead))
    deviations = [(ranks - (ranks * weight).sum(0) / count) * weight for ranks in (one, other)]
    sizes = [deviation.square().sum(0).sqrt() for deviation in deviations]
    return (deviations[0] * deviations[1]).sum(0) / (sizes[0] * sizes[1])


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of every column, (n, C) float64; equal values share the mean of theirs."""
    ordered, order = values.sort(dim=0)
    place = torch.arange(len(values), device=values.device)[:, None].expand_as(ordered)
    edge = torch.ones_like(ordered[:1], dtype=torch.bool)
    begins = torch.cat((edge, ordered[1:] != ordered[:-1]))
    ends = torch.cat((begins[1:], edge))
    first = torch.where(begins, place, 0).cummax(0).values
    last = torch.where(ends, place, len(values)).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(ordered, dtype=torch.float64).scatter_(0, order, (first + last).double() / 2)
