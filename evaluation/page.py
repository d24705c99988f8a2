"""The pages of a report and of the record, filled in. They load nothing, and everything in them is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import CHAMPION, POLICY
from evaluation.history import History
from evaluation.measures import Interval
from evaluation.record_summary import Summary, describe, grown
from evaluation.report import Report
from evaluation.verdict import describe_power
from evaluation.walk_summary import WalkSummary
from runtime.wording import count_of

NONE = Markup('<span title="too few days, or nothing to divide by">n/a</span>')


def render_page(report: Report, svgs: Mapping[str, tuple[str, str]]) -> bytes:
    """Return ``report.html``.

    Args:
        report: the figures.
        svgs: pictures by name, each drawn for a wide page and for a phone.
    """
    names = [name for name in svgs if name.startswith("symbol")]
    net_returns = {row["symbol"]: row[POLICY].total_return for row in report.symbols}
    plotted = [
        (symbol, net_returns[symbol], name) for symbol, name in zip(report.plotted, names, strict=True)
    ]
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            svgs={name: tuple(map(Markup, pair)) for name, pair in svgs.items()},
            plotted=plotted,
            headline=headline(report),
            power=describe_power(report.pooled[POLICY], report.num_trials),
            dates=f"{report.first.astype('datetime64[D]')} to {report.last.astype('datetime64[D]')}",
            trained_until=f"{report.trained_until.astype('datetime64[m]')}".replace("T", " "),
            held=held_for,
            has_funding=any(measures.funding for measures in report.pooled.values()),
            POLICY=POLICY,
            BUY_AND_HOLD=BUY_AND_HOLD,
        )
        .encode()
    )


def render_record(
    summary: Summary, lines: Sequence[Mapping[str, Any]], svgs: Mapping[str, tuple[str, str]]
) -> bytes:
    """Return ``record.html``: a record's sum, its curve, and its lines, the newest first."""
    return (
        _environment()
        .get_template("record.html")
        .render(
            summary=summary,
            lines=[*reversed(lines)],
            svgs={name: tuple(map(Markup, pair)) for name, pair in svgs.items()},
            POLICY=POLICY,
            BUY_AND_HOLD=BUY_AND_HOLD,
        )
        .encode()
    )


def render_history(history: History, svgs: Mapping[str, tuple[str, str]]) -> bytes:
    """Return ``history.html``: exams and champions, the newest first."""
    pairs = {name: tuple(map(Markup, pair)) for name, pair in svgs.items()}
    names = {"POLICY": POLICY, "BUY_AND_HOLD": BUY_AND_HOLD, "CHAMPION": CHAMPION}
    page = _environment().get_template("history.html")
    return page.render(history=history, svgs=pairs, **names).encode()


def render_paper(
    content: Mapping[str, Any], said: Sequence[Mapping[str, Any]], svgs: Mapping[str, tuple[str, str]]
) -> bytes:
    """Return ``paper.html``: paper accounts as ``paper --json`` shows them, and what was said, newest first."""
    pairs = {name: tuple(map(Markup, pair)) for name, pair in svgs.items()}
    page = _environment().get_template("paper.html")
    return page.render(content=content, said=said, svgs=pairs).encode()


def held_for(minutes: float | None) -> str:
    """Return a holding time in its largest unit."""
    if minutes is None:
        return "none"
    for unit, length, limit in (("min", 1, 120), ("h", 60, 2_880)):
        if minutes < limit:
            return f"{minutes / length:.3g} {unit}"
    return f"{minutes / 1_440:.3g} days"


def render_walkforward(
    summary: WalkSummary, svgs: Mapping[str, tuple[str, str]], made: Mapping[str, str]
) -> bytes:
    """Return ``walkforward.html``: a walk's verdict, its curve, its windows and its symbols."""
    pairs = {name: tuple(map(Markup, pair)) for name, pair in svgs.items()}
    page = _environment().get_template("walkforward.html")
    names = {"POLICY": POLICY, "CHAMPION": CHAMPION, "BUY_AND_HOLD": BUY_AND_HOLD}
    return page.render(summary=summary, svgs=pairs, made=made, **names).encode()


def headline(report: Report) -> str:
    """Return the result in one sentence or two."""
    net = report.pooled[POLICY].total_return
    result = f"It {'earned' if net >= 0 else 'lost'} {abs(net):.2%} after costs"
    if not report.pooled[POLICY].turnover:
        result = "It never traded"
    if report.overlaps:
        return f"Not an exam: it was trained on some of these days. {result}."
    days = "these days of a simulated market" if report.is_simulated else "these days"
    return f"{'An edge' if report.verdict.edge else 'No edge'} on {days}. {result}."


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "interval": _interval,
        "count_of": count_of,
        "grown": grown,
        "described": describe,
    }
    return environment


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _interval(interval: Interval | None, form: str, factor: float = 1.0) -> str:
    return "" if interval is None else " to ".join(_number(factor * end, form) for end in interval)
