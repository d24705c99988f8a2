"""A walk that is killed again and again ends like one that was not; edges are found where there are some."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from commands.walkforward import WalkOptions, command
from continuous_training import Settings, train
from evaluation import plots
from monitoring.console import Console
from tests.commands import hourly
from tests.program import Start, flags

PROGRAM = ("-m", "tests.commands.hourly_program")
ACCOUNTS = {"single": (), "pair": ("--account", "pair", "--simulated-symbols", "3", "--net-exposure", "0.5")}
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
@pytest.mark.parametrize(("account", "most"), [("single", 20), ("pair", 6)])
def test_kills_change_no_byte(account: str, most: int, tmp_path: Path) -> None:
    options = ACCOUNTS[account]
    start = begin(tmp_path / "whole", *options).wait_for("Plan:")
    began = time.monotonic()
    assert "dge over 15 days" in start.ends_well().output
    seconds, reference = time.monotonic() - began, results(tmp_path / "whole")
    assert len(reference) == 3
    instants, kills, walks = random.Random(0), 0, 0
    while kills < most:
        walks, folder = walks + 1, tmp_path / f"killed{walks}"
        while True:
            start = begin(folder, *options)
            while not re.search("Plan:|Wrote", start.output) and start.process.poll() is None:
                time.sleep(0.01)
            end = time.monotonic() + instants.uniform(0, seconds)
            while time.monotonic() < end and start.process.poll() is None:
                time.sleep(0.005)
            if start.process.poll() is not None or kills == most:
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


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("strength", "headline"), [(0.35, "An edge over 84 days"), (0.0, "No edge over 84 days")]
)
def test_an_edge_that_is_planted_is_found_and_noise_is_called_none(
    strength: float, headline: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hourly.plant(
        monkeypatch, strength=strength, seed=seed, first_day=20_320
    )  # 80 days before the first window
    monkeypatch.setattr(plots, "as_png", lambda _: b"")
    monkeypatch.setattr(plots, "as_svg", lambda *_: "<svg/>")
    folders = {f"{name}_dir": str(tmp_path / name) for name in ("data", "log", "report", "checkpoint")}
    settings = Settings(**(hourly.LEARNABLE | folders | {"seed": seed, "epochs": 16, "checkpoint_every": 16}))
    options = WalkOptions(first_day="2025-11-09", output=tmp_path / "walk")
    with Console(tmp_path / "log", log_level="warning") as console:
        command(settings, train, options, console)
    found = json.loads((tmp_path / "report" / "walkforward_walk" / "walkforward.json").read_text())
    assert len(found["windows"]) == 12 and found["headline"].startswith(headline), found["verdict"]
