"""The pictures of a report and of an episode, as matplotlib Figures.

A report's are drawn in two widths: for a page, and for a phone. The colours are Okabe and Ito's, which everyone
can distinguish. Only the policy has the accent; the others are grey, with different dashes and a name at the end
of the line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from evaluation.baselines import ALWAYS_FLAT, BUY_AND_HOLD, MOMENTUM
from evaluation.exam import AGAINST, CHAMPION, POLICY, Contestants, Walk
from evaluation.forecasts import TREES
from evaluation.measures import drawdown, equity_curve

Array = NDArray[np.float64]

matplotlib.rcdefaults()  # a matplotlibrc of the user's may need LaTeX
matplotlib.rcParams["axes.unicode_minus"] = False  # the same minus as in everything that is printed
# In lower case, as matplotlib writes them.
ACCENT, SECOND, INK, MUTED, FAINT = "#0072b2", "#d55e00", "#1f2328", "#6b7280", "#e3e6ea"
BOUGHT = "#009e73"
FIRST = "first champion"  # of a walk forward, which is never trained again
# In the page these are variables of its style sheet, which has other values for the dark theme.
VARIABLES = {ACCENT: "accent", SECOND: "second", INK: "ink", MUTED: "muted", FAINT: "faint"}
STYLES: Mapping[str, Mapping[str, Any]] = {
    POLICY: {"color": ACCENT, "linewidth": 1.8, "zorder": 4},
    CHAMPION: {"color": SECOND, "linewidth": 1.4, "zorder": 3},
    FIRST: {"color": SECOND, "linewidth": 1.4, "linestyle": (0, (6, 2)), "zorder": 3},
    TREES: {"color": BOUGHT, "linewidth": 1.2, "zorder": 2},
    BUY_AND_HOLD: {"color": INK, "linewidth": 1.0, "zorder": 2},
    AGAINST: {"color": SECOND, "linewidth": 1.4, "linestyle": (0, (6, 2)), "zorder": 3},
    MOMENTUM: {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 2)), "zorder": 2},
    ALWAYS_FLAT: {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 1},
}
OWN_STYLE = {
    "color": MUTED,
    "linewidth": 1.0,
    "linestyle": (0, (5, 1, 1, 1)),
    "zorder": 2,
}  # of baselines of one's own
WIDTHS = (8.6, 3.6)  # inches, page and phone
NARROW = 5.0  # inches; a narrower picture is for a phone
LEAST_TRADE = 0.2  # a smaller change of the position is drift
LEAST_VALUE = 1e-12  # of a metric; what is smaller is a rounding error
POINTS = 700  # of a line: about one per pixel of a page


def equity(contestants: Contestants, width: float, band: Array | None = None) -> Figure:
    """Draw the net return of all contestants over time.

    Args:
        contestants: their walks.
        width: in inches.
        band: (2, D) growth of the policy, between what its curve could have been after each of its D decisions.
    """
    figure, axes = new_figure(width, 3.4)
    ends = []
    if band is not None and np.isfinite(band).all():
        low, high = _percent(band - 1)
        axes.fill_between(contestants[POLICY][0].time, low, high, color=ACCENT, alpha=0.12, linewidth=0)
    for name, walks in contestants.items():
        time, curve = equity_curve(walks)
        percent = _percent(lasts(curve) - 1)
        axes.plot(lasts(time), percent, label=name, **style_of(name))
        ends.append((float(percent[-1]), name))
        format_dates(axes, time, width)
    draw_zero_line(axes)
    _label_lines(axes, ends, width)
    axes.set_ylabel("net return, %")
    return figure


def windows(names: Sequence[str], returns: Sequence[float], others: Sequence[float], width: float) -> Figure:
    """Draw the net return of each window of a walk, and beside it that of buy and hold."""
    figure, axes = new_figure(width, 2.4)
    place = np.arange(len(names))
    axes.bar(place - 0.2, _percent(np.array(returns)), 0.4, color=ACCENT, label=POLICY, zorder=3)
    axes.bar(place + 0.2, _percent(np.array(others)), 0.4, color=FAINT, label=BUY_AND_HOLD, zorder=2)
    draw_zero_line(axes)
    shown = place[:: -(-len(names) // (4 if width < NARROW else 9))]
    axes.set_xticks(shown, [names[number] for number in shown])
    axes.set_ylabel("net return, %")
    legend_above(axes)
    return figure


def drawdowns(contestants: Contestants, width: float) -> Figure:
    """Draw the drawdown of the policy and of buy and hold over time."""
    figure, axes = new_figure(width, 2.2)
    ends = []
    for name in (POLICY, BUY_AND_HOLD):
        time, curve = equity_curve(contestants[name])
        percent = _percent(minima(drawdown(curve)))
        axes.plot(lasts(time), percent, label=name, **style_of(name))
        if name == POLICY:
            axes.fill_between(lasts(time), percent, color=ACCENT, alpha=0.25, linewidth=0)
        ends.append((float(percent[-1]), name))
        format_dates(axes, time, width)
    axes.set_ylim(top=0)
    _label_lines(axes, ends, width)
    axes.set_ylabel("below peak, %")
    return figure


def cost_curve(
    costs_bps: Sequence[float],
    returns: Sequence[float],
    as_trained: tuple[float, float],
    break_even_bps: float | None,
    width: float,
) -> Figure:
    """Draw the pooled net return over the cost of traded value.

    Args:
        costs_bps: the rungs of the ladder.
        returns: the net return at each rung.
        as_trained: mean cost in bps and net return at the costs of the training.
        break_even_bps: where the return crosses 0; None if it does not.
        width: in inches.
    """
    figure, axes = new_figure(width, 2.6)
    percent = _percent(np.array(returns))
    axes.plot(costs_bps, percent, color=ACCENT, linewidth=1.8, marker="o", markersize=5, zorder=3)
    draw_zero_line(axes)
    for cost, value in zip(costs_bps, percent, strict=True):
        if width > NARROW or cost in (costs_bps[0], costs_bps[-1]):
            axes.annotate(
                f"{value:+.2f} %", (cost, value), (4, 6), textcoords="offset points", color=INK, fontsize=8
            )
    axes.plot(
        as_trained[0],
        _percent(np.array(as_trained[1])),
        "D",
        color=SECOND,
        markersize=6,
        zorder=4,
        label="at the stated costs",
    )
    if break_even_bps is not None:
        axes.axvline(break_even_bps, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
        is_right = break_even_bps > sum(axes.get_xlim()) / 2
        axes.annotate(
            f"break-even {break_even_bps:.2f} bps",
            (break_even_bps, 0.04),
            (-5 if is_right else 5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color=MUTED,
            fontsize=8,
        )
    legend_above(axes, columns=1)
    axes.margins(x=0.08, y=0.18)
    axes.set_xlabel("cost of traded value, bps")
    axes.set_ylabel("net return, %")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def symbol(walk: Walk, width: float) -> Figure:
    """Draw one symbol's price, the position held over it, and its return."""
    figure, (*_, net) = draw_walk(walk, (width, 3.7), (3, 1.1, 1.6))
    net.set_ylabel("net, %")
    return figure


def episode(walk: Walk, title: str) -> Figure:
    """Draw what :func:`symbol` draws, plus every trade, buy and hold, and the costs so far."""
    figure, (prices, _, net, paid) = draw_walk(walk, (10, 8), (3, 1, 3, 2))
    bars = np.arange(len(walk.time))
    mark_trades(prices, walk)
    prices.set_title(title, loc="left", color=INK, fontsize=10)

    held = 100 * (walk.price / walk.price[0] - 1)
    net.plot(bars, held, label="buy and hold, without costs", **STYLES[BUY_AND_HOLD])
    net.set_ylabel("net return, %")

    # As fractions of the initial equity, payments add up.
    fees, borrowing = (
        _percent(part * walk.equity_before) for part in (walk.costs - walk.borrowing, walk.borrowing)
    )
    labels = ("fees and slippage", "borrowing")
    paid.stackplot(bars, fees.cumsum(), borrowing.cumsum(), labels=labels, colors=(SECOND, ACCENT))
    if walk.funding is not None:  # may be received, so beside the others and not on top of them
        funding = _percent(walk.funding * walk.equity_before).cumsum()
        paid.plot(bars, funding, label="funding, paid less received", color=INK, linewidth=1.2)
    paid.set_ylabel("paid so far, %")
    paid.set_xlabel("decisions, by the time of their fill, UTC; closed hours are left out")
    for axes in (prices, net, paid):
        axes.legend(loc="upper left", frameon=False, ncols=2, labelcolor=INK, fontsize=8.5)
    return figure


def training(rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str]], width: float) -> Figure:
    """Draw metrics of the training over its epochs, one panel per metric.

    Args:
        rows: of metrics.jsonl, oldest first.
        panels: key and title of each metric.
        width: in inches.
    """
    columns = 1 if width < NARROW else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(width, 1.75 * lines + 0.2), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (key, title) in zip(grid, panels, strict=False):
        style(axes)
        found = [(at, row[key]) for at, row in enumerate(rows, 1) if row.get(key) is not None]
        places, values = np.array(found, np.float64).reshape(-1, 2).T
        values = np.where(np.abs(values) < LEAST_VALUE, 0.0, values)
        marker = "o" if len(places) < 30 else None
        axes.plot(places, values, color=ACCENT, linewidth=0.8, alpha=0.45, marker=marker, markersize=2.5)
        if len(values) >= 20:
            smooth = max(5, len(values) // 20)
            mean = np.convolve(values, np.ones(smooth) / smooth, "valid")
            middle = places[smooth // 2 :][: len(mean)]
            axes.plot(middle, mean, color=ACCENT, linewidth=1.6)
        if values.min() < 0 < values.max():
            draw_zero_line(axes)
        axes.set_title(title, loc="left", color=INK, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("epoch", fontsize=8.5, color=MUTED)
    return figure


# --- as files ---------------------------------------------------------------------------------------------


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return the picture on white, by default at twice the resolution of a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def as_svg(figure: Figure, name: str) -> str:
    """Return the picture as an inline element of a page, in the colours of the page's style sheet.

    Args:
        figure: the picture.
        name: unique in the page; ids are derived from it.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text. The style sheet sets its font, so matplotlib's long list of fonts would only take space.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    _, start, rest = buffer.getvalue().partition("<svg")  # without the XML declaration
    text = re.sub(r"<[^>]+>", _shorten_tag, start + rest)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _shorten_tag(tag: re.Match[str]) -> str:
    """Drop the ids of groups, which are the same in every picture, and digits that no screen shows."""
    text = re.sub(r'^<g id="[^"]*"', "<g", tag[0])
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)


# --- parts ------------------------------------------------------------------------------------------------


def style_of(name: str) -> Mapping[str, Any]:
    """Return the style of a contestant's line."""
    return STYLES.get(name, OWN_STYLE)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure and its only axes, in the style of the report."""
    figure = Figure(figsize=(width, height if width > NARROW else height * 0.85), layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Give axes the report's style."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(8.5)
    axes.yaxis.label.set_fontsize(8.5)
    axes.yaxis.set_major_formatter(FuncFormatter(partial(_format_tick, axes)))


def _format_tick(axes: Axes, value: float, _: int | None) -> str:
    low, high = axes.get_ylim()
    return f"{0.0 if abs(value) < 1e-9 * (high - low) else value:,.6g}"


def draw_walk(
    walk: Walk, size: tuple[float, float], heights: Sequence[float]
) -> tuple[Figure, Sequence[Axes]]:
    """Draw price, position and net return over decisions; closed hours are left out.

    Returns:
        The figure and its panels, one per entry of ``heights``; those after the third are empty.
    """
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    for axes in panels:
        style(axes)
        axes.margins(x=0)
    prices, positions, net, *_ = panels
    place = bin_starts(len(walk.time))
    prices.plot(place, means(walk.price), color=INK, linewidth=0.9)
    prices.set_ylabel("price")
    positions.fill_between(place, means(walk.position), step="post", color=ACCENT, alpha=0.65, linewidth=0)
    positions.axhline(0, color=MUTED, linewidth=0.6)
    limit = max(1.0, float(np.abs(walk.position).max())) * 1.1
    positions.set_ylim(-limit, limit)
    positions.set_ylabel("position")
    percent = _percent(np.expm1(np.cumsum(walk.log_returns)))
    net.plot(place, means(percent), color=ACCENT, linewidth=1.4, label="policy")
    draw_zero_line(net)
    count = 4 if size[0] < NARROW else 8
    ticks = np.unique(np.linspace(0, len(walk.time) - 1, count).round().astype(int))
    times = (walk.time[tick].astype("datetime64[s]").item() for tick in ticks)
    panels[-1].set_xticks(ticks, [f"{time:%m-%d\n%H:%M}" for time in times])
    figure.align_ylabels()
    return figure, panels


def mark_trades(prices: Axes, walk: Walk, size: float = 18) -> None:
    """Mark over the price where the position was raised and where it was lowered."""
    bars = np.arange(len(walk.time))
    change = np.diff(walk.position.round(2), prepend=0.0)
    for name, marker, color, where in (
        ("bought", "^", BOUGHT, change > LEAST_TRADE),
        ("sold", "v", SECOND, change < -LEAST_TRADE),
    ):
        prices.scatter(bars[where], walk.price[where], s=size, c=color, marker=marker, label=name, zorder=3)


def _percent(fractions: Array) -> Array:
    """Return percent without rounding errors, which would be all that an axis shows where nothing was traded."""
    return (100 * fractions).round(9) + 0.0


def draw_zero_line(axes: Axes) -> None:
    """Draw the line of 0."""
    axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)


def format_dates(axes: Axes, time: NDArray[np.datetime64], width: float) -> None:
    """Let the horizontal axis show dates, as few as fit."""
    locator = AutoDateLocator(minticks=2, maxticks=5 if width < NARROW else 9)
    formatter = ConciseDateFormatter(locator, show_offset=False)
    # a day with its month
    formatter.formats[2] = formatter.zero_formats[2] = formatter.zero_formats[3] = "%b %d"
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlim(time[0], time[-1])


def legend_above(axes: Axes, columns: int = 2, is_centered: bool = False) -> None:
    """Name the curves above the axes, at their right or in the middle."""
    axes.legend(
        loc="lower center" if is_centered else "lower right",
        bbox_to_anchor=(0.5 if is_centered else 1.0, 1.0),
        borderpad=0.0,
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )


def _label_lines(axes: Axes, ends: Sequence[tuple[float, str]], width: float) -> None:
    """Write names at the ends of lines where there is room, else a legend."""
    if width < NARROW:
        legend_above(axes, is_centered=True)
        return
    low, high = axes.get_ylim()
    gap = 0.065 * (high - low) * 3.4 / axes.figure.get_figheight()  # type: ignore[union-attr]
    at = -np.inf
    for end, name in sorted(ends):
        at = max(end, at + gap)
        axes.annotate(
            name,
            (1.0, at),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=style_of(name)["color"],
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def bin_starts(length: int, most: int = POINTS) -> NDArray[np.int64]:
    """Return the first index of each of at most ``most`` bins of nearly equal length."""
    return np.unique(np.linspace(0, length, min(most, length) + 1).round().astype(np.int64))[:-1]


def lasts(values: NDArray, most: int = POINTS) -> NDArray:
    """Return the first value, then the last one of each bin of (T,) values."""
    ends = np.append(bin_starts(len(values), most)[1:], len(values)) - 1
    return values[np.concatenate([[0], ends])]


def minima(values: Array, most: int = POINTS) -> Array:
    """Return the first value, then the lowest one of each bin of (T,) values."""
    return np.concatenate([values[:1], np.minimum.reduceat(values, bin_starts(len(values), most))])


def means(values: Array, most: int = POINTS) -> Array:
    """Return the mean of each bin of (T,) values."""
    first = bin_starts(len(values), most)
    return np.add.reduceat(values, first) / np.diff(np.append(first, len(values)))
