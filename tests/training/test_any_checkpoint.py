"""Whatever a checkpoint's bytes are: a checkpoint or a CheckpointError, in bounded time and memory."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation import ledger
from monitoring.metrics_file import NAME, read_metrics
from tests.data_sources.test_any_bytes import ENTRIES, is_refused_cheaply, json_bytes, mutated
from tests.training.checkpoints import small
from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError, ResumeState

LONG = os.environ.get("DRILL") == "1"
any_bytes = settings(
    max_examples=1_000 if LONG else 25,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    small(folder, 1, 1).save(keep=2)
    return folder / "run1_epoch1.pt"


def read(path: Path) -> None:
    for reads in (Checkpoint.read, ResumeState.read):
        try:
            reads(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


@any_bytes
@given(data=st.data())
def test_mutated_checkpoints(saved: Path, data: st.DataObject) -> None:
    path = saved.with_name("mutated.pt")
    path.write_bytes(data.draw(mutated(saved.read_bytes())))
    read(path)
    found, _ = checkpoint.newest(saved.parent)
    assert found is not None and found.name == saved.name


@any_bytes
@given(data=st.data())
def test_whole_files_with_anything_in_them(saved: Path, data: st.DataObject) -> None:
    contents = torch.load(saved, weights_only=True)
    name = data.draw(st.sampled_from(sorted(contents)))
    path = saved.with_name("strange.pt")
    torch.save(data.draw(st.just(contents | {name: data.draw(ENTRIES)}) | ENTRIES), path)
    try:
        strange = Checkpoint.read(path)
    except CheckpointError:
        return
    assert {field.name for field in fields(strange)}


@any_bytes
@given(st.binary(max_size=60) | ENTRIES.map(lambda entry: pickle.dumps(entry)).flatmap(mutated))
def test_pickles_within_a_whole_zip(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run1_epoch1.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("run1_epoch1/data.pkl", content)
            archive.writestr("run1_epoch1/version", b"3\n")
            archive.writestr("run1_epoch1/byteorder", b"little")
        read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "run1_epoch1.pt"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(16):
            file.write(bytes(1 << 20))
    is_refused_cheaply(lambda: Checkpoint.read(path), CheckpointError)


@any_bytes
@given(json_bytes({"run": 1, "epoch": 2, "data": "d", "transitions": 3}))
def test_the_ledger_of_exams_and_metrics(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ledger.NAME
        good = {"run": 1, "epoch": 1, "data": "d"}
        path.write_bytes(content + b"\n")
        ledger.append(path, good)
        assert ledger.read(path)[-1] == good
        (Path(folder) / NAME).write_bytes(content + b"\n")
        assert isinstance(read_metrics(Path(folder), 10, 10**9), list)
