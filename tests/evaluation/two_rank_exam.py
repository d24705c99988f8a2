"""Run by test_two_rank_exam.py: two ranks (gloo) examine policies that trade, and one of them fails in its part.

    two_rank_exam.py FOLDER

The second rank is forked once all is imported. Rank 0 leaves FOLDER/found.json.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed import TCPStore

from evaluation import examiner
from tests.evaluation.test_champion import Training
from training import distributed


def trade(training: Training, seed: int) -> None:
    """Let the policy trade in its own way, the same on every rank."""
    head = training.trainer.policy.head
    torch.manual_seed(seed)
    with torch.no_grad():
        torch.nn.init.normal_(head.logits.weight, std=0.5)
        head.logits.bias.zero_()


def exams(training: Training) -> list[dict]:
    """Examine one that holds, which becomes the champion, and two that trade."""
    found = []
    for seed in range(3):
        trade(training, seed) if seed else training.hold("long")
        exam = training.examine()
        found.append({"figures": exam.figures, "record": exam.record})
    return found


def fail(*_: object, **__: object) -> None:
    raise KeyError("a fault of rank 1")


def gather_then_fail(full_policy: Callable[[], object]) -> None:
    full_policy()
    raise torch.OutOfMemoryError("of 1 GiB, all")


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("continuous_training").addHandler(handler)
    with distributed.start() as ranks:
        found = {}
        for name in ("ddp", "fsdp"):
            (folder / name).mkdir(exist_ok=True)
            training = Training(folder / name, None, ranks, parallel=name)
            found[name] = exams(training)
        walk = examiner.examine
        if ranks.rank == 1:
            examiner.examine = fail
        failed = training.examine()
        examiner.examine = walk
        found["failed"] = failed.figures
        if ranks.rank == 1:
            training.trainer.full_policy = partial(gather_then_fail, training.trainer.full_policy)
        training.examiner._best = None  # so that the champion walks again
        training.examine()
        if ranks.rank == 1:
            del training.trainer.full_policy
        found["warnings"] = warnings
        found["after"] = training.examine().figures
        if ranks.is_first:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    second = os.fork()
    os.environ |= agents | {"WORLD_SIZE": "2", "RANK": "0" if second else "1", "CUDA_VISIBLE_DEVICES": ""}
    run(Path(sys.argv[1]))
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
