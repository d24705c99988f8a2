"""Simulated bars need no library of a vendor, so that a borrowed machine trains without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.program import ROOT, environment, tiny_flags

# The vendors' libraries, what only they need, and what only reports and the calendar of real sessions need.
LIBRARIES = (
    *("boto3", "botocore", "s3transfer", "binance", "yfinance", "curl_cffi", "requests", "isal"),
    *("pandas", "exchange_calendars", "matplotlib", "jinja2"),
)
SITE = f"""
import sys
from importlib.machinery import PathFinder
class WithoutThem:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {LIBRARIES!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThem
"""


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_demo_trains_where_the_vendors_libraries_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    flags = ["--demo", *tiny_flags(tmp_path, runs=1, epochs=1, holdout_days=1)]
    arguments = json.dumps(["train", *flags])
    code = f"import sys; sys.argv[1:] = {arguments}; from continuous_training import main; main()"
    own = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    missing = run([sys.executable, "-c", "import boto3"], own)
    assert missing[0] == 1 and "No module named 'boto3'" in missing[1]
    ended = run([sys.executable, "-c", code], own)
    assert ended[0] == 0, ended[1]
    assert (tmp_path / "checkpoints" / "run1_epoch1.pt").is_file()
