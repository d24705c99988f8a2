"""An invalid setting is one line with the value, the rule and the fix; a valid one is used as typed."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from commands import cli
from continuous_training import PRESETS, Settings, train_command
from tests.program import PATIENCE
from training import validation

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "continuous_training.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_defaults_are_what_was_promised() -> None:
    promised = {
        "envs_per_gpu": 512,
        "batch_size": 65_536,
        "d_model": 2048,
        "num_layers": 12,
        "num_heads": 32,
        "epochs": 200,
        "runs": None,
        "checkpoint_every": 25,
        "min_bars": 2000,
        "history_days": 730,
        "start_date": None,
        "end_date": None,
        "precision": "auto",
        "sources": ("polygon", "binance", "yahoo"),
    }
    settings = asdict(Settings())
    assert {name: settings[name] for name in promised} == promised
    assert len(set(Settings().stocks)) == 22
    assert len(set(Settings().binance_pairs)) >= 20
    assert all(pair.endswith("USDT") for pair in Settings().binance_pairs)
    assert all(re.fullmatch(r"X:[A-Z]+-USD", pair) for pair in Settings().polygon_crypto)
    validation.check_batch(Settings(), 1)
    validation.check_batch(Settings(), 4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_preset_fits_every_usual_number_of_processes(preset: str, world_size: int) -> None:
    validation.check_batch(Settings(**PRESETS[preset]), world_size)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"d_model": 100, "num_heads": 8},
            "d_model=100 must be a multiple of 2 x num_heads = 16, such as 96",
        ),
        ({"start_date": "2026-13-01"}, "start_date=2026-13-01 must be a day such as 2026-01-31"),
        ({"start_date": "2025-02-01", "end_date": "2025-01-01"}, "must not be after end_date=2025-01-01"),
        ({"start_date": "2999-01-01"}, "must not be after today"),
        ({"end_date": "1990-01-01"}, "end_date=1990-01-01 must not be before 2003-01-01"),
        (
            {"sources": ("polygon", "nasdaq")},
            "sources=polygon,nasdaq has nasdaq, which is unknown; use some of",
        ),
        (
            {"sources": ()},
            "must name at least one of: files, polygon, binance, binance_futures, yahoo, simulated",
        ),
        ({"sources": ("simulated", "yahoo")}, "must not mix simulated bars with real ones"),
        ({"episode_bars": 1000}, "episode_bars=1000 must be a multiple of horizon=128, such as 1024"),
        ({"positions": (1.0, 1.0)}, "positions=1.0,1.0 must be two or more different fractions of equity"),
        ({"envs_per_gpu": 0}, "envs_per_gpu=0 must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"gamma": 1.5}, "gamma=1.5 must be 0 or more and below 1"),
        ({"runs": 0}, "runs=0 must be 1 or more, or not set"),
        ({"precision": "fp4"}, "precision=fp4 must be one of: auto, fp8, bf16, fp32"),
        (
            {"precision": "fp8", "d_model": 40, "num_heads": 4},
            "a multiple of 16 for precision=fp8, such as 32",
        ),
        ({"ruin_fraction": 1.0}, "ruin_fraction=1.0 must be 1e-06 or more and below 1"),
        ({"ruin_fraction": 1e-7}, "ruin_fraction=1e-07 must be 1e-06 or more and below 1"),
        ({"positions": (-1.0, 1.0)}, "positions=-1.0,1.0 must have 0 among them"),
        ({"positions": (0.0, float("inf"))}, "positions=0.0,inf must be finite"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan must be finite"),
        ({"crypto_fee_bps": 4_999.0}, "fees and slippage=0.5 must be under 0.5 of the traded value"),
        ({"volume_slippage": 0.6}, "lower crypto_fee_bps, slippage_bps or volume_slippage"),
        ({"borrow_rate": -0.1}, "borrow_rate=-0.1 must be 0 or more"),
        ({"seed": -1}, "seed=-1 must be 0 or more and below 2147483648"),
        ({"seed": 2**31}, "seed=2147483648 must be 0 or more and below 2147483648"),
        ({"history_days": 10**9}, ", the days since 2003-01-01"),
        ({"history_days": 366, "end_date": "2004-01-01"}, "history_days=366 must be at most 365, the days"),
        ({"start_date": "2026-10-01", "end_date": "2026-9-1"}, "must not be after end_date=2026-9-1"),
        ({"holdout_days": -1}, "holdout_days=-1 must be 0 or more"),
        ({"horizon": 0}, "horizon=0 must be 1 or more"),
        ({"stocks": ("top:many",)}, "stocks=top:many must be symbols, or a rule such as top:500"),
        ({"binance_pairs": ("top:5",)}, "binance_pairs=top:5 must be symbols"),
    ],
)
def test_an_invalid_setting_names_the_value_the_rule_and_the_fix(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Settings(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_days_are_compared_as_days_and_not_as_words() -> None:
    assert Settings(start_date="2019-9-1", end_date="2019-10-01").start_date == "2019-9-1"
    assert Settings(start_date="2003-1-1").start_date == "2003-1-1"
    assert Settings(history_days=365, end_date="2004-1-1").history_days == 365


def test_every_float_must_be_finite() -> None:
    for field in fields(Settings):
        if isinstance(field.default, float):
            with pytest.raises(ValueError, match=f"^{field.name}=nan must be finite$"):
                Settings(**{field.name: float("nan")})


def test_a_batch_that_cannot_be_shared_out_names_one_that_can() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=7 must be a multiple of .* 128 x 1 = 128, .*; use 128$"
    ):
        validation.check_batch(Settings(batch_size=7), 1)
    with pytest.raises(
        ValueError, match=r"batch_size=65536 must be a multiple of .* 128 x 3 = 384.*; use 65664$"
    ):
        validation.check_batch(Settings(), 3)
    with pytest.raises(ValueError, match=r"must divide the transitions of an epoch.*= 65536; use 32768$"):
        validation.check_batch(Settings(batch_size=49_152), 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "7", "--demo"],
        ["--d-model", "100", "--demo"],
        ["--start-date", "yesterday", "--demo"],
        ["--sources", "nasdaq", "--demo"],
        ["--preset", "huge"],
        ["--epochs", "many", "--demo"],
    ],
)
def test_wrong_settings_on_the_command_line_exit_2_with_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(cli.application(Settings, PRESETS, train_command, "Help."), arguments)
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("Invalid setting: ") and arguments[1] in line


def test_an_env_file_that_is_no_utf_8_is_one_line_without_its_content(tmp_path: Path) -> None:
    # The program looks for .env beside itself.
    script = shutil.copy(ROOT / "continuous_training.py", tmp_path)
    (tmp_path / ".env").write_text("POLYGON_SECRET_KEY=hush", encoding="utf-16")
    command = [sys.executable, script, "preflight", "--checkpoint-dir", str(tmp_path / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "Invalid setting: .env must be a readable text file in UTF-8: save it as one"
    ]


def test_only_rank_0_prints_and_preflight_counts_the_ranks(tmp_path: Path) -> None:
    folder = ["--checkpoint-dir", str(tmp_path)]
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    quiet = run("train", "--batch-size", "7", *folder, **rank)
    assert (quiet.returncode, quiet.stderr) == (2, "")
    fine = run("preflight", "--preset", "small", *folder, NPROC="2")
    assert (fine.returncode, fine.stdout) == (0, "")
    assert fine.stderr.startswith("Settings are valid; loading PyTorch ...\nTrains on the CPU, ")
    wrong = run("preflight", "--preset", "small", *folder, NPROC="3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(
        "Invalid setting: batch_size=4096 must be a multiple of horizon x processes"
    )


def test_the_demo_ends_by_itself() -> None:
    demo = Settings(**PRESETS["demo"])
    assert (demo.runs, demo.epochs) == (1, 50)


def test_presets_name_settings_only() -> None:
    names = {field.name for field in fields(Settings)}
    assert all(set(preset) <= names for preset in PRESETS.values())


@pytest.mark.parametrize("through_start_script", [False, True])
def test_a_typed_path_starts_where_the_user_is_and_a_constant_in_the_programs_folder(
    tmp_path: Path, through_start_script: bool
) -> None:
    words = ["check", "--offline", "--preset", "small", "--checkpoint-dir", "mine/ck"]
    where: dict[str, Any] = {"cwd": tmp_path, "env": dict(os.environ)}
    if through_start_script:
        where = {"cwd": ROOT, "env": os.environ | {cli.CALLED_FROM: str(tmp_path)}}
    done = subprocess.run(
        [sys.executable, str(ROOT / "continuous_training.py"), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **where,
    )
    assert f"{tmp_path}/mine/ck is writable" in done.stdout, done.stdout + done.stderr
    assert not any(tmp_path.iterdir())  # check leaves nothing, here or there


def test_every_setting_that_is_a_folder_starts_where_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Path("elsewhere").absolute()
    monkeypatch.setattr(cli, "_called_from", str(elsewhere))
    names = [field.name for field in fields(Settings) if field.name.endswith("_dir")] + ["mirror"]
    typed = dict.fromkeys(names, "mine")
    located = cli._parse_given(Settings, get_type_hints(Settings), typed)
    assert len(names) >= 6 and set(located.values()) == {str(elsewhere / "mine")}
    same = {"mirror": "s3://bucket/mine", "data_dir": str(Path("mine").absolute()), "files_dir": "none"}
    parsed = cli._parse_given(Settings, get_type_hints(Settings), same)
    assert parsed == same | {"files_dir": None}
    assert cli._locate(Path("run1_epoch25.pt")) == elsewhere / "run1_epoch25.pt"


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("FILE", "must be a folder: .*bars.csv is a file"),
        ("FILE/below", "must be a folder: .*bars.csv is a file"),
        ("LINK/ck", "must be a folder: .*gone links to .*unmounted, which does not exist"),
        ("x" * 300, "must be a folder: File name too long"),
        ("$NOT_SET/ck", r"names a variable that is not set, \$NOT_SET"),
        ("/data/${NOT_SET}", r"names a variable that is not set, \$\{NOT_SET\}"),
        ("s3://me:word@bucket/ck", r"s3://\.\.\. must be a folder of this machine"),
        ("ck\n", "must have no line breaks"),
    ],
)
def test_what_can_be_no_folder_is_one_line(tmp_path: Path, folder: str, told: str) -> None:
    (tmp_path / "bars.csv").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    folder = folder.replace("FILE", f"{tmp_path}/bars.csv").replace("LINK", f"{tmp_path}/gone")
    for name in ("checkpoint_dir", "report_dir", "files_dir"):
        with pytest.raises(ValueError, match=f"^{name}=.*{told}"):
            Settings(**{name: folder})
    with pytest.raises(ValueError, match="mirror=://"):
        Settings(mirror="://")


def test_a_variable_is_filled_in_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", str(tmp_path))
    for place in ("$DISK", "${DISK}"):
        assert Settings(checkpoint_dir=f"{place}/ck", mirror=f"{place}/m").checkpoint_dir == f"{tmp_path}/ck"
    assert Settings(checkpoint_dir=f"{tmp_path}/C$/a$b").checkpoint_dir == f"{tmp_path}/C$/a$b"
    assert cli.locate("$DISK/ck") == f"{tmp_path}/ck"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    names = [field.name for field in fields(Settings) if field.name.endswith("_dir")]
    settings = Settings(**{name: f"~/{name}" for name in names})
    assert {getattr(settings, name) for name in names} == {str(tmp_path / name) for name in names}
    assert Settings(checkpoint_dir="./~odd").checkpoint_dir == "./~odd"
    for folder in ("~no-such-user/ck", "", " "):
        with pytest.raises(ValueError, match="checkpoint_dir="):
            Settings(checkpoint_dir=folder)
    done = run("episode", "~/none.pt", "--output=~/episode.png", HOME=str(tmp_path))
    assert str(tmp_path / "none.pt") in done.stderr
