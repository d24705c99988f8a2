"""Run by torchrun in test_promises_daemon.py: the whole program on each rank, watched from inside.

    two_rank_training.py FOLDER train --flag value ...

Leaves FOLDER/rankR.json: what this rank's weights are at the end, which lengths its attention saw, and the
allocator's setting at the moment at which torch was first imported.
"""

import hashlib
import json
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
allocator: list[str | None] = []


class WhenTorchIsImported(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            allocator.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, WhenTorchIsImported())
    import torch

    import continuous_training as program
    from commands.train import Job

    lengths: set[tuple[int, int, bool]] = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched_attention(query, key, value, **how):
        lengths.add((torch.is_grad_enabled(), query.shape[-2], key.shape[-2]))
        return attention(query, key, value, **how)

    torch.nn.functional.scaled_dot_product_attention = watched_attention
    trainers = []
    make_trainer = Job._make_trainer

    def kept_trainer(*arguments):
        trainers.append(make_trainer(*arguments))
        return trainers[-1]

    Job._make_trainer = kept_trainer
    code: object = 0
    try:
        program.main()
    except SystemExit as end:
        code = end.code or 0  # None is success, too
    (trainer,) = trainers
    weights = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in trainer.policy.state_dict().items()
    }
    seen = {
        "code": code,
        "allocator": allocator[0],
        "weights": weights,
        "attention": sorted(lengths),
        "accounts": trainer.env.state_dict()["open_time"].tolist(),
        "optimizer_steps": trainer.learner.optimizer_steps,
    }
    (folder / f"rank{trainer.ranks.rank}.json").write_text(json.dumps(seen))
