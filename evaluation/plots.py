"""The pictures of a report, each as a matplotlib Figure in two widths: for a page, and for a phone.

Okabe and Ito's colours are told apart by everyone. The policy alone has the accent; what it is compared to is
grey, told apart by dashes and by a name at the end of its line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from evaluation.baselines import ALWAYS_FLAT, BUY_AND_HOLD, MOMENTUM
from evaluation.exam import CHAMPION, POLICY, Contestants, Walk
from evaluation.measures import equity_curve

ACCENT, SECOND, INK, MUTED, FAINT = "#0072B2", "#D55E00", "#1f2328", "#6b7280", "#e3e6ea"
BOUGHT = "#009E73"
# In the page a colour is a variable of its style sheet, which has another value in the dark.
VARIABLES = {ACCENT: "accent", SECOND: "second", INK: "ink", MUTED: "muted", FAINT: "faint"}
STYLES: Mapping[str, Mapping[str, Any]] = {
    POLICY: {"color": ACCENT, "linewidth": 1.8, "zorder": 4},
    CHAMPION: {"color": SECOND, "linewidth": 1.4, "zorder": 3},
    BUY_AND_HOLD: {"color": INK, "linewidth": 1.0, "zorder": 2},
    MOMENTUM: {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 2)), "zorder": 2},
    ALWAYS_FLAT: {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 1},
}
WIDTHS = (8.6, 3.6)  # inches, of the two widths
NARROW = 5.0  # below this it is a phone
LEAST_TRADE = 0.2  # a smaller change of the position is drift, not a trade


def equity(contestants: Contestants, width: float) -> Figure:
    """Draw what became of the money of the policy and of those that it is compared to."""
    figure, axes = _figure(width, 3.4)
    ends = []
    for name, walks in contestants.items():
        time, curve = equity_curve(walks)
        percent = 100 * (lasts(curve) - 1)
        axes.plot(lasts(time), percent, label=name, **STYLES[name])
        ends.append((float(percent[-1]), name))
        _dates(axes, time, width)
    _zero_line(axes)
    _name_lines(axes, ends, width)
    axes.set_ylabel("net return, %")
    return figure


def drawdowns(contestants: Contestants, width: float) -> Figure:
    """Draw how far below its peak the policy is, beside buying and holding."""
    figure, axes = _figure(width, 2.2)
    ends = []
    for name in (POLICY, BUY_AND_HOLD):
        time, curve = equity_curve(contestants[name])
        percent = 100 * lowests(drawdown(curve))
        axes.plot(lasts(time), percent, label=name, **STYLES[name])
        if name == POLICY:
            axes.fill_between(lasts(time), percent, color=ACCENT, alpha=0.25, linewidth=0)
        ends.append((float(percent[-1]), name))
        _dates(axes, time, width)
    axes.set_ylim(top=0)
    _name_lines(axes, ends, width)
    axes.set_ylabel("below its peak, %")
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
        returns: at each of them.
        as_trained: mean cost that was paid under the costs of the training, in bps, and the return then.
        break_even_bps: where the return crosses 0; None where it does not.
        width: in inches.
    """
    figure, axes = _figure(width, 2.6)
    percent = (100 * np.array(returns)).round(9)  # what never traded earned rounding errors
    axes.plot(costs_bps, percent, color=ACCENT, linewidth=1.8, marker="o", markersize=5, zorder=3)
    _zero_line(axes)
    for cost, value in zip(costs_bps, percent, strict=True):
        if width > NARROW or cost in (costs_bps[0], costs_bps[-1]):
            text = f"{value:+.2f} %".replace("-", "\N{MINUS SIGN}")
            axes.annotate(text, (cost, value), (4, 6), textcoords="offset points", color=INK, fontsize=8)
    axes.plot(
        as_trained[0],
        100 * as_trained[1],
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
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.0, frameon=False, labelcolor=INK, fontsize=8
    )
    axes.margins(x=0.08, y=0.18)
    axes.set_xlabel("cost of traded value, bps")
    axes.set_ylabel("net return, %")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def symbol(walk: Walk, width: float) -> Figure:
    """Draw one symbol's price, the position held over it, and its return."""
    figure, (*_, net) = _walk_panels(walk, (width, 3.7), (3, 1.1, 1.6))
    net.set_ylabel("net, %")
    return figure


def episode(walk: Walk, title: str) -> Figure:
    """Draw what :func:`symbol` draws, with every trade, buying and holding, and the costs paid so far."""
    figure, (prices, _, net, paid) = _walk_panels(walk, (10, 8), (3, 1, 3, 2))
    bars = np.arange(len(walk.time))
    change = np.diff(walk.position.round(2), prepend=0.0)
    for name, marker, color, where in (
        ("bought", "^", BOUGHT, change > LEAST_TRADE),
        ("sold", "v", SECOND, change < -LEAST_TRADE),
    ):
        prices.scatter(bars[where], walk.price[where], s=18, c=color, marker=marker, label=name, zorder=3)
    prices.set_title(title, loc="left", color=INK, fontsize=10)

    held = 100 * (walk.price / walk.price[0] - 1)
    net.plot(bars, held, label="buy and hold, without costs", **STYLES[BUY_AND_HOLD])
    net.set_ylabel("net return, %")

    # As fractions of the equity at the start they add up.
    fees, borrowing = (
        100 * part * walk.equity_before for part in (walk.costs - walk.borrowing, walk.borrowing)
    )
    labels = ("fees and slippage", "borrowing")
    paid.stackplot(bars, fees.cumsum(), borrowing.cumsum(), labels=labels, colors=(SECOND, ACCENT))
    paid.set_ylabel("paid so far, %")
    paid.set_xlabel("decisions, by the time of their fill, UTC; closed hours are left out")
    for axes in (prices, net, paid):
        axes.legend(loc="upper left", frameon=False, ncols=2, labelcolor=INK, fontsize=8.5)
    return figure


def training(rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str]], width: float) -> Figure:
    """Draw figures of the training over its epochs, one panel each.

    Args:
        rows: of metrics.jsonl, oldest first.
        panels: key and title of each.
        width: in inches.
    """
    columns = 1 if width < NARROW else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(width, 1.75 * lines + 0.2), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (key, title) in zip(grid, panels, strict=False):
        _plain(axes)
        found = [(at, row[key]) for at, row in enumerate(rows, 1) if row.get(key) is not None]
        places, values = np.array(found, np.float64).reshape(-1, 2).T
        marker = "o" if len(places) < 30 else None
        axes.plot(places, values, color=ACCENT, linewidth=0.8, alpha=0.45, marker=marker, markersize=2.5)
        if len(values) >= 20:
            smooth = max(5, len(values) // 20)
            mean = np.convolve(values, np.ones(smooth) / smooth, "valid")
            middle = places[smooth // 2 :][: len(mean)]
            axes.plot(middle, mean, color=ACCENT, linewidth=1.6)
        if values.min() < 0 < values.max():
            _zero_line(axes)
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
    """Return the picture as an element of a page: nothing to load, colours and font of the page's style sheet.

    Args:
        figure: the picture.
        name: unlike that of every other picture in the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]+\")[^>]*>", r'<svg \1 role="img" focusable="false">', text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"font: (?:[a-z0-9]+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    text = re.sub(r"<style[^>]*>.*?</style>", "<!-- -->", text, flags=re.DOTALL)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # hundredths of a point are finer than any screen
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    return text


# --- parts ------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height if width > NARROW else height * 0.85), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(8.5)
    axes.yaxis.label.set_fontsize(8.5)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "\N{MINUS SIGN}"))
    )


def _walk_panels(
    walk: Walk, size: tuple[float, float], heights: Sequence[float]
) -> tuple[Figure, Sequence[Axes]]:
    """Return panels above each other: price, position, net return, and what else there is room for.

    They share an axis of decisions: closed hours take no room.
    """
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    for axes in panels:
        _plain(axes)
        axes.margins(x=0)
    prices, positions, net, *_ = panels
    place = stretches(len(walk.time))
    prices.plot(place, means(walk.price), color=INK, linewidth=0.9)
    prices.set_ylabel("price")
    positions.fill_between(place, means(walk.position), step="post", color=ACCENT, alpha=0.65, linewidth=0)
    positions.axhline(0, color=MUTED, linewidth=0.6)
    limit = max(1.0, float(np.abs(walk.position).max())) * 1.1
    positions.set_ylim(-limit, limit)
    positions.set_ylabel("position")
    percent = 100 * np.expm1(np.cumsum(walk.log_returns))
    net.plot(place, means(percent), color=ACCENT, linewidth=1.4, label="policy")
    _zero_line(net)
    count = 4 if size[0] < NARROW else 8
    ticks = np.unique(np.linspace(0, len(walk.time) - 1, count).round().astype(int))
    times = (walk.time[tick].astype("datetime64[s]").item() for tick in ticks)
    panels[-1].set_xticks(ticks, [f"{time:%m-%d\n%H:%M}" for time in times])
    figure.align_ylabels()
    return figure, panels


def _zero_line(axes: Axes) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)


def _dates(axes: Axes, time: NDArray[np.datetime64], width: float) -> None:
    locator = AutoDateLocator(minticks=2, maxticks=5 if width < NARROW else 9)
    formatter = ConciseDateFormatter(locator, show_offset=False)
    formatter.formats[2] = formatter.zero_formats[2] = formatter.zero_formats[3] = (
        "%b %d"  # a day has its month
    )
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlim(time[0], time[-1])


def _name_lines(axes: Axes, ends: Sequence[tuple[float, str]], width: float) -> None:
    # At the end of each line where there is room, else as a legend.
    if width < NARROW:
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, labelcolor=INK, fontsize=8
        )
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
            color=STYLES[name]["color"],
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


Array = NDArray[np.float64]
POINTS = 700  # about one per pixel of a page


def stretches(length: int, most: int = POINTS) -> NDArray[np.int64]:
    """Return the first index of each of at most ``most`` stretches of nearly equal length, without the end."""
    return np.unique(np.linspace(0, length, min(most, length) + 1).round().astype(np.int64))[:-1]


def lasts(values: NDArray, most: int = POINTS) -> NDArray:
    """Return the first value, then the last one of each stretch of (T,) values."""
    ends = np.append(stretches(len(values), most)[1:], len(values)) - 1
    return values[np.concatenate([[0], ends])]


def lowests(values: Array, most: int = POINTS) -> Array:
    """Return the first value, then the lowest one of each stretch of (T,) values."""
    return np.concatenate([values[:1], np.minimum.reduceat(values, stretches(len(values), most))])


def means(values: Array, most: int = POINTS) -> Array:
    """Return the mean of each stretch of (T,) values."""
    first = stretches(len(values), most)
    return np.add.reduceat(values, first) / np.diff(np.append(first, len(values)))


def drawdown(equity: Array) -> Array:
    """Return how far a curve is below its highest value so far, (T,), 0 or less."""
    return equity / np.maximum.accumulate(equity) - 1.0


def break_even(costs_bps: Sequence[float], returns: Sequence[float]) -> tuple[float | None, str]:
    """Find the cost of traded value, in basis points, above which nothing is earned any more.

    Args:
        costs_bps: of the ladder, ascending.
        returns: net, at each.

    Returns:
        The cost, by a straight line between two rungs, None where the return does not fall to 0 on the ladder; and
        in words.
    """
    if returns[0] <= 0:
        return None, "none: it earns nothing even without costs" if costs_bps[0] == 0 else (
            f"below {costs_bps[0]:g} bps"
        )
    rungs = list(zip(costs_bps, returns, strict=True))
    for (cost, earned), (next_cost, next_earned) in pairwise(rungs):
        if next_earned <= 0:
            value = cost + (next_cost - cost) * earned / (earned - next_earned)
            return value, f"{value:.2f} bps"
    return None, f"above {costs_bps[-1]:g} bps"
