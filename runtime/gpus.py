"""What NVIDIA's driver says of this machine, without torch: its version, and the GPUs that it lists.

``nvidia-smi`` where it is, else /proc and /dev: a container may have GPUs and no such tool. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/driver/nvidia")
DEVICES = Path("/dev")
PCI = Path("/sys/bus/pci/devices")
VERSION = re.compile(r"\b(\d{3}\.\d+(?:\.\d+)*)\b")
# Where it is though not on the PATH.
OTHER_PLACES = ("/usr/lib/wsl/lib/nvidia-smi", r"C:\Windows\System32\nvidia-smi.exe")
TOOL_SECONDS = 60.0  # without a persistence daemon a driver wakes one GPU after the other


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: "" as version where none is loaded.

    ``num_gpus`` counts what it lists, ``num_instances`` the slices of those in MIG mode; ``fault`` is the tool's
    own word when it fails though there is a card.
    """

    version: str = ""
    num_gpus: int = 0
    num_instances: int = 0
    fault: str = ""

    @property
    def major(self) -> int:
        """Its branch, such as 535."""
        return int(self.version.partition(".")[0] or 0)


def read_driver() -> Driver:
    """Ask nvidia-smi, or look into /proc and /dev where there is none."""
    loaded, tool = _loaded_version(), _find_tool()
    if tool is None:
        nodes = [path for path in DEVICES.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
        return Driver(loaded, len(nodes) if loaded else 0)
    listing, fault = _run(tool, "-L")
    lines = [line.strip() for line in listing.splitlines()]
    count = sum(line.startswith("GPU ") for line in lines)
    if not count:  # an image may have the tool though its machine has no card
        return Driver(loaded, 0, 0, fault if loaded or _has_card() else "")
    version = VERSION.search(_run(tool, "--query-gpu=driver_version", "--format=csv,noheader")[0])
    return Driver(version[1] if version else loaded, count, sum(line.startswith("MIG ") for line in lines))


def read_capabilities() -> list[tuple[int, int]]:
    """Return the compute capability of every GPU; empty where the driver is too old to know."""
    tool = _find_tool()
    listing = _run(tool, "--query-gpu=compute_cap", "--format=csv,noheader")[0] if tool else ""
    found = re.findall(r"^(\d+)\.(\d)\s*$", listing, re.MULTILINE)
    return [(int(major), int(minor)) for major, minor in found]


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES asks for no GPU at all; Slurm's word for that is NoDevFiles."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def named_gpus(environment: Mapping[str, str]) -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names, up to where CUDA stops reading; None where it is not set."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",")]
    return names[: next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))]


def _find_tool() -> str | None:
    return shutil.which("nvidia-smi") or next(filter(os.path.exists, OTHER_PLACES), None)


def _has_card() -> bool:
    """Return whether an NVIDIA display or compute card sits on the PCI bus, with a driver or without."""
    for card in PCI.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((card / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def _loaded_version() -> str:
    try:
        found = VERSION.search((PROC / "version").read_text(errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""


def _run(tool: str, *arguments: str) -> tuple[str, str]:
    """Return what the tool printed, and why it failed."""
    try:
        result = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer for {TOOL_SECONDS:.0f} s"
    except OSError:
        return "", ""
    if result.returncode:
        words = (result.stdout + result.stderr).strip().splitlines() or [f"exit code {result.returncode}"]
        return "", words[0]
    return result.stdout, ""
