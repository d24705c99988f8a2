"""What differs between operating systems: processes that never outlive their starter.

Linux    the kernel kills a child when its parent dies, and /proc shows which processes are a run's.
Windows  a job object does both.
Others   process groups only: children of a daemon that is killed with SIGKILL live on.

Standard library only: the supervisor and the set-up run before anything is installed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from runtime.locking import try_lock

WINDOWS = sys.platform == "win32"
LINUX = sys.platform == "linux"

RUN_ID = "TRAIN_RUN_ID"  # environment variable that marks every process of a run
SWEEP_SECONDS = 60.0  # a process inside the GPU driver may take that long to die of SIGKILL
CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1


def hold_folder(folder: Path) -> int:
    """Mark a folder as in use by this process until it ends; systemd-tmpfiles skips such folders too.

    Returns:
        The descriptor that carries the mark; -1 on Windows, which cannot open folders.
    """
    if WINDOWS:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try_lock(descriptor)
    return descriptor


def die_with_parent(supervisors_folder: Path | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies; workers call it first of all.

    ``supervisors_folder`` is the one that the supervisor holds (see ``hold_folder``). When nobody holds it
    any more, the supervisor died before this call, the kernel will not tell, and this process ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if supervisors_folder is None:
        return
    import fcntl

    try:
        descriptor = os.open(supervisors_folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: many workers may ask at once
    except BlockingIOError:
        os.close(descriptor)
    except FileNotFoundError:
        os._exit(1)
    else:
        os._exit(1)


def memory_bytes() -> int | None:
    """Return the memory that this machine, or the container around this process, has; None where nobody says."""
    if sys.platform == "win32":
        return _windows_memory_bytes()
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, second and first version
        try:
            limit = (CGROUP / name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            found = min(found, int(limit))
    return found


def _windows_memory_bytes() -> int | None:
    # MEMORYSTATUSEX: its own length, load in percent, total and available physical memory, four more.
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    return int(status[1]) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if sys.platform == "win32":
    from ctypes import wintypes

    class _BasicLimits(ctypes.Structure):
        _fields_ = (
            ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
            ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
            ("LimitFlags", wintypes.DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t),
            ("MaximumWorkingSetSize", ctypes.c_size_t),
            ("ActiveProcessLimit", wintypes.DWORD),
            ("Affinity", ctypes.c_size_t),
            ("PriorityClass", wintypes.DWORD),
            ("SchedulingClass", wintypes.DWORD),
        )

    class _ExtendedLimits(ctypes.Structure):
        _fields_ = (
            ("BasicLimitInformation", _BasicLimits),
            ("IoInfo", ctypes.c_ulonglong * 6),
            ("ProcessMemoryLimit", ctypes.c_size_t),
            ("JobMemoryLimit", ctypes.c_size_t),
            ("PeakProcessMemoryUsed", ctypes.c_size_t),
            ("PeakJobMemoryUsed", ctypes.c_size_t),
        )

    class _Job:
        """A Windows job object: its processes and their children end with the supervisor, or all at once.

        Source: learn.microsoft.com, "Job Objects" and "JOBOBJECT_EXTENDED_LIMIT_INFORMATION" (2026-11).
        """

        _KILL_ON_JOB_CLOSE = 0x2000
        _EXTENDED_LIMIT_INFORMATION = 9

        def __init__(self) -> None:
            self._kernel = ctypes.WinDLL("kernel32", use_last_error=True)
            self._kernel.CreateJobObjectW.restype = wintypes.HANDLE
            self._handle = wintypes.HANDLE(self._kernel.CreateJobObjectW(None, None))
            limits = _ExtendedLimits()
            limits.BasicLimitInformation.LimitFlags = self._KILL_ON_JOB_CLOSE
            self._check(
                self._kernel.SetInformationJobObject(
                    self._handle,
                    self._EXTENDED_LIMIT_INFORMATION,
                    ctypes.byref(limits),
                    ctypes.sizeof(limits),
                )
            )

        def add(self, child: subprocess.Popen[bytes]) -> None:
            self._check(self._kernel.AssignProcessToJobObject(self._handle, self._handle_of(child)))

        def kill_all(self) -> None:
            self._check(self._kernel.TerminateJobObject(self._handle, 1))

        @staticmethod
        def _handle_of(child: subprocess.Popen[bytes]) -> wintypes.HANDLE:
            return wintypes.HANDLE(int(vars(child)["_handle"]))

        def _check(self, succeeded: int) -> None:
            if not succeeded:
                raise ctypes.WinError(ctypes.get_last_error())


class Processes:
    """The processes of one run: started here, found wherever they went, and never left behind.

    They get a session of their own, so that a terminal's Ctrl+C reaches the supervisor only, and start with
    the stopping signals ignored, so that a signal to a whole service (systemd) does not kill them either.
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

        ``errors``: its standard error; None: ours.

        Raises:
            OSError: the system cannot start it.
        """
        marked = dict(environment) | {RUN_ID: self._run_id}
        if sys.platform == "win32":
            child = subprocess.Popen(
                command,
                env=marked,
                stdin=subprocess.DEVNULL,
                stderr=errors,
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,  # the console's Ctrl+C does not reach it
            )
            self._job.add(child)
        else:
            child = subprocess.Popen(
                command,
                env=marked,
                stdin=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_child_setup(os.getpid()),  # the supervisor has one thread, so this is safe
            )
        self._children.append(child)

    def exit_codes(self) -> list[int | None]:
        """Look at every started process: None while it runs, -N when signal N ended it."""
        codes = [child.poll() for child in self._children]
        if os.getpid() == 1:
            self._reap_adopted()
        return codes

    def sweep(self) -> list[int]:
        """Kill every process of the run, wait until each is gone, and forget them.

        Returns:
            The ids of those that even SIGKILL did not end in time.
        """
        deadline = time.monotonic() + SWEEP_SECONDS
        while True:
            if sys.platform == "win32":
                self._job.kill_all()
            alive = [child.pid for child in self._children if child.poll() is None]
            # Again until a look finds none: a process may start another one between the look and its death.
            alive = sorted({*alive, *self._marked()})
            if not alive or time.monotonic() > deadline:
                self._children.clear()
                return alive
            for process in alive:
                _kill(process)
            time.sleep(0.02)

    def _marked(self) -> list[int]:
        """Find living processes that carry the run's mark; zombies show no environment."""
        if not LINUX:
            return []
        mark = f"{RUN_ID}={self._run_id}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it ended meanwhile, or belongs to another user
                continue
            if mark in environment.split(b"\0"):
                found.append(int(entry.name))
        return found

    def _reap_adopted(self) -> None:
        """As process 1 of a container, reap the orphans that the kernel hands over, or they stay zombies."""
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
    """Return what a child does between fork and exec."""

    def setup() -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        die_with_parent()
        if os.getppid() != supervisor:  # it died before the kernel was asked
            os._exit(1)

    return setup


def _kill(process: int) -> None:
    try:
        if sys.platform == "win32":
            os.kill(process, signal.SIGTERM)  # which ends it at once there
        elif LINUX:
            os.kill(process, signal.SIGKILL)
        else:
            os.killpg(process, signal.SIGKILL)  # no /proc: at least its whole group
    except (ProcessLookupError, PermissionError):
        pass  # gone since it was looked up
