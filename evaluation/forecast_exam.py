"""How well the forecasts beside a policy rank the moves and volatilities of days that it was not trained on.

Shapes: K = horizons, n = segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from envs.ahead import moves_ahead
from envs.market import Market
from evaluation.trained_policy import NEVER_NS
from models.forecaster import Forecaster
from models.policy import Policy
from training.forecasts import FORECAST_FIGURES, rank_correlations
from training.parallel import is_sharded
from training.trainer import Trainer

MOST_SEGMENTS = 256  # spread evenly; many more would cost as much as the walks


def forecast_figures(trainer: Trainer, start_ns: int) -> dict[str, Any]:
    """Return ``exam/`` rank correlations of a trainer's forecasts from ``start_ns`` on; none where it has none.

    Nor where this rank has a shard alone of the weights.
    """
    forecaster = trainer.objective.forecaster
    if forecaster is None or is_sharded(trainer.policy):
        return {}
    market = trainer.env.market.until(NEVER_NS)
    chunk = trainer.learner.micro_batch_segments
    values = rank_ics(trainer.policy, forecaster, market, start_ns, chunk)
    names = (name.replace("forecast/", "exam/forecast_") for name in FORECAST_FIGURES)
    return dict(zip(names, values.tolist(), strict=True))


@torch.no_grad()
def rank_ics(
    policy: Policy, forecaster: Forecaster, market: Market, start_ns: int, chunk_segments: int
) -> Tensor:
    """Return Spearman's correlations of forecasts with what came, (2 x K,), over decisions from a time on.

    Args:
        policy, forecaster: as they are.
        market: goes beyond ``start_ns``.
        start_ns: of the first bar that is decided at.
        chunk_segments: segments per trunk forward, to bound memory.
    """
    steps = torch.arange(market.horizon, device=market.device)
    first = segments_from(market, start_ns)
    columns = []
    for part in first.split(chunk_segments):
        length = market.context_bars + market.horizon
        bars = market.windows(part - market.context_bars, length)
        with torch.compiler.set_stance("force_eager"):  # of other sizes than those that are compiled
            forecasts = forecaster(policy.hidden(bars, market.horizon))
        columns.append(torch.stack((forecasts, moves_ahead(market, part[:, None] + steps))))
    if not columns:
        return torch.full((len(FORECAST_FIGURES),), torch.nan)
    return rank_correlations(*torch.cat(columns, dim=1).flatten(1, 2).flatten(2))


def segments_from(market: Market, start_ns: int) -> Tensor:
    """Return the first decisions, (n,) int64, of segments whose decisions are all at ``start_ns`` or later."""
    first, last = market.stretch_first, market.stretch_last
    bounds = zip(first.tolist(), last.tolist(), strict=True)
    before = [torch.searchsorted(market.open_time[begin : end + 1], start_ns) for begin, end in bounds]
    low = torch.maximum(first + market.context_bars, first + torch.stack(before))
    counts = (last - market.horizon - low).clamp(min=0)
    total = int(counts.sum())
    number = torch.arange(count := min(MOST_SEGMENTS, total), device=low.device) * total // max(1, count)
    starts_before = counts.cumsum(0) - counts
    stretch = torch.searchsorted(starts_before, number, right=True) - 1
    return low[stretch] + number - starts_before[stretch]
