"""A disk that forgets what was not synced: which states a folder can have after a power cut.

As crash-consistency checkers do (ALICE: Pillai et al., OSDI 2014; CrashMonkey: Mohan et al., OSDI 2018): the calls
that change the disk are recorded, and replayed as POSIX allows at worst. Entries of a folder (new names, renames,
removals) are safe when that folder was synced, and until then any of them may be there or not; the bytes of a file
are safe when it was synced, and until then it may hold what it held, half of the new bytes, all of them, or zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePath

MOST_ENTRIES = 7  # more pending ones: all of them, none, every prefix, each alone, and all but each

State = frozenset[tuple[str, int, bytes | None]]  # path, inode, bytes; None for a folder


@dataclass(frozen=True)
class Entry:
    """A change of a folder: ``path`` becomes ``inode``, or is removed (0)."""

    path: str
    inode: int
    group: int  # a rename removes and adds at once


def changed(durable: bytes, now: bytes) -> list[bytes]:
    """Return what a file may hold of bytes that were not synced."""
    pairs = zip(durable, now, strict=False)
    kept = next(
        (place for place, (one, other) in enumerate(pairs) if one != other), min(len(durable), len(now))
    )
    half = kept + (len(now) - kept) // 2
    return [durable, now[:half], now[:kept] + bytes(len(now) - kept), now]


class Disk:
    """The files of one folder as they are, and as they would be after a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.names: dict[str, int] = {self.root: root.stat().st_ino}
        self.data: dict[int, bytes | None] = {root.stat().st_ino: None}
        for path in sorted(root.rglob("*")):
            inode = self.names[str(path)] = path.stat().st_ino
            self.data[inode] = None if path.is_dir() else path.read_bytes()
        self.durable_names, self.durable_data = dict(self.names), dict(self.data)
        self.pending: list[Entry] = []
        self._groups = 0

    def records(self, log: bytes) -> list[tuple[list[str], bytes]]:
        """Split the shim's log into records and the bytes of writes."""
        found, place = [], 0
        while place < len(log):
            end = log.index(b"\n", place)
            words, place = log[place:end].decode().split("\t"), end + 1
            size = int(words[3]) if words[0] == "write" else 0
            found.append((words, log[place : place + size]))
            place += size
        return [(words, payload) for words, payload in found if self._is_ours(words)]

    def _is_ours(self, words: list[str]) -> bool:
        # Inodes are known from the records before.
        if words[0] in ("open", "mkdir"):
            if not words[3].startswith(self.root):
                return False
            self._seen = getattr(self, "_seen", set(self.data)) | {int(words[1])}
            return True
        if words[0] in ("write", "truncate", "fsync"):
            return int(words[1]) in getattr(self, "_seen", self.data)
        return words[1].startswith(self.root)

    def apply(self, record: tuple[list[str], bytes]) -> None:
        """Do what one call did."""
        (verb, *words), payload = record
        self._groups += 1
        if verb in ("open", "mkdir"):
            inode, is_cut, path = int(words[0]), words[1] == "1", words[2]
            if path not in self.names:
                self._enter(path, inode)
                self.data[inode] = None if verb == "mkdir" else b""
                self.durable_data[inode] = self.data[inode]
            elif is_cut:
                self.data[inode] = b""
        elif verb == "write":
            inode, place = int(words[0]), int(words[1])
            before = self.data[inode] or b""
            self.data[inode] = before[:place].ljust(place, b"\0") + payload + before[place + len(payload) :]
        elif verb == "truncate":
            inode, size = int(words[0]), int(words[1])
            self.data[inode] = (self.data[inode] or b"")[:size].ljust(size, b"\0")
        elif verb == "fsync":
            self._sync(int(words[0]))
        elif verb == "link":
            self._enter(words[1], self.names[words[0]])
        elif verb == "unlink":
            self._enter(words[0], 0)
        elif verb == "rename":
            inode = self.names[words[0]]
            if self.names.get(words[1]) != inode:  # else rename does nothing, by POSIX
                self._enter(words[0], 0)
                self._enter(words[1], inode)

    def _enter(self, path: str, inode: int) -> None:
        self.pending.append(Entry(path, inode, self._groups))
        self._change(self.names, self.pending[-1])

    @staticmethod
    def _change(names: dict[str, int], entry: Entry) -> None:
        if entry.inode:
            names[entry.path] = entry.inode
        else:
            names.pop(entry.path, None)

    def _sync(self, inode: int) -> None:
        if self.data[inode] is not None:
            self.durable_data[inode] = self.data[inode]
            return
        folder = next(path for path, number in self.names.items() if number == inode)
        for entry in self.pending:
            if str(PurePath(entry.path).parent) == folder:
                self._change(self.durable_names, entry)
        self.pending = [entry for entry in self.pending if str(PurePath(entry.path).parent) != folder]

    def after_power_cut(self) -> Iterator[State]:
        """Yield every state that the folder may have if the power fails now."""
        groups = sorted({entry.group for entry in self.pending})
        for kept in self._subsets(groups):
            names = dict(self.durable_names)
            for entry in self.pending:
                if entry.group in kept:
                    self._change(names, entry)
            # What lies in a folder that was lost is lost.
            reachable = {self.root}
            for path in sorted(names):
                if str(PurePath(path).parent) in reachable:
                    reachable.add(path)
            unsynced = [
                number for number, now in self.data.items()
                if now is not None and now != self.durable_data[number]
            ]  # fmt: skip
            for variant in range(4 if unsynced else 1):
                data = dict(self.data)
                for number in unsynced:
                    data[number] = changed(self.durable_data[number] or b"", self.data[number] or b"")[
                        variant
                    ]
                yield frozenset((path, names[path], data[names[path]]) for path in reachable)

    @staticmethod
    def _subsets(groups: list[int]) -> list[set[int]]:
        if len(groups) <= MOST_ENTRIES:
            chosen = product((False, True), repeat=len(groups))
            return [
                {group for group, is_kept in zip(groups, kept, strict=True) if is_kept} for kept in chosen
            ]
        alone = [{group} for group in groups]
        prefixes = [set(groups[:length]) for length in range(len(groups) + 1)]
        return [*prefixes, *alone, *(set(groups) - one for one in alone)]

    def put(self, state: State, folder: Path) -> None:
        """Write a state as files; names of one inode are links."""
        places: dict[int, Path] = {}
        for path, inode, content in sorted(state, key=lambda entry: entry[0]):
            place = folder / PurePath(path).relative_to(self.root)
            if content is None:
                place.mkdir()
            elif inode in places:
                os.link(places[inode], place)
            else:
                place.write_bytes(content)
                places[inode] = place
