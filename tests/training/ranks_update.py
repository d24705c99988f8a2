"""Run by torchrun in test_learner.py: each rank updates on its part of a rollout, rank 0 saves weights.

    ranks_update.py OUT [poison] [sharded] [compiled] [muon]

``poison`` spoils the bars of rank 1. ``sharded`` lets ranks hold shards of the model instead of replicas.
``compiled`` compiles the objective. ``muon`` updates with Muon. There may be more ranks than two.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.rollouts import (
    CONTEXT,
    HORIZON,
    SETTINGS,
    made_up_rollout,
    part_of,
    small_learner,
    small_policy,
)
from training import distributed
from training.compilation import compile_objective
from training.learner import Learner
from training.losses import Objective
from training.sharding import shard_policy

# Forecasts are learnt, too: their heads are replicated beside a sharded trunk.
CHANGES = {"forecast_coef": 0.5, "optimizer": "muon" if "muon" in sys.argv else "adamw"}


def handed_over(first: Learner, rollout, ranks, sharded: bool):
    """Let another learner take over, sharded or not, and return the weights after one more update."""
    policy = small_policy()
    policy.load_state_dict(first.parallel.weights())
    second = small_learner(policy, ranks, minibatch=4, micro=3, passes=3, sharded=sharded, **CHANGES)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file
    second.generator.set_state(first.generator.get_state())
    second.update(rollout, run_fraction=0.5)
    return {name: value.clone() for name, value in second.parallel.weights().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharded = "sharded" in sys.argv
    with distributed.start() as ranks:
        policy = small_policy()
        if sharded:
            shard_policy(policy, ranks)
        objective = Objective(policy, replace(SETTINGS, **CHANGES))
        if "compiled" in sys.argv:
            assert compile_objective(objective, 2, CONTEXT, HORIZON, ranks) == ""
        learner = small_learner(objective, ranks, minibatch=4, micro=3, passes=3, sharded=sharded, **CHANGES)
        whole = made_up_rollout(small_policy(), 4 * ranks.world_size, has_forecasts=True)
        own = part_of(whole, slice(4 * ranks.rank, 4 * ranks.rank + 4))
        if "poison" in sys.argv and ranks.rank == 1:
            own.bars[0] = float("nan")
        statistics = learner.update(own, run_fraction=0.25)
        weights = {name: value.clone() for name, value in learner.parallel.weights().items()}
        assert ranks.any(ranks.rank == 1)
        assert not ranks.any(False)
        assert ranks.gather(ranks.rank) == list(range(ranks.world_size))
        weights |= learner.state_dict()["forecaster"]
        same = [ranks.gather(value.double().sum().item()) for value in weights.values()]
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in policy.parameters())
        moments = sum(m.numel() for state in learner.optimizer.state.values() for m in state.values())
        after = [handed_over(learner, own, ranks, other) for other in (sharded, not sharded)]
        if ranks.is_first:
            figures = {name: float(value) for name, value in statistics.items()}
            result = {"weights": weights, "same": same, "figures": figures, "after": after}
            torch.save({**result, "held": held, "moments": moments}, sys.argv[1])
