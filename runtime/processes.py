"""Child processes that never outlive their parent, on every operating system.

Linux    the kernel kills a child when its parent dies, and /proc shows which processes belong to a run.
Windows  a job object does both.
Others   process groups only: children of a supervisor that is killed with SIGKILL live on.

Standard library only: the supervisor and the installation run before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from runtime.locking import try_lock

WINDOWS = sys.platform == "win32"
LINUX = sys.platform == "linux"

RUN_ID = "TRAIN_RUN_ID"  # environment variable that marks every process of a run
SWEEP_SECONDS = 60.0  # SIGKILL may take so long to end a process inside the GPU driver
_PR_SET_PDEATHSIG = 1


def hold_folder(folder: Path) -> int:
    """Mark a folder as in use by this process until it ends; systemd-tmpfiles skips such folders too.

    Returns:
        The file descriptor that holds the mark; -1 on Windows, which cannot open folders.
    """
    if WINDOWS:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try_lock(descriptor)
    return descriptor


def die_with_parent(held_folder: Path | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies; workers call it first.

    Args:
        held_folder: the folder that the supervisor holds (see ``hold_folder``). If it is no longer held, the
            supervisor died before this call, which the kernel does not report, and this process exits.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if held_folder is None:
        return
    try:
        if not is_held(held_folder):
            os._exit(1)
    except FileNotFoundError:
        os._exit(1)
    except OSError:
        return  # there are no locks to look at


def is_held(folder: Path) -> bool:
    """Return whether a process that lives holds the folder (see ``hold_folder``).

    Raises:
        OSError: there is no such folder, or its file system has no locks.
    """
    if sys.platform == "win32":
        return folder.is_dir()
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: many may look at once
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


if sys.platform == "win32":
    from ctypes import wintypes

    class _ExtendedLimits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION of 64-bit Windows: 144 bytes, of which only the flags are set."""

        _fields_ = (("times", ctypes.c_int64 * 2), ("flags", ctypes.c_uint32), ("rest", ctypes.c_uint64 * 15))

    class _Job:
        """A Windows job object: its processes and their children end with the supervisor, or on ``kill_all``.

        Source: learn.microsoft.com, "Job Objects" and "JOBOBJECT_EXTENDED_LIMIT_INFORMATION" (2026-11).
        """

        _KILL_ON_JOB_CLOSE = 0x2000
        _EXTENDED_LIMIT_INFORMATION = 9

        def __init__(self) -> None:
            self._kernel = ctypes.WinDLL("kernel32", use_last_error=True)
            self._kernel.CreateJobObjectW.restype = wintypes.HANDLE
            self._handle = wintypes.HANDLE(self._kernel.CreateJobObjectW(None, None))
            limits = _ExtendedLimits(flags=self._KILL_ON_JOB_CLOSE)
            arguments = (self._EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits))
            self._check(self._kernel.SetInformationJobObject(self._handle, *arguments))

        def add(self, child: subprocess.Popen[bytes]) -> None:
            handle = wintypes.HANDLE(int(vars(child)["_handle"]))
            self._check(self._kernel.AssignProcessToJobObject(self._handle, handle))

        def kill_all(self) -> None:
            self._check(self._kernel.TerminateJobObject(self._handle, 1))

        def _check(self, succeeded: int) -> None:
            if not succeeded:
                raise ctypes.WinError(ctypes.get_last_error())


class Processes:
    """The processes of one run and their descendants, none of which is left behind.

    They get a session of their own, so that a terminal's Ctrl+C reaches the supervisor only, and start with
    stop signals ignored, so that a signal to a whole service (systemd) does not kill them either.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._children: list[subprocess.Popen[bytes]] = []
        if sys.platform == "win32":
            self._job = _Job()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], errors: BinaryIO | None = None
    ) -> None:
        """Start one process with exactly this environment plus the run's mark.

        Args:
            command: the program and its arguments.
            environment: replaces this process's own.
            errors: its standard error; None for that of this process.

        Raises:
            OSError: the system cannot start it.
        """
        options: dict[str, Any]
        if sys.platform == "win32":  # in a group of its own, the console's Ctrl+C does not reach it
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:  # preexec_fn is safe: the supervisor has one thread
            options = {"start_new_session": True, "preexec_fn": _child_setup(os.getpid())}
        marked = dict(environment) | {RUN_ID: self._run_id}
        child = subprocess.Popen(command, env=marked, stdin=subprocess.DEVNULL, stderr=errors, **options)
        if sys.platform == "win32":
            self._job.add(child)
        self._children.append(child)

    def exit_codes(self) -> list[int | None]:
        """Return the exit code of every started process: None while it runs, -N when signal N ended it."""
        codes = [child.poll() for child in self._children]
        if os.getpid() == 1:
            self._reap_adopted()
        return codes

    def sweep(self) -> list[int]:
        """Kill every process of the run and wait until all are gone.

        Returns:
            The ids of those that survived SIGKILL for ``SWEEP_SECONDS``.
        """
        deadline = time.monotonic() + SWEEP_SECONDS
        while True:
            if sys.platform == "win32":
                self._job.kill_all()
            alive = [child.pid for child in self._children if child.poll() is None]
            # Until none is found: a process may start another one before it dies.
            alive = sorted({*alive, *self._find_marked()})
            if not alive or time.monotonic() > deadline:
                self._children.clear()
                return alive
            for process_id in alive:
                _kill(process_id)
            time.sleep(0.02)

    def _find_marked(self) -> list[int]:
        """Find living processes with the run's mark; zombies show no environment."""
        if not LINUX:
            return []
        mark = f"{RUN_ID}={self._run_id}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or belongs to another user
                continue
            if mark in environment.split(b"\0"):
                found.append(int(entry.name))
        return found

    def _reap_adopted(self) -> None:
        """As process 1 of a container, reap orphans, which would stay zombies."""
        if sys.platform == "win32":
            return
        own = {child.pid for child in self._children}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def _child_setup(supervisor: int) -> Callable[[], None]:
    """Return a function for the child to run between fork and exec."""

    def setup() -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        die_with_parent()
        if os.getppid() != supervisor:  # it died before prctl
            os._exit(1)

    return setup


def _kill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
        if sys.platform == "win32":
            os.kill(process_id, signal.SIGTERM)  # which ends it at once there
        elif LINUX:
            os.kill(process_id, signal.SIGKILL)
        else:
            os.killpg(process_id, signal.SIGKILL)  # no /proc: at least its whole group
