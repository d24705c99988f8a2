"""A run's bars as one file beside the lake, ready to be mapped: ranks share its pages, restarts load in a blink.

    data_dir/.ready/<what is asked>-<interval>-<fingerprint>.bars

It is derived: removing it costs the time to make it again. A run that is resumed finds the copy that it began
with by its interval, whatever the lake has learned since, so that its numbers go on.

Layout: MAGIC, then per symbol the six columns of COLUMNS, 8 bytes a value, one after the other; then JSON
(accounts, places, checksum), its length and checksum in 12 bytes, little endian, and MAGIC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_sources.bars import COLUMNS, Bars
from data_sources.coverage import SymbolRow
from data_sources.errors import LakeError
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.load import LoadedData, each_symbol, fingerprint
from data_sources.sources import DataRequest
from runtime.files import TEMPORARY_SUFFIX, write_atomically

SUFFIX = ".bars"
MAGIC = b"BARS\0\0\0\1"
KEPT_COPIES = 4  # of one daemon: its run's, the one before, and two that were made ahead
UNUSED_SECONDS = 14 * 86_400.0  # copies of other settings go when nobody asked for them for so long
_TRAILER = struct.Struct("<QI")
_WIDTH = 8


def provide(lake: Lake, request: DataRequest, *, kept_copies: int = KEPT_COPIES) -> Path:
    """Return the copy that ``request`` began with, made now where there is none; old ones are removed.

    Raises:
        LakeError: the lake cannot be read, or the copy cannot be written (disk full, read-only).
    """
    asked, interval = _names(request)
    folder = lake.root / READY_FOLDER
    try:
        for path in sorted(folder.glob(f"{asked}-{interval}-*{SUFFIX}"), key=_age):
            with contextlib.suppress(LakeError):  # damaged: made again below
                open_copy(path)
                os.utime(path)
                return path
            path.unlink(missing_ok=True)
        path = folder / f"{asked}-{interval}-{fingerprint(lake, request)}{SUFFIX}"
        write_atomically(path, lambda file: _write(file, lake, request))
        _prune(folder, asked, kept_copies)
    except OSError as error:
        raise LakeError(f"cannot write {folder}: {error.strerror or error}") from error
    return path


def open_copy(path: Path) -> LoadedData:
    """Map a copy; its bars are views of the file, and writing to them changes this process's view only.

    Raises:
        LakeError: it is not there, cannot be read, or is not whole.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise LakeError(f"cannot read {path}: {error}") from error
    header = _header(content, path)
    bars = []
    for place in header["places"]:
        first, num_bars = place["first"], place["num_bars"]
        columns = [
            np.frombuffer(
                content, np.int64 if number == 0 else np.float64, num_bars, first + number * num_bars * _WIDTH
            )
            for number in range(len(COLUMNS))
        ]
        bars.append(Bars.known_valid(place["symbol"], place["asset_class"], *columns))
    rows = [SymbolRow.from_dict(each) for each in header["rows"]]
    dropped = {row.symbol: row.dropped for row in rows if row.dropped}
    return LoadedData(bars, dropped, rows, header["fingerprint"])


def verify(lake: Lake) -> list[str]:
    """Read every copy whole; remove the damaged ones and return their names.

    Raises:
        LakeError: a damaged one cannot be removed.
    """
    damaged = []
    for path in sorted((lake.root / READY_FOLDER).glob(f"*{SUFFIX}")):
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = _header(content, path)
                with memoryview(content) as view, view[len(MAGIC) : header["end"]] as payload:
                    is_whole = zlib.crc32(payload) == header["crc32"]
        except (LakeError, ValueError):
            is_whole = False
        except OSError as error:
            raise LakeError(f"cannot read {path}: {error.strerror or error}") from error
        if not is_whole:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise LakeError(f"cannot remove {path}: {error.strerror or error}") from error
            damaged.append(f"{READY_FOLDER}/{path.name}")
    return damaged


def _names(request: DataRequest) -> tuple[str, str]:
    """Return what is asked and for which interval, a few hex digits each."""
    values = dataclasses.asdict(request)
    interval = [values.pop("start_ns"), values.pop("end_ns")]
    texts = (json.dumps(each, sort_keys=True) for each in (values, interval))
    asked, interval_name = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)
    return asked, interval_name


def _write(file: BinaryIO, lake: Lake, request: DataRequest) -> None:
    """Write symbol after symbol, so that one batch of them is all that is in memory."""
    file.write(MAGIC)
    place, checksum = len(MAGIC), 0
    places: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for bars, row in each_symbol(lake, request):
        rows.append(dataclasses.asdict(row))
        lake.show_life()
        if row.dropped:
            continue
        places.append(
            {"symbol": bars.symbol, "asset_class": bars.asset_class, "first": place, "num_bars": len(bars)}
        )
        for name in COLUMNS:
            column = np.ascontiguousarray(getattr(bars, name)).view(np.uint8).data
            file.write(column)
            checksum = zlib.crc32(column, checksum)
            place += len(column)
    header = {
        "places": places,
        "rows": rows,
        # After reading, so that a part set aside on the way counts as absent.
        "fingerprint": fingerprint(lake, request),
        "end": place,
        "crc32": checksum,
    }
    text = json.dumps(header).encode()
    file.write(text + _TRAILER.pack(len(text), zlib.crc32(text)) + MAGIC)


def _header(content: mmap.mmap, path: Path) -> dict[str, Any]:
    trailer = len(MAGIC) + _TRAILER.size
    if len(content) > len(MAGIC) + trailer and content[: len(MAGIC)] == content[-len(MAGIC) :] == MAGIC:
        length, checksum = _TRAILER.unpack(content[-trailer : -len(MAGIC)])
        text = content[max(0, len(content) - trailer - length) : len(content) - trailer]
        if len(text) == length and zlib.crc32(text) == checksum:
            header: dict[str, Any] = json.loads(text)
            if header["end"] + length + trailer == len(content):
                return header
    raise LakeError(f"{path} is damaged; it is made again from the lake")


def _prune(folder: Path, asked: str, kept_copies: int) -> None:
    now = time.time()
    own = sorted(folder.glob(f"{asked}-*{SUFFIX}"), key=_age)[kept_copies:]
    others = [path for path in folder.glob(f"*{SUFFIX}") if now - _changed(path) > UNUSED_SECONDS]
    leftovers = [path for path in folder.glob(f".*{TEMPORARY_SUFFIX}") if now - _changed(path) > 86_400.0]
    for path in (*own, *others, *leftovers):
        with contextlib.suppress(PermissionError):  # Windows: another process has it mapped
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    return -_changed(path)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
