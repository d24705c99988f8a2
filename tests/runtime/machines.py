"""Machines with GPUs, as far as a tool in the PATH and files under /proc make one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import gpus

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  -L) {listing} ;;
  *driver_version*) echo {version} ;;
  *compute_cap*) echo {capability} ;;
esac
"""


def add_nvidia_smi(folder: Path, version: str, count: int = 1, capability: str = "8.0", mig: int = 0) -> None:
    """Write an nvidia-smi that lists GPUs, each with ``mig`` slices."""
    lines = []
    for index in range(count):
        lines.append(f"GPU {index}: NVIDIA A100 (UUID: GPU-{index})")
        lines += [f"  MIG 1g.5gb     Device  {number}: (UUID: MIG-{index}{number})" for number in range(mig)]
    listing = "; ".join(f"echo '{line}'" for line in lines)
    write_tool(folder, NVIDIA_SMI.format(listing=listing or "true", version=version, capability=capability))


def write_tool(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "nvidia-smi"
    tool.write_text(text)
    tool.chmod(0o755)


def use_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process see no GPUs but those of ``folder``, whose files take the place of /proc and /dev."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(gpus, "OTHER_PLACES", ())
    for name in ("PROC", "DEVICES", "PCI"):
        monkeypatch.setattr(gpus, name, folder / name.lower())


def load_driver(folder: Path, version: str, count: int) -> None:
    """Write the files of a loaded driver with ``count`` device nodes."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (root@host)\n"
    (folder / "proc" / "version").write_text(line + "GCC version:  gcc version 12.3.0 (Ubuntu)\n")
    (folder / "devices").mkdir(exist_ok=True)
    for name in ("nvidiactl", *(f"nvidia{index}" for index in range(count))):
        (folder / "devices" / name).touch()
