"""Which runs' last checkpoints stay on the disk: the newest runs, then one of each day, then one of each week.

The rule counts days and weeks that have a checkpoint, not time until now: neither a clock that jumps nor a month
without training removes anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

KEEP_DAYS = 7


def thin_out(last_of_runs: Sequence[Path], keep_runs: int) -> set[Path]:
    """Return the checkpoints that stay.

    Args:
        last_of_runs: the last checkpoint of every run, newest first.
        keep_runs: newest runs of which all stay. Of those before them stay the newest of each of the last
            KEEP_DAYS days and of every week, in UTC.
    """
    days: dict[date, Path] = {}
    weeks: dict[tuple[int, int], Path] = {}
    for path in last_of_runs[keep_runs:]:
        if not (day := _day_of(path)):  # removed meanwhile
            continue
        days.setdefault(day, path)
        weeks.setdefault(day.isocalendar()[:2], path)
    return {*last_of_runs[:keep_runs], *list(days.values())[:KEEP_DAYS], *weeks.values()}


def most_files(settings: Settings) -> int:
    """Return how many checkpoints stay at most, with the champion's; one a week is added to them."""
    complete_runs = settings.keep_checkpoints // -(-settings.epochs // settings.checkpoint_every)
    named = 1 + (settings.exam_patience is not None)  # the champion's, and the run's best
    return settings.keep_checkpoints + max(0, settings.keep_runs - complete_runs) + KEEP_DAYS + named


def _day_of(path: Path) -> date | None:
    try:
        return _day(path, path.stat().st_mtime)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=1000)  # a file's contents never change
def _day(path: Path, modified: float) -> date:
    """Return the day of a checkpoint.

    A folder that was copied to another machine has the time of the copy on every file, and one day would be left
    of months. So the day on which the run's bars end counts where it is earlier, unless a setting fixes that.
    """
    try:
        contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensor
        bars_end = contents["data_cutoff_ns"] / 1e9
        if bars_end > 0 and not contents["config"].get("end_date"):
            modified = min(modified, bars_end)
    except Exception:  # noqa: BLE001 - a stranger's file can do anything to torch's unpickler
        log.debug(f"{path} cannot be read: the day of the file counts")
    return datetime.fromtimestamp(modified, UTC).date()
