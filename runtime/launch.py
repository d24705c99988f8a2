"""How many ranks to start, and the command lines for it: a single process, torchrun, or one per rank.

Standard library only: this runs in the supervisor.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime import surroundings
from runtime.cores import limit_threads
from runtime.processes import LINUX, WINDOWS

LOOPBACK = "127.0.0.1"
RENDEZVOUS_SECONDS = 600  # for all machines to join; less than the supervisor's START_SECONDS


@dataclass(frozen=True)
class Launch:
    """How many ranks to start, on which machines, with which launcher."""

    num_ranks: int = 1  # on this machine; where NPROC is not set, the preflight counts the GPUs
    launcher: str = "torchrun"  # or "direct": this program starts each rank itself, as on Windows
    num_nodes: int = 1
    node_rank: str = ""
    rendezvous: str = ""  # host:port of node 0

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Launch:
        """Read NPROC, NNODES, NODE_RANK, RDZV_ENDPOINT and LAUNCHER.

        Raises:
            ValueError: one of them is invalid; the text has its name, the rule and the value.
        """
        launch = Launch(
            num_ranks=_count(environment, "NPROC"),
            launcher=environment.get("LAUNCHER") or ("torchrun" if LINUX else "direct"),
            num_nodes=_count(environment, "NNODES"),
            node_rank=environment.get("NODE_RANK", ""),
            rendezvous=environment.get("RDZV_ENDPOINT", ""),
        )
        if launch.launcher not in ("torchrun", "direct"):
            raise ValueError(f"LAUNCHER must be torchrun or direct, was {launch.launcher!r}")
        if launch.num_nodes > 1:
            if launch.launcher == "direct":
                raise ValueError("NNODES above 1 needs LAUNCHER=torchrun, which exists on Linux only")
            if not launch.rendezvous:
                raise ValueError(
                    "NNODES above 1 needs RDZV_ENDPOINT, host:port of the first machine, which is not set"
                )
            if not launch.node_rank.isdigit() or int(launch.node_rank) >= launch.num_nodes:
                last = launch.num_nodes - 1
                raise ValueError(
                    f"NODE_RANK must be this machine's number, 0 to {last}, was {launch.node_rank!r}"
                )
        return launch

    @property
    def world_size(self) -> int:
        """The number of ranks on all machines."""
        return self.num_ranks * self.num_nodes

    def commands(self, worker: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
        """Return the command lines to start on this machine, each with its additions to the environment."""
        python = [sys.executable, "-u"]
        if self.world_size == 1:
            return [([*python, *worker], {})]
        additions = limit_threads(self.num_ranks)
        if LINUX and self.num_nodes == 1:
            additions["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the machine's name
        if self.launcher == "torchrun":
            # By number: a machine's own name may resolve to nothing, or to an address that it has no more.
            nodes = ["--standalone", f"--local-addr={LOOPBACK}"]
            if self.num_nodes > 1:
                # static: rank 0, which downloads and saves, is always on node 0. The c10d rendezvous numbers
                # machines in the order in which they join.
                nodes = [
                    f"--nnodes={self.num_nodes}",
                    f"--node-rank={self.node_rank}",
                    "--rdzv-backend=static",
                    f"--rdzv-endpoint={self.rendezvous}",
                    "--rdzv-id=continuous_training",
                    f"--rdzv-conf=timeout={RENDEZVOUS_SECONDS}",
                ]
            flags = [
                f"--nproc-per-node={self.num_ranks}",
                "--max-restarts=0",  # torchrun never resets its count; the supervisor does after every epoch
                "--signals-to-handle=SIGUSR2",  # none: stopping goes through the control folder
                "--shutdown-timeout=10",
            ]
            return [([*python, "-m", "runtime.torchrun", *nodes, *flags, *worker], additions)]
        common = additions | {
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": LOOPBACK,  # by name, Windows may find a virtual network card
            "MASTER_PORT": str(_free_port()),
        }
        if WINDOWS:
            common["USE_LIBUV"] = "0"  # PyTorch's Windows wheels are built without it
        return [
            ([*python, *worker], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(self.num_ranks)
        ]


def clean_environment() -> dict[str, str]:
    """Return the user's environment without inherited rank numbers and what was meant for other programs."""
    inherited = dict(os.environ)
    surroundings.shut_out_ranks(inherited)
    surroundings.shut_out(inherited)
    return inherited


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "").strip() or "1"
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, was {text!r}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
