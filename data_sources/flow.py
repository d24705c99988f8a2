"""Order flow of bars that the lake has from before it kept any: how much there is, and fetching it again.

Which parts those are, and whether they are worth fetching again, is for their source to say. A part that has got
its flow says so in its footer, so that a fetch that was killed goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_sources.errors import DataError
from data_sources.lake.lake import Lake
from data_sources.progress import Progress
from data_sources.sources import DataRequest
from runtime.files import free_bytes
from runtime.wording import count_of

FILES_PER_REFRESH = 500  # in the background: some minutes of one core, and up to 1.3 GB
# A month of minutes in Binance's archive is 2.5 MB; six perpetuals took 3.8 to 5.9 bytes a bar more in the lake.
DOWNLOADED_BYTES_PER_BAR, KEPT_BYTES_PER_BAR = 57, 8
SPARE_BYTES = 4 << 30  # of the disk, for checkpoints and for new bars, which matter more


@dataclass(frozen=True)
class FlowPlan:
    """What there is to fetch again: ``files`` with ``bars`` bars."""

    files: int
    bars: int

    @property
    def downloaded_bytes(self) -> int:
        """An estimate."""
        return self.bars * DOWNLOADED_BYTES_PER_BAR

    @property
    def kept_bytes(self) -> int:
        """What they will take on the disk beside what they take now, an estimate."""
        return self.bars * KEPT_BYTES_PER_BAR

    def __str__(self) -> str:
        return (
            f"order flow: the lake has {count_of(self.files, 'file')} from before it was kept, fetched again "
            f"while a run trains, newest first: about {_size(self.downloaded_bytes)} to download, "
            f"{_size(self.kept_bytes)} more on the disk"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def missing_flow(lake: Lake, request: DataRequest, now_ns: int) -> FlowPlan:
    """Return what ``fetch_flow`` has to do.

    Raises:
        LakeError: the lake cannot be read.
    """
    parts = [part for source in request.chosen for part in source.without_flow(lake, request, now_ns)]
    return FlowPlan(len(parts), sum(part.rows for part in parts))


def fetch_flow(
    lake: Lake, request: DataRequest, now_ns: int, progress: Progress, most_files: int | None = None
) -> None:
    """Fetch again, newest first, what was kept before there was order flow; what fails is a warning.

    The lake is locked for each file only.

    Args:
        lake: where the bars are; prices and volumes stay as they are there.
        request: which bars.
        now_ns: the present.
        progress: receives work done and warnings.
        most_files: the others are left for another time.
    """
    for source in request.chosen:
        try:
            parts = source.without_flow(lake, request, now_ns)[:most_files]
            if most_files is not None:
                most_files -= len(parts)
            if not parts:
                continue
            needed = SPARE_BYTES + KEPT_BYTES_PER_BAR * sum(part.rows for part in parts)
            free = free_bytes(lake.root)
            if free is not None and free < needed:
                raise DataError(f"{_size(needed - free)} more must be free in {lake.root}")
            source.add_flow(lake, parts, now_ns, progress)
        except (DataError, OSError, ImportError) as error:
            progress.warn(source.name, f"order flow of {source.label} waits: {' '.join(str(error).split())}")
