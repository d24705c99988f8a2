"""What the shell, a notebook or another program left in the environment, and libraries would act upon.

Settings of this program are its constants, flags and .env. Proxies, certificates, devices and threads are those
of the machine, and stay. Standard library only.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping

# Read by libraries, and meant for other programs.
FOREIGN = (
    "MPLBACKEND",  # a notebook's, which is not installed here
    "MATPLOTLIBRC",
    "PROMETHEUS_MULTIPROC_DIR",
    "prometheus_multiproc_dir",
    "PYTHON_DOTENV_DISABLED",
    "PYTHONINSPECT",  # waits for input where the program should end
)
# AWS: Polygon's S3 is not Amazon's. PET: torchrun's own options, as Kubeflow sets them. GIT: within a hook.
FOREIGN_PREFIXES = ("AWS_", "BOTO_", "PET_", "GIT_")
KEPT = ("AWS_CA_BUNDLE",)


def shut_out(environment: MutableMapping[str, str]) -> None:
    """Remove what was meant for other programs from an environment; requests reads no netrc with it."""
    for name in list(environment):
        if (name in FOREIGN or name.startswith(FOREIGN_PREFIXES)) and name not in KEPT:
            del environment[name]
    environment["NETRC"] = os.devnull
    if "error" in environment.get("PYTHONWARNINGS", ""):
        del environment["PYTHONWARNINGS"]


def prepare_process() -> None:
    """Keep the surroundings out of this process and its children; call it before libraries are imported."""
    if "error" in os.environ.get("PYTHONWARNINGS", ""):  # a library's warning is no crash
        warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error"]  # type: ignore[index]
    shut_out(os.environ)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):  # an encoding that lacks a character
            stream.reconfigure(errors="backslashreplace")
