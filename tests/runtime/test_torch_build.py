"""Which torch a machine gets, by its driver; the real installation is in tests/test_start_scripts.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import torch_build
from runtime.torch_build import INDEX, TooOldError, choose
from tests.program import ROOT
from tests.runtime.machines import add_nvidia_smi, load_driver, use_only

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a shell script stands in for nvidia-smi")
REQUIRED = "torch==2.13.0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_only(monkeypatch, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("driver", "capability", "linux", "windows"),
    [
        ("525.60.13", "8.0", "torch==2.13.0+cu126 (cu126)", "torch==2.13.0+cu126 (cu126)"),
        ("535.183.01", "8.0", "torch==2.13.0+cu126 (cu126)", "torch==2.13.0+cu126 (cu126)"),
        ("550.54.15", "9.0", "torch==2.13.0+cu126 (cu126)", "torch==2.13.0+cu126 (cu126)"),
        ("570.86.15", "12.0", "torch==2.10.0+cu128 (cu128)", "torch==2.10.0+cu128 (cu128)"),
        ("580.65.06", "12.0", "torch==2.13.0", "torch==2.13.0+cu130 (cu130)"),
        ("615.12", "8.0", "torch==2.13.0", "torch==2.13.0+cu130 (cu130)"),
    ],
)
def test_the_driver_decides(
    here: Path, monkeypatch: pytest.MonkeyPatch, driver: str, capability: str, linux: str, windows: str
) -> None:
    add_nvidia_smi(here, driver, capability=capability)
    assert str(choose(REQUIRED, {})) == linux
    monkeypatch.setattr(torch_build, "WINDOWS", True)
    assert str(choose(REQUIRED, {})) == windows


@pytest.mark.parametrize("driver", ["470.256.02", "515.105.01"])
def test_a_driver_that_no_build_runs_on_is_refused_unless_the_cpu_is_asked_for(
    here: Path, driver: str
) -> None:
    add_nvidia_smi(here, driver)
    with pytest.raises(TooOldError, match=f"driver {driver} is too old: torch==2.13.0 needs 525 or newer"):
        choose(REQUIRED, {})
    for asked in (["--demo", "--device", "cpu"], ["--device=cpu"]):
        assert choose(REQUIRED, {}, asked).backend == "cpu"
    assert choose(REQUIRED, {"CUDA_VISIBLE_DEVICES": ""}).backend == "cpu"


def test_without_a_gpu_the_small_build_is_enough(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = choose(REQUIRED, {})
    assert (str(build), build.fallback, build.needs_gpu) == ("torch==2.13.0+cpu (cpu)", REQUIRED, False)
    load_driver(here, "470.256.02", count=0)  # of a machine whose container was given none
    assert choose(REQUIRED, {}) == build
    monkeypatch.setattr(torch_build, "WINDOWS", True)
    assert str(choose(REQUIRED, {})) == REQUIRED  # PyPI's
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(choose(REQUIRED, {})) == REQUIRED


def test_a_driver_is_found_without_its_tool(here: Path) -> None:
    load_driver(here, "535.183.01", count=2)
    assert choose(REQUIRED, {}).backend == "cu126"


def test_torch_spec_overrides(here: Path) -> None:
    add_nvidia_smi(here, "470.256.02")
    build = choose(REQUIRED, {"TORCH_SPEC": "--index-url https://mirror/rocm7.2 torch==2.12.0"})
    assert (build.requirement, build.options) == ("torch==2.12.0", ("--index-url", "https://mirror/rocm7.2"))


def test_a_build_that_a_newer_driver_runs_too_can_stay_for_a_while(here: Path) -> None:
    add_nvidia_smi(here, "535.183.01")
    older = choose(REQUIRED, {})
    add_nvidia_smi(here, "580.65.06")
    newer = choose(REQUIRED, {})
    assert newer.can_wait(str(older)) and not older.can_wait(str(newer)) and not newer.can_wait(None)


@pytest.mark.parametrize(
    ("driver", "code", "expected"),
    [
        ("", 0, f"+cpu from {INDEX}/cpu, else torch=="),
        ("470.256.02", 2, "NVIDIA's driver 470.256.02 is too old"),
        ("535.183.01", 0, "/cu126, else torch==2.10.0 from PyPI: driver 535.183.01 runs CUDA 12"),
        ("580.65.06", 0, " from PyPI: driver 580.65.06 runs CUDA 13.\n"),
    ],
)
def test_a_dry_run_says_what_a_start_would_install(here: Path, driver: str, code: int, expected: str) -> None:
    if driver:
        add_nvidia_smi(here, driver)
    command = [sys.executable, "-m", "runtime.install", "--dry-run", "requirements_simple.txt"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == code and expected in done.stderr, done.stderr
