"""Checkpoints: complete or absent, damage always detected, nothing executed, old ones pruned by rule."""

import errno
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from continuous_training import Settings
from data_sources.errors import LakeError
from evaluation.trained_policy import TrainedPolicy
from tests.training.checkpoints import small, untrained
from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError

ROOT = Path(__file__).parents[2]


def save(folder: Path, run: int, epoch: int, keep: int = 16) -> Path:
    saved = small(folder, run, epoch)
    saved.save(keep)
    return saved.path


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = save(tmp_path, 1, 10)
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.path, warnings) == (path, [])
    assert found.symbols == ["AAPL"]
    assert torch.equal(found.model["w"], torch.full((1000,), 10.0))
    assert found.resume is not None
    assert found.resume.clock == {"epoch": 10}


def test_an_empty_or_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_emptied(path: Path) -> None:
    path.write_bytes(b"")


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.find(torch.tensor(4.0).numpy().tobytes() * 4) + 1
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_checkpoints_that_the_disk_refuses_are_an_error_and_no_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2):
        small(tmp_path, 1, epoch).save(keep=3)
    opened = zipfile.ZipFile

    def refuse(path: Path) -> zipfile.ZipFile:
        if path.name == "run1_epoch2.pt" or all_of_them:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    all_of_them = False
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None and found.epoch == 1 and "Input/output error; the one before" in warnings[0]
    all_of_them = True
    with pytest.raises(
        CheckpointError, match=r"run1_epoch2\.pt cannot be read: Input/output error, and no other"
    ):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("damage", [damage_truncated, damage_emptied, damage_one_bit])
@pytest.mark.parametrize("which", ["weights", "resume"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: Any, which: str
) -> None:
    older = save(tmp_path, 1, 3)
    newest = save(tmp_path, 1, 4)
    target = newest if which == "weights" else tmp_path / "resume" / newest.name
    damage(target)
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.path == older
    assert len(warnings) == 1
    assert str(target) in warnings[0]
    assert "the one before it is used" in warnings[0]


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1)
    good, chance = path.read_bytes(), random.Random(0)
    for _ in range(40):
        content = bytearray(good)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(content))
        try:
            loaded = Checkpoint.read(path)
        except CheckpointError:
            continue
        # A flip in the zip's padding or dates affects nothing that is loaded.
        assert torch.equal(loaded.model["w"], torch.ones(1000))
        assert (loaded.run, loaded.epoch) == (1, 1)


def test_weights_without_resume_state_are_the_last_resort(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 4)
    (tmp_path / "resume" / path.name).unlink()
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.resume is None
    assert "no resume state left" in warnings[0]


def test_a_checkpoint_from_a_stranger_cannot_run_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    path = tmp_path / "run1_epoch1.pt"
    torch.save({"format": 1, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        Checkpoint.read(path)
    assert not canary.exists()


def test_old_checkpoints_go_but_the_last_of_every_run_stays(tmp_path: Path) -> None:
    for run, epoch in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]:
        save(tmp_path, run, epoch, keep=3)
    names = [path.name for path in checkpoint.existing(tmp_path)]
    assert names == [
        "run3_epoch2.pt",
        "run3_epoch1.pt",
        "run2_epoch3.pt",
        "run1_epoch3.pt",
    ]
    resume = sorted(path.name for path in (tmp_path / "resume").glob("*.pt"))
    assert resume == ["run3_epoch1.pt", "run3_epoch2.pt"]


def test_a_folder_with_the_name_of_a_checkpoint_is_ignored_and_stays(tmp_path: Path) -> None:
    strange = [tmp_path / "run1_epoch0.pt", tmp_path / "resume" / "run0_epoch1.pt"]
    for folder in strange:
        folder.mkdir(parents=True)
    for epoch in (1, 2, 3):
        path = save(tmp_path, 1, epoch, keep=1)
    assert checkpoint.existing(tmp_path) == [path]
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None and (found.path, warnings) == (path, [])
    assert all(folder.is_dir() for folder in strange)


def test_pruning_ignores_files_that_are_already_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path, 1, epoch) for epoch in (1, 2, 3)]
    before = checkpoint.existing(tmp_path)
    paths[0].unlink()
    monkeypatch.setattr(checkpoint, "existing", lambda folder: before)  # listed just before it was removed
    checkpoint.prune(tmp_path, keep=1)
    assert [path.exists() for path in paths] == [False, False, True]


def test_a_folder_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"was not saved: "):
        save(tmp_path / "file", 1, 1)


def test_a_second_daemon_learns_which_process_has_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from training import checkpoint\n"
        f"with checkpoint.exclusive(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(checkpoint.FolderInUse, match=str(holder.pid)), checkpoint.exclusive(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with checkpoint.exclusive(tmp_path):  # the lock ended with its process
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_folder_that_cannot_be_created_is_not_mistaken_for_one_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(CheckpointError, match="checkpoint_dir: cannot write"),
        checkpoint.exclusive(tmp_path / "file"),
    ):
        pass


def test_errors_inside_the_lock_pass_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="of the lake"), checkpoint.exclusive(tmp_path):
        raise LakeError("of the lake")


@pytest.mark.drill
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_acknowledged_checkpoint(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.training.checkpoints import small\n"
        "for epoch in range(1, 10_000):\n"
        f"    small(Path({str(tmp_path)!r}), 1, epoch, 300_000).save(3)\n"
        "    print(epoch, flush=True)"
    )
    acknowledged, chance = 0, random.Random(1)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(chance.random() * 0.3)
        writer.kill()
        rest = writer.communicate()[0].split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        found, warnings = checkpoint.newest(tmp_path)
        assert found is not None
        assert warnings == []
        assert found.resume is not None
        assert found.epoch >= acknowledged
        assert found.resume.clock == {"epoch": found.epoch}
        for path in checkpoint.existing(tmp_path):
            path.unlink()


def test_the_manifest_of_a_checkpoint_is_plain(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2)
    loaded = torch.load(path, weights_only=True)
    del loaded["model"]
    assert list(json.loads(json.dumps(loaded)).items()) == [
        ("format", 1), ("run", 1), ("epoch", 2), ("step", 0), ("transitions", 0), ("model_config", {}),
        ("symbols", ["AAPL"]), ("features", {}), ("config", {}), ("data_fingerprint", "0123456789abcdef"),
        ("data_cutoff_ns", 0), ("trained_until_ns", 0), ("metrics", {}), ("exam", {}),
    ]  # fmt: skip
    assert list(torch.load(tmp_path / "resume" / path.name, weights_only=True)) == [
        "clock",
        "learner",
        "ranks",
    ]


def test_a_file_from_before_exams_still_loads(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2)
    contents = torch.load(path, weights_only=True) | {"data_cutoff_ns": 5}
    for key in ("step", "trained_until_ns", "exam"):
        del contents[key]
    torch.save(contents, path)
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None and found.resume is not None and not warnings
    assert (found.step, found.trained_until_ns, found.exam) == (0, 5, {})


def test_a_newest_checkpoint_with_a_missing_key_is_skipped(tmp_path: Path) -> None:
    older, path = save(tmp_path, 1, 1), save(tmp_path, 1, 2)
    contents = torch.load(path, weights_only=True)
    del contents["symbols"]
    torch.save(contents, path)
    found, warnings = checkpoint.newest(tmp_path)
    assert found is not None and found.path == older
    assert f"{path} is of another version of this program: it has no symbols" in warnings[0]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", " is empty"),
        (b"epochs: 3\n", " is not a checkpoint of this program; one is such as checkpoints/best.pt"),
        (b"\x89PNG\r\n", " is not a checkpoint of this program"),
        (b"PK\x03\x04" + bytes(100), " is damaged, its end is missing"),
    ],
)
def test_a_file_of_another_kind_is_called_that(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "run1_epoch2.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.read(path)
    assert str(error.value).startswith(f"{path}{fault}") and "zip" not in str(error.value)


def test_weights_of_a_program_that_knew_one_encoding_are_used_with_that(tmp_path: Path) -> None:
    path = untrained(tmp_path, feature_encoding="linear")
    contents = torch.load(path, weights_only=True)
    del contents["config"]["feature_encoding"], contents["model_config"]["trunk"]["feature_encoding"]
    torch.save(contents, path)
    settings = Settings(**(contents["config"] | {"feature_encoding": "linear"}))
    saved = Checkpoint.read(path)
    assert saved.mismatch(settings) == ""
    wanted = "feature_encoding=piecewise, but "
    assert saved.mismatch(replace(settings, feature_encoding="piecewise")).startswith(wanted)
    trained = TrainedPolicy.read(path, Settings)
    assert trained.settings.feature_encoding == "linear"
    assert trained.policy.num_parameters() == saved.policy(torch.device("cpu"), "fp32").num_parameters()
    with pytest.raises(ValueError, match="was trained with feature_encoding=linear"):
        TrainedPolicy.read(path, Settings, feature_encoding="piecewise")
