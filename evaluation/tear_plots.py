"""The pictures of a tear sheet, as matplotlib Figures; see ``evaluation/plots.py`` for widths and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation import plots
from evaluation.exam import Walk
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
    held.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderpad=0.0, fontsize=8
    )
    net.set_ylabel("earned, %")
    net.set_xlabel("hour of the fill, UTC")
    net.set_xticks(range(0, 24, 3 if width > NARROW else 6))
    figure.align_ylabels()
    return figure


def day(walk: Walk, width: float) -> Figure:
    """Draw price with every trade, position and return of one symbol's day."""
    figure, (prices, _, net) = plots.draw_walk(walk, (width, 4.2), (3, 1.1, 1.6))
    plots.mark_trades(prices, walk, size=14)
    prices.legend(loc="upper left", frameon=False, ncols=2, fontsize=8)
    net.set_ylabel("net, %")
    return figure
