"""The page of a report: one file of HTML that loads nothing. What comes from outside is escaped, all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.measures import Measures
from evaluation.report import Report

TEMPLATE = Path(__file__).with_name("report.html")
NONE = '<span title="too few days, or nothing to divide by">n/a</span>'
HOW_TO_READ = (
    "Fills are simulated, at the open of the next bar and at the costs that are stated; no order was ever sent. "
    "Real fills can be worse, and what was found in these days need not be there in the next ones. "
    "The pool has equal money in every symbol at the start and moves none later. Intervals are 95 %, from a "
    "bootstrap over days. Costs are all fees, slippage and borrowing, added up."
)


def page(report: Report, svgs: Mapping[str, tuple[str, str]]) -> bytes:
    """Return ``report.html``.

    Args:
        report: what it tells.
        svgs: by name of the picture, as drawn for a page and for a phone.
    """
    dates = f"{_day(report.first)} to {_day(report.last)}"
    sections = [
        _section(
            "Against simple rules",
            "The same bars, at the same costs, in the same ledger. "
            f"{count_of(len(report.walks[POLICY]), 'symbol')}, {count_of(report.pooled[POLICY].num_days, 'day')}. "
            "Small figures are 95 % intervals.",
            _comparison(report.pooled),
        ),
        _section("Equity", "What became of the money, net of all costs.", _figure(svgs, "equity", "Equity")),
        _section("Drawdown", "How far below its last peak.", _figure(svgs, "drawdown", "Drawdown")),
        _costs(report, svgs),
        _section(
            "Symbols", "Each with its share of the money; a click on a heading sorts.", _symbols(report)
        ),
        _plotted(report, svgs),
        _training(report, svgs),
        _section("How it was made", "", _made(report)),
        _section("How to read it", "", _notes(report)),
    ]
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{report.checkpoint}, {dates}"),
        kicker=escape(f"Evaluation of {report.checkpoint}, {dates}, UTC"),
        headline=escape(headline(report)),
        stamp=_stamp(report),
        verdict=_verdict(report),
        cards=_cards(report),
        sections="\n".join(section for section in sections if section),
        footer=escape("Continuous Training. Simulated fills, no orders, no promise."),
    ).encode()


def headline(report: Report) -> str:
    """Say in one sentence what came out."""
    earned = report.pooled[POLICY].total_return
    what = f"It {'earned' if earned >= 0 else 'lost'} {abs(earned):.2%} after costs"
    if not report.pooled[POLICY].turnover:
        what = "It never traded"
    if report.overlaps:
        return f"Not an exam: it was trained on some of these days. {what}."
    return f"{'An edge' if report.verdict.edge else 'No edge'} on these days. {what}."


def count_of(number: int, what: str) -> str:
    """Return "1 symbol", "42 symbols"."""
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"


def _notes(report: Report) -> str:
    return "".join(f"<p>{escape(note)}</p>" for note in (HOW_TO_READ, *report.notes))


# --- parts ------------------------------------------------------------------------------------------------


def _stamp(report: Report) -> str:
    if not report.overlaps:
        return ""
    until = str(report.trained_until.astype("datetime64[m]")).replace("T", " ")
    return (
        '<p class="stamp">OVERLAPS TRAINING: these weights were trained on bars up to '
        f"{escape(until)} UTC. What is shown below is how well they remember, not what they are worth.</p>"
    )


def _verdict(report: Report) -> str:
    reasons = report.verdict.reason.split("; ")
    listed = "".join(f"<li>{escape(_sentence(reason))}</li>" for reason in reasons)
    note = (
        f"Judged after {count_of(report.num_trials, 'exam')} of this training on record, this one included: "
        "whoever looks often enough finds something."
    )
    return f'<ul class="reasons">{listed}</ul><p class="note">{note}</p>'


def _cards(report: Report) -> str:
    own, rule = report.pooled[POLICY], report.pooled[BUY_AND_HOLD]
    sharpe_range = _range(own.sharpe_interval, "{:.1f}")
    cards = [
        (_percent(own.total_return), "net return"),
        (_percent(rule.total_return), "buy and hold"),
        (_number(own.sharpe, "{:.1f}"), ", ".join(filter(None, ("Sharpe", sharpe_range)))),
        (f"{own.max_drawdown:.2%}", "deepest drawdown"),
        (f"{own.costs:.2%}", f"paid, {report.paid_bps:.2f} bps of what it traded"),
        (escape(report.break_even[1].split(":")[0]), "break-even cost"),
    ]
    return "".join(
        f'<div class="card"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in cards
    )


def _comparison(pooled: Mapping[str, Measures]) -> str:
    heads = (
        "",
        "net return",
        "mean day",
        "Sharpe",
        "Sortino",
        "deepest drawdown",
        "traded per day",
        "time in market",
        "days with a gain",
        "paid",
    )
    rows = []
    for name, one in pooled.items():
        cells = [
            _percent(one.total_return),
            _with_range(
                f"{1e4 * one.mean_daily_return:+.1f} bps",
                _range(_times(one.mean_daily_interval, 1e4), "{:+.1f}"),
            ),
            _with_range(_number(one.sharpe, "{:.2f}"), _range(one.sharpe_interval, "{:.2f}")),
            _number(one.sortino, "{:.2f}"),
            f"{one.max_drawdown:.2%}",
            f"{one.turnover:,.2f}x",
            f"{one.time_in_market:.0%}",
            f"{one.hit_rate:.0%}",
            f"{one.costs:.2%}",
        ]
        own = ' class="own"' if name == POLICY else ""
        rows.append(f'<tr{own}><th scope="row">{escape(name)}</th>{_cells(cells)}</tr>')
    return _table(heads, rows)


def _costs(report: Report, svgs: Mapping[str, tuple[str, str]]) -> str:
    if not report.ladder:
        return ""
    heads = ("flat cost of traded value", "net return", "Sharpe", "traded per day", "paid")
    rows = [
        f'<tr><th scope="row">{bps:g} bps</th>'
        + _cells(
            [
                _percent(one.total_return),
                _with_range(_number(one.sharpe, "{:.2f}"), _range(one.sharpe_interval, "{:.2f}")),
                f"{one.turnover:,.2f}x",
                f"{one.costs:.2%}",
            ]
        )
        + "</tr>"
        for bps, one in report.ladder
    ]
    own = report.pooled[POLICY]
    note = (
        "The same policy at flat costs in place of all fees and slippage; it sees what a trade costs. Break-even: "
        f"{report.break_even[1]}. At the stated fees and slippage it paid {report.paid_bps:.2f} bps, borrowing "
        f"included, and came to {own.total_return:+.2%}."
    )
    return _section("Costs", note, _figure(svgs, "costs", "Net return over costs") + _table(heads, rows))


def _symbols(report: Report) -> str:
    heads = (
        "symbol",
        "class",
        "decisions",
        "net return",
        "buy and hold",
        "share of the pool's return",
        "Sharpe",
        "deepest drawdown",
        "traded per day",
        "time in market",
        "paid",
    )
    rows = []
    for row in report.symbols:
        own, rule = row[POLICY], row[BUY_AND_HOLD]
        cells = (
            (row["decisions"], f"{row['decisions']:,}"),
            (own.total_return, _percent(own.total_return)),
            (rule.total_return, _percent(rule.total_return)),
            (row["contribution"], _percent(row["contribution"], 3)),
            (own.sharpe, _number(own.sharpe, "{:.2f}")),
            (own.max_drawdown, f"{own.max_drawdown:.2%}"),
            (own.turnover, f"{own.turnover:,.2f}x"),
            (own.time_in_market, f"{own.time_in_market:.0%}"),
            (own.costs, f"{own.costs:.2%}"),
        )
        numbers = "".join(
            f'<td data-value="{-math.inf if value is None else value}">{text}</td>' for value, text in cells
        )
        name = f'<th scope="row">{escape(row["symbol"])}</th>'
        rows.append(f'<tr>{name}<td class="words">{escape(row["asset_class"])}</td>{numbers}</tr>')
    return _table(heads, rows, "sortable", "long")


def _plotted(report: Report, svgs: Mapping[str, tuple[str, str]]) -> str:
    if not report.plotted:
        return ""
    parts = []
    earned = {row["symbol"]: row[POLICY].total_return for row in report.symbols}
    for name, picture in zip(report.plotted, (key for key in svgs if key.startswith("symbol")), strict=True):
        title = f"{escape(name)} <span class='number note'>{_percent(earned[name])}</span>"
        parts.append(f"<h3>{title}</h3>{_figure(svgs, picture, f'{name}: price, position and return')}")
    note = "Position: the value held as a share of equity, above 0 long, below 0 short. Closed hours take no room."
    return _section("Position over price", note, "".join(parts))


def _training(report: Report, svgs: Mapping[str, tuple[str, str]]) -> str:
    if "training" not in svgs:
        return ""
    note = (
        f"{count_of(len(report.training), 'epoch')} up to this checkpoint. In the first run costs grow from "
        "nothing, as cost_ramp says; until they are whole, rewards come cheap."
    )
    return _section("Training", note, _figure(svgs, "training", "Figures of the training over its epochs"))


def _made(report: Report) -> str:
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in report.made.items()
    )
    return f'<div class="scroll"><table class="made"><tbody>{"".join(rows)}</tbody></table></div>'


# --- pieces -----------------------------------------------------------------------------------------------


def _section(title: str, note: str, content: str) -> str:
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def _figure(svgs: Mapping[str, tuple[str, str]], name: str, label: str) -> str:
    wide, narrow = svgs[name]
    return (
        f'<figure role="img" aria-label="{escape(label)}"><div class="wide">{wide}</div>'
        f'<div class="narrow">{narrow}</div></figure>'
    )


def _table(heads: Sequence[str], rows: Iterable[str], kind: str = "", box: str = "") -> str:
    words = (0, 1) if kind == "sortable" else (0,)
    cells = "".join(
        f'<th scope="col"{" class=words" if number in words else ""}>{escape(head)}</th>'
        for number, head in enumerate(heads)
    )
    return (
        f'<div class="scroll {box}" tabindex="0"><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def _with_range(text: str, interval: str) -> str:
    return f"{text}<small>{interval}</small>" if interval else text


def _range(interval: tuple[float, float] | None, form: str) -> str:
    if interval is None:
        return ""
    return f"{_minus(form.format(interval[0]))} to {_minus(form.format(interval[1]))}"


def _times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (factor * interval[0], factor * interval[1])


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else _minus(form.format(value))


def _percent(value: float, digits: int = 2) -> str:
    return _minus(f"{value:+.{digits}%}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _day(moment: np.datetime64) -> str:
    return str(moment.astype("datetime64[D]"))
