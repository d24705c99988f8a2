"""Run by torchrun in test_learner.py: each rank updates on its half of a rollout, rank 0 saves weights."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.rollouts import made_up_rollout, part_of, small_learner, small_policy
from training import distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.start() as ranks:
        policy = small_policy()
        learner = small_learner(policy, ranks, minibatch=4, micro=3, passes=3)
        whole = made_up_rollout(policy, 8)
        half = part_of(whole, slice(4 * ranks.rank, 4 * ranks.rank + 4))
        if "poison" in sys.argv and ranks.rank == 1:
            half.bars[0] = float("nan")
        statistics = learner.update(half, run_fraction=0.25)
        weights = {name: value.clone() for name, value in policy.state_dict().items()}
        assert ranks.any(ranks.rank == 1)
        assert not ranks.any(False)
        assert ranks.gather(ranks.rank) == [0, 1]
        same = [ranks.gather(value.double().sum().item()) for value in weights.values()]
        if ranks.is_first:
            figures = {name: float(value) for name, value in statistics.items()}
            torch.save({"weights": weights, "same": same, "figures": figures}, sys.argv[1])
