"""Whether a training has days enough: fewer are learnt by heart, and what is learnt so does not come again.

Both limits were measured on real bars, see docs/real_markets.md. What the symbols of an asset class do on a day
hangs together, so days count, not bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_sources.bars import DAY_NS
from envs.market import Market

if TYPE_CHECKING:
    from continuous_training import Settings

# What a policy earns a bar differs by 0.4 bp from one day of 22 stocks to the next: 0.1 bp, as much as any model
# finds on real bars, is two standard errors of so many days.
LEAST_DAYS = 60
MOST_VISITS = 10.0  # times that a run learns from each bar, on average


def count_training_days(market: Market) -> dict[str, int]:
    """Count the UTC days with bars to train on, by asset class (waits for the device)."""
    days: dict[str, list[Tensor]] = {}
    numbers = torch.searchsorted(market.offsets, market.stretch_first, right=True) - 1
    for number, first, last in zip(
        numbers.tolist(), market.stretch_first.tolist(), market.stretch_last.tolist(), strict=True
    ):
        own = torch.unique_consecutive(market.open_time[first : last + 1] // DAY_NS)
        days.setdefault(market.asset_classes[number], []).append(own)
    return {name: len(torch.cat(parts).unique()) for name, parts in days.items()}


def count_training_bars(market: Market) -> int:
    """Count the bars to train on, of all symbols (waits for the device)."""
    return int((market.stretch_last - market.stretch_first + 1).sum())


def shortage_in(market: Market, settings: Settings, world_size: int) -> str:
    """Return ``find_shortage`` of a training's market; "" for simulated bars, of which there is no end."""
    if "simulated" in settings.sources:
        return ""
    return find_shortage(count_training_days(market), count_training_bars(market), settings, world_size)


def find_shortage(days: Mapping[str, int], num_bars: int, settings: Settings, world_size: int) -> str:
    """Return what will be learnt by heart and what to do about it, in one line; "" where days are enough.

    Args:
        days: to train on, by asset class.
        num_bars: to train on, of all symbols.
        settings: of the training.
        world_size: number of ranks.
    """
    few = [
        f"{count} days of {name} bars to train on, where {LEAST_DAYS} begin to tell an edge from luck"
        for name, count in days.items()
        if count < LEAST_DAYS
    ]
    decisions = settings.epochs * settings.envs_per_gpu * world_size * settings.horizon
    visits = decisions * settings.update_passes / max(1, num_bars)
    often = [f"a run learns {visits:.0f} times from each bar"] if visits > MOST_VISITS else []
    if not few and not often:
        return ""
    fixes = ["fetch more days"] if few else []
    if not settings.feature_noise:
        fixes.append("set feature_noise to 1")
    if often:
        fixes.append(f"lower epochs or update_passes until it is {MOST_VISITS:g} times")
    return f"days will be learnt by heart: {'; '.join(few + often)}. Trust exams alone; {', or '.join(fixes)}"
