"""The CUDA path without a GPU: it never waits, compiles whole, fits its memory plan, and runs on several ranks.

Skipped where torch is built without CUDA; ``make nullgpu`` installs one that is, and runs these.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.nullgpu.build import build, environment, has_cuda_wheel
from tests.nullgpu.gpu import ROOT

pytestmark = [
    pytest.mark.skipif(
        not has_cuda_wheel() or shutil.which("gcc") is None, reason="needs torch built for CUDA, and gcc"
    ),
    pytest.mark.timeout(1800),
]


def run(*arguments: str, capability: str = "80") -> str:
    """Run Python on a null GPU of this compute capability; return what it printed."""
    command = [sys.executable, *arguments]
    variables = environment(build()) | {"NULLGPU_CAPABILITY": capability}
    ran = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3_000:] + ran.stderr[-3_000:]
    return ran.stdout


def measured(*flags: str, **card: str) -> dict[str, Any]:
    """Train on the null GPU with these settings; see measure.py."""
    found: dict[str, Any] = json.loads(run("-m", "tests.nullgpu.measure", *flags, **card))
    return found


def assert_it_never_waits_and_fits(found: dict[str, Any]) -> None:
    for phase in ("rollout", "update"):
        assert (found[f"{phase}_syncs"], found[f"{phase}_waits"]) == (0, {})
        assert found[f"{phase}_launches"] > 100
    assert found["peak_gib"] == pytest.approx(found["planned_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("change", "capability"), [((), "80"), (("--precision", "fp8"), "90"), (("--optimizer", "muon"), "80")]
)
def test_the_small_preset_never_waits_fits_its_plan_and_resumes(
    change: tuple[str, ...], capability: str
) -> None:
    found = measured("--preset", "small", "--compile", "off", *change, "--resume", capability=capability)
    assert_it_never_waits_and_fits(found)
    assert found["resumes"]


@pytest.mark.slow
def test_compiled_it_is_one_graph_each_and_launches_a_fraction() -> None:
    found = measured("--preset", "small", "--compile", "on")
    assert_it_never_waits_and_fits(found)
    assert found["not_compiled"] == ""
    assert (found["graph_breaks"], found["recompilations"]) == (0, 0)
    assert found["rollout_launches"] < 5_000  # 10,519 when it is not compiled


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rank_0_of_four_never_waits_fits_its_plan_and_resumes(parallel: str, optimizer: str) -> None:
    flags = "--preset", "small", "--compile", "off", "--ranks", "4", "--parallel", parallel, "--resume"
    found = measured(*flags, "--optimizer", optimizer)
    waits = [wait for phase in ("rollout", "update") for wait in found[f"{phase}_waits"]]
    # DDP times its own first ten steps, and every hundredth.
    assert [wait for wait in waits if parallel == "fsdp" or "cudaEventSynchronize learner" not in wait] == []
    assert found["epoch_peak_gib"] == pytest.approx(found["planned_gib"], rel=0.1)
    assert found["resumes"]


def test_what_needs_a_gpu_passes_on_it() -> None:
    folders = ["tests/models", "tests/envs", "tests/training"]
    patient = "--timeout", "1700"  # they compile, on the cores that are there
    summary = run(
        "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *patient, *folders
    ).splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary
