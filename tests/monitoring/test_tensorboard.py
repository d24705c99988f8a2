"""TensorBoard reads the metrics of metrics.jsonl, each step once, also after a resume."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams

from continuous_training import Settings
from monitoring import exporters, metrics_file
from monitoring.exporters import EventFile, Telemetry
from monitoring.metrics_file import read_metrics
from monitoring.tensorboard_head import COMPARED, LAYOUT
from tests.program import ALONE, ROOT, Start, metrics, tiny_flags
from training.setting_types import recorded


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all scalars of a folder as TensorBoard does: name -> (step, value), in order."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs, the first four of them in a checkpoint; then a start that resumes from it."""
    folder = tmp_path_factory.mktemp("resumed")
    words = [*ALONE, *tiny_flags(folder, runs=1, epochs=5, checkpoint_every=4)]
    Start(folder / "first", words).ends_well()
    for path in folder.glob("checkpoints/**/run1_epoch5.pt"):
        path.unlink()  # as if it had been killed before
    Start(folder / "second", [*ALONE, *tiny_flags(folder, runs=1, epochs=8, checkpoint_every=4)]).ends_well()
    return folder


def test_scalars_are_those_of_the_metrics(resumed: Path) -> None:
    newest = {entry["transitions"]: entry for entry in metrics(resumed)}  # epochs done again count once
    assert len(metrics(resumed)) == 9 and len(newest) == 8
    found = curves(resumed / "logs")
    names = {name for entry in newest.values() for name in entry} - {
        "time",
        "transitions",
        "loss/outlying_symbol",
    }
    assert set(found) == names
    for name, points in found.items():
        expected = [
            (step, entry[name]) for step, entry in sorted(newest.items()) if entry.get(name) is not None
        ]
        assert [step for step, _ in points] == [step for step, _ in expected], name
        np.testing.assert_array_equal([value for _, value in points], np.float32([v for _, v in expected]))


def test_no_step_comes_twice_after_a_resume(resumed: Path) -> None:
    for name, points in curves(resumed / "logs").items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), name


def test_a_rollback_within_one_start_drops_the_steps_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "_file_numbers", itertools.count(9))  # the tenth file sorts last
    events = EventFile(tmp_path)
    for step, value in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 4.0), (30, 5.0)):
        events.write(step, {"reward": value})
    events.close()
    assert curves(tmp_path) == {"reward": [(10, 1.0), (20, 4.0), (30, 5.0)]}


def test_metrics_are_on_disk_at_once(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    events.write(10, {"reward": 1.0})
    assert curves(tmp_path) == {"reward": [(10, 1.0)]}  # not closed: as after kill -9
    events.close()


def test_values_that_are_not_finite_or_not_numbers_have_no_point(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, None)
    figures = {"transitions": 8, "a": math.nan, "b": math.inf, "c": None, "d": "text", "e": 2}
    telemetry.record(figures)
    telemetry.close()
    assert curves(tmp_path) == {"e": [(8, 2.0)]}


def test_a_folder_that_cannot_be_written_is_one_warning_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    telemetry = Telemetry(folder, None)
    for epoch in (1, 2):
        telemetry.record({"epoch": epoch, "transitions": 64 * epoch})
    assert len(caplog.messages) == 2 and all(str(folder) in warning for warning in caplog.messages)
    folder.unlink()
    telemetry.record({"epoch": 3, "transitions": 192})
    telemetry.close()
    assert len(caplog.messages) == 2
    assert curves(folder) == {"epoch": [(192, 3.0)]}
    assert [row["epoch"] for row in read_metrics(folder, 10, 192)] == [3]


def test_a_full_disk_is_one_warning_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(tmp_path, None)
    telemetry.record({"epoch": 1, "transitions": 64})
    events = telemetry._events
    write = events._append

    def full(_: Any) -> None:
        assert events._file is not None
        events._file.write(b"half a record")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events, "_append", full)
    for epoch in (2, 3):
        telemetry.record({"epoch": epoch, "transitions": 64 * epoch})
    monkeypatch.setattr(events, "_append", write)
    telemetry.record({"epoch": 4, "transitions": 256})
    telemetry.close()
    (warning,) = caplog.messages
    assert "TensorBoard" in warning and "No space left" in warning
    assert curves(tmp_path)["epoch"] == [(64, 1.0), (256, 4.0)]


def test_a_resumed_start_reads_the_epochs_before_it(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, None)
    for epoch, transitions in ((1, 64), (2, 128), (3, 192), (2, 128), (3, 192), (4, 256)):
        telemetry.record({"epoch": epoch, "transitions": transitions, "tried": transitions})
    telemetry.close()
    path = tmp_path / metrics_file.NAME
    with path.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 5, "trans\n[1]\n\n')
    assert [row["epoch"] for row in read_metrics(tmp_path, 10, 192)] == [1, 2, 3]
    assert [row["epoch"] for row in read_metrics(tmp_path, 2, 256)] == [3, 4]
    assert read_metrics(tmp_path / "nowhere", 10, 64) == []


def test_settings_and_a_layout_are_there_from_the_start(resumed: Path) -> None:
    """TensorBoard's own plugins read what a start wrote first."""
    events = EventAccumulator(str(resumed / "logs"), size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("settings")[-1].tensor_proto.string_val
    assert b"| epochs | 8 |" in text and b"| sources | simulated |" in text and b"notify" not in text
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    start = hparams.parse_session_start_info_plugin_data(metadata.plugin_data.content)
    assert (
        start.hparams["d_model"].number_value == 16 and start.hparams["sources"].string_value == "simulated"
    )
    (content,) = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    layout = layout_pb2.Layout.FromString(content)
    assert [category.title for category in layout.category] == list(LAYOUT)


def test_the_layout_names_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags} | {*COMPARED}
    assert named <= set(re.findall("`([^`]+)`", text))
    assert any(tag.startswith("exam/") for tag in named)


def test_no_secret_is_in_the_settings_that_are_shown(tmp_path: Path) -> None:
    settings = Settings(notify=("https://user:hunter2@host.example/hunter2",), log_dir=str(tmp_path))
    telemetry = Telemetry(tmp_path, None, recorded(settings))
    telemetry.record({"epoch": 1, "transitions": 64})
    telemetry.close()
    (file,) = tmp_path.glob("events.*")
    assert b"learning_rate" in file.read_bytes() and b"hunter2" not in file.read_bytes()
