"""How many cores and how much memory the control groups around this process leave it. Standard library only.

A container's quota hides from what counts cores: 4 CPUs of a machine with 64 are 64 cores for torch, whose threads
then wait for each other. Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst
(2026-11).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
SPINS = (
    1000  # some 10 us: no slower alone than libgomp's 300,000, and four times faster beside a second training
)


def usable_cores() -> int:
    """Return the cores that this process may keep busy: those of its affinity, at most a container's quota."""
    return max(1, min(_affinity(), int(_quota())))


def memory_limit() -> int | None:
    """Return the bytes that the tightest control group allows, None without a limit."""
    limits = [*_read("memory.max"), *_read("memory.limit_in_bytes", "memory")]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def limit_threads(num_ranks: int = 1) -> dict[str, str]:
    """Return the variables that keep a rank's threads to its part of the cores, and let them wait asleep.

    By default threads spin for milliseconds while they wait for each other, on cores that other programs want: two
    trainings on one machine stand still together. Source: libgomp's manual, GOMP_SPINCOUNT (2026-11). What is set
    already stays.
    """
    cores, variables = usable_cores(), {}
    if "OMP_NUM_THREADS" not in os.environ and (num_ranks > 1 or cores < _affinity()):
        variables["OMP_NUM_THREADS"] = str(max(1, cores // num_ranks))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        variables["GOMP_SPINCOUNT"] = str(SPINS)
    return variables


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _quota() -> float:
    """Return the tightest quota in cores, infinite without one."""
    quotas = [tuple(text.split()) for text in _read("cpu.max")]
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError):
            texts = [(folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
            quotas.append(tuple(texts))
    cores = [int(quota) / int(period) for quota, period in quotas if quota.isdigit() and int(period) > 0]
    return min(cores, default=float(sys.maxsize))


def _read(name: str, controller: str = "") -> Iterator[str]:
    """Yield a file's content in every control group around this process, "" for the second version's."""
    for folder in _groups(controller):
        with contextlib.suppress(OSError):
            yield (folder / name).read_text().strip()


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own up to the root."""
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        lines = []
    # In a container the path is that of the host, and the folder mounted is the container's own.
    paths = [path for _, names, path in lines if controller in names.split(",")] or ["/"]
    mounts = [CGROUP / controller] if controller else [CGROUP, CGROUP / "unified"]
    for mount in mounts:
        own = mount / paths[0].strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield folder
