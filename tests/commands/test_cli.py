"""The command line: help that reads well on a terminal, and mistakes that end as one line with exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from commands import cli
from commands.cli import application, helps_of
from continuous_training import PRESETS, Settings, train_command
from evaluation.trained_policy import TrainedPolicy
from tests.program import PATIENCE, ROOT, environment

PROGRAM = application(Settings, PRESETS, train_command, "Help.")


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(PROGRAM, [*arguments, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    return result.output


def end_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.run(PROGRAM, arguments)
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def panel_of(option: str, text: str) -> str:
    """Return the title of the panel that shows an option."""
    before = text[: re.search(rf"{option}\b", text).start()]  # type: ignore[union-attr]
    return re.findall(r"╭─ (.+?) ─", before)[-1]


@pytest.mark.parametrize("command", ["train", "check", "evaluate", "signals"])
def test_options_are_grouped_by_the_sections_of_the_settings_and_fit_a_terminal(command: str) -> None:
    text = shown(command)
    titles = re.findall(r"╭─ (.+?) ─", text)
    assert titles[-6:] == ["Data", "Accounts", "Model", "Optimisation", "Runs", "Display"]
    assert panel_of("--help", text) == "Options"
    for option, title in (("--stocks", "Data"), ("--positions", "Accounts"), ("--log-level", "Display")):
        assert panel_of(option, text) == title
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text and "None" not in text


def test_every_option_shows_its_type_and_a_readable_default() -> None:
    words = re.sub(r"[\s│]+", " ", shown("train"))
    for option, kind, default in (
        ("--preset", "<full|small|demo>", "full"),
        ("--envs-per-gpu", "<int>", "512"),
        ("--learning-rate", "<float>", "0.0001"),
        ("--sources", "<str,...>", "polygon, binance, yahoo"),
        ("--stocks", "<str,...>", "AAPL, MSFT, GOOGL and 19 more"),
        ("--positions", "<float,...>", "-1, 0, 1"),
        ("--runs", "<int>", "not set"),
        ("--start-date", "<str>", "not set"),
        ("--precision", "<auto|fp8|bf16|fp32>", "auto"),
        ("--no-dashboard", "<bool>", "on"),
        ("--no-extended-hours", "<bool>", "off"),
    ):
        expected = rf"{option} {re.escape(kind)} [^<]*?\[default: {re.escape(default)}\]"
        assert re.search(expected, words), option


def test_of_a_checkpoint_no_defaults_are_shown_but_those_of_its_training() -> None:
    words = re.sub(r"[\s│]+", " ", shown("signals"))
    assert "Settings that are not given are those of its training." in words
    assert "[default:" not in words
    assert all(f"--{field.name.replace('_', '-')}" in words for field in fields(Settings))


def test_every_setting_has_a_comment_which_is_its_help() -> None:
    helps = helps_of(Settings)
    assert set(helps) == {field.name for field in fields(Settings)}
    assert not any("[" in text for text in helps.values())  # markup, to the terminal
    words = re.sub(
        r"[\s│]+", " ", CliRunner().invoke(PROGRAM, ["train", "--help"], env={"COLUMNS": "300"}).output
    )
    for name, text in helps.items():
        assert f"--{name.replace('_', '-')}" in words
        assert text in words, name


@pytest.mark.parametrize("command", ["train", "walkforward", "signals", "export"])
def test_on_80_columns_every_flag_is_shown_whole(command: str) -> None:
    shown = subprocess.run(
        [sys.executable, "continuous_training.py", command, "--help"],
        cwd=ROOT,
        env=environment(COLUMNS="80"),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=True,
    ).stdout
    assert "\u2026" not in shown and max(map(len, shown.splitlines())) <= 80
    for field in fields(Settings):
        assert f" --{field.name.replace('_', '-')} " in shown, field.name


def test_the_version_is_that_of_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "program_version", lambda: "0123abc-dirty")
    assert end_of(capsys, "--version") == (0, "continuous_training 0123abc-dirty\n", "")
    assert "--version" in shown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --envs_per_gpu 5", "No such option: --envs_per_gpu. Did you mean --envs-per-gpu?"),
        ("--env-per-gpu 5", "No such option: --env-per-gpu. Did you mean --envs-per-gpu?"),
        ("evaluate best.pt --symbol AAPL", "No such option: --symbol. Did you mean --symbols"),
        ("check --frobnicate", "No such option: --frobnicate; see: "),
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("signals", "Missing argument 'CHECKPOINT...'; see: "),
        ("train now", "Got unexpected extra argument"),
        ("selftest --seeds 0", "Invalid setting: --seeds 0 must be a whole number of 1 or more"),
        ("--demo --preset small", "Invalid setting: preset=small cannot go with --demo, which is --preset demo; "),
        ("check --demo --preset full", "Invalid setting: preset=full cannot go with --demo"),
        ("--preset huge", "Invalid setting: preset=huge must be one of: full, small, demo"),
        ("data --epochs many", "Invalid setting: epochs='many' must be a whole number, such as 200"),
        ("--runs some", "Invalid setting: runs='some' must be a whole number, or none"),
        ("--positions long,short", "Invalid setting: positions='long,short' must be a number, such as -1,0,1"),
        ("check --precision fp4", "Invalid setting: precision=fp4 must be one of: auto, fp8, bf16, fp32"),
        ("evaluate best.pt --gamma x", "Invalid setting: gamma='x' must be a number, such as 0.99"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_fix(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    code, out, err = end_of(capsys, *arguments.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(message)


def test_a_mistake_that_the_preflight_finds_names_the_command_that_people_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end_of(capsys, "preflight", "now")[2].endswith(" train --help\n")


def test_without_a_champion_best_names_the_newest_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("signals", "best", "--checkpoint-dir", str(tmp_path))
    code, _, text = end_of(capsys, *words)
    assert (code, text.count("\n")) == (2, 1)
    assert text.endswith("an exam has to prove one better than cash; name a checkpoint\n")
    for name in ("run1_epoch25.pt", "run1_epoch28.pt"):
        (tmp_path / name).touch()
    assert end_of(capsys, *words)[2].endswith(f"name a checkpoint, such as {tmp_path / 'run1_epoch28.pt'}\n")
    (tmp_path / "dethroned.pt").touch()
    assert "lost its title, and there is no champion; name" in end_of(capsys, *words)[2]


def test_demo_and_its_preset_are_the_same() -> None:
    assert cli._preset_name(PRESETS, "demo", True) == cli._preset_name(PRESETS, None, True) == "demo"
    assert cli._preset_name(PRESETS, None, False) == "full"


def test_a_gpu_that_a_training_fills_is_one_line_that_names_the_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "best.pt").touch()

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(TrainedPolicy, "read", fail)
    code, _, text = end_of(capsys, "signals", str(tmp_path / "best.pt"), "--device", "cpu")
    assert (code, text.count("\n")) == (4, 1) and "use --device cpu, or another GPU" in text


@pytest.mark.parametrize(
    "command", ["train", "check", "selftest", "evaluate", "episode", "signals", "export"]
)
def test_every_command_takes_a_device(
    capsys: pytest.CaptureFixture[str], command: str, tmp_path: Path
) -> None:
    (tmp_path / "best.pt").touch()
    words = (
        [command, str(tmp_path / "best.pt")]
        if command in ("evaluate", "episode", "signals", "export")
        else [command]
    )
    code, _, text = end_of(capsys, *words, "--device", "gpu")
    assert (code, text) == (
        2,
        "Invalid setting: device=gpu must be auto, cpu, cuda, or one GPU such as cuda:1\n",
    )


def test_a_command_that_is_wanted_alone_has_the_same_help_and_the_others_are_still_listed() -> None:
    alone = application(Settings, PRESETS, train_command, "Help.", wanted={"signals"})
    for words in (["signals", "--help"], ["--help"]):
        expected, found = (CliRunner().invoke(app, words, env={"COLUMNS": "100"}) for app in (PROGRAM, alone))
        assert found.output == expected.output
    with pytest.raises(SystemExit) as end:
        cli.run(alone, ["signal"])
    assert end.value.code == 2
    assert cli.with_command([]) == cli.with_command(["train"]) == ["train"]
    assert cli.with_command(["--demo"]) == ["train", "--demo"] and cli.with_command(["--help"]) == ["--help"]
