"""Walk through every system call of an operation, in a process that has calls.so preloaded.

    walk.py FOLDER SCENARIO=KIND,KIND... ...

KIND is MODE:ERRNO, to kill or fail each call in turn (calls.c), or "power", to cut the power after each (disk.py).
Prints a line of JSON for each scenario and kind: how many calls and faults were walked, and what was broken.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.disk import Disk
from tests.faults.scenarios import NEW, REPORTS, Scenario, leftovers, prepared

shim = ctypes.CDLL(None)
DONE, WARNED, RAISED, CRASHED = range(4)
KILLS = "kt"


class Reports(logging.Handler):
    """Notes whether anything was said."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def run(scenario: Scenario, folder: Path, at: int, mode: str, code: int, log: int = -1) -> tuple[int, int]:
    """Operate in a fork; return how it ended (DONE to CRASHED, or minus the signal) and its number of calls."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ended, reports = CRASHED, Reports()
        try:
            logging.getLogger().addHandler(reports)
            shim.arm(ctypes.c_long(at), ord(mode), code, log)
            try:
                scenario.operate(folder)
                ended = WARNED if reports.count else DONE
            except REPORTS:
                ended = RAISED
            finally:
                count = shim.disarm()
            os.write(writing, str(count).encode())
        except BaseException as error:  # noqa: BLE001 - reported by the exit code, below
            sys.stderr.write(f"{at}{mode}{code}: {type(error).__name__}: {error}\n")
        finally:
            os._exit(ended)
    os.close(writing)
    count = int(os.read(reading, 20) or b"0")
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


def fault(scenario: Scenario, folder: Path, ended: int, mode: str) -> str:
    """Return what is wrong with the folder after one fault, "" if nothing."""
    try:
        is_new = scenario.read(folder) == NEW
        if ended == CRASHED:
            return "not one of our errors"
        if mode in KILLS and ended != -signal.SIGKILL:
            return f"it was not killed, it ended with {ended}"
        if ended == DONE and not is_new:
            return "it reported success and changed nothing"
        scenario.recover(folder)
        if scenario.read(folder) != NEW:
            return "the next start did not complete it"
        return f"left: {left}" if (left := leftovers(folder)) else ""
    except (AssertionError, *REPORTS) as error:
        return f"{type(error).__name__}: {error}"


def walk_calls(scenario: Scenario, original: Path, kind: str) -> dict[str, object]:
    """Kill or fail every call once, each time on a fresh copy of the folder."""
    work = original.parent / "work"
    mode, _, name = kind.partition(":")
    shutil.copytree(original, work)
    ended, calls = run(scenario, work, 0, "e", 0)
    assert ended == DONE and scenario.read(work) == NEW, ended
    broken = []
    for at in range(1, calls + 1):
        shutil.rmtree(work)
        shutil.copytree(original, work)
        ended, _ = run(scenario, work, at, mode, getattr(errno, name, 0))
        wrong = fault(scenario, work, ended, mode)
        if wrong:
            broken.append(f"call {at} of {calls}, {kind}, ended {ended}: {wrong}")
    shutil.rmtree(work)
    return {"calls": calls, "faults": calls, "broken": broken}


def walk_power(scenario: Scenario, original: Path) -> dict[str, object]:
    """Cut the power after every change of the disk, and read every state that it may be in."""
    work, log = original.parent / "work", original.parent / "log"
    shutil.copytree(original, work)
    disk = Disk(work)
    with log.open("wb") as file:
        ended, calls = run(scenario, work, 0, "e", 0, file.fileno())
    assert ended == DONE, ended
    broken: list[str] = []
    seen: set[tuple[int, bool]] = set()
    records = disk.records(log.read_bytes())
    for number, record in enumerate([None, *records]):
        if record is not None:
            disk.apply(record)
        is_last = number == len(records)
        for state in disk.after_power_cut():
            key = (hash(state), is_last)
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(work)
            disk.put(state, work)
            # Once it has returned, what it wrote outlives a power cut.
            wrong = fault(scenario, work, DONE if is_last else WARNED, "p")
            if wrong:
                broken.append(f"after {number} of {len(records)} changes: {wrong}")
    shutil.rmtree(work)
    return {"calls": calls, "faults": len(seen), "broken": broken}


if __name__ == "__main__":
    place, *words = sys.argv[1:]
    for name, _, kinds in (word.partition("=") for word in words):
        folder = Path(place) / name
        folder.mkdir()
        scenario = prepared(name, folder / "original")
        for kind in kinds.split(","):
            walk = walk_power if kind == "power" else partial(walk_calls, kind=kind)
            result = walk(scenario, folder / "original")
            sys.stdout.write(json.dumps({"scenario": name, "kind": kind} | result) + "\n")
