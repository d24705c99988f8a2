"""Bring the lake up to date from every source, each in isolation, or only probe the sources."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from data_sources.calendar import utc
from data_sources.errors import DataError, LakeBusy, MissingCredentials
from data_sources.lake.lake import Lake
from data_sources.progress import Progress
from data_sources.sources import Answer, DataRequest, RefreshJob, Source
from data_sources.splits import SplitLedger
from data_sources.vendors import SOURCES

logger = logging.getLogger(__name__)

WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class SourceReport:
    """How one source fared. ``message`` is one line for the user that begins with its label.

    ``rows`` and ``newest_ns`` (end of the newest interval, None without one) are what the lake has of it now.
    """

    status: Literal["ok", "skipped", "failed"]
    message: str
    seconds: float
    rows: int = 0
    newest_ns: int | None = None


def refresh(
    lake: Lake,
    request: DataRequest,
    now_ns: int,
    progress: Progress,
    *,
    sources: Mapping[str, Source] = SOURCES,
    wait_seconds: float = WAIT_SECONDS,
) -> dict[str, SourceReport]:
    """Fetch from every source of the request what the lake lacks, one source after another.

    Whatever a source does, the others get their turn and what arrived stays. A refresh by another process is
    waited for. Sources that were skipped or failed are also reported through ``progress.warn``. Only an interrupt
    leaves this function as an exception.

    Args:
        sources: other sources under these names, for tests; the other arguments make the RefreshJob.
        wait_seconds: how long to wait for another process that writes to the lake.
    """
    wanted = {name: sources[name] for name in request.sources}
    reports = {
        name: SourceReport("ok", f"{source.label} ok: needs no download", 0.0)
        for name, source in wanted.items()
        if source.is_computed
    }
    fetched = [source for source in wanted.values() if not source.is_computed]
    if fetched:
        started = time.monotonic()
        try:
            with lake.writing(wait_seconds, progress):
                job = RefreshJob(lake, request, now_ns, progress, SplitLedger(lake.root))
                for source in fetched:
                    reports[source.name] = _refresh_one(job, source)
        except (DataError, OSError) as error:  # the lake itself is at fault
            for source in fetched:
                if source.name not in reports:
                    reports[source.name] = _failure_report(lake, source, error, time.monotonic() - started)
    for source in fetched:
        if reports[source.name].status != "ok":
            progress.warn(source.name, reports[source.name].message)
    return {name: reports[name] for name in wanted}


def _refresh_one(job: RefreshJob, source: Source) -> SourceReport:
    started = time.monotonic()
    try:
        source.refresh(job)
        rows, newest_ns, kept = _kept(job.lake, source)
    except MissingCredentials as error:
        return SourceReport("skipped", f"{source.label} skipped: {error}", time.monotonic() - started)
    except (DataError, OSError, ImportError) as error:
        return _failure_report(job.lake, source, error, time.monotonic() - started)
    except Exception as error:
        # A bug of ours: logged with its traceback, and still no reason to stop training.
        logger.exception("the source %s broke", source.name)
        return _failure_report(job.lake, source, error, time.monotonic() - started)
    return SourceReport("ok", f"{source.label} ok: {kept}", time.monotonic() - started, rows, newest_ns)


def _failure_report(lake: Lake, source: Source, error: Exception, seconds: float) -> SourceReport:
    reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    status: Literal["skipped", "failed"] = "skipped" if isinstance(error, LakeBusy) else "failed"
    try:
        rows, newest_ns, kept = _kept(lake, source)
    except DataError:
        rows, newest_ns, kept = 0, None, "its part of the lake cannot be read"
    return SourceReport(status, f"{source.label} {status}: {reason}; {kept}", seconds, rows, newest_ns)


def _kept(lake: Lake, source: Source) -> tuple[int, int | None, str]:
    """Return a source's rows in the lake, the end of the newest interval, and both in words."""
    parts = [
        part for dataset in lake.datasets(source.name) for part in lake.parts(source.name, dataset).values()
    ]
    if not parts:
        return 0, None, "nothing is kept of it yet"
    rows, newest_ns = sum(part.rows for part in parts), max(part.end_ns for part in parts)
    return rows, newest_ns, f"{rows:,} bars up to {utc(newest_ns):%Y-%m-%d %H:%M} UTC are kept"


def probe(request: DataRequest, now_ns: int) -> list[Answer]:
    """Ask all sources of a request at once whether a refresh would work; nothing is kept."""
    sources = request.chosen
    with ThreadPoolExecutor(len(sources) or 1, "probe") as pool:
        found = pool.map(lambda source: _probe_one(source, request, now_ns), sources)
        return [answer for answers in found for answer in answers]


def _probe_one(source: Source, request: DataRequest, now_ns: int) -> list[Answer]:
    try:
        return list(source.probe(request, now_ns))
    except (DataError, OSError, ImportError) as error:
        return [Answer(source.label, error)]
