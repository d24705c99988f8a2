"""File systems that refuse what training does not need: syncs of folders, locks, links, renames over a file."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands.check import machine
from monitoring.machine import read_disk
from runtime import files
from runtime.files import (
    NO_FOLDER_SYNC,
    NO_LINKS,
    NO_RENAME_OVER,
    NO_SYNC,
    can_link,
    find_lacks,
    free_bytes,
    move_over,
    write_atomically,
)
from runtime.locking import NO_LOCKS, FolderHeld, FolderLock, can_lock
from tests.program import PATIENCE, ROOT, environment, tiny_flags
from tests.training import checkpoints


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_warned", set())


def refusing(call: Callable[..., Any], code: int, only_folders: bool = False) -> Callable[..., Any]:
    def refuse(descriptor: int, *rest: Any) -> Any:
        if only_folders and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return call(descriptor, *rest)
        raise OSError(code, os.strerror(code))

    return refuse


REFUSALS = [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS]


@pytest.mark.parametrize(
    ("code", "only_folders", "lack"),
    [
        *((code, False, NO_SYNC) for code in REFUSALS),
        # Of a folder any refusal is one: rclone's answers EIO, VirtualBox's EPROTO.
        *((code, True, NO_FOLDER_SYNC) for code in (*REFUSALS, errno.EIO, errno.EPROTO, errno.EACCES)),
    ],
)
def test_a_refused_sync_is_one_warning_and_no_failed_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    only_folders: bool,
    lack: str,
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, code, only_folders))
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b", "b"):
            write_atomically(tmp_path / name, lambda file: file.write(b"x"))
    assert caplog.text.count(lack) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert lack in find_lacks(tmp_path)


@pytest.mark.parametrize(
    ("code", "only_folders"), [(errno.EIO, False), (errno.ENOSPC, False), (errno.ENOSPC, True)]
)
def test_a_sync_that_fails_is_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, only_folders: bool
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, code, only_folders))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EIO, errno.EACCES])
def test_without_locks_a_folder_is_held_within_the_process_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, code))
    assert not can_lock(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with FolderLock(tmp_path).hold(), pytest.raises(FolderHeld), FolderLock(tmp_path).hold():
                pass
    assert caplog.text.count(NO_LOCKS) == 1


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EINVAL, errno.EACCES, errno.EPERM])
def test_a_file_is_replaced_where_a_rename_over_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    rename = os.rename

    def refuse(path: Any, target: Any, **_: Any) -> None:
        if Path(target).exists():
            raise OSError(code, os.strerror(code))
        rename(path, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "file", lambda file, content=content: file.write(content))
    assert (tmp_path / "file").read_bytes() == b"new"
    assert find_lacks(tmp_path) == [NO_RENAME_OVER]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError):
        move_over(tmp_path / "none", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_every_rename_goes_by_the_function_that_such_file_systems_know() -> None:
    packages = (
        "commands",
        "data_sources",
        "envs",
        "evaluation",
        "models",
        "monitoring",
        "runtime",
        "training",
    )
    sources = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    own = re.compile(r"os\.(?:replace|rename)\(|\b\w*(?:path|file|temporary|aside)\.(?:replace|rename)\(")
    found = [path.name for path in sources if own.search(path.read_text(encoding="utf-8"))]
    assert found == ["export.py", "report.py", "files.py"]  # two rename folders, over nothing


def test_a_second_name_is_tried_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_link(tmp_path)
    monkeypatch.setattr(os, "link", refusing(os.link, errno.EPERM))
    assert not can_link(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, None])
def test_a_disk_that_does_not_say_what_is_free_is_not_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    assert free_bytes(tmp_path)
    nothing = os.statvfs_result((0,) * 10)
    monkeypatch.setattr(os, "statvfs", refusing(os.statvfs, code) if code else lambda _: nothing)
    assert free_bytes(tmp_path) is None
    checkpoints.small(tmp_path, 1, 1).save(keep=1)
    assert machine._on_disk("checkpoints", tmp_path, 1, 1, "").level == "OK"
    assert read_disk(tmp_path).free is None and read_disk(tmp_path).num_checkpoints == 1


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int flock(int fd, int op) { errno = ENOLCK; return -1; }
int link(const char *a, const char *b) { errno = EPERM; return -1; }
int fsync(int fd) {
    struct stat s;
    if (!fstat(fd, &s) && S_ISDIR(s.st_mode)) { errno = EINVAL; return -1; }
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return real(fd);
}
int ftruncate(int fd, long size) {
    struct stat s;
    if (!fstat(fd, &s) && S_ISREG(s.st_mode) && size < s.st_size) { errno = ENOTSUP; return -1; }
    int (*real)(int, long) = dlsym(RTLD_NEXT, "ftruncate");
    return real(fd, size);
}
int ftruncate64(int fd, long size) { return ftruncate(fd, size); }
"""


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    """A library that takes from a program what some file systems refuse."""
    (tmp_path / "shim.c").write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs gcc")
    return tmp_path / "shim.so"


@pytest.mark.parametrize("refuses", [False, True])
def test_lines_are_added_after_a_torn_one_though_no_file_can_be_shortened(shim: Path, refuses: bool) -> None:
    path = shim.with_name("lines.jsonl")
    path.write_bytes(b"first\nto")
    code = (
        "import sys; from pathlib import Path; from runtime import files; from runtime.locking import FolderLock\n"
        "path = Path(sys.argv[1])\n"
        "with FolderLock(path.parent).hold():\n"
        "    files.append_durably(path, b'second\\n', 6)\n"
        "    files.append_durably(path, b'third\\n', 13)\n"
    )
    variables = environment(LD_PRELOAD=str(shim)) if refuses else environment()
    for _ in range(2):  # the second program finds the first one's lock file
        subprocess.run(
            [sys.executable, "-c", code, path], cwd=ROOT, env=variables, check=True, timeout=PATIENCE
        )
    assert path.read_bytes() == b"first\nsecond\nthird\n"
    assert {file.name for file in shim.parent.iterdir()} == {"shim.c", "shim.so", "lines.jsonl", ".lock"}


def test_lines_that_cannot_be_added_leave_those_before_them(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.append_durably(Path("/dev/full"), b"line\n", 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.append_durably(tmp_path / "folder", b"line\n", 0)
    files.append_durably(tmp_path / "new" / "lines", b"line\n", 0)
    assert (tmp_path / "new" / "lines").read_bytes() == b"line\n"


@pytest.mark.drill
def test_training_saves_and_check_names_the_lacks_on_such_a_file_system(tmp_path: Path, shim: Path) -> None:
    flags = tiny_flags(tmp_path, epochs=2, runs=1)
    outputs = []
    for command in ("train", "check"):
        words = [sys.executable, "-m", "runtime.supervisor", command, *flags]
        words += ["--offline"] if command == "check" else []
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=environment(LD_PRELOAD=str(shim)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout
        outputs.append(done.stdout)
    assert (tmp_path / "checkpoints" / "run1_epoch2.pt").exists()
    assert outputs[0].count(NO_FOLDER_SYNC) == 1 and "not saved" not in outputs[0]
    assert outputs[1].count(f"{NO_FOLDER_SYNC}; {NO_LOCKS}") == 3  # checkpoints, logs, reports
    assert outputs[1].count(f"; {NO_LINKS}\n") == 1
