"""The page of a training: ``page.html``, filled in. Everything in it is escaped; it loads nothing from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from monitoring import attach, exams, summary
from monitoring.format import iso_time, thinned, utc_time
from monitoring.state import DashboardState

Row = Mapping[str, Any]

REFRESH_SECONDS = 10
NUM_LINES = 20
WIDTH, HEIGHT = 600, 150  # of a curve's drawing
MOST_POINTS = 300
# Replaces the content without a flash, and keeps the place on the page.
SCRIPT = f"""
setInterval(async () => {{
  try {{
    const answer = await fetch(location.href, {{cache: "no-store"}});
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    document.title = fresh.title;
  }} catch (error) {{ document.title = "(not reached) " + document.title.replace("(not reached) ", ""); }}
}}, {1000 * REFRESH_SECONDS});
"""
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src 'sha256-{_DIGEST}'",
        "style-src 'unsafe-inline'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name, and its newest value in words."""

    name: str
    last: str


@dataclass(frozen=True)
class Curve:
    """A chart: its drawing, and the texts around it."""

    svg: Markup
    series: Sequence[Series]
    low: str
    high: str
    first: str
    last: str


def render_page(state: DashboardState, reports: Sequence[str]) -> bytes:
    """Return the page.

    Args:
        state: of the training.
        reports: names of the reports to link to.
    """
    life = attach.describe_life(state)
    return (
        _environment()
        .get_template("page.html")
        .render(
            state=state,
            verdict=exams.verdict_of(state),
            facts=summary.facts_beside_verdict(state),
            place=f"{summary.describe_place(state)}{f'; {life}' if life else ''}",
            percent=f"{100 * min(1.0, state.epoch / max(1, state.epochs)):.1f}",
            charts=list(_charts(state)),
            lines=[(_clock(state, line.at), line) for line in summary.newest_lines(state, NUM_LINES)][::-1],
            reports=reports,
            time=iso_time(state.now_ns).replace("T", " ").removesuffix("Z"),
            refresh_seconds=REFRESH_SECONDS,
            script=Markup(SCRIPT),
        )
        .encode()
    )


def _charts(state: DashboardState) -> list[tuple[str, Curve]]:
    charts = []
    rewards = state.values("rollout/reward_bps")
    if len(rewards) > 1:
        span = (f"epoch {state.history[0]['epoch']}", f"epoch {state.history[-1]['epoch']}")
        charts.append(("Reward in training, bp per bar", draw({"net of costs": rewards}, "{:+.2f}", span)))
    names = (exams.POLICY, exams.BUY_AND_HOLD)
    held_out: dict[str, list[float | None]] = {name: [] for name in names}
    for exam in state.exams:
        returns = exams.returns_of(exam)
        for name in names:
            held_out[name].append(returns.get(name))
    if len(state.exams) > 1:
        span = (exams.name_of(state.exams[0]), exams.name_of(state.exams[-1]))
        charts.append(("Return on held-out days, by exam", draw(held_out, "{:+.1%}", span)))
    record = {
        name: state.values(f"record/{key}_percent")
        for name, key in (("champions", "return"), ("buy and hold", "buy_and_hold"))
    }
    if len(record["champions"]) > 1:
        rows = [row for row in state.history if "record/return_percent" in row]
        span = (f"run {rows[0]['run']}", f"run {rows[-1]['run']}")
        charts.append(("Record, percent on days that came later", draw(record, "{:+.1f}%", span)))
    return charts


def draw(series: Mapping[str, Sequence[float | None]], form: str, span: tuple[str, str]) -> Curve:
    """Draw values over time as lines in one scale that has 0 in it; None interrupts a line."""
    drawn = {name: thinned(values, MOST_POINTS) for name, values in series.items()}
    known = [value for values in drawn.values() for value in values if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    scale = (high - low) or 1.0

    def height(value: float) -> float:
        return 2 + (HEIGHT - 4) * (high - value) / scale

    zero = f'<path class="zero" d="M0 {height(0.0):.1f}H{WIDTH}"/>'
    paths = [
        f'<path class="s{number}" d="{_path([None if v is None else height(v) for v in values])}"/>'
        for number, values in enumerate(drawn.values())
    ]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{zero}'
    newest = {name: values[-1] if values else None for name, values in series.items()}
    return Curve(
        Markup(svg + "".join(paths) + "</svg>"),
        [Series(name, "none" if value is None else form.format(value)) for name, value in newest.items()],
        form.format(low),
        form.format(high),
        *span,
    )


def _path(heights: Sequence[float | None]) -> str:
    step = WIDTH / max(1, len(heights) - 1)
    parts, is_on = [], False
    for number, y in enumerate(heights):
        if y is not None:
            parts.append(f"{'L' if is_on else 'M'}{number * step:.1f} {y:.1f}")
        is_on = y is not None
    return "".join(parts)


def _clock(state: DashboardState, at: float) -> str:
    return utc_time(state.now_ns - int((state.now - at) * 1e9), "%m-%d %H:%M:%S")


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
