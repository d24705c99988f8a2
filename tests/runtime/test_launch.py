"""Launch settings: the variables, torchrun's command line, and how many ranks a machine gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.launch import Launch


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
