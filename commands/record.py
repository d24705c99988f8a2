"""The command ``record``: what the champions earned on bars that came after them, and whether it was edited."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from evaluation import plots, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.measures import jsonable
from evaluation.page import render_record
from evaluation.record_summary import Summary, describe, grown, summarize
from evaluation.report import write_folder
from monitoring.console import Console
from runtime.control import EXIT_CRASH, EXIT_NO_DATA, ExitProgram
from runtime.wording import count_of

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

FORMAT = 1
LIMITS = (
    "A chain cannot show lines that were all rewritten from some place on, head included, nor older copies of "
    "both files: compare the hash with one that you kept, such as in train.log or a report"
)


def show(settings: Settings, console: Console, as_json: bool) -> None:
    """Print the record as a table or JSON, and write its page, ``report_dir``/record.

    Raises:
        ExitProgram: there is none, or it was edited.
        OSError: the record cannot be read, or the page cannot be written.
    """
    kept = _read_whole(settings)
    summary = summarize(kept.lines)
    if summary is None:
        raise _no_record(settings)
    content = report(summary, kept.lines)
    if as_json:
        console.emit(json.dumps(content, indent=1, allow_nan=False))
    else:
        columns = ("line", "written, UTC", "return", "buy and hold", "what")
        rows = [_row(line) for line in kept.lines]
        left = console.width - sum(max(len(row[n]) for row in [columns, *rows]) + 2 for n in range(4))
        rows = [[*row, shorten(what, max(left, 20), placeholder=" ...")] for *row, what in rows]
        console.table(summary.headline, columns, rows)
    folder = Path(settings.report_dir) / "record"
    write_folder(folder, _files(summary, kept.lines, content))
    log.info(f"Wrote {folder / 'record.html'}")


def verify(settings: Settings, console: Console, as_json: bool) -> None:
    """Check every line of the record, and say what was edited.

    Raises:
        ExitProgram: there is none, or it was edited.
        OSError: it cannot be read.
    """
    kept = _read_whole(settings)
    if not kept.lines:
        raise _no_record(settings)
    if as_json:
        console.emit(json.dumps({"lines": len(kept.lines), "hash": kept.hash, "is_whole": True}))
        return
    log.info(f"{count_of(len(kept.lines), 'line')}, whole and in order; the last hash is {kept.hash}")
    log.info(LIMITS)


def report(summary: Summary, lines: list[record.Line]) -> dict[str, Any]:
    """Return everything as plain types; docs/record.md explains the fields."""
    return jsonable(
        {
            "format": FORMAT,
            "headline": summary.headline,
            "hash": summary.hash,
            "so_far": {name: asdict(measures) for name, measures in summary.measures.items()},
            "lines": [line | {"what": describe(line)} for line in lines],
        }
    )


def _read_whole(settings: Settings) -> record.Record:
    kept = record.read(Path(settings.checkpoint_dir))
    if kept.faults:
        raise ExitProgram(EXIT_CRASH, f"{kept.folder / record.NAME}: {kept.faults[0]}")
    return kept


def _no_record(settings: Settings) -> ExitProgram:
    return ExitProgram(
        EXIT_NO_DATA,
        f"There is no record in {settings.checkpoint_dir} yet: it begins with the run after a champion's, "
        "with the bars that came in between",
    )


def _row(line: record.Line) -> list[str]:
    is_scored = line["kind"] == "scored"
    returns = [f"{grown(line, name):+.2%}" if is_scored else "" for name in (POLICY, BUY_AND_HOLD)]
    return [str(line["number"]), line["time"][:16].replace("T", " "), *returns, describe(line)]


def _files(
    summary: Summary, lines: list[record.Line], content: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    draw = partial(plots.equity, summary.walks)
    wide, narrow = (draw(width) for width in plots.WIDTHS)
    svgs = {"equity": (plots.as_svg(wide, "equity-wide"), plots.as_svg(narrow, "equity-narrow"))}
    yield "equity.png", plots.as_png(wide)
    yield "record.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    yield "record.html", render_record(summary, lines, svgs)
