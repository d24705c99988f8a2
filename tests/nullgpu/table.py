"""Print the null GPU's table: each preset, eager and compiled, alone and as rank 0 of four.

python -m tests.nullgpu.table                   # the small preset, some minutes
python -m tests.nullgpu.table full              # the full one: an hour of compiling on two cores
python -m tests.nullgpu.table full eager fp8    # some of its columns
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.nullgpu.build import build, environment
from tests.nullgpu.gpu import ROOT

EAGER, COMPILED = ("--compile", "off"), ("--compile", "on")
MUON = ("--optimizer", "muon")
DDP, FSDP = ("--ranks", "4"), ("--ranks", "4", "--parallel", "fsdp")
CASES = {
    "eager": EAGER,
    "compiled": COMPILED,
    "DDP": (*EAGER, *DDP),
    "DDP, compiled": (*COMPILED, *DDP),
    "FSDP": (*EAGER, *FSDP),
    "FSDP, compiled": (*COMPILED, *FSDP),
    "Muon": (*EAGER, *MUON),
    "Muon, DDP": (*EAGER, *MUON, *DDP),
    "Muon, FSDP": (*EAGER, *MUON, *FSDP),
    "fp8": (*EAGER, "--precision", "fp8"),
    "fp8, compiled": (*COMPILED, "--precision", "fp8"),
}
ROWS = {
    "launches of a rollout": "rollout_launches",
    "launches of an update": "update_launches",
    "host syncs of a rollout": "rollout_syncs",
    "host syncs of an update": "update_syncs",
    "host syncs of the metrics": "metrics_syncs",
    "segments of a micro-batch": "micro_batch_segments",
    "planned GiB": "planned_gib",
    "peak GiB of an epoch": "epoch_peak_gib",
    "peak GiB of the dry run": "preparation_peak_gib",
    "peak GiB of an exam": "exam_peak_gib",
    "graph breaks": "graph_breaks",
    "recompilations": "recompilations",
    "seconds to prepare (compile)": "prepared_seconds",
    "launches of an exam's segment": "exam_segment_launches",
    "resumes as it was": "resumes",
}


def main(preset: str = "small", *cases: str) -> None:
    """Run each case, or those that are named, in a process of its own."""
    found = {name: measured(preset, CASES[name]) for name in cases or CASES}
    lines = [["", *found], ["---"] * (len(found) + 1)]
    lines += ([label, *(shown(case.get(key)) for case in found.values())] for label, key in ROWS.items())
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))


def measured(preset: str, flags: Sequence[str]) -> dict[str, Any]:
    """Measure one case on an A100 or, as that has no kernels for fp8, an H100."""
    variables = environment(build()) | ({"NULLGPU_CAPABILITY": "90"} if "fp8" in flags else {})
    command = [sys.executable, "-m", "tests.nullgpu.measure", "--preset", preset, *flags]
    if preset != "full":  # whose second trainer takes more than 20 GB of the host's memory
        command.append("--resume")
    ran = subprocess.run(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def shown(value: float | bool | None) -> str:
    """Return the text of a cell, empty for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
