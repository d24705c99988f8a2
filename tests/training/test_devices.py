"""What a start computes on: all GPUs that torch sees, or an error that names the fix; never less in silence."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from continuous_training import PRESETS, Settings
from tests.program import PATIENCE, ROOT, Start, environment, tiny_flags
from tests.runtime.machines import add_nvidia_smi, load_driver, use_only, write_tool
from training import devices
from training.devices import DeviceError, find, missing_tools

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for nvidia-smi")

SMALL = Settings(**PRESETS["small"])
A100, T4, V100, B200 = ("A100", (8, 0)), ("T4", (7, 5)), ("V100", (7, 0)), ("B200", (10, 0))
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
Gpu = tuple[str, tuple[int, int]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_only(monkeypatch, tmp_path)
    monkeypatch.setattr(devices, "usable_cores", lambda: 16)
    monkeypatch.setattr(devices, "ENOUGH_SHM", 0)
    return tmp_path


@pytest.fixture
def torch_sees(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def see(*gpus: Gpu, cuda: str | None = "13.0", built_for: list[str] = CUDA_13) -> None:
        def properties(index: int) -> SimpleNamespace:
            name, (major, minor) = gpus[index]
            return SimpleNamespace(name=name, major=major, minor=minor, total_memory=40 * 2**30)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    see()
    return see


def test_one_rank_for_each_gpu_and_one_line_for_all(here: Path, torch_sees: Any) -> None:
    add_nvidia_smi(here, "580.65.06", count=4)
    torch_sees(*[A100] * 4)
    found = find(SMALL, {})
    assert (found.num_ranks, found.kind, found.capability) == (4, "cuda", (8, 0))
    assert found.text == "on 4 x A100, driver 580.65.06, torch for CUDA 13.0"
    assert find(SMALL, {"NPROC": "2"}).num_ranks == 2
    one = find(replace(SMALL, device="cuda:3"), {})
    assert (one.num_ranks, one.gpus[0].index) == (1, 3)


def test_gpus_without_nvidias_tool_are_all_used(here: Path, torch_sees: Any) -> None:
    torch_sees(A100, A100)
    assert find(SMALL, {}).num_ranks == 2


def test_no_gpu_is_no_error_unless_one_is_asked_for(here: Path, torch_sees: Any) -> None:
    found = find(SMALL, {"NPROC": "2"})
    assert (found.num_ranks, found.kind) == (2, "cpu")
    assert found.text == "on the CPU, as there is no NVIDIA GPU; 16 cores"
    cuda = replace(SMALL, device="cuda")
    with pytest.raises(DeviceError, match=r"needs a GPU, as there is no NVIDIA GPU: .* with --device cpu"):
        find(cuda, {})
    load_driver(here, "580.65.06", count=0)
    with pytest.raises(DeviceError, match=r"as this container has no GPU, .*docker run --gpus all"):
        find(cuda, {})
    assert "as this container has no GPU, though driver 580.65.06 is loaded" in find(SMALL, {}).text


@pytest.mark.parametrize(
    ("device", "visible"),
    [("cpu", None), ("cpu", "0,9"), ("auto", ""), ("auto", "-1"), ("auto", "NoDevFiles")],
)
def test_the_cpu_is_used_in_silence_only_where_it_is_asked_for(
    here: Path, torch_sees: Any, device: str, visible: str | None
) -> None:
    add_nvidia_smi(here, "535.183.01", count=4)
    found = find(replace(SMALL, device=device), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert (found.num_ranks, found.kind) == (1, "cpu")


@pytest.mark.parametrize(
    ("gpus", "variables", "cuda", "expected"),
    [
        ([], {}, "13.0", "its version 535.183.01 is too old for torch for CUDA 13.0, which needs 580"),
        ([], {}, None, "was built without CUDA: start with START_CONTINUOUS.sh, which installs the right one"),
        ([A100] * 3, {}, "12.6", "the driver lists 4 GPUs, and torch sees 3"),
        ([A100], {"CUDA_VISIBLE_DEVICES": "0,9"}, "12.6", "DEVICES=0,9 names 2 GPUs, and torch sees 1"),
        ([], {"CUDA_VISIBLE_DEVICES": "1,1"}, "12.6", "names 2 GPUs and names one twice"),
        ([], {"CUDA_VISIBLE_DEVICES": "all"}, "12.6", "names 1 GPUs, and torch sees 0"),
        ([A100] * 4, {"NPROC": "8"}, "12.6", "NPROC=8 needs as many GPUs, and torch sees 4: set NPROC=4"),
    ],
)  # fmt: skip
def test_fewer_gpus_than_planned_are_an_error_with_its_fix(
    here: Path, torch_sees: Any, gpus: list[Gpu], variables: dict[str, str], cuda: str | None, expected: str
) -> None:
    add_nvidia_smi(here, "535.183.01", count=4)
    torch_sees(*gpus, cuda=cuda)
    with pytest.raises(DeviceError) as raised:
        find(SMALL, variables)
    assert expected in str(raised.value) and str(raised.value).endswith("--device cpu")


def test_a_driver_that_fails_is_an_error(here: Path, torch_sees: Any) -> None:
    write_tool(
        here, "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n"
    )
    load_driver(here, "535.183.01", count=1)
    with pytest.raises(DeviceError, match="version mismatch: restart the machine or reinstall the driver"):
        find(SMALL, {})


def test_a_gpu_in_mig_mode_is_one_rank(here: Path, torch_sees: Any) -> None:
    add_nvidia_smi(here, "570.86.15", count=2, mig=7)
    torch_sees(A100)
    assert find(SMALL, {}).num_ranks == 1
    found = find(SMALL, {"CUDA_VISIBLE_DEVICES": "MIG-00,MIG-01"})
    assert found.num_ranks == 1 and found.text.startswith("on one slice (MIG) of A100, ")


def test_cards_that_are_too_old_or_too_new_are_refused(here: Path, torch_sees: Any) -> None:
    torch_sees(V100)
    with pytest.raises(DeviceError, match=r"V100, has compute capability 7.0, and training needs 7.5"):
        find(SMALL, {})
    torch_sees(B200, built_for=["sm_80", "sm_90"], cuda="12.6")
    with pytest.raises(DeviceError, match="has no kernels for it: update the driver to 580"):
        find(SMALL, {})
    torch_sees(("RTX 4090", (8, 9)), built_for=["sm_80", "sm_90"], cuda="12.6")
    assert find(SMALL, {}).num_ranks == 1
    torch_sees(T4)
    assert find(SMALL, {}).num_ranks == 1
    with pytest.raises(DeviceError, match="precision=bf16: GPU 0, T4, has compute"):
        find(replace(SMALL, precision="bf16"), {})


def test_fp8_is_refused_without_its_kernels(
    here: Path, torch_sees: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, precision="fp8")
    ends = "the CPU, as there is no NVIDIA GPU: use --precision auto"
    with pytest.raises(
        DeviceError, match=r"precision=fp8 needs NVIDIA GPUs .* or newer, and training is on " + ends
    ):
        find(settings, {})
    torch_sees(A100)
    with pytest.raises(DeviceError, match=r"GPU 0, A100, has compute capability 8.0: use --precision auto"):
        find(settings, {})
    torch_sees(("RTX 4090", (8, 9)))
    assert find(settings, {}).num_ranks == 1
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose capabilities count otherwise
    with pytest.raises(DeviceError, match="needs NVIDIA GPUs"):
        find(settings, {})


def test_what_is_short_is_a_warning(here: Path, torch_sees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sees(*[A100] * 4)
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    monkeypatch.setattr(devices, "ENOUGH_SHM", 2**60)
    few_cores, little_memory = find(SMALL, {}).warnings
    assert few_cores.startswith("4 GPUs share 2 cores") and "--shm-size 1g" in little_memory


def test_a_compiler_that_lacks_a_tool_is_named_with_the_package(
    here: Path, torch_sees: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_sees(A100)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(here))
    (here / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.delenv("CC", raising=False)
    (line,) = find(SMALL, {}).warnings
    assert line.startswith(f"{here} has no Python.h: ") and "-dev`; training runs without" in line
    (here / "Python.h").touch()
    assert find(SMALL, {}).warnings == ()
    (here / "gcc").unlink()
    (line,) = find(SMALL, {}).warnings
    assert line.startswith("there is no C compiler: install gcc")
    assert find(replace(SMALL, compile="off"), {}).warnings == ()
    assert missing_tools("cpu") == ""


def test_a_start_refuses_to_train_on_the_cpu_where_gpus_are_built_in(tmp_path: Path) -> None:
    """The real program: torch for CPUs, beside a driver that lists two GPUs."""
    add_nvidia_smi(tmp_path / "bin", "535.183.01", count=2)
    path = f"{tmp_path / 'bin'}:{environment()['PATH']}"
    words = ["-m", "runtime.supervisor", *tiny_flags(tmp_path, runs=1, epochs=1)]
    start = Start(tmp_path / "out", words, environment(PATH=path, NPROC=""), cwd=ROOT)
    assert start.process.wait(PATIENCE) == 2
    _, line = start.lines  # after that of loading PyTorch
    assert "the driver lists 2 GPUs" in line and line.endswith("or train on the CPU with --device cpu")
