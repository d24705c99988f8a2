"""What is in the lake's folders, as the file system lists it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.parse import unquote

from data_sources.errors import lake_errors
from data_sources.lake.names import escape
from data_sources.lake.parts import QUARANTINE_SUFFIX, SUFFIX, DamagedPartError, parse_footer


def stamp_of(path: Path | os.DirEntry[str]) -> tuple[int, int]:
    """Return (mtime in ns, size) of a file: other ones are another content."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, nothing if it does not exist."""
    try:
        with (
            lake_errors("list", folder, FileNotFoundError, NotADirectoryError),
            os.scandir(folder) as found,
        ):
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, none if it does not exist."""
    return [Path(entry.path) for entry in entries(folder) if entry.is_dir()]


def dataset_of(folder: Path, files: list[tuple[Path, tuple[int, int]]]) -> str:
    """Return the dataset in a folder: by its name, or by a part where that is listed in another case."""
    name = unquote(folder.name)
    for path, _ in files if escape(name, folds_case=True) != folder.name else ():
        with contextlib.suppress(DamagedPartError, FileNotFoundError), lake_errors("read", path):
            return parse_footer(path).dataset
    return name


def part_files(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Return the part files of a folder with (mtime, size), sorted by name."""
    found = []
    for entry in entries(folder):
        if entry.name.endswith(SUFFIX) and not entry.name.endswith(QUARANTINE_SUFFIX):
            with contextlib.suppress(FileNotFoundError), lake_errors("read", folder, FileNotFoundError):
                found.append((Path(entry.path), stamp_of(entry)))
    return sorted(found)
