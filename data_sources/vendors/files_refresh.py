"""Bars of one's own files: in the lake one dataset per folder and kind, one part per file or piece of a large one.

A part's version is the file's size and time of change, and what was said of it: a file that changes is read again,
alone. Files that are gone leave their bars in the lake, as a vendor's would stay; a warning says what to remove.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from data_sources.bars import FLOW_COLUMNS, MINUTE_NS
from data_sources.calendar import in_regular_session, utc
from data_sources.errors import BadAnswer, SourceUnavailable
from data_sources.lake.lake import Part
from data_sources.lake.quality import EARLIEST_NS
from data_sources.sources import RefreshJob
from data_sources.vendors.files import SOURCE_NAME as SOURCE
from data_sources.vendors.files import dataset_of
from data_sources.vendors.files_columns import Columns
from data_sources.vendors.files_description import CRYPTO, FILE_NAME, KINDS, STOCK
from data_sources.vendors.files_find import Folder, OwnFile
from data_sources.vendors.files_minutes import Spool, coarse_symbols, to_minutes
from data_sources.vendors.files_open import opened
from runtime.wording import first_of

SPOOL_FOLDER = ".files"
IN_SESSION = 0.3  # of stocks' bars, below which their times are doubtful


class Refresh:
    """One refresh of a folder's bars."""

    def __init__(self, job: RefreshJob) -> None:
        self._job, self._lake, self._progress = job, job.lake, job.progress
        self._folder, self._timezone = job.request.files_dir, job.request.files_timezone
        self._guessed: dict[str, str] = {}  # symbol -> asset class

    def run(self) -> None:
        """Bring the lake up to date; each file fails alone, with one warning, and its former bars stay.

        Raises:
            SourceUnavailable: the folder or none of its files can be read.
            BadAnswer: a bars.toml is wrong.
            LakeError: the lake cannot be written.
        """
        found = Folder.read(Path(self._folder), self._lake.root)
        files = found.files
        for warning in found.warnings:
            self._progress.warn(SOURCE, warning)
        known = self._parts()
        wanted = [file for file in files if not self._is_complete(file, known.get(file.name, []))]
        self._progress.start(SOURCE, "files", len(wanted))
        failed: list[str] = []
        for file in wanted:
            try:
                self._read(file, known.get(file.name, []))
            except BadAnswer as error:
                failed.append(file.name)
                kept = "; the bars read from it before stay" if known.get(file.name) else ""
                self._progress.warn(SOURCE, f"{file.name}: {error}{kept}")
            self._progress.advance(SOURCE, 1, 0)
        gone = [name for name in known if name not in {file.name for file in files}]
        if gone:
            self._progress.warn(SOURCE, self._explain_gone(gone))
        if not files or len(failed) == len(files):
            what = (
                "no file of bars" if not files else f"no file of bars that can be read ({first_of(failed)})"
            )
            raise SourceUnavailable(f"files_dir {self._folder} has {what}; see docs/data.md")
        self._say_guesses()
        self._compare_with_request()
        num_read = len(wanted) - len(failed)
        self._progress.finish(
            SOURCE, f"{len(files) - len(failed)} files are up to date, {num_read} were read now"
        )

    def _parts(self) -> dict[str, list[Part]]:
        """Return the parts of this folder by file."""
        found: dict[str, list[Part]] = {}
        for kind in KINDS:
            for part in self._lake.parts(SOURCE, dataset_of(self._folder, kind)).values():
                found.setdefault(_origin(part)["file"], []).append(part)
        return found

    def _timezone_of(self, file: OwnFile) -> str:
        return file.description.timezone or self._timezone

    def _is_complete(self, file: OwnFile, parts: Sequence[Part]) -> bool:
        version = file.version(self._timezone_of(file))
        there = [_origin(part) for part in parts if part.version == version]
        last = [origin["number"] for origin in there if origin["last"]]
        wanted = {(origin["number"], kind) for origin in there for kind in origin["kinds"]}
        return (
            bool(last)
            and wanted == {(origin["number"], origin["kind"]) for origin in there}
            and {origin["number"] for origin in there} == set(range(last[0] + 1))
        )

    def _read(self, file: OwnFile, former: Sequence[Part]) -> None:
        """Read a file to the lake, and remove its former parts.

        Raises:
            BadAnswer: nothing of it can be used.
            LakeError: the lake cannot be written.
        """
        written: set[tuple[str, str]] = set()
        coarse: dict[str, int] = {}
        session = Counter[bool]()  # bars of stocks inside and outside of New York's
        num_finer = num_bars = 0
        with Spool(self._lake.root / SPOOL_FOLDER) as spool:
            notes = self._fill(file, spool)
            frames = spool.frames()
            frame, number = next(frames, None), 0
            while frame is not None:
                coarser = coarse_symbols(frame)
                coarse |= coarser
                rows, aggregated = to_minutes(
                    frame.filter(~pl.col("symbol").is_in([*coarser]).fill_null(False))
                )
                num_finer += aggregated
                frame = next(frames, None)
                is_last = frame is None
                if is_last and not num_bars and not len(rows):
                    raise BadAnswer(_explain_coarse(coarse))
                for part in self._write(file, rows, number, is_last, session):
                    written.add((part.dataset, part.unit))
                    num_bars += part.rows
                number += 1
                self._progress.advance(SOURCE, 0, 0)
        for part in former:
            if (part.dataset, part.unit) not in written:
                self._lake.remove(part)
        if coarse:
            notes.append(_explain_coarse(coarse))
        if num_finer:
            notes.append(f"aggregated {num_finer:,} of its rows, bars finer than a minute")
        if session.total() and session[True] < IN_SESSION * session.total():
            share = session[True] / session.total()
            notes.append(
                f"with times in {self._timezone_of(file)}, only {share:.0%} of its bars are of 09:30-16:00 New "
                f"York; see --files-timezone and {FILE_NAME} in docs/data.md"
            )
        for note in notes:
            self._progress.warn(SOURCE, f"{file.name}: {note}")

    def _fill(self, file: OwnFile, spool: Spool) -> list[str]:
        """Read all rows; return what is strange about them, a line each."""
        with opened(file.path) as content:
            symbol = "" if "symbol" in content.header else file.symbol
            columns = Columns(content.header, content.delimiter, self._timezone_of(file), symbol)
            num_rows = num_timed = num_named = num_possible = 0
            for raw in content.batches:
                try:
                    rows = columns.rows(raw)
                # Times of the year 30,000 are a panic.
                except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
                    raise BadAnswer(
                        f"its columns cannot be read: {' '.join(str(error).split()):.200}"
                    ) from error
                num_rows += len(rows)
                num_timed += len(rows) - rows["open_time"].null_count()
                num_named += len(rows) - rows["symbol"].null_count()
                is_possible = rows["open_time"].is_between(EARLIEST_NS, self._job.now_ns)
                num_possible += int(is_possible.sum())
                if num_rows and not num_timed:
                    name, example = content.header["open_time"], _example(raw["open_time"])
                    raise BadAnswer(f"no time in its column {name!r} can be read, such as {example!r:.40}")
                spool.add(rows)
                self._progress.advance(SOURCE, 0, int(raw.estimated_size()))
            if not num_rows:
                raise BadAnswer("it has a header and no rows")
            if not num_possible:
                when = f"{utc(EARLIEST_NS):%Y} to now, such as {_example(raw['open_time']):.40}"
                raise BadAnswer(f"no time in its column {content.header['open_time']!r} is of {when}")
            if not file.is_unchanged():
                raise BadAnswer("it changed while it was read: the next refresh reads it")
            times = columns.times
            zone = self._timezone_of(file)
            notes = (
                ("left out", content.num_bad_lines, f"lines for their number of values: {content.example}"),
                ("left out", columns.num_headers, "lines, copies of the header"),
                ("set aside", num_rows - num_timed - times.num_ambiguous, "rows: their time cannot be read"),
                (
                    "set aside",
                    times.num_ambiguous,
                    f"rows: the clocks of {zone} repeat or skip their time; save times in UTC",
                ),
                ("set aside", num_rows - num_named, "rows: they name no symbol"),
            )
            lines = [f"{done} {count:,} of its {what}" for done, count, what in notes if count]
            if len(times.units) > 1:
                lines.append(
                    f"its times are in {' and '.join(sorted(times.units))}: each was read by its size"
                )
            return lines

    def _write(
        self, file: OwnFile, rows: pl.DataFrame, number: int, is_last: bool, session: Counter[bool]
    ) -> Iterator[Part]:
        """Write a frame's rows, one part per kind of symbols."""
        kinds: dict[str, list[str]] = {}
        for symbol in rows["symbol"].unique().drop_nulls().sort().to_list():
            kind, is_guessed = file.description.kind(symbol)
            kinds.setdefault(kind, []).append(symbol)
            if is_guessed:
                self._guessed[symbol] = "crypto" if kind == CRYPTO else "stock"
        if not kinds:
            kinds[STOCK] = []
        named = [kind for kind in KINDS if kind in kinds]
        for kind in named:
            own = pl.col("symbol").is_in(kinds[kind])
            # Rows without a symbol, too, so that they are counted.
            table = rows.filter(own | pl.col("symbol").is_null() if kind == named[0] else own)
            table = table.drop(name for name in FLOW_COLUMNS if table[name].null_count() == len(table))
            times = table["open_time"].drop_nulls().to_numpy()
            times = times[(times >= EARLIEST_NS) & (times <= self._job.now_ns)]
            if kind != CRYPTO:
                session.update(in_regular_session(times).tolist())
            start_ns, end_ns = (int(times.min()), int(times.max()) + MINUTE_NS) if len(times) else (0, 0)
            origin = {"file": file.name, "number": number, "kind": kind, "kinds": named, "last": is_last}
            yield self._lake.write(
                SOURCE,
                dataset_of(self._folder, kind),
                f"{file.name}#{number}" if number else file.name,
                table.to_arrow(),
                key=json.dumps(origin),
                version=file.version(self._timezone_of(file)),
                start_ns=start_ns,
                end_ns=end_ns,
                symbols=kinds[kind],
                now_ns=self._job.now_ns,
                fetched_ns=min(file.changed_ns, self._job.now_ns),
            )

    def _say_guesses(self) -> None:
        """Report what was guessed of symbols that were read now."""
        if not self._guessed:
            return
        by_class: dict[str, list[str]] = {}
        for symbol, asset_class in sorted(self._guessed.items()):
            by_class.setdefault(asset_class, []).append(symbol)
        guesses = "; ".join(
            f"{kind} {first_of(names)}" for kind, names in sorted(by_class.items(), reverse=True)
        )
        adjusted = "; prices of stocks count as split-adjusted" if "stock" in by_class else ""
        self._progress.warn(
            SOURCE, f"guessed from the symbols: {guesses}{adjusted}. {FILE_NAME} can say it, see docs/data.md"
        )

    def _compare_with_request(self) -> None:
        """Report symbols that have bars, but none in the days that were asked for."""
        spans: dict[str, tuple[int, int]] = {}
        for part in (part for parts in self._parts().values() for part in parts if part.rows):
            for symbol in part.symbols:
                low, high = spans.get(symbol, (part.start_ns, part.end_ns))
                spans[symbol] = (min(low, part.start_ns), max(high, part.end_ns))
        start_ns, end_ns = self._job.request.start_ns, self._job.request.end_ns
        outside = [symbol for symbol, (low, high) in spans.items() if high <= start_ns or end_ns <= low]
        if outside:
            low, high = min(spans[name][0] for name in outside), max(spans[name][1] for name in outside)
            self._progress.warn(
                SOURCE,
                f"{first_of(sorted(outside))}: all bars, {utc(low).date()} to {utc(high).date()}, are outside of "
                f"the days asked for, {utc(start_ns).date()} to {utc(end_ns).date()}: see --start-date",
            )

    def _explain_gone(self, gone: list[str]) -> str:
        return (
            f"{first_of(gone)}: no longer in {self._folder}; the lake keeps the bars. To drop them, remove the "
            f"parts of that name in {self._lake.root / SOURCE}"
        )


def _origin(part: Part) -> dict[str, Any]:
    """Return which piece of which file a part is; it is written as the key."""
    return dict(json.loads(part.key))


def _example(values: pl.Series) -> str:
    """Return the first value as text."""
    try:
        return str(values.drop_nulls().first())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ArithmeticError, ValueError):
        return "one of another era"  # for which Python has no date


def _explain_coarse(coarse: dict[str, int]) -> str:
    """Say which symbols were left out, and why."""
    sizes = ", ".join(f"{minutes:,} minutes" for minutes in sorted(set(coarse.values()))[:3])
    return (
        f"bars of {sizes} ({first_of(sorted(coarse))}) were left out: coarser ones than a minute do not say what "
        "happened within, and accounts act every minute"
    )
