"""The command ``history``: all exams, champions and records of a training, as tables, JSON and a page."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import history, plots, tear_plots
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.history import History
from evaluation.measures import jsonable
from evaluation.page import render_history
from evaluation.report import write_folder
from monitoring.console import Console
from runtime.control import EXIT_NO_DATA, ExitProgram

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

FORMAT = 1
NEWEST = 30  # exams in the table, without --all
EXAMS: tuple[str, ...] = (
    "exam",
    "held, UTC",
    "run/epoch",
    "days",
    "return",
    "buy and hold",
    "Sharpe",
    "break-even",
    "verdict",
)
EXAMS += ("title",)
SPARE_OF_EXAMS = ("held, UTC", "break-even", "days", "Sharpe", "exam")
CHAMPIONS = ("champion", "since, UTC", "exam's return", "buy and hold", "record", "days", "ended")
SPARE_OF_CHAMPIONS = ("since, UTC", "buy and hold", "days", "exam's return")


def show(settings: Settings, console: Console, as_json: bool, has_all: bool) -> None:
    """Print the history as tables or JSON, and write its page, ``report_dir``/history.

    Raises:
        ExitProgram: there was no exam yet.
        OSError: a file cannot be read, or the page cannot be written.
    """
    found = history.read(Path(settings.checkpoint_dir))
    if not found.exams:
        raise ExitProgram(
            EXIT_NO_DATA,
            f"There is no exam in {settings.checkpoint_dir} yet: each checkpoint has one on its held-out days; "
            "give the --checkpoint-dir, or the --demo, of the training",
        )
    content = report(found)
    if as_json:
        console.emit(json.dumps(content, indent=1, allow_nan=False))
    else:
        _print(found, console, has_all)
    folder = Path(settings.report_dir) / "history"
    write_folder(folder, _files(found, content))
    log.info(f"Wrote {folder / 'history.html'}")


def report(found: History) -> dict[str, Any]:
    """Return everything as plain types; docs/report.md explains the fields."""
    return jsonable(
        {
            "format": FORMAT,
            "headline": found.headline,
            "record": found.about_record,
            "exams": found.exams,
            "champions": found.champions,
        }
    )


def _print(found: History, console: Console, has_all: bool) -> None:
    shown = found.exams if has_all else found.exams[-NEWEST:]
    left = len(found.exams) - len(shown)
    note = f"; the newest {len(shown)}, --all shows all" if left else ""
    rows = [_exam_row(exam) for exam in shown]
    console.table(f"{found.headline}{note}", EXAMS, rows, SPARE_OF_EXAMS, f"{found.about_record}.")
    if found.champions:
        champions = [_champion_row(champion) for champion in found.champions]
        console.table("Champions", CHAMPIONS, champions, SPARE_OF_CHAMPIONS)


def _exam_row(exam: history.Row) -> list[str]:
    title = "new champion" if exam["is_promoted"] else "title lost" if exam["dethroned"] else ""
    returns = exam["returns"]
    return [
        str(exam["exam"]),
        _minute(exam["time"]),
        f"{exam['run']}/{exam['epoch']}",
        _form(exam["days"], "d"),
        *(_form(returns.get(name), "+.2%") for name in (POLICY, BUY_AND_HOLD)),
        _form(exam["sharpe"], ".2f"),
        _form(exam["break_even_bps"], ".2f"),
        exam["verdict"] or "",
        title,
    ]


def _champion_row(champion: history.Row) -> list[str]:
    return [
        champion["checkpoint"] or "",
        _minute(champion["since"]),
        _form(champion["exam_return"], "+.2%"),
        _form(champion["exam_buy_and_hold"], "+.2%"),
        _form(champion["record_return"], "+.2%"),
        str(champion["record_days"]),
        champion["ended"]
        + (f", {champion['claim']}" if champion["until"] is None and champion["claim"] else ""),
    ]


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _minute(time: str | None) -> str:
    return "" if time is None else time[:16].replace("T", " ")


def _files(found: History, content: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    draw = partial(tear_plots.exams, content["exams"])
    wide, narrow = (draw(width) for width in plots.WIDTHS)
    svgs = {"exams": (plots.as_svg(wide, "exams-wide"), plots.as_svg(narrow, "exams-narrow"))}
    yield "exams.png", plots.as_png(wide)
    yield "history.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    yield "history.html", render_history(found, svgs)
