"""The lake: a folder of Parquet parts. A part is one fetched unit; its footer is its entry in the ledger.

    data_dir/<source>/<dataset>/<unit>.parquet              bars; the footer has the request and the origin
    data_dir/<source>/<dataset>/<unit>.quarantine.parquet   rows of that unit that are not bars, with a reason
    data_dir/<source>/<dataset>/<unit>.parquet.corrupt      a part that can no longer be read; fetched again

There is no index to get out of step: the lake holds what the folder holds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_sources.bars import COLUMNS
from data_sources.errors import BadAnswer, LakeBusy, LakeError, lake_errors
from data_sources.lake.flow import added_to, join_flow
from data_sources.lake.listing import dataset_of, entries, folders, part_files, stamp_of
from data_sources.lake.names import escape
from data_sources.lake.parts import (
    FETCHED,
    FORMAT,
    QUARANTINE_SUFFIX,
    SUFFIX,
    Columns,
    DamagedPartError,
    Part,
    digest_of,
    fault_of,
    flow_digest_of,
    merge_rows,
    parse_footer,
    parse_part,
    symbol_runs,
    write_part,
)
from data_sources.lake.quality import OUTSIDE_TOLERANCE_NS, REVISED, clean, flow_of
from data_sources.progress import NullProgress, Progress, Waiting
from runtime.files import TEMPORARY_SUFFIX, move_over, sync_folder, write_atomically
from runtime.locking import FolderHeld, FolderLock, FolderLockError

__all__ = ["Lake", "Part"]

CORRUPT_SUFFIX = ".corrupt"
READY_FOLDER = ".ready"  # snapshots, see snapshot.py; their writers hold no lock
SHRINK_TOLERANCE = 0.05
MOST_READINGS = 3  # of parts that another process replaces meanwhile


class Lake:
    """Bars of every source below one folder; see the module for its layout.

    Reading needs no lock and works on a read-only folder; writing takes the folder's lock, which ends with
    its process. Methods may be called from any thread.

    Raises:
        LakeError: from every method, when the folder cannot be read, written or locked.
    """

    def __init__(self, root: Path, progress: Progress | None = None) -> None:
        self.root = Path(root)
        self._progress = progress or NullProgress()
        self._lock = FolderLock(self.root)
        self._known: dict[Path, tuple[tuple[int, int], Part]] = {}  # path -> ((mtime, size), part)
        self._known_guard = threading.Lock()
        self._verified: dict[Path, tuple[int, int]] = {}  # path -> (mtime, size) of what was read whole

    @contextmanager
    def writing(self, wait_seconds: float = 0.0, progress: Progress | None = None) -> Iterator[int]:
        """Lock the lake for a refresh, so that no other process writes; may be nested.

        Leftovers of killed writers are removed first. Yields the nanoseconds that another process was waited for.

        Args:
            wait_seconds: how long to wait for another process's refresh.
            progress: shows the wait, and may interrupt it.

        Raises:
            LakeBusy: another process has the lock (named).
            LakeError: the folder cannot be written.
        """
        waiting = Waiting(self.root, progress or NullProgress())
        with ExitStack() as lock:
            try:
                is_outermost = lock.enter_context(self._lock.hold(wait_seconds, waiting))
            except FolderHeld as error:
                raise LakeBusy(str(error)) from error
            except FolderLockError as error:
                raise LakeError(str(error)) from error
            finally:
                waiting.end()
            if is_outermost:
                self._sweep()
            yield waiting.nanoseconds

    def parts(self, source: str, dataset: str) -> dict[str, Part]:
        """Return the parts of one dataset by unit, from the footers alone.

        A part with an unreadable footer is set aside with a warning and is absent here.
        """
        folder = self._folder(source, dataset)
        found = {}
        for path, stamp in part_files(folder):
            with self._known_guard:
                known = self._known.get(path)
            if known and known[0] == stamp:
                part = known[1]
            else:
                try:
                    with lake_errors("read", path, FileNotFoundError):
                        part = parse_footer(path)
                    # In any case of letters: some file systems list other ones than were written.
                    if str(self._path(part)).casefold() != str(path).casefold():
                        name = f"{part.source}/{part.dataset}/{part.unit}"
                        raise DamagedPartError(f"by its footer it is {name}")
                except FileNotFoundError:
                    continue  # replaced or removed by the writer since the folder was listed
                except DamagedPartError as error:
                    self._set_aside(path, error)
                    continue
                with self._known_guard:
                    self._known[path] = (stamp, part)
            found[part.unit] = part
        return found

    def datasets(self, source: str) -> list[str]:
        """Return the datasets of one source with at least one part, sorted."""
        listed = ((folder, part_files(folder)) for folder in folders(self._folder(source)))
        return sorted(dataset_of(folder, files) for folder, files in listed if files)

    def sources(self) -> list[str]:
        """Return the sources with at least one dataset, sorted."""
        names = [unquote(folder.name) for folder in folders(self.root)]
        return sorted(name for name in names if self.datasets(name))

    def write(
        self,
        source: str,
        dataset: str,
        unit: str,
        table: pa.Table,
        *,
        key: str,
        version: str,
        start_ns: int,
        end_ns: int,
        symbols: Sequence[str],
        now_ns: int,
        fetched_ns: int | None = None,
        dollar_volume: Mapping[str, int] | None = None,
    ) -> Part:
        """Clean ``table`` and keep it as the part ``unit``, replacing an older part of that name.

        Args:
            source: such as "polygon".
            dataset: such as "us_stocks_sip" or a symbol; one folder.
            unit: such as "2026-11-20"; one file. All three may be any text, odd characters are escaped.
            table: symbol, open_time, open, high, low, close, volume, perhaps trades and taker_buy_volume; see
                quality.clean. May be empty.
            key: the vendor's name of the answer.
            version: ETag or sha256, which changes when the vendor replaces the answer; "" if there is none.
            start_ns: with ``end_ns``, the half-open interval that the answer covers, rows or not.
            end_ns: see ``start_ns``.
            symbols: the requested symbols, present or not. Rows of other symbols go to quarantine.
            now_ns: the time of the fetch; of two parts that overlap, the later one wins.
            fetched_ns: the age of the answer that counts for that, if it is older than the fetch.
            dollar_volume: what the largest symbols traded, for universe.py.

        Raises:
            BadAnswer: the table lacks a column of bars, or it has the version and the interval of the part
                that is kept, but over 5 % fewer bars; the kept part stays.
            LakeError: the folder cannot be written (disk full, read-only, locked by another process).
        """
        requested = tuple(sorted(set(symbols)))
        cleaned = clean(table, now_ns=now_ns, start_ns=start_ns, end_ns=end_ns, symbols=requested)
        part = Part(
            source=source,
            dataset=dataset,
            unit=unit,
            key=key,
            version=version,
            start_ns=start_ns,
            end_ns=end_ns,
            symbols=requested,
            rows=cleaned.table.num_rows,
            rejected=cleaned.rejected,
            fetched_ns=now_ns if fetched_ns is None else fetched_ns,
            content=digest_of(cleaned.table),
            rejected_by_symbol=cleaned.rejected_by_symbol,
            repaired=cleaned.repaired,
            dollar_volume=dict(dollar_volume or {}),
            format=FORMAT,
            flow={n: len(cleaned.table) - cleaned.table[n].null_count for n in flow_of(cleaned.table)},
            flow_content=flow_digest_of(cleaned.table),
            flow_rejected=cleaned.flow_rejected,
        )
        with self.writing():
            self._refuse_shrinking(part, cleaned.table)
            self._keep(part, cleaned.table, cleaned.quarantined)
        return part

    def add_flow(self, part: Part, answer: pa.Table | None, now_ns: int) -> Part | None:
        """Give the bars of ``part``, kept before there was order flow, that of a newer answer; see lake/flow.py.

        Its bars, their digest and their age stay: whatever was known of them still holds.

        Args:
            part: as it was listed.
            answer: as for ``write``; None: there is none, which is noted.
            now_ns: the time of the answer.

        Returns:
            The part as it is now; None where another one has taken its place, or it is damaged.

        Raises:
            BadAnswer, LakeError: as ``write``.
        """
        with self.writing():
            is_listed = self.parts(part.source, part.dataset).get(part.unit) == part
            bars = self._rows(part) if is_listed else None
            if bars is None:
                return None
            if answer is None:
                part = replace(part, flow_asked_ns=now_ns)
                self._keep(part, bars.set_column(0, "symbol", bars["symbol"].cast(pa.string())), None)
                return part
            part, bars, aside = join_flow(part, bars, answer, now_ns)
            self._keep(part, bars, self._added_to_quarantine(part, aside) if aside.num_rows else None)
        return part

    def _added_to_quarantine(self, part: Part, aside: pa.Table) -> pa.Table | None:
        path = self._quarantine_path(part)
        try:
            with lake_errors("read", path):
                return added_to(path, aside)
        except (LakeError, pa.ArrowException, KeyError) as error:
            name = path.relative_to(self.root).as_posix()
            self._progress.warn(
                part.source, f"{name} cannot be added to ({error}); {len(aside)} rows are lost"
            )
            return None

    def _keep(self, part: Part, table: pa.Table, aside: pa.Table | None) -> None:
        """Write a part's file, and that of its quarantine; None: as it is."""
        path, quarantine = self._path(part), self._quarantine_path(part)
        with lake_errors("write", path):
            # Whatever comes between the two leaves a superfluous file, never a missing one.
            if aside is not None and aside.num_rows:
                write_atomically(quarantine, lambda file: pq.write_table(aside, file, compression="zstd"))
            write_atomically(path, lambda file: write_part(file, table, part))
            if aside is not None and not aside.num_rows:
                quarantine.unlink(missing_ok=True)
            stamp = stamp_of(path)
        with self._known_guard:
            self._known[path] = (stamp, part)

    def remove(self, part: Part) -> None:
        """Remove a part and its quarantine, if they exist."""
        path = self._path(part)
        with self.writing(), lake_errors("remove", path):
            path.unlink(missing_ok=True)
            self._quarantine_path(part).unlink(missing_ok=True)
            if path.parent.exists():
                sync_folder(path.parent)
        with self._known_guard:
            self._known.pop(path, None)

    def columns(
        self, source: str, dataset: str, symbols: Sequence[str] | None, start_ns: int, end_ns: int
    ) -> dict[str, Columns]:
        """Return the bars that open in [start_ns, end_ns) as arrays, by symbol (sorted) and column.

        Where parts have the same minute of a symbol, the row fetched later wins. Checksums are verified, those of
        whole files once; a damaged part is set aside with a warning, the rest is returned. If parts change
        meanwhile, all are read again: bars that another process moves to a new part would be in none.

        Args:
            symbols: None for all. Those without a bar are absent from the result.

        Returns:
            Per symbol new arrays: COLUMNS, those of FLOW_COLUMNS that a part has (NaN where none is), and
            "fetched_ns" (int64), when the part of each row was fetched.
        """
        parts, pieces, merged = dict[str, Part](), dict[str, list[Columns]](), {}
        for _ in range(MOST_READINGS):
            if (now := self.parts(source, dataset)) == parts:
                break
            pieces.clear()  # before there are others: they may take a gigabyte
            parts, pieces = now, self._pieces(now, symbols, start_ns, end_ns)
        for symbol in sorted(pieces):
            if len((columns := merge_rows(pieces.pop(symbol)))["open_time"]):
                merged[symbol] = columns
        return merged

    def _pieces(
        self, parts: Mapping[str, Part], symbols: Sequence[str] | None, start_ns: int, end_ns: int
    ) -> dict[str, list[Columns]]:
        """Return the bars of ``columns`` by symbol, those of each part by themselves, oldest interval first."""
        pieces: dict[str, list[Columns]] = {}
        earliest_ns, latest_ns = start_ns - OUTSIDE_TOLERANCE_NS, end_ns + OUTSIDE_TOLERANCE_NS
        for part in sorted(parts.values(), key=lambda part: (part.start_ns, part.unit)):
            wanted = set(part.symbols) if symbols is None else set(part.symbols).intersection(symbols)
            reaches = earliest_ns < part.end_ns and part.start_ns < latest_ns
            for table in self._tables(part, wanted) if wanted and reaches else ():
                arrays = {name: table[name].to_numpy() for name in (*COLUMNS, *flow_of(table))}
                for symbol, first, last in symbol_runs(table):
                    if symbol in wanted:
                        times = arrays["open_time"][first:last]
                        low, high = first + np.searchsorted(times, (start_ns, end_ns))
                        # Copies: a view would keep the rows of all other symbols of the part in memory.
                        piece = {name: array[low:high].copy() for name, array in arrays.items()}
                        piece[FETCHED] = np.full(high - low, part.fetched_ns)
                        pieces.setdefault(symbol, []).append(piece)
        return pieces

    def verify(self) -> list[str]:
        """Read, hash and check every part again; set damaged ones aside and return their names."""
        damaged = []
        parts = list(self.all_parts())
        self._progress.start("lake", "parts verified", len(parts))
        for part in parts:
            path, table = self._path(part), self._rows(part)
            fault = fault_of(table, part) if table is not None else ""
            # A writer may have replaced it since it was listed: then the new part counts.
            now = self.parts(part.source, part.dataset).get(part.unit, part) if fault else part
            if now != part:
                table = self._rows(now)
                fault = fault_of(table, now) if table is not None else ""
            if fault:
                self._set_aside(path, DamagedPartError(fault))
            if (fault or table is None) and not path.exists():
                damaged.append(f"{part.source}/{part.dataset}/{part.unit}")
            self._progress.advance("lake", 1, 0)
        self._progress.finish("lake", f"{len(parts):,} parts verified, {len(damaged)} damaged")
        return damaged

    def heartbeat(self) -> None:
        """Report that long work on the lake continues."""
        self._progress.advance("lake", 0, 0)

    def all_parts(self) -> Iterator[Part]:
        """Yield every part of the lake in a fixed order."""
        for source in self.sources():
            for dataset in self.datasets(source):
                parts = self.parts(source, dataset)
                yield from (parts[unit] for unit in sorted(parts))

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the contents: same bars of the same answers, same digits."""
        digest = hashlib.sha256()
        for part in self.all_parts():
            fields = [part.source, part.dataset, part.unit, part.version, str(part.rows), part.content]
            fields += [part.flow_content] if part.flow_content else []
            digest.update("\0".join(fields).encode() + b"\n")
        return digest.hexdigest()[:16]

    def _rows(self, part: Part, symbols: set[str] | None = None) -> pa.Table | None:
        path = self._path(part)
        try:
            with lake_errors("read", path, FileNotFoundError):
                stamp = stamp_of(path)
                table = parse_part(path, symbols, is_verified=self._verified.get(path) == stamp)
                self._verified[path] = stamp
                return table
        except FileNotFoundError:
            return None  # removed by the writer since the folder was listed: superseded by another part
        except DamagedPartError as error:
            self._set_aside(path, error)
            return None

    def _tables(self, part: Part, symbols: set[str]) -> Iterator[pa.Table]:
        if part.rows and (table := self._rows(part, symbols)) is not None:
            yield table
        if part.rejected.keys().isdisjoint(REVISED):
            return
        # An earlier version set rows aside for what later rows showed, or for their age: look at them again.
        path = self._quarantine_path(part)
        try:
            with lake_errors("read", path, FileNotFoundError):
                aside = pq.read_table(path)
            rows = aside.filter(pc.is_in(aside["reason"], pa.array(REVISED)))
            span = {"start_ns": part.start_ns, "end_ns": part.end_ns}
            yield clean(rows, now_ns=part.fetched_ns, symbols=part.symbols, **span).table
        except FileNotFoundError:
            return  # removed by hand, or with its part
        except (LakeError, pa.ArrowException, KeyError, BadAnswer) as error:
            name = path.relative_to(self.root).as_posix()
            self._progress.warn(part.source, f"{name} cannot be used ({error}); its rows are left out")

    def _refuse_shrinking(self, part: Part, table: pa.Table) -> None:
        """Protect bars from half an answer that looks like a whole one (same version)."""
        kept = self.parts(part.source, part.dataset).get(part.unit)
        if (
            kept is None
            or kept.version != part.version
            or not (part.start_ns <= kept.start_ns and kept.end_ns <= part.end_ns)
            or not set(kept.symbols) <= set(part.symbols)
            or part.rows >= (1 - SHRINK_TOLERANCE) * kept.rows
        ):
            return
        if self._rows(kept) is not None:  # a damaged part protects nothing
            raise BadAnswer(
                f"{part.source}/{part.dataset}/{part.unit}: got {part.rows} bars where {kept.rows} are kept "
                "under the same version; the kept bars stay"
            )

    def _set_aside(self, path: Path, error: DamagedPartError) -> None:
        name = path.relative_to(self.root).as_posix()
        with self._known_guard:
            self._known.pop(path, None)
        try:
            move_over(path, path.with_name(path.name + CORRUPT_SUFFIX))
            outcome = "set aside, to be fetched again"
        except FileNotFoundError:
            return  # another process was faster
        except OSError as problem:
            outcome = f"ignored, cannot be set aside: {problem.strerror or problem}"
        self._progress.warn(path.relative_to(self.root).parts[0], f"{name} is damaged ({error}); {outcome}")

    def _sweep(self) -> None:
        for leftover in self.root.rglob(f".*{TEMPORARY_SUFFIX}"):
            if leftover.parent.name == READY_FOLDER:
                continue
            with lake_errors("remove", leftover):
                leftover.unlink(missing_ok=True)

    def _folder(self, source: str, dataset: str = "") -> Path:
        folder = self.root / escape(source)
        if not dataset:
            return folder
        name, former = escape(dataset, folds_case=True), quote(dataset, safe="")
        # Lakes of former versions have a few datasets under names that not every system takes.
        is_former = name != former and any(entry.name == former for entry in entries(folder))
        return folder / (former if is_former else name)

    def _path(self, part: Part) -> Path:
        return self._folder(part.source, part.dataset) / (escape(part.unit) + SUFFIX)

    def _quarantine_path(self, part: Part) -> Path:
        return self._folder(part.source, part.dataset) / (escape(part.unit) + QUARANTINE_SUFFIX)
