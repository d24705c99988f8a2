"""Durable files: written completely or not at all, whatever kills the writer."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("continuous_training")

TEMPORARY_SUFFIX = ".tmp"
# What SMB, VirtualBox and WSL shares, FUSE and others answer to a call that they do not implement.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOTTY)
# A sync of a folder that fails otherwise is one that the file system does not have: EIO of rclone, EPROTO of
# VirtualBox. A disk that is broken or gone says so to the next write.
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
FOLDER_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EISDIR)
NO_OVERWRITE = (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EBUSY)
NO_SYNC = "this file system does not sync files: a power cut can damage what was written last"
NO_FOLDER_SYNC = "this file system does not sync folders: a power cut can lose the newest files"
NO_LINKS = "this file system has no hard links: best.pt is a copy and takes room of its own"
NO_RENAME_OVER = "this file system does not rename over a file: a crash in between can lose it"
_warned: set[tuple[int, str]] = set()
_probed: list[str] | None = None  # collects the lacks during find_lacks
_COPY_BYTES = 1 << 20
ZIP_START = b"PK\x03\x04"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a new file that replaces ``path`` once it is safe on disk.

    Temporary file in the same folder, fsync, rename, fsync of the folder: after this returns, the file survives
    a power cut; until then, ``path`` is unchanged. A kill leaves at most a hidden ``.NAME.*.tmp`` beside it.
    A missing folder is created.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is untouched.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:  # not "xb", which some file systems refuse; the name is random
            write(file)
            sync_file(file, path.parent)
        move_over(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error matters
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_durably(path: Path, text: bytes, size: int) -> None:
    """Let a file go on, after its first ``size`` bytes, with ``text``, durably; what a torn write left there goes.

    Raises:
        OSError: the disk is full, or the file cannot be written; the first ``size`` bytes stay.
    """
    make_folder(path.parent)
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > size and not _is_cut(file, size):
            kept = path.read_bytes()[:size]
            write_atomically(path, lambda whole: whole.write(kept + text))
            return
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            sync_file(file, path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # the first error matters; the next try cuts it off
                file.truncate(size)
            raise
    if is_new:
        sync_folder(path.parent)


def _is_cut(file: FileIO, size: int) -> bool:
    """Shorten a file to ``size`` bytes; False where the file system cannot."""
    try:
        file.truncate(size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def make_folder(folder: Path) -> list[Path]:
    """Make a folder where it is missing, with those above it, durably: a file in it is no safer than its name.

    Returns:
        What was missing, the innermost first.

    Raises:
        OSError: it cannot be made.
    """
    missing = [folder] if not folder.is_dir() else []
    while missing and not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent, warns=False)  # the writing into it will
    return missing


def remove_empty(made: Iterable[Path]) -> None:
    """Remove the folders that ``make_folder`` made, where nothing came into them: a refusal leaves none behind."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def sync_folder(folder: Path, warns: bool = True) -> None:
    """Make renames and removals in ``folder`` durable, where the file system can: what is written stands without.

    Windows has no such call and does not need one.
    """
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, *FOLDER_UNREADABLE):
            raise
        is_synced = False
    else:
        is_synced = _is_synced(descriptor)
    if warns and not is_synced:
        warn_once(folder, NO_FOLDER_SYNC)


def _is_synced(descriptor: int) -> bool:
    """Sync an open folder and close it; False where the file system does not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def sync_file(file: BinaryIO, folder: Path) -> None:
    """Make what was written to a file of ``folder`` durable, where the file system can."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(folder, NO_SYNC)


def move_over(path: Path, target: Path) -> None:
    """Rename ``path`` to ``target``, over an existing file; in two steps where the file system refuses one.

    Raises:
        OSError: it cannot be renamed; ``target`` is as it was.
    """
    try:
        path.replace(target)
        return
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, *NO_OVERWRITE) or not target.is_file():
            raise
        first = error
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        target.rename(aside)
    except OSError:
        raise first from None
    try:
        path.rename(target)
    except OSError:
        aside.rename(target)
        raise first from None
    warn_once(target.parent, NO_RENAME_OVER)
    aside.unlink(missing_ok=True)


def warn_once(folder: Path, lack: str) -> None:
    """Warn once per file system and process of what it cannot promise."""
    if _probed is not None:
        _probed.append(lack)
        return
    with contextlib.suppress(OSError):
        key = (folder.stat().st_dev, lack)
        if key not in _warned:
            _warned.add(key)
            log.warning(f"{folder}: {lack}")


def find_lacks(folder: Path) -> list[str]:
    """Write, sync and rename in a folder as the program does; return what its file system cannot promise.

    Raises:
        OSError: the folder cannot be written.
    """
    global _probed
    _probed = []
    probe = folder / f".probe.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        for _ in range(2):  # the second is over an existing file
            write_atomically(probe, lambda file: file.write(b"probe"))
    finally:
        lacks, _probed = _probed, None
        probe.unlink(missing_ok=True)
    return list(dict.fromkeys(lacks))


def free_bytes(folder: Path) -> int | None:
    """Return the free space of a folder's disk; None where the file system does not say, as some FUSE."""
    try:
        usage = shutil.disk_usage(folder)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    return usage.free if usage.total or usage.free else None


def identity_of(path: Path) -> tuple[int, int, int]:
    """Return (inode, mtime in ns, size) of a file: other ones are another file, or another content."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def fault_of_folder(folder: Path) -> str:
    """Return why no folder can be there, "" if it is one, or could be made."""
    path = folder.absolute()
    for place in (path, *path.parents):
        try:
            if place.is_dir():
                return ""
            if place.is_symlink() and not place.exists():
                return f"{place} links to {place.readlink()}, which does not exist"
            if place.exists():
                return f"{place} is a file"
        except OSError as error:
            return f"{error.strerror or error}"
    return ""


def fault_of_zip(path: Path, expected: str) -> str:
    """Return what is wrong with a file that is no whole zip file; ``expected`` says what it should be."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(len(ZIP_START))
        if not start:
            return "is empty: use another one"
        if start != ZIP_START:
            return f"is not {expected}"
    return "is damaged, its end is missing: use another one"


def can_link(folder: Path) -> bool:
    """Return whether a file in ``folder`` can have a second name. Raises OSError where none can be written."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe.", suffix=TEMPORARY_SUFFIX) as file:
        second = Path(f"{file.name}.link{TEMPORARY_SUFFIX}")
        try:
            os.link(file.name, second)
        except OSError:
            return False
        second.unlink()
        return True


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
