"""Launch settings: the variables, torchrun's command line, and how many ranks a machine gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.launch import Launch, count_gpus


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"NPROC": "0"}, "NPROC must be"),
        ({"LAUNCHER": "mpi"}, "LAUNCHER must be"),
        ({"NNODES": "2", "LAUNCHER": "direct"}, "LAUNCHER=torchrun"),
        ({"NNODES": "2", "LAUNCHER": "torchrun"}, "RDZV_ENDPOINT"),
        ({"NNODES": "2", "LAUNCHER": "torchrun", "RDZV_ENDPOINT": "a:1", "NODE_RANK": "2"}, "0 to 1"),
    ],
)
def test_launch_settings_name_the_variable_and_its_rule(settings, rule):
    with pytest.raises(ValueError, match=rule):
        Launch.from_environment({"NPROC": "1"} | settings)


def test_many_machines_meet_at_the_endpoint():
    environment = {
        "NPROC": "4",
        "NNODES": "2",
        "NODE_RANK": "1",
        "RDZV_ENDPOINT": "first:29500",
        "LAUNCHER": "torchrun",
    }
    launch = Launch.from_environment(environment)
    ((command, _),) = launch.commands(["worker.py", "train"])
    assert launch.world_size == 8
    assert {"--nnodes=2", "--rdzv-endpoint=first:29500", "--node-rank=1"} < set(command)
    assert "--standalone" not in command and not [word for word in command if "local-addr" in word]


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun")
def test_ranks_of_one_machine_meet_though_its_name_does_not_resolve(tmp_path):
    """A name that does not resolve costs torchrun's ranks five minutes, then the next start the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket; socket.getfqdn = lambda name='': 'no.such.host'"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(dict(os.environ)))\n"
    )
    ((command, additions),) = Launch(num_ranks=2, launcher="torchrun").commands([str(worker), str(tmp_path)])
    path = f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[2]}"
    subprocess.run(command, env=os.environ | additions | {"PYTHONPATH": path}, check=True, timeout=120)
    for rank in ("0", "1"):
        seen = json.loads((tmp_path / rank).read_text())
        assert seen["MASTER_ADDR"] == "127.0.0.1" and seen["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 3),
        ("", 1),
        ("-1", 1),
        ("0", 1),
        ("0,2", 2),
        ("0,-1,2", 1),
        ("GPU-a,GPU-b", 2),
        ("0,1,2,3,4", 3),
    ],
)
def test_ranks_default_to_the_visible_gpus(tmp_path, monkeypatch, visible, expected):
    listing = "GPU 0: X (UUID: GPU-a)\n  MIG 1g: Device 0\nGPU 1: X (UUID: GPU-b)\nGPU 2: X (UUID: GPU-c)\n"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{listing}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_a_machine_without_nvidia_tools_gets_one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus({}) == 1
