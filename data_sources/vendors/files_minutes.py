"""Rows of any file as minutes: coarser bars are found, finer ones aggregated; many rows go over the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from data_sources.bars import DAY_NS, FLOW_COLUMNS, MINUTE_NS
from data_sources.errors import lake_errors
from data_sources.lake.quality import EARLIEST_NS

PART_ROWS = 1 << 20  # of one part of the lake, more or less: some 0.5 GB of memory while it is checked
LATEST_NS = 2**62  # the year 2116
UNPLACED = -1  # the bucket of rows without a time that could be
COMMON = 3  # bars at one distance before it is called theirs
# Prices of a row that can be part of a minute.
_VALID = pl.all_horizontal(
    *(pl.col(name).is_finite() & (pl.col(name) > 0) for name in ("open", "high", "low", "close")),
    pl.col("volume").fill_null(0.0).is_finite(),
)
_KEY = ["symbol", "minute"]


class Spool:
    """Collects the rows of one file and returns them in frames of whole months, or of days where those are large.

    Beyond PART_ROWS rows go to temporary files, one per month.
    """

    def __init__(self, folder: Path, part_rows: int = PART_ROWS, bucket: str = "month") -> None:
        self._folder, self._part_rows, self._bucket = folder, part_rows, bucket
        self._kept: list[pl.DataFrame] = []
        self._num_kept = 0
        self._files: dict[int, Any] = {}  # writers by bucket
        self._counts: dict[int, int] = {}

    def __enter__(self) -> Spool:
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with lake_errors("write", self._folder):  # what a writer still held may not fit the disk
                for writer in self._files.values():
                    writer.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, rows: pl.DataFrame) -> None:
        """Take rows, in any order."""
        self._kept.append(rows)
        self._num_kept += len(rows)
        if self._num_kept > self._part_rows or self._files:
            self._write()

    def frames(self) -> Iterator[pl.DataFrame]:
        """Yield all rows, those of a month or a day together."""
        if not self._files:
            yield pl.concat(self._kept)
            return
        waiting: list[int] = []
        size = 0
        for bucket in sorted(self._counts):
            count = self._counts[bucket]
            if waiting and size + count > self._part_rows:
                yield pl.concat(frame for number in waiting for frame in self._frames(number))
                waiting, size = [], 0
            if count <= 2 * self._part_rows or (self._bucket == "day" and bucket != UNPLACED):
                waiting.append(bucket)
                size += count
            elif bucket == UNPLACED:
                yield from self._frames(bucket)
            else:
                with Spool(self._folder / "days", self._part_rows, "day") as days:
                    for frame in self._frames(bucket):
                        days.add(frame)
                    yield from days.frames()
        if waiting:
            yield pl.concat(frame for number in waiting for frame in self._frames(number))

    def _frames(self, bucket: int) -> Iterator[pl.DataFrame]:
        self._files[bucket].close()
        with lake_errors("read", self._path(bucket)), pa.ipc.open_stream(self._path(bucket)) as stream:
            for batch in stream:
                yield pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))

    def _write(self) -> None:
        rows, self._kept, self._num_kept = pl.concat(self._kept), [], 0
        time = pl.col("open_time")
        moment = pl.from_epoch(time, "ns")
        bucket = (
            time // DAY_NS
            if self._bucket == "day"
            else moment.dt.year().cast(pl.Int64) * 12 + moment.dt.month().cast(pl.Int64)
        )
        is_placed = time.is_between(EARLIEST_NS, LATEST_NS).fill_null(False)
        split = rows.with_columns(pl.when(is_placed).then(bucket).otherwise(UNPLACED).alias("bucket"))
        with lake_errors("write", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for (number,), own in split.partition_by("bucket", as_dict=True, include_key=False).items():
                table = own.to_arrow()
                if number not in self._files:
                    options = pa.ipc.IpcWriteOptions(compression="lz4")
                    self._files[number] = pa.ipc.new_stream(self._path(number), table.schema, options=options)
                self._files[number].write_table(table)
                self._counts[number] = self._counts.get(number, 0) + len(own)

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket}.arrows"


def coarse_symbols(rows: pl.DataFrame) -> dict[str, int]:
    """Return the symbols whose bars are coarser than a minute, with the minutes of one.

    Bars of a minute have most neighbours a minute apart, also where many are missing; those of five never do.
    """
    minutes = rows.select("symbol", pl.col("open_time").floordiv(MINUTE_NS).alias("minute")).drop_nulls()
    gaps = minutes.unique().sort("symbol", "minute").select("symbol", pl.col("minute").diff().over("symbol"))
    counts = gaps.drop_nulls().group_by("symbol", "minute").len()
    found = counts.group_by("symbol").agg(
        pl.col("minute").sort_by("len", "minute", descending=[True, False]).first(),
        pl.col("len").max().alias("common"),
        pl.col("len").sum().alias("all"),
        pl.col("len").filter(pl.col("minute") == 1).sum().alias("ones"),
    )
    is_coarse = (
        (pl.col("minute") > 1)
        & (pl.col("common") >= COMMON)
        & (pl.col("ones") * 10 < pl.col("common"))
        & (pl.col("common") * 2 >= pl.col("all"))
    )
    return dict(found.filter(is_coarse).select("symbol", "minute").sort("symbol").rows())


def to_minutes(rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Aggregate bars finer than a minute; return the rows, and how many were aggregated.

    Rows alone in their minute stay as they are, and get its start as their time. So do those that are not valid
    bars, and equal times, which the lake's checks sort out.
    """
    time = pl.col("open_time")
    if rows.select((time % MINUTE_NS == 0).all()).item():
        return rows, 0
    rows = rows.with_columns((time - time % MINUTE_NS).alias("minute"))
    several = (
        rows.filter(_VALID).group_by(_KEY).agg(time.n_unique().alias("times")).filter(pl.col("times") > 1)
    )
    marked = rows.join(several.with_columns(fine=True).drop("times"), on=_KEY, how="left", nulls_equal=True)
    is_fine = pl.col("fine").fill_null(False) & _VALID.fill_null(False)
    fine = marked.filter(is_fine)
    alone = (
        marked.filter(~is_fine).with_columns(pl.col("minute").alias("open_time")).select(rows.columns[:-1])
    )
    # Of rows for one instant the one with the larger volume counts, as among minutes.
    single = fine.sort("symbol", "open_time", "volume").unique(
        ["symbol", "open_time"], keep="last", maintain_order=True
    )
    whole = single.group_by(_KEY, maintain_order=True).agg(
        pl.col("open").first(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("close").last(),
        pl.col("volume").sum(),
        *(
            pl.when(pl.col(name).is_not_null().all()).then(pl.col(name).sum()).alias(name)
            for name in FLOW_COLUMNS
        ),
    )
    minutes = whole.rename({"minute": "open_time"}).select(alone.columns)
    return pl.concat([alone, minutes.cast(alone.schema)]), len(fine)
