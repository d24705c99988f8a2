"""A container's quota of CPU time and memory, read from control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import cores
from runtime.launch import Launch


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 64),
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 64),
    ],
)
def test_a_quota_of_the_second_version_bounds_the_cores(groups: Path, quota: str, expected: int) -> None:
    write(groups, self="0::/", cpu__max=quota)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("400000", 4), ("20000", 1)])
# Mounted as the container's own, or seen as on the host.
@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_and_one_of_the_first(groups: Path, path: str, quota: str, expected: int) -> None:
    write(groups, self=f"5:memory:/\n4:cpu,cpuacct:{path}")
    write(groups / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert cores.usable_cores() == expected


def test_the_tightest_group_around_a_process_counts(groups: Path) -> None:
    write(groups, self="0::/system.slice/train.service")
    write(groups / "system.slice" / "train.service", cpu__max="max 100000", memory__max="max")
    write(groups / "system.slice", cpu__max="800000 100000", memory__max="8000000000")
    assert (cores.usable_cores(), cores.memory_limit()) == (8, 8_000_000_000)


def test_without_groups_there_is_no_limit(groups: Path) -> None:
    assert (cores.usable_cores(), cores.memory_limit()) == (64, None)
    assert "OMP_NUM_THREADS" not in cores.limit_threads()


def test_threads_follow_the_quota_and_the_ranks_but_a_number_of_ones_own_stays(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(groups, self="0::/", cpu__max="800000 100000")
    assert cores.limit_threads()["OMP_NUM_THREADS"] == "8"
    for launcher in ("direct", "torchrun"):
        ((_, additions), *_) = Launch(num_ranks=4, launcher=launcher).commands(["worker.py"])
        assert additions["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in cores.limit_threads(4)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_soon_sleep_while_they_wait_unless_one_says_otherwise(
    groups: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert 0 < int(cores.limit_threads()["GOMP_SPINCOUNT"]) <= 2000
    monkeypatch.setenv(name, "ACTIVE" if name == "OMP_WAIT_POLICY" else "300000")
    assert "GOMP_SPINCOUNT" not in cores.limit_threads()
