"""Who can be short: a training of spot pairs alone says so, or holds none; one that began short continues."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.check import _check_checkpoint
from commands.train import Job
from continuous_training import PRESETS, Settings
from runtime.control import Control, ExitProgram
from tests.training.checkpoints import untrained
from training.checkpoint import Checkpoint
from training.distributed import Ranks
from training.validation import check_start, impossible_shorts

SPOT: dict[str, Any] = {"sources": ("binance",)}


@pytest.mark.parametrize(
    ("changes", "is_possible"),
    [
        ({}, True),  # stocks among them
        (PRESETS["demo"], True),
        (SPOT, False),
        (SPOT | {"positions": (-0.5, 0.0, 0.5)}, False),
        (SPOT | {"positions": (0.0, 1.0)}, True),
        (SPOT | {"positions": (0.0, 2.0)}, True),
        (SPOT | {"allow_spot_shorts": True}, True),
        ({"sources": ("polygon",), "stocks": ()}, False),
        ({"sources": ("polygon", "binance"), "polygon_crypto": ()}, True),
        ({"sources": ("polygon", "binance", "yahoo"), "stocks": ()}, False),
    ],
)
def test_only_spot_pairs_alone_refuse_a_short(changes: dict[str, Any], is_possible: bool) -> None:
    assert (impossible_shorts(Settings(**changes)) == "") == is_possible


def test_a_start_refuses_them_where_it_has_nothing_to_resume_from(tmp_path: Path) -> None:
    settings = Settings(**SPOT, checkpoint_dir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"positions=-1,0,1 must not be below 0 .* use --positions 0,1"):
        check_start(settings, 1)
    check_start(replace(settings, mirror=str(tmp_path / "mirror")), 1)  # which may have one
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run1_epoch2.pt").touch()
    check_start(settings, 1)


def job_of(settings: Settings) -> Job:
    job = Job(settings, Control())
    job.ranks = Ranks(0, 1, torch.device("cpu"))
    return job


def test_a_new_training_of_spot_pairs_alone_is_refused_with_its_two_ways_out(tmp_path: Path) -> None:
    settings = Settings(**SPOT, checkpoint_dir=str(tmp_path))
    expected = (
        "Invalid setting: positions=-1,0,1 must not be below 0 where all symbols are spot pairs, which only their "
        "owner can sell; use --positions 0,1, or --allow-spot-shorts if you borrow coins on margin"
    )
    with pytest.raises(ExitProgram) as ended:
        job_of(settings)._find_checkpoint()
    assert (ended.value.code, str(ended.value)) == (2, expected)
    line, *_ = _check_checkpoint(None, [], settings)
    assert (line.level, line.text, line.code) == ("error", expected, 2)
    for way_out in ({"positions": (0.0, 1.0)}, {"allow_spot_shorts": True}):
        assert job_of(replace(settings, **way_out))._find_checkpoint()[1] is None


def test_a_training_that_began_short_continues_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = untrained(tmp_path)
    saved = Checkpoint.read(path).with_resume()
    settings = Settings(
        **{name: value for name, value in saved.config.items() if name != "allow_spot_shorts"}
    )
    settings = replace(settings, checkpoint_dir=str(path.parent))
    monkeypatch.setattr(logging.getLogger("continuous_training"), "propagate", True)
    progress, found = job_of(settings)._find_checkpoint()
    assert found is not None and (progress.run, progress.epoch) == (1, 2)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "spot pairs" in warning and f"{path} keeps those that it was trained with" in warning
    first, *others = _check_checkpoint(saved, [], settings)
    assert (first.topic, first.level) == ("settings", "warning") and others[-1].level == "OK"
    caplog.clear()
    job_of(replace(settings, allow_spot_shorts=True))._find_checkpoint()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
