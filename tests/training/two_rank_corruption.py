"""Run by torchrun in test_integrity.py: bits flip on rank 1 of two, and what both ranks find goes to a file.

two_rank_corruption.py OUT [sharded] [compiled]
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.corruption import flip, flip_gradient_once
from tests.training.rollouts import CONTEXT, HORIZON, SETTINGS, made_up_rollout, small_learner, small_policy
from training import distributed
from training.compilation import compile_objective
from training.losses import Objective
from training.sharding import shard_policy

if __name__ == "__main__":
    torch.set_num_threads(1)
    sharded, found = "sharded" in sys.argv, {}
    with distributed.start() as ranks:
        objective = Objective(small_policy(), SETTINGS)
        if sharded:
            shard_policy(objective.policy, ranks)
        if "compiled" in sys.argv:
            assert compile_objective(objective, 2, CONTEXT, HORIZON, ranks) == ""
        learner = small_learner(objective, ranks, sharded=sharded)
        rollout = made_up_rollout(small_policy(), 8, seed=ranks.rank)

        def look(name: str) -> None:
            found[name] = learner.find_corruption()

        learner.update(rollout, 0.0)
        look("sound")
        learner.update(rollout, 0.0)
        look("sound again")
        if ranks.rank == 1:
            flip_gradient_once(objective.policy.head.mix.weight)
        look("gradient")
        look("after the gradient")
        if ranks.rank == 1:
            flip(learner.parallel.parameters[0])
        learner.update(rollout, 0.0)
        look("weight")
        learner.seal.close()
        if not sharded:  # where the flip came within a step, only the other rank's replica can tell
            look("replica")
        found["all"] = ranks.gather(found)
        if ranks.is_first:
            Path(sys.argv[1]).write_text(json.dumps(found))
