"""The page and the table of a walk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commands.walkforward.schedule import Window
from evaluation import plots
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.page import render_walkforward
from evaluation.provenance import minute_of
from evaluation.walk_summary import WalkSummary
from runtime.wording import count_of

if TYPE_CHECKING:
    from commands.walkforward import WalkOptions
    from continuous_training import Settings


def render_files(
    summary: WalkSummary, content: Mapping[str, Any], made: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of a walk's page."""
    svgs = {}
    for name, draw in summary.pictures().items():
        wide, narrow = (draw(width) for width in plots.WIDTHS)
        svgs[name] = (plots.as_svg(wide, f"{name}-wide"), plots.as_svg(narrow, f"{name}-narrow"))
        yield f"{name}.png", plots.as_png(wide)
    yield "walkforward.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    yield "walkforward.html", render_walkforward(summary, svgs, made)


def table(summary: WalkSummary) -> tuple[str, tuple[str, ...], list[list[str]], tuple[str, ...]]:
    """Return title, columns and rows, one a window, and which columns a narrow terminal may leave out."""
    beside = summary.beside.values()
    columns = ("window", "UTC", "champion", "return", *beside, "exams")
    spare = ("exams", *(name for name in reversed(beside) if name != BUY_AND_HOLD), "UTC")
    rows = [
        [
            str(row.number),
            f"{row.first} to {row.last}",
            named(row.champion, row.members),
            *(f"{row.returns[n]:+.2%}" if n in row.returns else "" for n in (POLICY, *summary.beside)),
            str(row.exams),
        ]
        for row in summary.windows
    ]
    return summary.headline, columns, rows, spare


def named(champion: str | None, members: Sequence[str], without: str = "none") -> str:
    """Name who decided: the champion, and how many before it decided together with it."""
    return f"{champion} + {len(members) - 1}" if len(members) > 1 else champion or without


def describe(row: Mapping[str, Any], window: Window, of: int) -> str:
    """Put a window that is done into a line."""
    own, hold = (math.prod(row["days"].get(name, {}).values()) - 1 for name in (POLICY, BUY_AND_HOLD))
    champion = named(row["champion"], row.get("members", ()), "no champion")
    earned = f"{own:+.2%} (buy and hold {hold:+.2%})" if row["days"] else "no bar to trade on"
    return f"Window {window.number} of {of}, {window}: {champion}, {earned}, {count_of(row['exams'], 'exam')}"


def notes_of(
    settings: Settings, windows: Sequence[Window], results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return what a reader of the page should know."""
    notes = []
    if "simulated" in settings.sources:
        notes.append("The bars are simulated, with a pattern to learn that real markets do not have.")
    if without := sum(not row["champion"] for row in results):
        notes.append(
            f"No exam had crowned a champion in {count_of(without, 'window')} of {len(windows)}: nothing was held."
        )
    if windows[-1].end_ns - windows[0].start_ns > sum(w.end_ns - w.start_ns for w in windows):
        notes.append("Weeks without a bar are left out.")
    standing = results[-1]["accounts"].get(POLICY, {}) if results else {}
    groups = {name: account["symbols"] for name, account in standing.items() if "symbols" in account}
    notes += [f"{name.capitalize()}: {', '.join(symbols)}." for name, symbols in groups.items()]
    if groups:
        notes.append("A row of the symbols is an account over a group of them.")
    return notes


def how_it_was_made(
    settings: Settings, windows: Sequence[Window], options: WalkOptions, began_with: str
) -> dict[str, str]:
    """Return what is needed to reproduce a walk."""
    together = f"the newest {options.ensemble} champions, by the average of their probabilities"
    first, last = minute_of(windows[0].start_ns), minute_of(windows[-1].end_ns)
    carried = "carried from window to window, a run each, as the daemon does"
    return {
        "windows": f"{len(windows)} of {count_of(options.step, 'day')}, from {first} to {last} UTC",
        "training": "each window from nothing" if options.fresh else carried,
        "begun with": began_with,
        "decides": "the champion" if options.ensemble == 1 else together,
        "exam": f"the {settings.holdout_days} days before each window, every {settings.checkpoint_every} of "
        f"{settings.epochs} epochs",
        "policy": f"{settings.d_model} wide, {settings.num_layers} layers, {settings.num_heads} heads, seed "
        f"{settings.seed}",
        "bars": f"{', '.join(settings.sources)}, as known at each window's start",
        "fees": f"stocks {settings.stock_fee_bps:g} bps, crypto {settings.crypto_fee_bps:g} bps, perpetual "
        f"futures {settings.perpetual_fee_bps:g} bps of traded value; slippage {settings.slippage_bps:g} bps",
    }


def clock(seconds: float) -> str:
    """Return hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"
