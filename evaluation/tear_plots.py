"""The pictures of a tear sheet and of a history; see ``evaluation/plots.py`` for widths and colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from evaluation import plots
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY, Walk
from evaluation.plots import ACCENT, MUTED, NARROW, SECOND

Floats = NDArray[np.float64]


def rolling_sharpe(dates: NDArray[np.datetime64], values: Floats, width: float) -> Figure:
    """Draw the Sharpe ratio of so many days in a row over the last of them; both (n,)."""
    figure, axes = plots.new_figure(width, 2.2)
    marker = "o" if len(dates) < 30 else None
    axes.plot(dates, values, color=ACCENT, linewidth=1.6, marker=marker, markersize=3)
    plots.draw_zero_line(axes)
    if len(dates) > 1:
        plots.format_dates(axes, dates, width)
    axes.set_ylabel("Sharpe, per year")
    return figure


def hours(rows: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Draw what was held long and short, and what was earned, by hour of the day."""
    height = 3.2 if width > NARROW else 2.8
    figure = Figure(figsize=(width, height), layout="constrained")
    held, net = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    places = [row["hour"] for row in rows]
    for name, color in (("long", ACCENT), ("short", SECOND)):
        held.bar(places, [row[name] for row in rows], width=0.8, color=color, label=name)
    net.bar(places, [100 * row["net"] for row in rows], width=0.8, color=MUTED)
    for axes in (held, net):
        plots.style(axes)
        plots.draw_zero_line(axes)
    held.set_ylabel("held, mean")
    plots.legend_above(held)
    net.set_ylabel("earned, %")
    net.set_xlabel("hour of the fill, UTC")
    net.set_xticks(range(0, 24, 3 if width > NARROW else 6))
    figure.align_ylabels()
    return figure


def exams(rows: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Draw what the policy and buy and hold earned in every exam; rows as ``history.json`` has them."""
    figure, axes = plots.new_figure(width, 2.8)
    numbers = [row["exam"] for row in rows]
    marker = "o" if len(rows) < 30 else None
    for name in (BUY_AND_HOLD, POLICY):
        values = [row["returns"].get(name) for row in rows]
        percent = [math.nan if value is None else 100 * value for value in values]
        axes.plot(numbers, percent, label=name, marker=marker, markersize=3, **plots.style_of(name))
        if name == POLICY:
            crowned = [(n, p) for n, p, row in zip(numbers, percent, rows, strict=True) if row["is_promoted"]]
            axes.plot(
                *zip(*crowned, strict=True) if crowned else ((), ()), "D", color=SECOND, label="new champion"
            )
    plots.draw_zero_line(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("exam")
    axes.set_ylabel("net return, %")
    plots.legend_above(axes, columns=3, is_centered=True)
    return figure


def day(walk: Walk, width: float) -> Figure:
    """Draw price with every trade, position and return of one symbol's day."""
    figure, (prices, _, net) = plots.draw_walk(walk, (width, 4.2), (3, 1.1, 1.6))
    plots.mark_trades(prices, walk, size=14)
    prices.legend(loc="upper left", frameon=False, ncols=2, labelcolor=plots.INK, fontsize=8)
    net.set_ylabel("net, %")
    return figure
