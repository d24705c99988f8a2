"""One Binance pair's parts in the lake.

Units of a pair's dataset, each a part with its own footer:

* ``2026-10``, ``2026-11-20``   a month or day of the archive; without rows and version: known to be empty
* ``recent``                    REST bars up to now; grows, and loses its front to the archive's files
* ``rest-20250301T0000``        REST bars of an older span that the archive does not have
* ``fill-2026-10``              REST's bars of the minutes missing in that file; when empty, a true outage
* ``kept-2026-10``              bars of older parts that are not in that file

A month takes the place of its days.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from data_sources.bars import COLUMNS, FLOW_COLUMNS
from data_sources.lake.lake import Lake
from data_sources.lake.parts import Part
from data_sources.lake.quality import SCHEMA, bar_table


class PairParts:
    """One pair's parts in the lake."""

    def __init__(self, lake: Lake, source: str, pair: str, now_ns: int) -> None:
        self._lake, self._source, self._pair, self._now_ns = lake, source, pair, now_ns
        self.by_unit = lake.parts(source, pair)
        self.num_written = 0

    def between(self, start_ns: int, end_ns: int) -> list[Part]:
        """Return the parts that touch [start_ns, end_ns)."""
        return [part for part in self.by_unit.values() if part.start_ns < end_ns and part.end_ns > start_ns]

    def of_archive(self) -> list[Part]:
        """Return the parts that are archive files."""
        return [part for unit, part in self.by_unit.items() if unit[0].isdigit()]

    def have_rows(self) -> bool:
        """Return whether any part has a row."""
        return any(part.rows for part in self.by_unit.values())

    def begin(self) -> tuple[int, int]:
        """Return where the oldest part with a bar begins, and the time of its first bar; there must be one."""
        oldest = min((part for part in self.by_unit.values() if part.rows), key=lambda part: part.start_ns)
        first = self.bars(oldest.start_ns, oldest.end_ns).column("open_time")[:1].to_pylist()
        return oldest.start_ns, (first or [oldest.start_ns])[0]

    def extent(self) -> tuple[int, int]:
        """Return the time of the first bar, and the end of the newest part with a bar; there must be one."""
        return self.begin()[1], max(part.end_ns for part in self.by_unit.values() if part.rows)

    def uncovered(
        self, start_ns: int, end_ns: int, parts: Sequence[Part] | None = None
    ) -> list[tuple[int, int]]:
        """Return the spans of [start_ns, end_ns) that no part (or none of ``parts``) covers, oldest first."""
        spans, cursor = [], start_ns
        parts = list(self.by_unit.values()) if parts is None else parts
        for part in sorted(parts, key=lambda part: part.start_ns):
            if part.end_ns > cursor:
                spans.append((cursor, min(part.start_ns, end_ns)))
                cursor = part.end_ns
        spans.append((cursor, end_ns))
        return [(start, end) for start, end in spans if start < end]

    def bars(self, start_ns: int, end_ns: int) -> pa.Table:
        """Return the bars of all parts that open in [start_ns, end_ns)."""
        found = self._lake.columns(self._source, self._pair, (self._pair,), start_ns, end_ns)
        columns = found.get(self._pair)
        if columns is None:
            return SCHEMA.empty_table()
        flow = {name: columns[name] for name in FLOW_COLUMNS if name in columns}
        return bar_table(self._pair, [columns[name] for name in COLUMNS], **flow)

    def write(
        self, unit: str, table: pa.Table, start_ns: int, end_ns: int, key: str, version: str = ""
    ) -> Part:
        """Write a part; see Lake.write."""
        part = self._lake.write(
            self._source, self._pair, unit, table, key=key, version=version, start_ns=start_ns, end_ns=end_ns,
            symbols=(self._pair,), now_ns=self._now_ns,
        )  # fmt: skip
        self.by_unit[unit] = part
        self.num_written += 1
        return part

    def remove(self, part: Part) -> None:
        """Remove a part."""
        self._lake.remove(part)
        self.by_unit.pop(part.unit, None)

    def remove_replaced_by(self, part: Part) -> None:
        """Remove the parts within an archive file's, except for its companions."""
        companions = (part.unit, f"fill-{part.unit}", f"kept-{part.unit}", "recent")
        for other in list(self.by_unit.values()):
            within = part.start_ns <= other.start_ns and other.end_ns <= part.end_ns
            if within and other.unit not in companions:
                self.remove(other)
