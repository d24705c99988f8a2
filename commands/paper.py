"""The command ``paper``: accounts that trade on live bars by themselves, once a minute. No orders are sent."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from commands.check.sources import check_clock
from commands.paper_report import curves_of, report, table, trades_of
from commands.signals import SignalOptions, refresh_bars, request_of, seconds_to_next_minute
from data_sources.bars import MINUTE_NS
from data_sources.errors import DataError
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.progress import WarningCollector
from data_sources.refresh import probe
from envs.feature_errors import FeatureError
from evaluation import ensemble, plots
from evaluation.champion import DETHRONED
from evaluation.page import render_paper
from evaluation.paper import Minute, run_minute
from evaluation.paper_book import Book, BookError
from evaluation.paper_totals import Totals
from evaluation.provenance import members_of
from evaluation.recorder import COSTS, training_of
from evaluation.report import file_name
from evaluation.trained_policy import TrainedPolicy, stem_of
from monitoring.console import Console
from monitoring.format import iso_time, utc_time
from runtime.control import EXIT_LOCKED, EXIT_SETTING, ExitProgram
from runtime.files import identity_of, write_atomically
from runtime.locking import FolderHeld, FolderLock, FolderLockError
from runtime.wording import first_of
from training.checkpoint import BEST, CheckpointError

log = logging.getLogger("continuous_training")

MOST_NAMED, MOST_SAID = 3, 200  # symbols in a warning, lines on the page
PAGE = "paper.html"
CLOCK_MINUTES = 60  # between two looks at the sources' clocks


@dataclass(frozen=True)
class PaperOptions:
    """The options: symbols (all of the training if empty), the folder, and after how many minutes to end."""

    symbols: tuple[str, ...] = ()
    folder: Path | None = None
    minutes: int | None = None
    as_json: bool = False
    gross: float | None = None  # cap on the exposure of one account over all; None: no such account


class Paper:
    """Accounts in a folder, and the checkpoint that decides for them."""

    def __init__(
        self,
        trained: TrainedPolicy,
        options: PaperOptions,
        book: Book,
        console: Console,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.trained, self.options, self.book, self.console = trained, options, book, console
        self._clock = clock
        self._files: list[tuple[int, int, int] | None] = [part.file for part in trained.parts]
        self._is_dethroned = False  # the champion that decided lost its title, and there is no other
        self._lines = [self._deciding()]  # that are not in the book yet
        self._clock_fault, self._clock_at = "", -CLOCK_MINUTES
        self._warned: list[str] = []
        self._is_silent = False  # nothing was decided in the minute before, and that is said

    def run(self) -> None:
        """Do one minute: fetch, book, decide, keep, show.

        Raises:
            DataError: the lake cannot be read.
            OSError: the folder cannot be written; the minute is not done.
        """
        said = self._follow()
        now_ns = self._clock()
        collector = WarningCollector()
        if before := self._clock_went_back(now_ns):
            said.append(before)
        else:
            said += self._check_clock(now_ns)
            data = self._fetch(now_ns, collector)
            said += self._warnings_of(collector)
            # Whatever took long, a decision counts only if it is made in time.
            self._step(data, max(now_ns, self._clock()), said)
        for text in said:
            log.warning(text)

    def _step(self, data: LoadedData, now_ns: int, said: list[str]) -> None:
        book, wanted = self.book, set(self.options.symbols or self.trained.symbols)
        bars = [series for series in data.bars if series.symbol in wanted]
        others = [series for series in data.bars if series.symbol not in wanted]
        # With the clock off, no decision: only what is settled is booked.
        may_decide = not self._clock_fault
        done = run_minute(
            self.trained.actor, book.state, bars, now_ns, may_decide, others, self._is_dethroned
        )
        loaded = {series.symbol for series in bars}
        missing = {symbol: data.dropped.get(symbol, "no bars") for symbol in sorted(wanted - loaded)}
        done = replace(done, waiting=missing | dict(done.waiting))
        said += self._changes(done)
        if done.revised:  # perhaps they had not closed yet, by the source's clock
            self._clock_at = now_ns // MINUTE_NS - CLOCK_MINUTES
        totals = Totals.of(book.extra) or Totals.begin(now_ns, self.options.gross, len(wanted))
        trades = totals.add(done, self.trained.env_config(1))
        lines: list[dict[str, Any]] = [*self._lines]
        lines += [{"kind": "said", "time": iso_time(now_ns), "text": text} for text in said]
        lines += [*trades_of(done), *trades]
        if totals.mark_is_due(done):
            lines.append({"kind": "mark", "time": iso_time(done.state.minute_ns), **totals.returns(done)})
        book.save(done.state, asdict(totals), lines)
        self._lines = []
        content = report(self.trained.title, done, totals, now_ns)
        if self.options.as_json:
            self.console.emit(json.dumps(content, allow_nan=False))
        else:
            self.console.table(*table(content))
        if lines and lines[-1]["kind"] == "mark":
            self.write_page(content)

    def _changes(self, done: Minute) -> list[str]:
        """Return what is to be said of a minute: late and revised bars, and why nothing is decided."""
        said = [
            f"{symbol}: {_minutes(times)} {what}"
            for what, found in (
                ("came too late: nothing was decided there, the account held what it had", done.late),
                ("came after newer bars", done.inserted),
                (
                    "changed since: used as they are now until they are booked, what is booked stays",
                    done.revised,
                ),
            )
            for symbol, times in found.items()
        ]
        why = self._clock_fault or ", ".join(
            f"{reason} ({first_of([s for s, other in done.waiting.items() if other == reason], MOST_NAMED)})"
            for reason in dict.fromkeys(done.waiting.values())
        )
        no_trade = f"No trade: {why}" if why and not done.targets else ""
        if no_trade and not self._is_silent:
            said.append(
                no_trade if self._clock_fault else f"{no_trade}; sources are down, or this clock is ahead"
            )
        if done.targets and self._is_silent:
            said.append("Trades again: there are bars of the last minute")
        self._is_silent = bool(no_trade)
        return said

    def write_page(self, content: Mapping[str, Any]) -> None:
        """Write ``paper.html`` into the folder, with a curve once there are two marks."""
        lines = self.book.lines()
        marks = [line for line in lines if line["kind"] == "mark"]
        svgs = {}
        if len(marks) > 1:
            draw = partial(plots.equity, curves_of(marks))
            wide, narrow = (plots.as_svg(draw(w), f"equity-{n}") for n, w in enumerate(plots.WIDTHS))
            svgs = {"equity": (wide, narrow)}
        said = [line for line in reversed(lines) if line["kind"] == "said"][:MOST_SAID]
        page = render_paper(content, said, svgs)
        write_atomically(self.book.folder / PAGE, lambda file: file.write(page))

    def _fetch(self, now_ns: int, collector: WarningCollector) -> LoadedData:
        settings = self.trained.settings
        options = SignalOptions(self.options.symbols)
        lake = Lake(Path(settings.data_dir), collector)
        now_ns = refresh_bars(lake, self.trained, options, now_ns, collector)
        sees_others = self.trained.actor.sees_others
        return load(lake, request_of(settings, now_ns, self.options.symbols, sees_others))

    def _warnings_of(self, collector: WarningCollector) -> list[str]:
        fresh = [text for text in collector.warnings if text not in self._warned]
        self._warned = collector.warnings
        return fresh  # a source that stays down is reported once

    def _follow(self) -> list[str]:
        """Read the checkpoints again where one changed: ``best.pt`` is another one after a promotion."""
        former = self.trained
        paths = [checkpoint.path for checkpoint in former.checkpoints]
        now = [_identity(path) for path in paths]
        if now == self._files:
            return []
        self._files = now
        if None in now:
            gone = paths[now.index(None)]
            self._is_dethroned = gone.name == BEST and (gone.parent / DETHRONED).exists()
            if self._is_dethroned:
                return [f"{gone} lost its title: accounts go to cash until there is another champion"]
            return [f"{gone} is not there any more: {former.title} goes on deciding"]
        try:
            trained = ensemble.read(paths, type(former.settings), former.device, **former.changes)
            # The settings may differ from those of its training.
            trained = replace(trained, settings=former.settings)
            if training_of(trained.statistics, trained.env_config(1)) != self.book.identity["training"]:
                return [f"{former.name} is of another training by now: {former.title} goes on deciding"]
        except (OSError, CheckpointError, FeatureError, ValueError) as error:
            return [f"{former.name} cannot be followed: {error}; {former.title} goes on deciding"]
        self.trained, self._is_dethroned = trained, False
        self._lines.append(self._deciding())
        return [f"{trained.title} decides from now on, after {former.title}"]

    def _deciding(self) -> dict[str, Any]:
        """Return the line that says who decides from here on."""
        return {
            "kind": "deciding",
            "time": iso_time(self._clock()),
            "checkpoint": self.trained.title,
            "members": members_of(self.trained),
        }

    def _clock_went_back(self, now_ns: int) -> str:
        newest_ns = self.book.state.minute_ns
        if now_ns >= newest_ns:
            return ""
        return (
            f"No trade: the clock went back, to {utc_time(now_ns)} UTC from {utc_time(newest_ns)}; nothing "
            "is done until it is there again"
        )

    def _check_clock(self, now_ns: int) -> list[str]:
        minute = now_ns // MINUTE_NS
        if minute - self._clock_at < CLOCK_MINUTES:
            return []
        self._clock_at = minute
        line = check_clock(probe(request_of(self.trained.settings, now_ns, self.options.symbols), now_ns))
        before, self._clock_fault = self._clock_fault, ""
        if line.level != "OK" and "not compared" not in line.text:
            self._clock_fault = f"this clock is {line.text.split(':')[0]}"
        if self._clock_fault:
            self._clock_at = minute - CLOCK_MINUTES + 1  # look again soon
        return [f"Trades again: the clock is {line.text}"] if before and not self._clock_fault else []


def run(
    trained: TrainedPolicy,
    options: PaperOptions,
    console: Console,
    clock: Callable[[], int] = time.time_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Do a minute just after every minute has closed, until interrupted, or for ``options.minutes``.

    Raises:
        ExitProgram: the folder is another account's, is used by another process, or cannot be read.
        ValueError: an option does not fit.
    """
    settings = trained.settings
    if settings.end_date:
        raise ValueError(f"end_date={settings.end_date} ends the bars before now: --end-date none lifts that")
    if "simulated" in settings.sources:
        raise ValueError("sources=simulated has no live bars: name others, such as --sources binance")
    request_of(settings, clock(), options.symbols)  # an unknown symbol needs no folder
    if options.gross is not None and not 0 < options.gross < math.inf:
        raise ValueError(f"--gross {options.gross:g} must be above 0, such as 1 for all of the equity")
    if options.gross is not None and settings.account != "single":
        raise ValueError(
            f"--portfolio is of single accounts: those of account={settings.account} have caps of their own, "
            "gross_exposure and net_exposure; drop it"
        )
    folder = options.folder or Path("paper") / file_name(stem_of(trained.names))
    try:
        with FolderLock(folder).hold():
            _run(trained, options, console, folder, clock, sleep)
    except FolderHeld as error:
        raise ExitProgram(
            EXIT_LOCKED,
            f"{folder} is used by another paper, {error.holder}: stop it, or use another --output",
        ) from error
    except (FolderLockError, BookError) as error:
        raise ExitProgram(EXIT_SETTING, str(error)) from error


def _run(
    trained: TrainedPolicy,
    options: PaperOptions,
    console: Console,
    folder: Path,
    clock: Callable[[], int],
    sleep: Callable[[float], None],
) -> None:
    config = trained.env_config(1)
    identity = {
        "training": training_of(trained.statistics, config),
        "costs": {name: getattr(config, name) for name in COSTS},
        "symbols": sorted(options.symbols or trained.symbols),
        "gross": options.gross,
    }
    book = Book.open(folder, identity)
    paper = Paper(trained, options, book, console, clock)
    begins = "Begins" if book.is_new else "Goes on"
    log.info(f"{begins} in {folder} with {trained.title}; no orders are sent")
    failed, minutes = "", 0
    try:
        while options.minutes is None or minutes < options.minutes:
            if minutes:
                sleep(seconds_to_next_minute(clock()))
            minutes += 1
            try:
                paper.run()
                failed = ""
            except (OSError, DataError) as error:
                text = f"This minute was not done: {error}"
                if text != failed:
                    log.warning(f"{text}; the next one tries again")
                failed = text
                paper.book = Book.open(folder, identity)
    except KeyboardInterrupt:
        log.info(f"Stopped; another start goes on in {folder}")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return the identity of a file; None where it is not there, or the disk refuses."""
    try:
        return identity_of(path)
    except OSError:
        return None


def _minutes(times: Sequence[int]) -> str:
    shown = first_of([utc_time(time_ns, "%H:%M") for time_ns in times], MOST_NAMED)
    return f"bar{'s' if len(times) > 1 else ''} of {shown}"
