"""What takes long to import is imported by what uses it: people wait for a command to begin."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "polars", "pyarrow", "pandas", "matplotlib", "boto3"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "boto3", "tensorboard", "pandas", "matplotlib"}
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
        (["check", "--offline", "--demo"], COMPILER),
    ],
    ids=["help", "mistake", "check"],
)
def test_a_command_does_without(words: list[str], without: set[str], tmp_path: Path) -> None:
    flags = [f"--{name}-dir={tmp_path}" for name in ("checkpoint", "log", "data")] if len(words) > 1 else []
    command = [sys.executable, "-c", LISTED, *words, *flags]
    errors = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stderr
    loaded = set(errors.partition("loaded ")[2].split())
    assert "commands.cli" in loaded
    assert loaded & without == set()
