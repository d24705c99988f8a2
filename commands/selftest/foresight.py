"""Does a feature look ahead? Replace every bar after t by entirely other ones: nothing up to t may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from data_sources.bars import MINUTE_NS, Bars
from envs.features import FEATURES, FeatureFunction, compute


def changed_after(bars: Bars, place: int, seed: int) -> Bars:
    """Return the same bars up to ``place`` and entirely other ones after it: prices, volumes and times."""
    random, later = np.random.default_rng(seed), len(bars) - place - 1
    columns = {name: getattr(bars, name).copy() for name in ("open", "high", "low", "close", "volume")}
    scale = float(np.exp(random.normal(0, 2)))
    prices = scale * np.exp(random.normal(0, 0.3, (4, later)))
    columns["low"][place + 1 :], columns["high"][place + 1 :] = prices.min(0), prices.max(0)
    columns["open"][place + 1 :], columns["close"][place + 1 :] = prices[0], prices[1]
    columns["volume"][place + 1 :] = random.lognormal(8, 4, later) * (random.random(later) > 0.3)
    times = bars.open_time.copy()
    times[place + 1 :] = times[place] + np.cumsum(random.integers(1, 500, later)) * MINUTE_NS
    return replace(bars, open_time=times, **columns)


def features_that_look_ahead(
    bars: Bars,
    places: Sequence[int],
    functions: Mapping[str, FeatureFunction] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """Find features whose values up to a bar depend on later bars, to the bit.

    Args:
        bars: of one symbol, real ones or not.
        places: the bars after which everything is replaced, one after the other.
        functions: name -> feature; the registered ones when not given.
        device: where they are computed.

    Returns:
        Name -> the first of ``places`` at which it saw a later bar; empty when all is well.
    """
    functions, device = FEATURES if functions is None else functions, torch.device(device)
    truth = compute(bars, device, functions)
    found: dict[str, int] = {}
    for seed, place in enumerate(places):
        other = compute(changed_after(bars, place, seed), device, functions)
        differs = (truth[: place + 1] != other[: place + 1]).any(0).tolist()
        for name, looked in zip(functions, differs, strict=True):
            if looked:
                found.setdefault(name, place)
    return found
