"""Starts of the real program with a fault at a chosen moment."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil

from tests.program import ROOT, Start, environment, tiny_flags

WITH_FAULTS = ROOT / "tests" / "drill" / "with_faults.py"


def kill_while_writing(folder: Path, epoch: int, **settings: Any) -> Path:
    """Train until kill -9 comes with the resume state of ``epoch`` half written; return the folder."""
    name = f"run1_epoch{epoch}.pt"
    with_kill = environment(KILL_IN_WRITE=name)
    start = Start(folder / "out", [WITH_FAULTS, "train", *tiny_flags(folder, **settings)], with_kill)
    start.ends()
    assert start.process.returncode == -signal.SIGKILL, start.output
    assert any((folder / "checkpoints" / "resume").glob(f".{name}.*.tmp"))
    return folder


SUPERVISED_WITH_FAULTS = (
    "-c",
    "import sys; from pathlib import Path; from runtime.supervisor import main\n"
    "sys.exit(main(sys.argv[2:], script=Path(sys.argv[1])))",
    WITH_FAULTS,
)
VICTIMS = ("rank 0", "rank 1", "launcher", "supervisor")


def find(start: Start, victim: str) -> psutil.Process | None:
    """Find a process of a supervised training on two ranks under torchrun; None while it does not exist."""
    own = psutil.Process(start.process.pid)
    if victim == "supervisor":
        return own
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "train" not in words:
                continue
            is_launcher = "runtime.torchrun" in words
            if (victim == "launcher" and is_launcher) or (
                not is_launcher and victim == f"rank {process.environ().get('RANK')}"
            ):
                return process
    return None


def living(folder: Path) -> list[psutil.Process]:
    """Find every process that trains into ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()) and "train" in process.cmdline():
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
