"""What must survive a failed or killed system call: operations on a folder, and how to read which state it has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from data_sources.errors import LakeError
from data_sources.lake import lake as lake_module
from data_sources.lake.lake import Lake
from evaluation import champion, ledger
from runtime.files import write_atomically
from tests.data_sources import bar_tables
from tests.training.checkpoints import small
from training import checkpoint
from training.checkpoint import BEST, Checkpoint, CheckpointError

OLD, NEW = "old", "new"
REPORTS = (OSError, CheckpointError, LakeError)


@dataclass(frozen=True)
class Scenario:
    """``read`` returns OLD or NEW, or raises AssertionError for anything in between.

    ``recover`` is what the next start does; the state that it leaves must be NEW.
    """

    prepare: Callable[[Path], None]
    operate: Callable[[Path], object]
    read: Callable[[Path], str]
    recover: Callable[[Path], object]


# --- a checkpoint with its champion and its line in the ledger ------------------------------------------------


def promoted(folder: Path, epoch: int) -> Checkpoint:
    line = {"run": 1, "epoch": epoch, "data": "d", "decision": champion.PROMOTED}
    line |= {"checkpoint": checkpoint.name_of(1, epoch)}
    saved = small(folder, 1, epoch, num_values=9_000)  # more than a buffer: several writes
    return Checkpoint(**{**vars(saved), "exam": {"line": line}})


def commit(folder: Path, epoch: int = 4) -> None:
    saved = promoted(folder, epoch)
    saved.save(keep=3)
    champion.apply_decision(saved)


def prepare_commits(folder: Path) -> None:
    for epoch in (1, 2, 3):
        commit(folder, epoch)


def epoch_of(saved: Checkpoint) -> int:
    assert bool((saved.model["w"] == saved.epoch).all())
    return saved.epoch


def read_commit(folder: Path, old: int = 3, new: int = 4) -> str:
    found, _ = checkpoint.newest(folder)
    newest = 0
    if found is not None:
        assert found.resume is not None and found.resume.clock == {"epoch": found.epoch}
        assert bool((found.resume.learner["moments"] == found.epoch).all())
        newest = epoch_of(found)
    best = epoch_of(Checkpoint.read(folder / BEST)) if (folder / BEST).exists() else 0
    lines = [line["epoch"] for line in ledger.read(folder / ledger.NAME)]
    # A checkpoint, then its champion, then its line: none is there without those before it.
    last = (ledger.read(folder / ledger.NAME) or [{"epoch": 0}])[-1]
    if last.get("decision") == champion.REFUSED:  # with a warning: the disk refused, and the line says so
        assert best == old and last["epoch"] == new
        best = new
    states = (newest, best, last["epoch"])
    assert set(states) <= {old, new} and list(states) == sorted(states, reverse=True), states
    assert lines == [*range(1, old + 1), *[new] * (lines[-1:] == [new])], lines
    return NEW if states == (new,) * 3 else OLD


def start_again(folder: Path, epoch: int = 4) -> None:
    checkpoint.sweep_unfinished(folder)
    found, _ = checkpoint.newest(folder)
    if found is not None:
        champion.apply_decision(found)
    commit(folder, epoch)


# --- a part of the lake -----------------------------------------------------------------------------------

START, NOW = bar_tables.ns("2026-11-20 00:00"), bar_tables.ns("2026-11-23 00:00")
ROWS = {OLD: 900, NEW: 1_000}
BROKEN_ROWS = {OLD: 3, NEW: 0}
_cleaned: dict[str, object] = {}


def write_part(folder: Path, version: str = NEW, broken: dict[str, int] = BROKEN_ROWS) -> None:
    # Cleaning runs in threads, which a forked process lacks, and touches no disk: done once, before.
    key = f"{version} {broken[version]}"
    table = bar_tables.walk("AAA", START, ROWS[version])
    table = bar_tables.with_values(table, range(broken[version]), close=np.nan)
    clean = lake_module.clean
    with patch.object(
        lake_module, "clean", lambda *a, **k: _cleaned.get(key) or _cleaned.setdefault(key, clean(*a, **k))
    ):
        lake = Lake(folder / "lake")
        lake.write(
            "binance", "AAA", "2026-11-20", table, key="k", version=version, start_ns=START,
            end_ns=START + bar_tables.DAY_NS, symbols=["AAA"], now_ns=NOW,
        )  # fmt: skip


def read_part(folder: Path, broken: dict[str, int] = BROKEN_ROWS) -> str:
    lake = Lake(folder / "lake")
    parts = lake.parts("binance", "AAA")
    if not parts:
        return OLD
    (part,) = parts.values()
    bars = lake.columns("binance", "AAA", None, 0, 2**62)["AAA"]
    assert len(bars["open_time"]) == part.rows == ROWS[part.version] - broken[part.version]
    beside = folder / "lake" / "binance" / "AAA" / "2026-11-20.quarantine.parquet"
    assert beside.exists() or not part.rejected, "its rejected rows are gone"
    return part.version


# --- whole files ------------------------------------------------------------------------------------------


def write_file(folder: Path, content: str = NEW) -> None:
    write_atomically(folder / "made" / "file", lambda file: file.write(content.encode() * 20_000))


def sweep_and_write(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        path.unlink()
    write_file(folder)


def write_file_in_place(folder: Path) -> None:
    (folder / "made" / "file").write_text(NEW * 20_000)


def read_file(folder: Path) -> str:
    path = folder / "made" / "file"
    text = path.read_text() if path.exists() else OLD * 20_000
    assert text in (OLD * 20_000, NEW * 20_000), f"{len(text)} characters of neither"
    return text[:3]


def nothing(_: Path) -> None:
    """A folder to begin with."""


def quarantine_grows(folder: Path) -> None:
    write_part(folder, NEW, {OLD: 0, NEW: 3})


def find_and_record(folder: Path) -> None:
    """What a start reads. A call that fails must not pass for an empty folder."""
    found, warnings = checkpoint.newest(folder)
    if found is None or found.epoch < 3:
        assert warnings, "an older checkpoint was chosen without a word"
    assert found is not None, "the folder passed for empty"
    assert [line["epoch"] for line in ledger.read(folder / ledger.NAME)] == [1, 2, 3]


SCENARIOS = {
    "commit": Scenario(prepare_commits, commit, read_commit, start_again),
    "first commit": Scenario(
        nothing,
        lambda folder: commit(folder / "new" / "checkpoints", 1),
        lambda folder: read_commit(folder / "new" / "checkpoints", 0, 1),
        lambda folder: start_again(folder / "new" / "checkpoints", 1),
    ),
    "start": Scenario(prepare_commits, find_and_record, lambda _: NEW, nothing),
    "lake": Scenario(lambda folder: write_part(folder, OLD), write_part, read_part, write_part),
    "lake, rows set aside": Scenario(
        lambda folder: write_part(folder, OLD, {OLD: 0, NEW: 3}),
        quarantine_grows,
        lambda folder: read_part(folder, {OLD: 0, NEW: 3}),
        quarantine_grows,
    ),
    "first part": Scenario(nothing, write_part, read_part, write_part),
    "file": Scenario(lambda folder: write_file(folder, OLD), write_file, read_file, sweep_and_write),
    # The control: what is written in place must be found broken, or the walk sees nothing.
    "control": Scenario(
        lambda folder: write_file(folder, OLD), write_file_in_place, read_file, sweep_and_write
    ),
}


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]


def prepared(name: str, folder: Path) -> Scenario:
    """Prepare a scenario's folder; everything that loads lazily is loaded, also by the reading of it."""
    torch.set_num_threads(1)
    scenario = SCENARIOS[name]
    warm = folder.parent / "warm"
    for place in (folder, warm):
        place.mkdir()
        scenario.prepare(place)
    scenario.operate(warm)
    scenario.read(warm)
    scenario.recover(warm)
    os.sync()
    return scenario
