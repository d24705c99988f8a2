"""Keys, sources and the clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from commands.check.report import Line
from data_sources import snapshot
from data_sources.bars import DAY_NS
from data_sources.errors import LakeError, MissingCredentials, RateLimited, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.load import each_symbol
from data_sources.sources import Answer, DataRequest
from runtime.control import EXIT_NO_DATA
from training.checkpoint import Checkpoint, CheckpointError
from training.data_feed import data_request, lost_symbols
from training.progress import TrainingProgress

if TYPE_CHECKING:
    from continuous_training import Settings

MOST_SECONDS_APART = 5.0  # a minute counts as closed after so long


@lru_cache(maxsize=1)
def lake_of(data_dir: str) -> Lake:
    """Return the lake in a folder: one for all checks, which remembers the footers that it has read."""
    return Lake(Path(data_dir))


def check_keys(request: DataRequest, environment: Mapping[str, str]) -> Iterator[Line]:
    """Report which keys are set; never their values."""
    needed = {name: without for source in request.chosen for name, without in source.keys(request).items()}
    if not needed:
        yield Line("keys", "OK", f"{', '.join(request.sources)}: none is needed")
    for name, without in needed.items():
        if environment.get(name, "").strip():
            yield Line("keys", "OK", f"{name} is set")
        else:
            yield Line("keys", "warning", f"{name} is not set: {without}; see .env.example")


def check_answers(answers: Sequence[Answer], settings: Settings) -> Iterator[Line]:
    """Report how each source answered; if none did, a start has only what the lake holds."""
    for answer in answers:
        if answer.error is None:
            yield Line("sources", "OK", f"{answer.asked} {answer.found}")
        elif isinstance(answer.error, MissingCredentials):
            yield Line("sources", "warning", f"{answer.asked} is skipped: {answer.error}")
        else:
            reason = " ".join(str(answer.error).split())
            is_silent = isinstance(answer.error, SourceUnavailable) and not isinstance(
                answer.error, RateLimited
            )
            if is_silent and answer.address and answer.address not in reason:
                reason += f"; check the network, a firewall, {answer.address} in .env"
            yield Line("sources", "warning", f"{answer.asked}: {reason}; a start continues without it")
    if any(answer.error is None for answer in answers if answer.gives_bars):
        return
    stored = stored_rows(settings)
    if stored:
        text = f"no source of bars answers: a start trains on the {stored:,} bars in {settings.data_dir}"
        yield Line("sources", "warning", text)
    else:
        text = (
            f"no source of bars answers, and {settings.data_dir} holds none: set the keys in .env, check the "
            "network, or try it offline with --demo"
        )
        yield Line("sources", "error", text, EXIT_NO_DATA)


def check_run_bars(
    saved: Checkpoint, settings: Settings, answers: Sequence[Answer], offline: bool
) -> Iterator[Line]:
    """Report whether the bars that a run in progress began with are still there, or could be fetched again."""
    try:
        progress = TrainingProgress.of(saved)
    except CheckpointError:
        return  # reported before
    request = data_request(settings, progress.cutoff_ns)
    if not progress.cutoff_ns or progress.is_over(settings) or not request.needs_lake:
        return  # the start begins a run on fresh bars
    lake, began_with = lake_of(settings.data_dir), f"run {progress.run} began with"
    try:
        if snapshot.find(lake, request, progress.num_bars):
            yield Line("bars", "OK", f"those that {began_with} are in {settings.data_dir}")
            return
        rows = [row for _, row in each_symbol(lake, request)]
    except LakeError as error:
        yield Line("bars", "warning", f"those that {began_with} cannot be read: {error}")
        return
    lost = lost_symbols(rows, progress.num_bars, request)
    if not lost:
        yield Line("bars", "OK", f"every symbol that {began_with} has bars in {settings.data_dir}")
        return
    text = (
        f"{settings.data_dir} lacks bars that {began_with}, of {len(lost)} symbols such as {next(iter(lost))}"
    )
    copy = "copy the data_dir that it began with (see Moving house in docs/checkpoints.md)"
    if offline or any(answer.error is None for answer in answers if answer.gives_bars):
        text += (
            f": a start fetches what the sources still have, and stops if a symbol is left without; or {copy}"
        )
        yield Line("bars", "warning", text)
    elif settings.missing_symbols == "continue" and len(lost) < len(progress.num_bars):
        yield Line(
            "bars", "warning", f"{text}, and no source answers: a start continues without them; or {copy}"
        )
    else:
        yield Line("bars", "error", f"{text}, and no source answers: {copy}", EXIT_NO_DATA)


def check_bars(settings: Settings, request: DataRequest) -> Iterator[Line]:
    """Warn where the lake's bars are no longer than the holdout; a refresh may add older ones."""
    lake = lake_of(settings.data_dir)
    try:
        spans = [
            (max(part.start_ns, request.start_ns), min(part.end_ns, request.end_ns))
            for source in request.sources
            for dataset in lake.datasets(source)
            for part in lake.parts(source, dataset).values()
            if part.rows and part.start_ns < request.end_ns and part.end_ns > request.start_ns
        ]
    except LakeError:
        return  # check_answers counts on no bars then
    if not spans:
        return
    days = (max(end for _, end in spans) - min(start for start, _ in spans)) / DAY_NS
    if days <= settings.holdout_days:
        held_out = f"holdout_days={settings.holdout_days}"
        text = f"{settings.data_dir} holds {days:.0f} days of bars, no more than {held_out}"
        fix = "none are left to train on unless a refresh adds older ones: lower --holdout-days"
        yield Line("bars", "warning", f"{text}; {fix}")


def stored_rows(settings: Settings) -> int:
    """Count the lake's bars of the settings' sources, whatever their age; 0 where it cannot be read."""
    lake = lake_of(settings.data_dir)
    try:
        return sum(
            part.rows
            for source in settings.sources
            for dataset in lake.datasets(source)
            for part in lake.parts(source, dataset).values()
        )
    except LakeError:
        return 0


def check_clock(answers: Sequence[Answer]) -> Line:
    """Compare this machine's clock with those of the servers that sent their time."""
    offsets = {answer.asked: answer.seconds_ahead for answer in answers if answer.seconds_ahead is not None}
    if not offsets:
        return Line("clock", "warning", "not compared: no source sent its time")
    # The nearest one: a proxy may serve an old answer.
    asked, seconds = min(offsets.items(), key=lambda item: abs(item[1]))
    host = asked.split()[0]
    if abs(seconds) <= MOST_SECONDS_APART:
        return Line("clock", "OK", f"within {max(1.0, abs(seconds)):.0f} s of {host}'s")
    direction = "ahead of" if seconds > 0 else "behind"
    text = f"{abs(seconds):.0f} s {direction} {host}'s: set it, as with timedatectl set-ntp true"
    return Line("clock", "warning", f"{text}; else minutes are fetched before they have closed, or late")
