"""Bars that stay the same up to a moment and change after it: what depends on later bars shows a difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from data_sources.bars import MINUTE_NS, Bars

MINUTES_BEFORE, MINUTES_AFTER = 2_048, 256  # a moment, of the bars of many symbols
LEAST_LATER = 64  # bars that replace those after a moment
SHARE_KEPT = 0.5  # of later bars, where some are deleted


def replace_bars_after(bars: Bars, cut: int, seed: int, num_later: int | None = None) -> Bars:
    """Return the same bars up to index ``cut``, then unrelated prices, volumes and times.

    Large and small moves, up and down, take turns with the seed: a feature may react to some kinds only. Prices
    stay within a factor of 3, so that no break follows: segments must be the same.

    Args:
        bars: of one symbol.
        cut: index of the last bar that stays.
        seed: another seed draws other bars.
        num_later: bars after the cut; None: as many as before.
    """
    random = np.random.default_rng(seed)
    later = len(bars) - cut - 1 if num_later is None else num_later
    is_wild = seed % 2 == 0
    jump, spread = (random.uniform(-0.4, 0.4), 0.1) if is_wild else (random.normal(0, 0.01), 0.003)
    prices = float(bars.close[cut]) * np.exp(jump + random.normal(0, spread, (4, later)))
    volume = random.lognormal(8, 4, later) * (random.random(later) > 0.3)
    steps = random.integers(1, 500 if is_wild else 3, later) * MINUTE_NS
    columns = {
        "open_time": bars.open_time[cut] + np.cumsum(steps),
        "open": prices[0],
        "high": prices.max(0),
        "low": prices.min(0),
        "close": prices[1],
        "volume": volume,
    }
    is_known = random.random(later) > 0.2
    flow = {"trades": np.ceil(volume), "taker_buy_volume": volume * random.random(later)}
    columns |= {name: np.where(is_known, values, np.nan) for name, values in flow.items()}
    joined = {name: np.concatenate([getattr(bars, name)[: cut + 1], columns[name]]) for name in bars.columns}
    return Bars.known_valid(bars.symbol, bars.asset_class, joined)


def bars_around(bars: Sequence[Bars], moment: int) -> list[Bars]:
    """Return the bars around a moment (ns), of the symbols that have some."""
    first, end = moment - MINUTES_BEFORE * MINUTE_NS, moment + MINUTES_AFTER * MINUTE_NS
    return [window for series in bars if len(window := series.between(first, end))]


def change_bars_after(bars: Sequence[Bars], moment: int, seed: int) -> list[Bars]:
    """Return the same bars up to a moment (ns); later ones are others, fewer or none, and a symbol is new.

    Symbols without a bar up to the moment are left out, changed or kept.
    """
    random = np.random.default_rng(seed)
    changed = []
    for number, series in enumerate(bars):
        cut = int(np.searchsorted(series.open_time, moment, side="right")) - 1
        kind = int(random.integers(4))
        if cut < 0:
            if kind:
                changed.append(series if kind == 1 else _without_some(series, -1, random))
        elif kind == 0:
            changed.append(series.rows(0, cut + 1))
        elif kind == 1:
            changed.append(_without_some(series, cut, random))
        else:
            changed.append(_replaced(series, cut, moment, seed + number))
    for asset_class in {series.asset_class for series in bars}:
        template = next(series for series in changed or bars if series.asset_class == asset_class)
        new = _replaced(template, 0, moment, seed)
        changed.append(replace(new.rows(1, len(new)), symbol=f"0NEW{asset_class}"))
    return changed


def _replaced(series: Bars, cut: int, moment: int, seed: int) -> Bars:
    other = replace_bars_after(series, cut, seed, max(LEAST_LATER, len(series) - cut - 1))
    times = other.open_time.copy()
    times[cut + 1 :] += moment // MINUTE_NS * MINUTE_NS - times[cut]
    return replace(other, open_time=times)


def _without_some(series: Bars, cut: int, random: np.random.Generator) -> Bars:
    stays = random.random(len(series)) < SHARE_KEPT
    stays[: cut + 1] = True
    return series.select(stays)


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Return where two tensors differ, be it in a bit, except that any NaN equals any other."""
    return (one != other) & ~(one.isnan() & other.isnan())


def names_that_differ(names: Iterable[str], one: Tensor, other: Tensor) -> list[str]:
    """Return the names of the columns of two tables, (B, F) each, that are not the same to the bit."""
    is_other = differs(one, other).any(0).tolist()
    return [name for name, differ in zip(names, is_other, strict=True) if differ]
