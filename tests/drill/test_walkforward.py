"""A walk that is killed again and again ends, to the byte, like one that was not."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests.commands import hourly
from tests.program import Start, flags

PROGRAM = (
    "-c",
    "from tests.commands import hourly; hourly.plant(strength=1.0)\n"
    "import continuous_training; continuous_training.main()",
)
KILLS = 20
OPTIONS = ["--step", "5", "--from", "2026-01-17", "--costs", "0,5"]


def begin(folder: Path, *options: str) -> Start:
    folders = {f"{name}_dir": folder / name for name in ("data", "log", "report", "checkpoint")}
    words = flags(hourly.SIZES | {"sources": "simulated"} | folders)
    return Start(
        folder / "out", [*PROGRAM, "walkforward", *words, *OPTIONS, "--output", folder / "walk", *options]
    )


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "walk" / "windows").glob("*.json")}


@pytest.mark.drill
def test_twenty_kills_change_no_byte(tmp_path: Path) -> None:
    start = begin(tmp_path / "whole").wait_for("Plan:")
    began = time.monotonic()
    assert "An edge over 15 days" in start.ends_well().output
    seconds, reference = time.monotonic() - began, results(tmp_path / "whole")
    assert len(reference) == 3
    instants, kills, walks = random.Random(0), 0, 0
    while kills < KILLS:
        walks, folder = walks + 1, tmp_path / f"killed{walks}"
        while True:
            start = begin(folder)
            while not re.search("Plan:|Wrote", start.output) and start.process.poll() is None:
                time.sleep(0.01)
            end = time.monotonic() + instants.uniform(0, seconds)
            while time.monotonic() < end and start.process.poll() is None:
                time.sleep(0.005)
            if start.process.poll() is not None or kills == KILLS:
                start.ends_well()
                break
            start.kill()
            kills += 1
        assert results(folder) == reference, f"walk {walks}, after {kills} kills"


@pytest.mark.drill
def test_windows_side_by_side_end_as_one_after_the_other_even_if_killed(tmp_path: Path) -> None:
    begin(tmp_path / "one", "--fresh").ends_well()
    killed = begin(tmp_path / "two", "--fresh", "--jobs", "2").wait_for("Window 1 of 3")
    killed.process.kill()  # its processes end with it
    killed.process.wait()
    begin(tmp_path / "two", "--fresh", "--jobs", "2").ends_well()
    assert results(tmp_path / "two") == results(tmp_path / "one")
