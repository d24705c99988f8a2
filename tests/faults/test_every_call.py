"""Every system call of a commit, a lake write and the ledger, killed or failed in turn; and power cuts after each.

After every single fault the previous state or the new one is readable, an error is reported, and the next start
completes the work and leaves nothing behind. The drill walks every scenario with every kind of fault.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.program import PATIENCE, ROOT, environment

long = pytest.mark.drill
SHORT = ["control=t:,power", "commit=t:,power", "lake=h:EIO,power", "first part=power"]
KINDS = "k:,t:,e:EIO,h:EIO,h:ENOSPC,e:EACCES,e:EPERM,e:EINVAL,d:EIO,d:ENOSPC,power"
SCENARIOS = ["commit", "first commit", "lake", "lake, rows set aside", "first part", "file"]
MOST_LINES = 20


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile what is preloaded."""
    path = tmp_path_factory.mktemp("shim") / "calls.so"
    source = Path(__file__).with_name("calls.c")
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler, cc")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of syncs of a real disk prove no more."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def walk(shim: Path, place: Path, words: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("walk.py")), str(place), *words],
        cwd=ROOT, env=environment(LD_PRELOAD=str(shim)), capture_output=True, text=True, timeout=20 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for result in results:
        sys.stdout.write("{scenario}, {kind}: {calls} calls, {faults} faults walked\n".format(**result))
    return results


def broken(results: list[dict[str, Any]]) -> list[str]:
    return [f"{result['scenario']}: {line}" for result in results for line in result["broken"]][:MOST_LINES]


@pytest.mark.slow
def test_after_any_call_killed_or_failed_and_after_a_power_cut_the_old_or_the_new_state_is_whole(
    shim: Path, place: Path
) -> None:
    results = walk(shim, place, SHORT)
    controls, walked = results[:2], results[2:]
    # What is written in place is found broken: the walk does see.
    assert [len(control["broken"]) > 0 for control in controls] == [True, True]
    assert broken(walked) == []
    assert [result["faults"] for result in walked if result["kind"] != "power"] > [50, 50]
    assert min(result["faults"] for result in walked) > 10


@long
def test_every_scenario_with_every_kind_of_fault(shim: Path, place: Path) -> None:
    results = walk(shim, place, [f"{name}={KINDS}" for name in SCENARIOS])
    # A start that cannot read says so; it never takes a full folder for an empty one.
    results += walk(shim, place, ["start=k:,e:EIO,e:EACCES,e:EPERM,d:EIO"])
    assert broken(results) == []
    assert sum(result["faults"] for result in results) > 4_000
