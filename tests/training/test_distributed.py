"""Ranks that meet, and ranks that would wait for ever for one that went to another meeting."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from torch.distributed import TCPStore

from runtime.launch import RENDEZVOUS_SECONDS
from tests.program import PATIENCE, ROOT
from training.distributed import RENDEZVOUS_TIMEOUT

LATE = """
from datetime import timedelta
from training import distributed
with distributed.start(timedelta(seconds=1)):
    pass
"""


def test_a_rank_whose_peers_do_not_come_leaves_instead_of_waiting() -> None:
    """Its machine met the others' old group; the launcher that serves the store now starts no ranks for it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", LATE],
        cwd=ROOT,
        env=os.environ | torchrun,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1 and "rank 0 is here" in done.stderr, done.stderr


def test_it_is_back_while_the_others_still_wait_for_its_machine() -> None:
    assert timedelta(seconds=RENDEZVOUS_SECONDS) >= RENDEZVOUS_TIMEOUT + timedelta(minutes=2)
