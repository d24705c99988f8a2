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

    lengths: set[tuple[int, int, bool]] = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched_attention(query, key, value, **how):
        lengths.add((torch.is_grad_enabled(), query.shape[-2], key.shape[-2]))
        return attention(query, key, value, **how)

    torch.nn.functional.scaled_dot_product_attention = watched_attention
    sessions = []
    new_session = program.new_session

    def kept_session(*arguments):
        sessions.append(new_session(*arguments))
        return sessions[-1]

    program.new_session = kept_session
    code = None
    try:
        program.main()
    except SystemExit as end:
        code = end.code
    (session,) = sessions
    weights = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in session.policy.state_dict().items()
    }
    seen = {
        "code": code,
        "allocator": allocator[0],
        "weights": weights,
        "attention": sorted(lengths),
        "accounts": session.env.state_dict()["open_time"].tolist(),
        "optimizer_steps": session.learner.optimizer_steps,
    }
    (folder / f"rank{session.ranks.rank}.json").write_text(json.dumps(seen))
