"""``evaluate CHECKPOINT``: an exam on demand, for any dates, symbols, sources and costs, written as a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from commands.options import parse_costs, parse_day_ns
from data_sources.bars import DAY_NS, Bars
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.progress import Progress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from envs.market import NoSegment
from evaluation import plots
from evaluation.comparison import compare, read_other
from evaluation.csv_files import csv_files
from evaluation.ensemble import reading_like
from evaluation.exam import AGAINST, CHAMPION, POLICY, Walk, at_flat_cost
from evaluation.group_exam import examine_accounts, notes_on_walks
from evaluation.measures import daily_growth, measure
from evaluation.page import headline, render_page
from evaluation.provenance import (
    champion_beside,
    changed_days,
    day_of,
    folders_of,
    how_it_was_made,
    members_of,
    minute_of,
    num_trials,
    training_rows,
)
from evaluation.record_summary import headline_beside
from evaluation.report import Report, file_name, json_bytes, write_folder
from evaluation.revision import revision_of
from evaluation.stale_opens import stale_opens
from evaluation.trained_policy import TrainedPolicy, stem_of
from evaluation.verdict import describe_power, verdict
from models.ensemble import Decider
from models.policy import precision_on
from monitoring.format import duration
from runtime.control import EXIT_NO_DATA, ExitProgram
from runtime.wording import count_of, first_of
from training.data_feed import data_request

log = logging.getLogger("continuous_training")

# Bars before the first decision, for features with a memory: about ten days of any stock (docs/features.md).
HISTORY_DAYS = 35
# Per forward of the trunk: more do not fit a CPU's cache; without gradients these take under a gigabyte of a GPU.
SEGMENTS_AT_ONCE = {"cpu": 16, "cuda": 64}
# Symbols drawn from either end of the table.
NUM_PLOTTED = 3
ESTIMATE_SECONDS = 5.0  # of work, after which the rest is estimated
# Label of the progress bar.
TASK = "evaluation"


@dataclass(frozen=True)
class EvaluateOptions:
    """The command line's options. An empty one means: as the checkpoint suggests."""

    first_day: str = ""  # YYYY-MM-DD, UTC
    last_day: str = ""  # inclusive
    symbols: tuple[str, ...] = ()
    costs_bps: tuple[float, ...] = (0.0, 1.0, 2.0, 5.0, 10.0)
    plotted: tuple[str, ...] = ()
    allow_overlap: bool = False
    refresh: bool = False
    against: Path | None = None

    @classmethod
    def parse(
        cls,
        first_day: str,
        last_day: str,
        symbols: str,
        costs: str,
        plotted: str,
        overlap: bool,
        refresh: bool,
        against: Path | None = None,
    ) -> EvaluateOptions:
        """Parse options as typed.

        Raises:
            ValueError: a cost is not a number of 0 or more.
        """
        chosen = _words(symbols), parse_costs(costs), _words(plotted)
        return cls(first_day, last_day, *chosen, overlap, refresh, against)


@dataclass(frozen=True)
class Span:
    """The time that is evaluated, in nanoseconds UTC; the end is exclusive."""

    start_ns: int
    end_ns: int

    def __str__(self) -> str:
        return f"{minute_of(self.start_ns)} to {minute_of(self.end_ns)} UTC"


def command(trained: TrainedPolicy, options: EvaluateOptions, progress: Progress) -> Path:
    """Evaluate a checkpoint and write ``report_dir``/NAME_FIRST_LAST.

    Args:
        trained: the policy; its settings name the lake.
        options: dates, symbols and costs.
        progress: of the refresh, the exam and the pictures.

    Returns:
        The folder with ``report.html``, ``report.json`` and the pictures.

    Raises:
        ValueError: an option does not fit; the message names one that would.
        ExitProgram: there are no bars at all.
        OSError: the report cannot be written.
    """
    began = time.monotonic()
    now_ns = time.time_ns()
    most = 1e4 * trained.env_config(1).max_rate
    if any(cost >= most for cost in options.costs_bps):
        raise ValueError(f"--costs {max(options.costs_bps):g} must be under {most:g} bps")
    other = read_other(options.against, trained.settings, trained.device) if options.against else None
    # None of them may have been trained on these days.
    later = max([trained, other] if other else [trained], key=lambda policy: policy.newest.trained_until_ns)
    newest_ns = data_request(trained.settings, now_ns if options.refresh else trained.data_cutoff_ns).end_ns
    span = choose_span(options, later.newest.trained_until_ns, newest_ns, later.newest_name)
    lake = Lake(Path(trained.settings.data_dir), progress)
    if options.refresh:
        refresh(lake, data_request(trained.settings, now_ns), now_ns, progress)
    request = replace(
        data_request(trained.settings, now_ns),
        start_ns=span.start_ns - HISTORY_DAYS * DAY_NS,
        end_ns=min(span.end_ns, now_ns),
        min_bars=later.settings.context_bars + later.settings.horizon + 2,
        keep_pegged=True,
    )
    data, symbols, others, notes = _load_bars(lake, request, trained, options, span)
    beside = f" against {_name_of(other)}" if other else ""
    log.info(f"Evaluating {_name_of(trained)}{beside} on {count_of(len(symbols), 'symbol')}, {span}")
    report = _evaluate(trained, other, data, symbols, others, options, span, notes, progress)
    first, last = (str(moment.astype("datetime64[D]")) for moment in (report.first, report.last))
    folder = Path(trained.settings.report_dir) / f"{file_name(stem_of(trained.titles))}_{first}_{last}"
    write_folder(folder, render_files(report, progress))
    log.info(headline(report))
    log.info(f"Because: {report.verdict.reason}")
    if report.comparison:
        log.info(str(report.comparison))
    log.info(f"Power: {describe_power(report.pooled[POLICY], report.num_trials)}")
    log.info(report.record)
    interval = f" (95 % interval: {report.break_even_range})" if report.break_even_range else ""
    log.info(f"Its trades: {report.margin}")
    log.info(f"Break-even cost of the ladder: {report.break_even[1]}{interval}")
    log.info(f"Wrote {folder / 'report.html'} in {time.monotonic() - began:.1f} s")
    return folder


def choose_span(options: EvaluateOptions, trained_until_ns: int, newest_ns: int, name: str) -> Span:
    """Return the time to evaluate: by default from the end of the training to its newest bar.

    Raises:
        ValueError: a date is invalid, the span is empty, or it overlaps the training and that is not allowed.
    """
    start_ns = parse_day_ns("--from", options.first_day) if options.first_day else trained_until_ns
    end_ns = parse_day_ns("--to", options.last_day) + DAY_NS if options.last_day else newest_ns
    first_allowed = day_of(-(-trained_until_ns // DAY_NS) * DAY_NS)
    if (start_ns < trained_until_ns or end_ns <= trained_until_ns < newest_ns) and not options.allow_overlap:
        raise ValueError(
            f"{name} was trained on bars up to {minute_of(trained_until_ns)} UTC: the first day allowed is "
            f"{first_allowed}; --allow-overlap shows older ones, and stamps the report"
        )
    if end_ns <= start_ns:
        if options.first_day and options.last_day:
            raise ValueError(f"--from {options.first_day} must not be after --to {options.last_day}")
        raise ValueError(
            f"there is no time between {minute_of(start_ns)} and {minute_of(end_ns)} UTC: give --from and --to, "
            "or --refresh for bars of today"
        )
    return Span(start_ns, end_ns)


def _load_bars(
    lake: Lake, request: DataRequest, trained: TrainedPolicy, options: EvaluateOptions, span: Span
) -> tuple[LoadedData, list[str], list[Bars], list[str]]:
    """Load the bars; return those of the symbols to evaluate, these symbols, other bars, and notes about all.

    Raises:
        ValueError: no bars on these days, or a symbol is unknown.
        ExitProgram: no bars at all.
    """
    try:
        data = load(lake, request)
    except LakeError as error:
        raise ExitProgram(EXIT_NO_DATA, f"{error}: look at the disk, or use another --data-dir") from error
    available = {bars.symbol for bars in data.bars if bars.open_time[-1] >= span.start_ns}
    if not available:
        if not data.bars and not _has_bars(lake, request):
            raise ExitProgram(
                EXIT_NO_DATA,
                f"No bars are in {lake.root}: fetch them with --refresh, or give the --data-dir of the training",
            )
        raise ValueError(
            f"there are no bars from {span}: give other --from and --to, or --refresh for newer ones"
        )
    known = [symbol for symbol in trained.symbols if symbol in available]
    unknown = [symbol for symbol in options.symbols if symbol not in available]
    if unknown:
        listed = first_of(sorted(available), most=50)
        raise ValueError(
            f"--symbols {','.join(unknown)}: no bars from {span}; there are: {listed}; others are read with "
            + ", ".join(f"--{setting.replace('_', '-')}" for setting in request.symbols)
        )
    symbols = list(dict.fromkeys(options.symbols)) or known or sorted(available)
    for symbol in options.plotted:
        if trained.env_config(1).group:
            raise ValueError("--plot-symbols draws single accounts; leave it out where groups are evaluated")
        if symbol not in symbols:
            raise ValueError(f"--plot-symbols {symbol} is not among the symbols that are evaluated")
    notes = []
    if "simulated" in trained.settings.sources:
        notes.append("The bars are simulated, with a pattern to learn that real markets do not have.")
    new = [symbol for symbol in symbols if symbol not in trained.symbols]
    if new:
        notes.append(f"Not among the symbols of the training: {', '.join(new)}.")
    missing = [symbol for symbol in trained.symbols if symbol not in available]
    if missing and not options.symbols:
        notes.append(f"Symbols of the training without bars in these days: {', '.join(missing)}.")
    chosen = [bars for bars in data.bars if bars.symbol in set(symbols)]
    others = [bars for bars in data.bars if bars.symbol not in set(symbols)]
    return replace(data, bars=chosen), symbols, others, notes


def _has_bars(lake: Lake, request: DataRequest) -> bool:
    try:
        return "simulated" in request.sources or any(
            lake.parts(source, dataset) for source in request.sources for dataset in lake.datasets(source)
        )
    except LakeError:
        return False


def _evaluate(
    trained: TrainedPolicy,
    other: TrainedPolicy | None,
    data: LoadedData,
    symbols: Sequence[str],
    others: Sequence[Bars],
    options: EvaluateOptions,
    span: Span,
    notes: Sequence[str],
    progress: Progress,
) -> Report:
    """Run the exam and reach a verdict."""
    settings, device = trained.settings, trained.device
    segments = settings.micro_batch_segments or SEGMENTS_AT_ONCE[device.type]
    champion, champion_notes = champion_beside(trained, span.start_ns)
    policies: dict[str, Decider] = {POLICY: trained.policy}
    if champion:
        best = champion.policy(device, precision_on(device, settings.precision))
        policies[CHAMPION] = reading_like(trained, best)
    try:
        market = trained.market(data.bars, others)
        walks = examine_accounts(
            policies,
            market,
            trained.env_config(1),
            symbols,
            span.start_ns,
            span.end_ns,
            chunk_segments=segments,
            flat_costs_bps=options.costs_bps,
            on_segment=_Segments(progress),
        )
        others_walks = _walk_other(other, data, symbols, others, span, segments, progress) if other else []
    except NoSegment as error:
        raise ValueError(
            f"no symbol has {settings.horizon + 2} bars in a row from {span}: "
            "give other --from and --to, or --refresh for newer bars"
        ) from error
    ladder, ladder_growth = [], []
    for bps in options.costs_bps:
        rung = walks.pop(at_flat_cost(POLICY, bps))
        ladder.append((bps, measure(rung)))
        ladder_growth.append(daily_growth(rung))
    notes = [*notes, *champion_notes]
    if trained.members:
        notes.append("Each set of members that was tried is one more trial; no ledger counts them.")
    notes += notes_on_walks(walks[POLICY], market, trained.env_config(1), symbols)
    # By the simulated market's rules, every open is the close before.
    is_simulated = "simulated" in settings.sources
    warning = "" if is_simulated else stale_opens(market, symbols, span.start_ns, span.end_ns)
    if warning:
        log.warning(warning)
        notes.append(f"{warning}.")
    pooled = {name: measure(contestant) for name, contestant in walks.items()}
    trials = num_trials(trained, data.fingerprint)
    judgement = verdict(pooled[POLICY], {n: m for n, m in pooled.items() if n != POLICY}, trials)
    comparison = None
    if other:
        comparison = compare(walks[POLICY], others_walks, _name_of(other))
        walks = {POLICY: walks.pop(POLICY), AGAINST: others_walks, **walks}
        pooled = {POLICY: pooled.pop(POLICY), AGAINST: measure(others_walks), **pooled}
    until_ns = max(policy.newest.trained_until_ns for policy in (trained, other) if policy)
    overlaps = span.start_ns < until_ns
    if overlaps:
        judgement = replace(judgement, edge=False, reason="days that it was trained on prove nothing")
    rows, row_notes = training_rows(trained)
    revision = revision_of(market, span.start_ns, span.end_ns)
    notes += changed_days(trained, revision)
    by_return = sorted(walks[POLICY], key=lambda walk: -walk.log_returns.sum())
    ends = [*by_return[:NUM_PLOTTED], *by_return[NUM_PLOTTED:][-NUM_PLOTTED:]]
    return Report(
        checkpoint=trained.name,
        members=members_of(trained),
        first=min(walk.time[0] for walk in walks[POLICY]),
        last=max(walk.time[-1] for walk in walks[POLICY]),
        trained_until=np.datetime64(until_ns, "ns"),
        overlaps=overlaps,
        walks=walks,
        pooled=pooled,
        verdict=judgement,
        num_trials=trials,
        ladder=ladder,
        ladder_growth=ladder_growth,
        plotted=options.plotted or [walk.symbol for walk in ends],
        training=rows,
        made=how_it_was_made(trained, data, revision, len(walks[POLICY]), device),
        notes=[*notes, *row_notes],
        record=_records(trained),
        is_simulated=is_simulated,
        comparison=comparison,
    )


def _walk_other(
    other: TrainedPolicy,
    data: LoadedData,
    symbols: Sequence[str],
    others: Sequence[Bars],
    span: Span,
    segments: int,
    progress: Progress,
) -> list[Walk]:
    """Let the other checkpoint walk the same bars: its own features and scale, the same costs."""
    walks = examine_accounts(
        other.policy,
        other.market(data.bars, others),
        other.env_config(1),
        symbols,
        span.start_ns,
        span.end_ns,
        chunk_segments=segments,
        on_segment=_Segments(progress),
    )
    return walks[POLICY]


class _Segments:
    """Shows how many segments were read and walked, and soon how long the rest takes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done, self._first, self._began = 0, 0, 0.0
        self._is_estimated = False

    def __call__(self, done: int, total: int) -> None:
        if not self._done:
            self._progress.start(TASK, "segments", total)
            self._began, self._first = time.monotonic(), done
        self._progress.advance(TASK, done - self._done)
        self._done = done
        seconds = time.monotonic() - self._began
        if not self._is_estimated and seconds > ESTIMATE_SECONDS and done > self._first:
            self._is_estimated = True
            left = seconds / (done - self._first) * (total - done)
            log.info(
                f"About {duration(left)} more for {total:,} segments; Ctrl+C ends it and leaves nothing behind"
            )
        if done == total:
            self._progress.finish(TASK, f"{total:,} segments read and walked")


def render_files(report: Report, progress: Progress) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of a report; pictures are drawn one at a time."""
    pictures = report.pictures()
    progress.start(TASK, "pictures", len(pictures))
    svgs = {}
    for name, draw in pictures.items():
        wide = draw(plots.WIDTHS[0])
        svgs[name] = (
            plots.as_svg(wide, f"{name}-wide"),
            plots.as_svg(draw(plots.WIDTHS[1]), f"{name}-narrow"),
        )
        yield f"{name}.png", plots.as_png(wide)
        progress.advance(TASK)
    progress.finish(TASK, f"{len(pictures)} pictures drawn")
    yield from csv_files(report.walks, report.tear)
    yield "report.json", json_bytes(report)
    yield "report.html", render_page(report, svgs)


def _name_of(trained: TrainedPolicy) -> str:
    """Return a checkpoint's run and epoch, and its file where that says neither; of an ensemble all files."""
    if trained.members:
        return trained.name
    checkpoint = trained.checkpoint
    file = "" if checkpoint.path.name == checkpoint.name else f" ({checkpoint.path.name})"
    return f"run {checkpoint.run}, epoch {checkpoint.epoch}{file}"


def _records(trained: TrainedPolicy) -> str:
    """Return the headlines of the records beside the checkpoints."""
    headlines = [(folder.name, headline_beside(folder)) for folder in folders_of(trained)]
    if len(headlines) == 1:
        return headlines[0][1]
    return "; ".join(f"of {name}: {headline}" for name, headline in headlines)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
