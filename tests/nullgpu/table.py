"""Print the null GPU's table: each preset, eager and compiled, alone and as rank 0 of four.

python -m tests.nullgpu.table          # the small preset, some minutes
python -m tests.nullgpu.table full     # the full one: an hour of compiling on two cores
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.nullgpu.build import build, environment
from tests.nullgpu.gpu import ROOT

CASES = {
    "eager": ("--compile", "off"),
    "compiled": ("--compile", "on"),
    "4 ranks, DDP": ("--compile", "off", "--ranks", "4"),
    "4 ranks, FSDP": ("--compile", "off", "--ranks", "4", "--parallel", "fsdp"),
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
}


def main(preset: str = "small") -> None:
    """Run every case in a process of its own."""
    found = {}
    for name, flags in CASES.items():
        command = [sys.executable, "-m", "tests.nullgpu.measure", "--preset", preset, *flags]
        ran = subprocess.run(command, env=environment(build()), cwd=ROOT, stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(ran.stdout)
    lines = [["", *found], ["---"] * (len(found) + 1)]
    for label, key in ROWS.items():
        lines.append(
            [label, *(f"{case[key]:,.4g}" if "gib" in key else f"{case[key]:,}" for case in found.values())]
        )
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
