"""What is exported is what was trained, comes back to the last bit, and is refused where anything is off."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from commands import export
from continuous_training import Settings
from data_sources import frames
from data_sources.bars import COLUMNS, Bars, bars_of_frame
from envs import features
from evaluation.trained_policy import Actor, TrainedPolicy
from models import load_policy
from models.exported import ExportError
from runtime.files import sha256_of
from tests.envs.markets import walk
from tests.program import PATIENCE, ROOT, environment, is_same
from tests.training.checkpoints import untrained
from training import acting


@pytest.fixture
def trained(tmp_path: Path) -> TrainedPolicy:
    return TrainedPolicy.read(untrained(tmp_path, feature_encoding="piecewise"), Settings)


@pytest.fixture
def exported(trained: TrainedPolicy, tmp_path: Path) -> Path:
    return export.command(trained, tmp_path / "out", False, print)


def frame_of(bars: Bars) -> pd.DataFrame:
    columns = {name: getattr(bars, name) for name in COLUMNS}
    return pd.DataFrame(columns | {"open_time": pd.to_datetime(bars.open_time, utc=True)})


def test_the_policy_comes_back_to_the_last_bit_with_all_that_is_known_of_it(
    trained: TrainedPolicy, exported: Path, tmp_path: Path
) -> None:
    policy = load_policy(exported)
    assert not policy.training
    assert is_same(dict(policy.state_dict()), dict(trained.policy.state_dict()))
    assert is_same(dict(load_policy(str(exported)).state_dict()), dict(policy.state_dict()))
    text = (exported / "card.json").read_text()
    card = json.loads(text)
    assert (card["checkpoint"], card["run"], card["epoch"]) == ("run1_epoch2.pt", 1, 2)
    assert card["symbols"] == ["BTCUSDT", "ETHUSDT"]
    assert card["data"] == {"fingerprint": "0123456789abcdef", "cutoff": "2026-11-20T12:00:31+00:00"}
    assert card["exam"] == {"exam/return_percent": 1.5}
    assert card["settings"]["binance_pairs"] == ["BTCUSDT", "ETHUSDT"]
    assert str(tmp_path) not in text  # a machine's folders are private
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "card.json", "example.py", "model.safetensors",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    actor = Actor.with_card(policy, exported)
    bars = [walk("AAA", 300)]
    assert actor.decide(bars) == trained.actor.decide(bars)


def test_the_example_acts_on_a_frame_of_bars(trained: TrainedPolicy, exported: Path, tmp_path: Path) -> None:
    bars = walk("BTCUSDT", 300)
    frame_of(bars).to_csv(tmp_path / "bars.csv", index=False)
    command = [sys.executable, str(exported / "example.py"), str(tmp_path / "bars.csv"), "BTCUSDT", "crypto"]
    shown = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert shown.returncode == 0, shown.stderr
    ((decision,), _) = trained.actor.decide([bars])
    target, probability = decision.when_holding(0.0)
    expected = f"BTCUSDT: {target:+g} of equity from the next open on, probability {probability:.3f}\n"
    assert (shown.stdout, shown.stderr) == (expected, "")
    assert len((exported / "example.py").read_text().splitlines()) <= 27


def test_examples_exported_before_find_what_they_import() -> None:
    assert acting.Actor is Actor and frames.bars_of_frame is bars_of_frame


def test_a_frame_is_taken_as_bars_or_refused_in_a_line() -> None:
    bars = walk("AAA", 50)
    frame = frame_of(bars)
    numbers = frame.assign(open_time=bars.open_time)
    text = frame.assign(open_time=frame["open_time"].dt.strftime("%Y-%m-%d %H:%M:%S"))
    for table in (frame, numbers, text):
        taken = bars_of_frame(table, "AAA", "crypto")
        assert all(getattr(taken, name).flags.writeable for name in COLUMNS)
        assert all(np.array_equal(getattr(taken, name), getattr(bars, name)) for name in COLUMNS)
    for wrong, message in (
        (frame.drop(columns="volume"), "AAA: the frame must have open_time, .*; volume missing"),
        (frame[::-1], "AAA: open_time strictly ascending is broken at bar 0"),
        (frame.assign(close=-1.0), "AAA: close finite and above zero is broken at bar 0 of 50"),
        (frame.assign(close="much"), "AAA: close must be numbers"),
        (frame.assign(open_time="soon"), "AAA: open_time must be times"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            bars_of_frame(wrong, "AAA", "crypto")
    with pytest.raises(ValueError, match="AAA: asset_class must be crypto, perpetual or stock, was bond"):
        bars_of_frame(frame, "AAA", "bond")  # type: ignore[arg-type]


def test_graphs_compute_what_the_policy_does(trained: TrainedPolicy, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = export.command(trained, tmp_path / "graphs", True, lines.append)
    assert {"policy.pt2", "policy.onnx"} < {path.name for path in folder.iterdir()}
    assert [line.split(" by ")[0] for line in lines] == [
        "policy.pt2 differs from the checkpoint", "policy.onnx differs from the checkpoint",
    ]  # fmt: skip
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    bars, accounts = torch.randn(5, 7, 24), torch.randn(5, 1, 9)
    logits, value = session.run(None, {"bars": bars.numpy(), "accounts": accounts.numpy()})
    with torch.no_grad():
        expected = trained.policy(bars, accounts)
    assert float(expected[0].abs().max()) > 0.1  # something was computed
    for mine, theirs in zip(expected, (logits, value), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-5)


def test_a_graph_that_computes_something_else_is_refused_and_leaves_nothing(
    trained: TrainedPolicy, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = (exported / "card.json").read_text()
    compare = export._largest_difference
    monkeypatch.setattr(export, "_largest_difference", lambda policy, run: compare(policy, run) + 0.01)
    with pytest.raises(ValueError, match=r"^policy.pt2 differs from the checkpoint by 0.01, more than 0.001"):
        export.command(trained, exported, True, print)
    with pytest.raises(ValueError, match=r"^policy.pt2 differs from the checkpoint"):
        export.command(trained, tmp_path / "a" / "b", True, print)
    assert (exported / "card.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "checkpoints"}


def test_an_export_replaces_an_export_and_nothing_else(trained: TrainedPolicy, exported: Path) -> None:
    (exported / "old").touch()
    export.command(trained, exported, False, print)
    assert not (exported / "old").exists()
    (exported.parent / "mine").mkdir()
    (exported.parent / "mine" / "diary.txt").touch()
    for name in ("mine", "mine/diary.txt"):
        with pytest.raises(ValueError, match="exists and is not an export: choose another with --output"):
            export.command(trained, exported.parent / name, False, print)
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        export.command(trained, exported.parent / "mine" / "diary.txt" / "more", False, print)


def test_what_is_damaged_or_of_another_program_is_refused_in_a_line(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, weights = exported / "card.json", exported / "model.safetensors"
    good, tensors = card.read_text(), weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ExportError, match=message) as error:
            Actor.with_card(load_policy(exported), exported)
        assert "\n" not in str(error.value)
        card.write_text(good)
        weights.write_bytes(tensors)

    weights.write_bytes(tensors[:-10])
    refused("model.safetensors is damaged: its SHA-256 is not the card's")
    # A file that would run code when unpickled, with a card that agrees: it is not unpickled.
    weights.write_bytes(pickle.dumps({"trunk": 1}))
    card.write_text(good.replace(json.loads(good)["weights_sha256"], sha256_of(weights)))
    refused("model.safetensors is of another network than its card says")
    card.write_text(good.replace('"d_model": 32', '"d_model": 64'))
    refused("model.safetensors is of another network than its card says")
    card.write_text(good[:100])
    refused("card.json is damaged: it is not JSON")
    card.write_text(good.replace('"format": 1', '"format": 9'))
    refused("card.json has format 9, this program reads 1")
    card.unlink()
    refused("card.json cannot be read: No such file or directory")
    with monkeypatch.context() as patch:
        patch.setitem(features.FEATURES, "jump", lambda history: history.log_return(3) * 1e3)
        refused("was trained with another version of these features: jump; use the program that exported it")
        patch.setitem(features.FEATURES, "moon", lambda history: history.log_return(2))
        refused("was trained on other features than this program computes: moon")
    assert Actor.with_card(load_policy(exported), exported)
