"""``evaluate CHECKPOINT``: the exam on demand, for any dates, symbols, sources and costs, written as a report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_sources.calendar import date_ns
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.progress import Progress
from data_sources.refresh import DataRequest, LoadedData, load, refresh
from envs.market import NoSegment
from evaluation import plots
from evaluation.exam import CHAMPION, POLICY, at_flat_cost, examine
from evaluation.measures import measure
from evaluation.page import count_of, headline, page
from evaluation.provenance import (
    DAY_NS,
    champion_beside,
    day_of,
    how_it_was_made,
    minute_of,
    num_trials,
    training_rows,
)
from evaluation.report import Report, file_name, json_bytes, write_folder
from evaluation.trained_policy import TrainedPolicy
from evaluation.verdict import verdict
from runtime.control import EXIT_NO_DATA, ExitProgram
from training.checkpoint import Checkpoint
from training.data_feed import data_request

log = logging.getLogger("continuous_training")

# Bars in front of the first decision, for features with a memory: about ten days of any stock (docs/features.md).
HISTORY_DAYS = 35
# Per forward of the trunk: more fall out of a CPU's cache; without gradients these take under a gigabyte of a GPU.
SEGMENTS_AT_ONCE = {"cpu": 16, "cuda": 64}
NUM_PLOTTED = 3  # symbols of either end of the table
WHAT = "evaluation"  # its name beside the progress bar


@dataclass(frozen=True)
class Asked:
    """What is evaluated. Empty texts and tuples mean: as the checkpoint suggests."""

    first_day: str = ""  # YYYY-MM-DD, UTC
    last_day: str = ""  # included
    symbols: tuple[str, ...] = ()
    costs_bps: tuple[float, ...] = (0.0, 1.0, 2.0, 5.0, 10.0)
    plotted: tuple[str, ...] = ()
    allow_overlap: bool = False
    refresh: bool = False

    @classmethod
    def read(
        cls,
        first_day: str,
        last_day: str,
        symbols: str,
        costs: str,
        plotted: str,
        overlap: bool,
        refresh: bool,
    ) -> Asked:
        """Read what was typed.

        Raises:
            ValueError: a cost is no number of 0 or more.
        """
        try:
            costs_bps = sorted({float(cost) for cost in _words(costs)})
        except ValueError:
            costs_bps = [-1.0]
        if not all(0 <= cost < math.inf for cost in costs_bps):
            raise ValueError(f"--costs {costs} must be basis points of 0 or more, such as 0,1,2,5,10")
        return cls(first_day, last_day, _words(symbols), tuple(costs_bps), _words(plotted), overlap, refresh)


def command(trained: TrainedPolicy, asked: Asked, progress: Progress) -> Path:
    """Evaluate a checkpoint and write ``report_dir``/NAME_FIRST_LAST.

    Args:
        trained: the policy; the lake is that of its settings.
        asked: dates, symbols and costs.
        progress: of the refresh, the exam and the pictures.

    Returns:
        The folder with ``report.html``, ``report.json`` and the pictures.

    Raises:
        ValueError: what is asked for cannot be: names it, and what can.
        ExitProgram: there are no bars at all.
        OSError: the report cannot be written.
    """
    began = time.monotonic()
    now_ns = time.time_ns()
    most = 1e4 * trained.env_config(1).max_rate
    if any(cost >= most for cost in asked.costs_bps):
        raise ValueError(f"--costs {max(asked.costs_bps):g} must be under {most:g} bps")
    trained_until_ns = trained.checkpoint.trained_until_ns
    newest_ns = data_request(
        trained.settings, now_ns if asked.refresh else trained.checkpoint.data_cutoff_ns
    ).end_ns
    start_ns, end_ns = interval(asked, trained_until_ns, newest_ns, trained.checkpoint.path.name)
    lake = Lake(Path(trained.settings.data_dir), progress)
    if asked.refresh:
        refresh(lake, data_request(trained.settings, now_ns), now_ns, progress)
    request = replace(
        data_request(trained.settings, now_ns),
        start_ns=start_ns - HISTORY_DAYS * DAY_NS,
        end_ns=min(end_ns, now_ns),
        min_bars=trained.settings.context_bars + trained.settings.horizon + 2,
    )
    data, symbols, notes = _bars(lake, request, trained, asked, (start_ns, end_ns))
    champion, told = champion_beside(trained, start_ns)
    notes += told
    days = f"{minute_of(start_ns)} to {minute_of(end_ns)} UTC"
    log.info(f"Evaluating {trained.checkpoint.path.name} on {count_of(len(symbols), 'symbol')}, {days}")
    report = _held(trained, champion, data, symbols, asked, (start_ns, end_ns), notes, progress)
    first, last = (str(moment.astype("datetime64[D]")) for moment in (report.first, report.last))
    folder = Path(trained.settings.report_dir) / f"{file_name(trained.checkpoint.path.stem)}_{first}_{last}"
    write_folder(folder, files_of(report, progress))
    log.info(headline(report))
    log.info(f"Because: {report.verdict.reason}")
    log.info(f"Break-even cost: {report.break_even[1]}")
    log.info(f"Wrote {folder / 'report.html'} in {time.monotonic() - began:.1f} s")
    return folder


def interval(asked: Asked, trained_until_ns: int, newest_ns: int, name: str) -> tuple[int, int]:
    """Return the start and end of what is evaluated, in nanoseconds; the end does not belong to it.

    Raises:
        ValueError: the dates are none, the wrong way round, or overlap what was trained on without leave.
    """
    start_ns = _day_ns("--from", asked.first_day) if asked.first_day else trained_until_ns
    end_ns = _day_ns("--to", asked.last_day) + DAY_NS if asked.last_day else newest_ns
    first_allowed = day_of(-(-trained_until_ns // DAY_NS) * DAY_NS)
    if (start_ns < trained_until_ns or end_ns <= trained_until_ns < newest_ns) and not asked.allow_overlap:
        raise ValueError(
            f"{name} was trained on bars up to {minute_of(trained_until_ns)} UTC: the first day allowed is "
            f"{first_allowed}; --allow-overlap shows older ones, and stamps the report"
        )
    if end_ns <= start_ns:
        if asked.first_day and asked.last_day:
            raise ValueError(f"--from {asked.first_day} must not be after --to {asked.last_day}")
        raise ValueError(
            f"there is no time between {minute_of(start_ns)} and {minute_of(end_ns)} UTC: give --from and --to, "
            "or --refresh for bars of today"
        )
    return start_ns, end_ns


def _bars(
    lake: Lake, request: DataRequest, trained: TrainedPolicy, asked: Asked, span: tuple[int, int]
) -> tuple[LoadedData, list[str], list[str]]:
    """Read the bars; return them, who is evaluated, and what is to be said about that.

    Raises:
        ValueError: no bars in these days, or a symbol is unknown.
        ExitProgram: no bars at all.
    """
    try:
        data = load(lake, request)
    except LakeError as error:
        raise ExitProgram(EXIT_NO_DATA, f"{error}: look at the disk, or use another --data-dir") from error
    start_ns, end_ns = span
    days = f"from {minute_of(start_ns)} to {minute_of(end_ns)} UTC"
    there = {one.symbol for one in data.bars if one.open_time[-1] >= start_ns}
    if not there:
        if not data.bars and not _has_bars(lake, request):
            raise ExitProgram(
                EXIT_NO_DATA,
                f"No bars are in {lake.root}: fetch them with --refresh, or give the --data-dir of the training",
            )
        raise ValueError(f"there are no bars {days}: give other --from and --to, or --refresh for newer ones")
    known = [symbol for symbol in trained.checkpoint.symbols if symbol in there]
    unknown = [symbol for symbol in asked.symbols if symbol not in there]
    if unknown:
        some = sorted(there)
        listed = ", ".join(some[:50]) + (f" and {len(some) - 50} more" if len(some) > 50 else "")
        raise ValueError(
            f"--symbols {','.join(unknown)}: no bars {days}; there are: {listed}; others are read with --stocks, "
            "--binance-pairs, --polygon-crypto"
        )
    symbols = list(dict.fromkeys(asked.symbols)) or known or sorted(there)
    for name in asked.plotted:
        if name not in symbols:
            raise ValueError(f"--plot-symbols {name} is not among the symbols that are evaluated")
    notes = []
    if "simulated" in trained.settings.sources:
        notes.append("The bars are simulated, with something to find in them: no market is like that.")
    strange = [symbol for symbol in symbols if symbol not in trained.checkpoint.symbols]
    if strange:
        notes.append(f"Not among the symbols of the training: {', '.join(strange)}.")
    missing = [symbol for symbol in trained.checkpoint.symbols if symbol not in there]
    if missing and not asked.symbols:
        notes.append(f"Symbols of the training without bars in these days: {', '.join(missing)}.")
    chosen = [one for one in data.bars if one.symbol in set(symbols)]
    return replace(data, bars=chosen), symbols, notes


def _has_bars(lake: Lake, request: DataRequest) -> bool:
    try:
        return "simulated" in request.sources or any(
            lake.parts(source, dataset) for source in request.sources for dataset in lake.datasets(source)
        )
    except LakeError:
        return False


def _held(
    trained: TrainedPolicy,
    champion: Checkpoint | None,
    data: LoadedData,
    symbols: Sequence[str],
    asked: Asked,
    span: tuple[int, int],
    notes: list[str],
    progress: Progress,
) -> Report:
    """Hold the exam and judge it."""
    start_ns, end_ns = span
    settings, device = trained.settings, trained.device
    policies = {POLICY: trained.policy}
    if champion:
        policies[CHAMPION] = champion.policy(device, trained.policy.bf16)
    try:
        walks = examine(
            policies,
            trained.market(data.bars),
            trained.env_config(1),
            symbols,
            start_ns,
            end_ns,
            chunk_segments=settings.micro_batch_segments or SEGMENTS_AT_ONCE[device.type],
            flat_costs_bps=asked.costs_bps,
            on_segment=_SegmentProgress(progress),
        )
    except NoSegment as error:
        days = f"from {minute_of(start_ns)} to {minute_of(end_ns)} UTC"
        raise ValueError(
            f"no symbol has {settings.horizon + 2} bars in a row {days}: "
            "give other --from and --to, or --refresh for newer bars"
        ) from error
    ladder = [(bps, measure(walks.pop(at_flat_cost(POLICY, bps)))) for bps in asked.costs_bps]
    missing = [symbol for symbol in symbols if symbol not in {walk.symbol for walk in walks[POLICY]}]
    if missing:
        notes.append(f"Without bars enough for a segment of {settings.horizon}: {', '.join(missing)}.")
    pooled = {name: measure(own) for name, own in walks.items()}
    trials = num_trials(trained.checkpoint, data.fingerprint)
    judgement = verdict(pooled[POLICY], {n: m for n, m in pooled.items() if n != POLICY}, trials)
    until_ns = trained.checkpoint.trained_until_ns
    if start_ns < until_ns:
        judgement = replace(
            judgement, edge=False, reason="nothing can be told from days that it was trained on"
        )
    rows, told = training_rows(trained)
    by_return = sorted(walks[POLICY], key=lambda walk: -walk.log_returns.sum())
    ends = [*by_return[:NUM_PLOTTED], *by_return[NUM_PLOTTED:][-NUM_PLOTTED:]]
    return Report(
        checkpoint=trained.checkpoint.path.name,
        run=trained.checkpoint.run,
        epoch=trained.checkpoint.epoch,
        first=min(walk.time[0] for walk in walks[POLICY]),
        last=max(walk.time[-1] for walk in walks[POLICY]),
        trained_until=np.datetime64(until_ns, "ns"),
        overlaps=start_ns < until_ns,
        walks=walks,
        pooled=pooled,
        verdict=judgement,
        num_trials=trials,
        ladder=ladder,
        plotted=asked.plotted or [walk.symbol for walk in ends],
        training=rows,
        made=how_it_was_made(trained, data, len(walks[POLICY]), device),
        notes=[*notes, *told],
    )


class _SegmentProgress:
    """Passes on how many segments are walked."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = False

    def __call__(self, done: int, total: int) -> None:
        if not self._began:
            self._progress.start(WHAT, "segments", total)
            self._began = True
        self._progress.advance(WHAT)
        if done == total:
            self._progress.finish(WHAT, f"{total:,} segments walked")


def files_of(report: Report, progress: Progress) -> Iterator[tuple[str, bytes]]:
    """Draw everything, one file after the other."""
    pictures = report.pictures()
    progress.start(WHAT, "pictures", len(pictures))
    svgs = {}
    for name, draw in pictures.items():
        wide = draw(plots.WIDTHS[0])
        svgs[name] = (
            plots.as_svg(wide, f"{name}-wide"),
            plots.as_svg(draw(plots.WIDTHS[1]), f"{name}-narrow"),
        )
        yield f"{name}.png", plots.as_png(wide)
        progress.advance(WHAT)
    progress.finish(WHAT, f"{len(pictures)} pictures drawn")
    yield "report.json", json_bytes(report)
    yield "report.html", page(report, svgs)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _day_ns(option: str, text: str) -> int:
    try:
        return date_ns(text)
    except ValueError:
        raise ValueError(f"{option} {text} must be a day such as 2026-11-20") from None
