"""Order flow of archive files that the lake has from before it kept any: which to fetch again, and how.

Only the archive is asked, one small file after another, the newest days and months first: they are what exams and
live decisions see. The bars that REST gave of the last days are for the next refresh (binance_pair.py); others of
REST, which the archive lacks, are few and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_sources.bars import DAY_NS
from data_sources.calendar import utc
from data_sources.errors import BadAnswer
from data_sources.lake.flow import OTHER_BAR
from data_sources.lake.lake import Lake
from data_sources.lake.parts import FORMAT, Part
from data_sources.progress import Progress
from data_sources.sources import DataRequest
from data_sources.vendors.binance_archive import Archive, Unit, days, months
from data_sources.vendors.binance_product import Product
from data_sources.vendors.http import FinalAnswer

ASK_AGAIN_NS = 7 * DAY_NS  # for a file that was not to be had
WAIT_SECONDS = 600.0  # for another process that writes to the lake
MOST_WARNINGS = 3


def without_flow(lake: Lake, product: Product, request: DataRequest, now_ns: int) -> list[Part]:
    """Return the archive's files of a request that were kept without flow, newest first.

    Raises:
        LakeError: the lake cannot be read.
    """
    found = {
        (part.dataset, part.unit): part
        for name, start_ns, end_ns in product.names(lake.root, request)
        for part in lake.parts(product.source, name).values()
        if part.start_ns < end_ns and start_ns < part.end_ns and _is_due(part, now_ns)
    }
    return sorted(found.values(), key=lambda part: (-part.start_ns, part.dataset))


def _is_due(part: Part, now_ns: int) -> bool:
    is_file = part.unit[0].isdigit() and bool(part.version) and part.rows > 0
    return is_file and part.format < FORMAT and now_ns - part.flow_asked_ns >= ASK_AGAIN_NS


def add_flow(
    archive: Archive, product: Product, lake: Lake, parts: Sequence[Part], now_ns: int, progress: Progress
) -> None:
    """Fetch the files of ``parts`` again, and add their flow to the lake, each as it comes.

    Raises:
        LakeError: the lake cannot be written.
        DataError: the archive was given up.
    """
    archive.host.begin_refresh()
    progress.start(product.source, "files of order flow", len(parts))
    num_odd = num_done = 0

    def warn(text: str) -> None:
        nonlocal num_odd
        num_odd += 1
        if num_odd <= MOST_WARNINGS:
            progress.warn(product.source, text)

    try:
        for part in parts:
            name = f"{part.dataset} {part.unit}"
            answer, num_bytes = None, 0
            try:
                if file := archive.fetch(part.dataset, _unit_of(part)):
                    answer, num_bytes = file.rows_of(_unit_of(part)), file.num_bytes
            except (BadAnswer, FinalAnswer) as error:
                if archive.host.down is not None:
                    raise
                warn(str(error))
            with lake.writing(WAIT_SECONDS, progress):
                now = lake.add_flow(part, answer, now_ns)
            num_done += answer is not None
            others = now.flow_rejected.get(part.dataset, {}).get(OTHER_BAR, 0) if now else 0
            if others:
                warn(
                    f"{name}: {others:,} of {part.rows:,} minutes have other prices or another volume in the "
                    f"archive than on {utc(part.fetched_ns).date()}, when they were fetched; they stay as they "
                    "are, without order flow"
                )
            progress.advance(product.source, 1, num_bytes)
    finally:
        archive.host.stop.set()
        if num_odd > MOST_WARNINGS:
            progress.warn(product.source, f"{num_odd - MOST_WARNINGS} more files of order flow are odd")
        progress.finish(product.source, f"order flow of {num_done} of {len(parts)} files added")


def _unit_of(part: Part) -> Unit:
    units: Iterator[Unit] = (days if part.unit.count("-") == 2 else months)(part.start_ns, part.end_ns)
    return next(units)
