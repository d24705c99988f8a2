"""Locks that the operating system releases when their holder dies, however it dies. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.files import UNSUPPORTED, make_folder, remove_empty, warn_once

LOCK_NAME = ".lock"
NO_LOCK_ERRORS = (*UNSUPPORTED, errno.ENOLCK)
NO_LOCKS = (
    "this file system has no locks: nothing keeps out a second program that writes here; start only one"
)
POLL_SECONDS = 0.2
_held_here: set[Path] = set()  # lock files that this process holds
_HOLDER_BYTES = 32  # of the lock file
_LOCK_OFFSET = 1 << 30  # a locked byte cannot be read on Windows: lock one beyond the holder's name


class FolderLockError(Exception):
    """The folder cannot be locked. The text is one line for the user."""


class FolderHeld(FolderLockError):
    """Another process, or another part of this one, holds the folder; ``holder`` is such as "process 123"."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is written by {holder} now; wait for it or stop it")
        self.holder = holder


class FolderUnwritable(FolderLockError):
    """The lock file cannot be created or written."""


class FolderLock:
    """Excludes other writers of ``folder``: other processes, and other FolderLocks of this process.

    Threads that share a FolderLock hold it together. Where an error ends the hold before anything came into the
    folder, the lock file and the folders that were made for it go again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._guard = threading.Lock()
        self._holds = 0
        self._descriptor = -1
        self._made: list[Path] = []  # folders that were missing
        self._before: set[Path] | None = None  # what the folder had; None where the lock file was there

    @contextmanager
    def hold(
        self,
        wait_seconds: float = 0.0,
        on_wait: Callable[[str], object] = lambda holder: None,
        is_trial: bool = False,
    ) -> Iterator[bool]:
        """Hold the lock; yields True for the outermost hold, False within another.

        Args:
            wait_seconds: how long to wait for another holder.
            on_wait: called with the holder a few times a second meanwhile; what it raises ends the wait.
            is_trial: leave as little as where an error ends the hold.

        Raises:
            FolderHeld: another holder has it.
            FolderUnwritable: the folder cannot be written.
        """
        with self._guard:
            if outermost := self._holds == 0:
                self._wait(time.monotonic() + wait_seconds, on_wait)
            self._holds += 1
        failed = True
        try:
            yield outermost
            failed = is_trial
        finally:
            with self._guard:
                self._holds -= 1
                if self._holds == 0:
                    self._release(failed)

    def _wait(self, end: float, on_wait: Callable[[str], object]) -> None:
        while True:
            try:
                return self._acquire()
            except FolderHeld as error:
                if time.monotonic() >= end:
                    raise
                on_wait(error.holder)
            time.sleep(POLL_SECONDS)

    def _acquire(self) -> None:
        descriptor = self._open()
        is_locked = _flock(descriptor, wait=False)
        if is_locked and not os.fstat(descriptor).st_nlink:  # its former holder has just removed it
            os.close(descriptor)
            descriptor = self._open()
            is_locked = _flock(descriptor, wait=False)
        if is_locked is None:  # no locks here: at least no second writer of this process
            is_locked = self._path.absolute() not in _held_here
            if is_locked:
                warn_once(self._path.parent, NO_LOCKS)
        if not is_locked:
            holder = os.read(descriptor, 100).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise FolderHeld(self._path.parent, holder or "another process")
        self._descriptor = descriptor
        _held_here.add(self._path.absolute())
        try:
            # As long as any other holder's name: not every file system can shorten a file.
            os.write(descriptor, f"process {os.getpid()}".ljust(_HOLDER_BYTES).encode())
        except OSError as error:
            self._release(failed=True)
            raise self._unwritable(error) from error

    def _open(self) -> int:
        folder = self._path.parent
        self._made, self._before = [], None
        try:
            self._made = make_folder(folder)
            if not self._path.exists():
                self._before = set(folder.iterdir())
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            remove_empty(self._made)
            raise self._unwritable(error) from error

    def _release(self, failed: bool) -> None:
        """Release the lock. The file stays and means nothing, but where nothing else was done."""
        _held_here.discard(self._path.absolute())
        if sys.platform == "win32":  # which removes no open file, so none that another holder has by now
            os.close(self._descriptor)
        if failed and self._before is not None:
            with contextlib.suppress(OSError):
                if set(self._path.parent.iterdir()) == {*self._before, self._path}:
                    self._path.unlink()
            remove_empty(self._made)
        if sys.platform != "win32":
            os.close(self._descriptor)

    def _unwritable(self, error: OSError) -> FolderUnwritable:
        reason = error.strerror or error
        return FolderUnwritable(
            f"cannot write to {self._path.parent}: {reason}; free space or check permissions"
        )


def try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take an exclusive lock on an open file; the operating system releases it when the process ends.

    Returns:
        Whether no other process has it; always True with ``wait``, and where the file system has no locks.
    """
    return _flock(descriptor, wait) is not False


def can_lock(folder: Path) -> bool:
    """Whether a file in ``folder`` can be locked. Raises OSError where none can be written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _flock(file.fileno(), wait=False) is not None


def _flock(descriptor: int, wait: bool) -> bool | None:
    """Return whether the lock was taken; None if the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            os.lseek(descriptor, _LOCK_OFFSET, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.2)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS and others; EACCES of SELinux, EIO where the server of locks is gone
        return None
    return True
