"""The files of bars below a folder, and what else is there."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from data_sources.errors import BadAnswer, SourceUnavailable
from data_sources.lake.names import as_text
from data_sources.vendors.files_columns import is_symbol
from data_sources.vendors.files_description import FILE_NAME, Description
from data_sources.vendors.files_open import SUFFIXES
from runtime.wording import first_of

READER = "1"  # another number reads all files again
# What follows the symbol in names such as BTCUSDT-1m-2024-01 and AAPL_1min_2024.
_TAIL = re.compile(
    r"[-_. ]+(1 ?m(in(ute)?s?)?|m1|\d+ ?s(ec)?|(19|20)\d\d([-_.]?\d\d){0,2}|bars?|ohlcv|minute|klines?|full|utc)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class OwnFile:
    """A file of bars: its path below the folder, and what was said of it."""

    path: Path
    name: str
    description: Description
    size: int
    changed_ns: int

    def version(self, timezone: str) -> str:
        """Return what changes when the file, or how it is to be read, changes."""
        fields = (READER, str(self.size), str(self.changed_ns), timezone, self.description.text)
        return hashlib.sha256("\0".join(fields).encode()).hexdigest()[:16]

    def is_unchanged(self) -> bool:
        """Return whether the file is the one that was listed."""
        try:
            status = self.path.stat()
        except OSError:  # it is gone
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed_ns)

    @property
    def symbol(self) -> str:
        """The symbol that it is named after: prices/BTCUSDT-1m-2024-01.csv.gz is BTCUSDT's.

        Raises:
            BadAnswer: its name is no symbol.
        """
        stem = self.name.rpartition("/")[2]
        suffix = max((suffix for suffix in SUFFIXES if stem.lower().endswith(suffix)), key=len)
        stem, longer = stem[: -len(suffix)], ""
        while stem != longer:
            stem, longer = _TAIL.sub("", stem), stem
        if not is_symbol(stem):
            raise BadAnswer(
                "it has no column symbol, and its name is none: name it after one, such as AAPL.csv"
            )
        return stem.upper() if stem == stem.lower() else stem


@dataclass
class Folder:
    """Everything below a folder, hidden files and folders left out.

    Attributes:
        files: those whose names end in SUFFIXES, sorted by name.
        warnings: a line for all that looks like a file of bars and is none.
    """

    files: list[OwnFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _others: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path, exclude: Path | None = None) -> Folder:
        """List what is below ``folder``, without what is below ``exclude``.

        Raises:
            SourceUnavailable: the folder cannot be read.
            BadAnswer: a bars.toml is wrong.
        """
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise SourceUnavailable(f"files_dir {folder} {what}: give the folder that has the files of bars")
        found = cls(_seen={os.path.realpath(exclude)} if exclude else set())
        found._walk(folder, "", Description({}))
        if found._others:
            names = first_of(found._others)
            found.warnings.append(f"{names}: left out, as no name of CSV or Parquet ({', '.join(SUFFIXES)})")
        found.files.sort(key=lambda file: file.name)
        return found

    def _walk(self, folder: Path, prefix: str, description: Description) -> None:
        self._seen.add(os.path.realpath(folder))
        try:
            with os.scandir(folder) as scan:
                # Links come last, as a folder is to be known by its own name.
                names = [name for _, name in sorted((entry.is_symlink(), entry.name) for entry in scan)]
        except OSError as error:
            if not prefix:
                raise SourceUnavailable(f"cannot read files_dir {folder}: {error.strerror}") from error
            self.warnings.append(f"{prefix} cannot be read: {error.strerror}")
            return
        if FILE_NAME in names:
            names.remove(FILE_NAME)
            try:
                description = Description.read(folder / FILE_NAME)
            except BadAnswer as error:
                raise BadAnswer(f"{prefix}{FILE_NAME}: {error}") from error
        for name in names:
            if not name.startswith("."):
                self._add(folder / name, prefix + as_text(name), description)

    def _add(self, path: Path, name: str, description: Description) -> None:
        is_named = name.lower().endswith(SUFFIXES)
        try:
            status = path.stat()
        except OSError as error:  # a link to nowhere, or to itself
            self.warnings.append(f"{name} cannot be read: {error.strerror}")
            return
        if stat.S_ISDIR(status.st_mode):
            if is_named:
                text = "is a folder with the name of a file: left out; rename it, or move its files up"
                self.warnings.append(f"{name} {text}")
            elif os.path.realpath(path) not in self._seen:
                self._walk(path, f"{name}/", description)
            elif path.is_symlink():
                self.warnings.append(f"{name} leads back to a folder that was looked at: left out")
        elif not is_named:
            self._others.append(name)
        elif not stat.S_ISREG(status.st_mode):
            self.warnings.append(f"{name} is no regular file: left out")
        else:
            self.files.append(OwnFile(path, name, description, status.st_size, status.st_mtime_ns))
