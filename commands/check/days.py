"""Whether the lake's days are enough for the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from commands.check.report import Line
from commands.check.sources import lake_of
from data_sources.bars import DAY_NS
from data_sources.errors import LakeError
from data_sources.lake.lake import Part
from data_sources.sources import DataRequest
from training.enough_days import find_shortage

if TYPE_CHECKING:
    from continuous_training import Settings

MONDAY = 4  # 1970-01-01 was a Thursday


def check_days(settings: Settings, request: DataRequest, world_size: int) -> Iterator[Line]:
    """Warn where few days would be left to train on; a refresh may add older ones, a start then counts again."""
    lake, parts_of = lake_of(settings.data_dir), dict[str, list[Part]]()
    try:
        for source in request.chosen:
            for group in source.groups:
                dataset = group.dataset_in(request)
                for name in group.symbols_in(lake, request) if dataset is None else [dataset]:
                    parts_of.setdefault(group.asset_class, []).extend(lake.parts(source.name, name).values())
    except LakeError:
        return  # reported with its bars
    days_of = {
        kind: {day for part in parts for day in _days(part, kind, request)}
        for kind, parts in parts_of.items()
    }
    every = set[int]().union(*days_of.values())
    if not every:
        return
    first_held_out = max(every) + 1 - settings.holdout_days
    left = {kind: sum(day < first_held_out for day in days) for kind, days in days_of.items() if days}
    if not any(left.values()):
        return  # reported with the holdout
    rows = sum(part.rows for parts in parts_of.values() for part in parts)
    share = sum(left.values()) / sum(len(days) for days in days_of.values())
    if text := find_shortage(left, round(rows * share), settings, world_size):
        yield Line("days", "warning", f"with the bars in {settings.data_dir}, {text}")


def _days(part: Part, asset_class: str, request: DataRequest) -> Iterator[int]:
    """Yield the days since 1970 that a part may have bars of."""
    if part.rows:
        first, end = max(part.start_ns, request.start_ns) // DAY_NS, min(part.end_ns, request.end_ns)
        for day in range(first, -(-end // DAY_NS)):
            if asset_class != "stock" or (day - MONDAY) % 7 < 5:
                yield day
