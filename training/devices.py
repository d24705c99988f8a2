"""What the training computes on: what torch sees, compared with what the driver lists and what is asked for.

``check``, the preflight of a start and every rank ask here, so that none of them trains on something else.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import fp8
from models.policy import BF16_CAPABILITY
from runtime.cores import usable_cores
from runtime.gpus import Driver, hides_gpus, named_gpus, read_driver
from runtime.torch_build import CUDA_12_DRIVER, CUDA_13_DRIVER
from training.setting_types import DEVICE_RULE, DEVICES

if TYPE_CHECKING:
    from continuous_training import Settings

OLDEST = (7, 5)  # Turing: torch for CUDA 13 has kernels from there on
SHM, ENOUGH_SHM = Path("/dev/shm"), 512 * 2**20  # bytes
ON_CPU = "or train on the CPU with --device cpu"
NEEDS_FP8 = "needs NVIDIA GPUs of compute capability 8.9 (Ada, Hopper) or newer"
USE_AUTO = "use --precision auto"


class DeviceError(ValueError):
    """The GPUs that were asked for, or are built in, cannot be used; the text names the fix."""


@dataclass(frozen=True)
class SeenGpu:
    """A GPU as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_total: int  # bytes


@dataclass(frozen=True)
class Devices:
    """What this machine trains on: one rank per GPU, or ``num_ranks`` ranks on the CPU where ``gpus`` is empty."""

    num_ranks: int
    gpus: tuple[SeenGpu, ...] = ()
    text: str = ""  # for people: on what, and why
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Torch's word for it: cuda or cpu."""
        return "cuda" if self.gpus else "cpu"

    @property
    def capability(self) -> tuple[int, int] | None:
        """The lowest compute capability of the GPUs: all ranks compute alike."""
        return min((gpu.capability for gpu in self.gpus), default=None)


def find(settings: Settings, environment: Mapping[str, str]) -> Devices:
    """Decide what this machine's ranks compute on.

    Args:
        settings: ``device`` and ``precision``.
        environment: NPROC and CUDA_VISIBLE_DEVICES, as this process has them.

    Raises:
        DeviceError: fewer GPUs can be used than are asked for or built in.
    """
    wanted, text = settings.device, environment.get("NPROC", "").strip()
    asked = int(text) if text.isdigit() else None  # Launch has checked it
    if wanted == "cpu" or (wanted == "auto" and hides_gpus(environment)):
        return _on_cpu(
            settings.precision, asked, f"for {'--device cpu' if wanted == 'cpu' else 'CUDA_VISIBLE_DEVICES'}"
        )
    driver = read_driver()
    seen = _seen_gpus()
    named = named_gpus(environment)
    expected = driver.num_gpus if named is None else len(named)
    if driver.num_instances or any(name.startswith("MIG-") for name in named or ()):
        expected = min(expected, 1)  # CUDA gives a process one slice
    if wanted == "auto" and not seen and not expected and not driver.fault:
        return _on_cpu(settings.precision, asked, _why_no_gpu(driver))
    if not seen or len(seen) < expected:
        raise DeviceError(_why_fewer(driver, named, expected, len(seen)))
    gpus = _chosen(wanted, asked, seen)
    for gpu in gpus:
        _check_gpu(gpu, settings.precision)
    names = sorted({gpu.name for gpu in gpus})
    count = "one slice (MIG) of" if driver.num_instances else f"{len(gpus)} x"
    text = f"on {count} {', '.join(names)}, driver {driver.version or 'unknown'}, torch for {_platform()}"
    shortages = list(_shortages(len(gpus), True))
    if settings.compile != "off" and (missing := missing_tools("cuda")):
        shortages.append(f"{missing}; training runs without the compiler, and slower")
    return Devices(len(gpus), gpus, text, tuple(shortages))


def of_rank(wanted: str, local_rank: int) -> torch.device:
    """Return the device of one rank. ``find`` has compared them before.

    Raises:
        DeviceError: the GPU is not there, or this is no device.
    """
    if not DEVICES.fullmatch(wanted):
        raise DeviceError(f"device={wanted} {DEVICE_RULE}")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or local_rank)
    if wanted != "auto" and index >= torch.cuda.device_count():
        raise DeviceError(f"device={wanted}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return torch.device("cuda", index)


def missing_tools(kind: str) -> str:
    """Return what torch's compiler lacks on this machine, with the fix; "" if nothing.

    Args:
        kind: cuda, where Triton needs a C compiler and Python's headers for each kernel's launcher, or cpu, where
            Inductor says itself what it lacks.
    """
    if kind != "cuda" or sys.platform != "linux":
        return ""
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
        return "there is no C compiler: install gcc, as with `apt install gcc`"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return (
            f"{headers} has no Python.h: install Python's headers, as with `apt install python{version}-dev`"
        )
    return ""


def _on_cpu(precision: str, asked: int | None, reason: str) -> Devices:
    if precision == "fp8":
        raise DeviceError(f"precision=fp8 {NEEDS_FP8}, and training is on the CPU, {reason}: {USE_AUTO}")
    ranks = asked or 1
    text = f"on the CPU, {reason}; {usable_cores()} cores"
    return Devices(ranks, text=text, warnings=tuple(_shortages(ranks, False)))


def _seen_gpus() -> list[SeenGpu]:
    with warnings.catch_warnings():  # such as a driver that is too old: _why_fewer says it in one line
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        SeenGpu(index, gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for index, gpu in enumerate(gpus)
    ]


def _chosen(wanted: str, asked: int | None, seen: list[SeenGpu]) -> tuple[SeenGpu, ...]:
    """Return the GPUs of the ranks."""
    if ":" in wanted:
        index = int(wanted.partition(":")[2])
        if index >= len(seen):
            raise DeviceError(f"device={wanted}: torch sees {len(seen)} GPUs, counted from 0; {ON_CPU}")
        if asked not in (None, 1):
            raise DeviceError(f"NPROC={asked} needs as many GPUs, and device={wanted} is one: leave one out")
        return (seen[index],)
    if asked and asked > len(seen):
        raise DeviceError(
            f"NPROC={asked} needs as many GPUs, and torch sees {len(seen)}: set NPROC={len(seen)}, {ON_CPU}"
        )
    return tuple(seen[: asked or len(seen)])


def _check_gpu(gpu: SeenGpu, precision: str) -> None:
    named = f"GPU {gpu.index}, {gpu.name}, has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if precision == "fp8" and not fp8.has_kernels(gpu.capability):
        raise DeviceError(f"precision=fp8 {NEEDS_FP8}, and {named}: {USE_AUTO}")
    if torch.version.hip:
        return
    if gpu.capability < OLDEST:
        raise DeviceError(
            f"{named}, and training needs {OLDEST[0]}.{OLDEST[1]} (Turing) or newer: leave it out with "
            f"CUDA_VISIBLE_DEVICES, {ON_CPU}"
        )
    if not _has_kernels(gpu.capability, torch.cuda.get_arch_list()):
        raise DeviceError(
            f"{named}, and this torch {torch.__version__} has no kernels for it: update the driver to 580 or "
            f"newer and start again, {ON_CPU}"
        )
    if precision == "bf16" and gpu.capability < BF16_CAPABILITY:
        raise DeviceError(f"precision=bf16: {named}, and computes bf16 from 8.0 (Ampere) on: {USE_AUTO}")


def _has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Return whether kernels exist: of the same major version and at most its minor, or PTX of any older one."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("abcdef")
        if not digits.isdigit():
            continue
        version = int(digits[:-1]), int(digits[-1])
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return not built_for


def _why_no_gpu(driver: Driver) -> str:
    if driver.version:
        return (
            f"as this container has no GPU, though driver {driver.version} is loaded (docker run --gpus all)"
        )
    return "as there is no NVIDIA GPU"


def _why_fewer(driver: Driver, named: list[str] | None, expected: int, seen: int) -> str:
    if driver.fault:
        return f"NVIDIA's driver fails: {driver.fault}: restart the machine or reinstall the driver, {ON_CPU}"
    if not expected and not torch.version.hip:
        return f"device=cuda needs a GPU, {_why_no_gpu(driver)}: look with `nvidia-smi`, {ON_CPU}"
    if not torch.version.cuda and not torch.version.hip:
        return (
            f"the driver lists {driver.num_gpus} GPUs, but this torch {torch.__version__} was built without "
            f"CUDA: start with START_CONTINUOUS.sh, which installs the right one, {ON_CPU}"
        )
    if driver.major and torch.version.cuda and driver.major < _driver_needed(torch.version.cuda):
        return (
            f"the driver lists {driver.num_gpus} GPUs, but its version {driver.version} is too old for torch "
            f"for CUDA {torch.version.cuda}, which needs {_driver_needed(torch.version.cuda)}: update it, or "
            f"start with START_CONTINUOUS.sh, which installs a torch that it runs, {ON_CPU}"
        )
    if named is not None:
        twice = " and names one twice" if len(set(named)) < len(named) else ""
        return (
            f"CUDA_VISIBLE_DEVICES={','.join(named)} names {expected} GPUs{twice}, and torch sees {seen} of "
            f"them: name GPUs that `nvidia-smi -L` lists ({driver.num_gpus}), {ON_CPU}"
        )
    return (
        f"the driver lists {expected} GPUs, and torch sees {seen}: look for the missing one with `nvidia-smi`, "
        f"name those to use in CUDA_VISIBLE_DEVICES, {ON_CPU}"
    )


def _driver_needed(cuda: str) -> int:
    return CUDA_13_DRIVER if int(cuda.partition(".")[0]) >= 13 else CUDA_12_DRIVER


def _platform() -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _shortages(num_ranks: int, on_gpus: bool) -> list[str]:
    """Return what this machine has too little of for so many ranks."""
    found = []
    cores = usable_cores()
    if num_ranks > cores:
        kind = "GPUs" if on_gpus else "processes"
        found.append(f"{num_ranks} {kind} share {cores} cores: allow this container more, or lower NPROC")
    if on_gpus and num_ranks > 1 and sys.platform == "linux":
        size = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
        if size < ENOUGH_SHM:
            found.append(
                f"{SHM} has {size / 2**20:.0f} MiB, and NCCL may need 1 GiB between GPUs: "
                "docker run --shm-size 1g, or --ipc host"
            )
    return found
