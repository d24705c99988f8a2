"""A run's bars as files beside the lake, ready to be mapped: ranks share their pages, restarts open them at once.

    data_dir/.ready/<request>-<interval>-<fingerprint>.npy     the columns of every used symbol, 8 bytes a value
    data_dir/.ready/<request>-<interval>-<fingerprint>.jsonl   a checksum; rows of all symbols

A snapshot is derived: removing it costs the time to write it again. A resumed run finds the one that it began
with by its interval, whatever the lake has learned since, so that its numbers continue. The .jsonl is written
last: without it there is no snapshot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import COLUMNS, Bars
from data_sources.coverage import SymbolRow
from data_sources.errors import LakeError, lake_errors
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.load import LoadedData, each_symbol, fingerprint
from data_sources.sources import DataRequest
from runtime.files import TEMPORARY_SUFFIX, write_atomically

SUFFIX, HEADER_SUFFIX = ".npy", ".jsonl"
FEATURES_SUFFIX = ".features"  # of what training derives from a snapshot (training/kept_features.py)
FORMER_SUFFIX = ".bars"  # of an earlier format
KEPT_SNAPSHOTS = 4  # of one daemon: its run's, the previous one, and two that were written ahead
UNUSED_SECONDS = 14 * 86_400.0  # snapshots of other settings are removed when unused for so long
LEFTOVER_SECONDS = 86_400.0  # what no process is writing any more by now
_CHUNK_BYTES = 1 << 18


def provide(
    lake: Lake,
    request: DataRequest,
    *,
    symbols: Collection[str] = (),
    written_ahead: str = "",
    kept_snapshots: int = KEPT_SNAPSHOTS,
) -> Path | None:
    """Return a snapshot of what the lake has for ``request``, written now if there is none; old ones are removed.

    Args:
        lake: where the bars are.
        request: which bars.
        symbols: of a resumed run, those that it began with. Its snapshot is the one that has them, whatever the
            lake has learned since; a run that begins has none, and gets what the lake holds now.
        written_ahead: the fingerprint of a snapshot that will do, too; the lake may have got order flow since.
        kept_snapshots: how many of this request stay.

    Returns:
        None where the lake has no bars to train on: a snapshot without bars is never kept.

    Raises:
        LakeError: the lake cannot be read, or the snapshot cannot be written (disk full, read-only).
    """
    found = find(lake, request, symbols, written_ahead) if written_ahead else None
    found = found or find(lake, request, symbols, "" if symbols else fingerprint(lake, request))
    if found is not None:
        with lake_errors("write", found):
            os.utime(found)
        return found
    asked, interval = _names(request)
    folder = lake.root / READY_FOLDER
    with lake_errors("write", folder):
        path = folder / f"{asked}-{interval}-{fingerprint(lake, request)}{SUFFIX}"
        has_bars = _write(path, lake, request)
        if not has_bars:
            _remove(path)
        _prune(folder, asked, kept_snapshots)
        return path if has_bars else None


def find(lake: Lake, request: DataRequest, symbols: Collection[str] = (), content: str = "") -> Path | None:
    """Return the newest snapshot of ``request`` that has bars, those of ``symbols`` among them; None without one.

    ``content`` is the fingerprint that it must have; "": any.

    Damaged and empty ones are removed on the way.

    Raises:
        LakeError: the folder cannot be read, or a snapshot cannot be removed.
    """
    asked, interval = _names(request)
    folder = lake.root / READY_FOLDER
    with lake_errors("write", folder):
        for path in sorted(
            folder.glob(f"{asked}-{interval}-*{SUFFIX}"), key=_modification_time, reverse=True
        ):
            names: set[str] = set()
            with contextlib.suppress(LakeError):
                names = {bars.symbol for bars in open_snapshot(path).bars}
            if not names:
                _remove(path)
            elif names.issuperset(symbols) and content in ("", content_of(path)):
                return path
    return None


def content_of(path: Path) -> str:
    """Return the fingerprint of a snapshot's bars, by its name."""
    return path.stem.rpartition("-")[2]


def open_snapshot(path: Path) -> LoadedData:
    """Map a snapshot; its bars are views of the file, and writing to them changes this process's view only.

    Raises:
        LakeError: it does not exist, cannot be read, or is not whole.
    """
    header = _read_header(path)
    try:
        rows = [SymbolRow.from_dict(row) for row in header["rows"]]
        used = [row for row in rows if not row.dropped]
        ends = np.cumsum([len(_columns(row)) * row.num_bars for row in used], dtype=np.int64)
        values: NDArray[np.int64] = np.asarray(np.load(path, mmap_mode="c"))
        blocks = np.split(values.view(np.int64), ends)
        bars = [_bars(row, block) for row, block in zip(used, blocks[:-1], strict=True)]
    # Cut, another array, or of another version.
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise LakeError(f"cannot read {path}: {error}") from error
    dropped = {row.symbol: row.dropped for row in rows if row.dropped}
    return LoadedData(bars, dropped, rows, header["fingerprint"], path)


def _columns(row: SymbolRow) -> tuple[str, ...]:
    """Return a symbol's columns in the file: those of the flow only where a bar has a value, funding if any."""
    return (*COLUMNS, *row.flow, *(("funding",) if row.has_funding else ()))


def _bars(row: SymbolRow, block: NDArray[np.int64]) -> Bars:
    names = _columns(row)
    columns: dict[str, NDArray[Any]] = dict(zip(names, block.reshape(len(names), row.num_bars), strict=True))
    columns |= {name: columns[name].view(np.float64) for name in names[1:]}
    return Bars.known_valid(row.symbol, row.asset_class, columns)


def verify(lake: Lake) -> list[str]:
    """Read every snapshot whole; remove the damaged ones and return their names.

    Raises:
        LakeError: a damaged one cannot be removed.
    """
    damaged = []
    for path in sorted((lake.root / READY_FOLDER).glob(f"*{SUFFIX}")):
        try:
            open_snapshot(path)
            with lake_errors("read", path):
                is_whole = _checksum(path) == _read_header(path)["values_crc32"]
        except LakeError:
            is_whole = False
        if not is_whole:
            with lake_errors("remove", path):
                _remove(path)
            damaged.append(f"{READY_FOLDER}/{path.name}")
    return damaged


def _names(request: DataRequest) -> tuple[str, str]:
    """Return a few hex digits each for the request and for its interval."""
    values = dataclasses.asdict(request)
    if not request.keep_pegged:  # so that a run that began before there was this setting finds its snapshot
        del values["keep_pegged"]
    files = {name: values.pop(name) for name in ("files_dir", "files_timezone")}
    if "files" in request.sources:  # else the names are those of before there were files
        values |= files
    if "binance_futures" not in request.sources:
        values["symbols"] = {k: names for k, names in request.symbols.items() if k != "binance_perpetuals"}
    interval = [values.pop("start_ns"), values.pop("end_ns")]
    texts = (json.dumps(part, sort_keys=True) for part in (values, interval))
    asked, interval_name = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)
    return asked, interval_name


def _write(path: Path, lake: Lake, request: DataRequest) -> bool:
    """Write a snapshot; return whether it has any bars."""
    rows: list[dict[str, Any]] = []

    def write_columns(file: BinaryIO) -> None:
        """Write symbol after symbol, so that one batch of them is all that is in memory."""
        num_values = 0
        _write_array_header(file, num_values)
        for bars, row in each_symbol(lake, request):
            rows.append(dataclasses.asdict(row))
            lake.heartbeat()
            if not row.dropped:
                names = _columns(row)
                for name in names:
                    file.write(np.ascontiguousarray(getattr(bars, name)).data)
                num_values += len(names) * len(bars)
        file.seek(0)
        _write_array_header(file, num_values)

    write_atomically(path, write_columns)
    # The fingerprint after reading, so that a part set aside meanwhile counts as absent.
    header = {"rows": rows, "fingerprint": fingerprint(lake, request), "values_crc32": _checksum(path)}
    text = json.dumps(header).encode()
    content = b"%d\n%s" % (zlib.crc32(text), text)
    write_atomically(path.with_suffix(HEADER_SUFFIX), lambda file: file.write(content))
    return any(not row["dropped"] for row in rows)


def _write_array_header(file: BinaryIO, num_values: int) -> None:
    """Write the beginning of the .npy file of a vector; it has one length for all ``num_values``."""
    described = {"descr": "<i8", "fortran_order": False, "shape": (num_values,)}
    np.lib.format.write_array_header_1_0(file, described)


def _read_header(path: Path) -> dict[str, Any]:
    with lake_errors("read", path):
        checksum, _, text = path.with_suffix(HEADER_SUFFIX).read_bytes().partition(b"\n")
    if checksum != b"%d" % zlib.crc32(text):
        raise LakeError(f"{path} is damaged; it is written again from the lake")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LakeError(f"{path} is of another version; it is written again from the lake") from error
    return dict(header) if isinstance(header, dict) else {}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _remove(path: Path) -> None:
    if path.suffix == SUFFIX:
        path.with_suffix(HEADER_SUFFIX).unlink(missing_ok=True)
        for derived in path.parent.glob(f"{path.stem}-*{FEATURES_SUFFIX}*"):
            derived.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _prune(folder: Path, asked: str, kept_snapshots: int) -> None:
    def older_than(seconds: float, pattern: str) -> list[Path]:
        return [path for path in folder.glob(pattern) if time.time() - _modification_time(path) > seconds]

    own = sorted(folder.glob(f"{asked}-*{SUFFIX}"), key=_modification_time, reverse=True)[kept_snapshots:]
    unused = older_than(UNUSED_SECONDS, f"*{SUFFIX}")
    leftovers = older_than(LEFTOVER_SECONDS, f".*{TEMPORARY_SUFFIX}")
    for path in (*own, *unused, *leftovers, *folder.glob(f"*{FORMER_SUFFIX}")):
        with contextlib.suppress(PermissionError):  # Windows: another process has it mapped
            _remove(path)


def _modification_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
