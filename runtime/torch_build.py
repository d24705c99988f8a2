"""Which build of torch this machine gets, by its NVIDIA driver. Standard library only.

PyPI's torch 2.13 for Linux is built for CUDA 13, which needs driver 580; its Windows wheel has no CUDA. PyTorch's
own index has the same release built for CUDA 12.6, which any driver from 525 on runs, and for CPUs alone, which is
2.5 GB smaller. Sources: docs.nvidia.com, "CUDA Minor Version Compatibility"; RELEASE.md of pytorch/pytorch, "CUDA
Support Matrix", releases 2.10 and 2.13 (2026-11).
"""

from __future__ import annotations

import itertools
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.gpus import Driver, hides_gpus, read_capabilities, read_driver
from runtime.processes import WINDOWS

INDEX = "https://download.pytorch.org/whl"
CUDA_13_DRIVER = 580
CUDA_12_DRIVER = 525
# Torch of PyPI that is built for CUDA 12.8, for when PyTorch's index cannot be reached.
TORCH_FOR_CUDA_12 = "torch==2.10.0"
BLACKWELL = (10, 0)  # CUDA 12.6 has no kernels for it


class TooOldError(Exception):
    """No build of torch runs on this driver; the text names the fix."""


@dataclass(frozen=True)
class Build:
    """A torch to install: ``requirement``, or where that cannot be had the ``fallback`` of PyPI.

    ``backend`` is the part of PyTorch's index that has it, such as cu126 or cpu; "" for PyPI's own wheel.
    """

    requirement: str
    reason: str  # for people
    backend: str = ""
    fallback: str = ""
    options: tuple[str, ...] = ()  # pip's, from TORCH_SPEC

    def __str__(self) -> str:
        return " ".join([*self.options, self.requirement, *([f"({self.backend})"] if self.backend else [])])

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        if self.options:
            return " ".join(self.options)
        if not self.backend:
            return "PyPI"
        return f"{INDEX}/{self.backend}" + (f", else {self.fallback} from PyPI" if self.fallback else "")

    @property
    def needs_gpu(self) -> bool:
        """Whether a machine without a GPU would do with less."""
        return self.backend != "cpu"

    def can_wait(self, before: str | None) -> bool:
        """Return whether the build ``before`` runs here too: one for CUDA 12 does on drivers for CUDA 13."""
        return before is not None and not self.backend and "(cu12" in before


def choose(required: str, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> Build:
    """Choose the build for this machine.

    Args:
        required: the requirement for torch, such as ``torch==2.13.0``.
        environment: TORCH_SPEC and CUDA_VISIBLE_DEVICES.
        arguments: of the start; ``--device cpu`` needs no GPU.

    Raises:
        TooOldError: the driver is.
    """
    if spec := shlex.split(environment.get("TORCH_SPEC", "")):
        return Build(spec[-1], "TORCH_SPEC asks for it", options=tuple(spec[:-1]))
    if sys.platform == "darwin" or platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return Build(required, "PyPI has one build for this system")
    words = " ".join(arguments).replace("--device=", "--device ").split()
    on_cpu = hides_gpus(environment) or ("--device", "cpu") in itertools.pairwise(words)
    driver = Driver() if on_cpu else read_driver()
    if not driver.num_gpus and not driver.fault:
        if WINDOWS:
            return Build(required, "no GPU: PyPI's wheel for Windows has no CUDA")
        asked = "the CPU is asked for" if on_cpu else "no NVIDIA GPU here"
        return Build(f"{required}+cpu", asked, "cpu", required)
    return _for_driver(required, driver)


def _for_driver(required: str, driver: Driver) -> Build:
    named = f"driver {driver.version or 'of an unknown version'}"
    if not driver.version or driver.major >= CUDA_13_DRIVER:
        if WINDOWS:
            return Build(f"{required}+cu130", f"{named} runs CUDA 13", "cu130", required)
        return Build(required, f"{named} runs CUDA 13")
    if driver.major < CUDA_12_DRIVER:
        raise TooOldError(
            f"NVIDIA's {named} is too old: {required} needs {CUDA_12_DRIVER} or newer (CUDA 12), better "
            f"{CUDA_13_DRIVER} (CUDA 13). Update it, as with `sudo apt install nvidia-driver-580-server` and a "
            "reboot; or train on the CPU with --device cpu"
        )
    reason = f"{named} runs CUDA 12, not 13, which needs {CUDA_13_DRIVER}"
    if max(read_capabilities(), default=(0, 0)) >= BLACKWELL:
        reason = f"{reason}; this GPU needs CUDA 12.8"
        return Build(f"{TORCH_FOR_CUDA_12}+cu128", reason, "cu128", TORCH_FOR_CUDA_12)
    fallback = required if WINDOWS else TORCH_FOR_CUDA_12
    return Build(f"{required}+cu126", reason, "cu126", fallback)
