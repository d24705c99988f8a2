"""What takes long to import is imported by what uses it: people wait for a command to begin."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "polars", "pyarrow", "pandas", "matplotlib", "boto3"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "boto3", "tensorboard", "pandas", "matplotlib"}
MISTAKES = (
    "train --sources binance",  # new, with shorts
    "train --demo --account group --envs-per-gpu 64 --group-size 64",
    "evaluate x --from 2026-13-01",
    "evaluate x --costs free",
    "evaluate x --against nowhere.pt",
    "signals x --holding BTCUSDT",
    "paper x --minutes 0",
    "paper x --gross much",
    "export x --push name",
    "episode x --start soon",
    "episode x --output nowhere/episode.png",
    "probe --costs 1,-1",
    "selftest --seeds 0",
    "walkforward --to soon",
    "walkforward --jobs two",
    "walkforward --start-from nowhere.pt",
)
LISTED = """
import runpy, sys
sys.argv = ["continuous_training.py", *sys.argv[1:]]
try:
    runpy.run_path("continuous_training.py", run_name="__main__")
finally:
    print("loaded", *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--help"], HEAVY),
        (["train", "--demo", "--epochs", "0"], HEAVY),  # a mistake
        *((words.split(), HEAVY) for words in MISTAKES),
        (["check", "--offline", "--demo"], COMPILER),
    ],
    ids=lambda words: "-".join(words) if isinstance(words, list) else "",
)
def test_a_command_does_without(words: list[str], without: set[str], tmp_path: Path) -> None:
    flags = [f"--{name}-dir={tmp_path}" for name in ("checkpoint", "log", "data")] if len(words) > 1 else []
    command = [sys.executable, "-c", LISTED, *words, *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    errors, _, modules = ended.stderr.partition("loaded ")
    if " ".join(words) in MISTAKES:
        assert (ended.returncode, ended.stdout, errors.count("\n")) == (2, "", 1)
        assert words[0] == "train" or words[-1] in errors or words[-1].split(",")[-1] in errors
    loaded = set(modules.split())
    assert "commands.cli" in loaded
    assert loaded & without == set()
