"""Data-parallel training: the model is replicated on every rank (DDP) or sharded over the ranks (FSDP2).

Either way every rank plays and learns from its own accounts, gradients are averaged over ranks before every
optimizer step, and the optimizer sees plain tensors of this rank: full weights, or its shards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.policy import Policy
from training.distributed import Ranks
from training.losses import Objective


class Parallel(Protocol):
    """The interface of both, as the learner uses it."""

    objective: nn.Module  # called like an Objective
    parameters: list[nn.Parameter]  # of this rank's optimizer, in the order of Objective.learnt
    world_size: int

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward; gradients are averaged after the last."""

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Set the averaged gradients of ``parameters`` (all ranks).

        Returns:
            The gradients, and the norm () of the full gradient, which is the same on every rank.
        """

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the full tensor of which one of ``parameters`` is this rank's shard."""

    def on_whole(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """Apply a function to whole matrices, of which every rank does its part (all ranks).

        Args:
            parameters: N of one shape, all of them replicated or all sharded.
            matrices: N, each held as its parameter is.
            function: of some of the whole ones at once, (N or fewer, rows, columns), each by itself.

        Returns:
            What becomes of them, held the same way.
        """

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return the full tensor of which ``tensor`` is this rank's shard (all ranks)."""

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a full tensor; the inverse of ``unshard``."""

    def weights(self) -> dict[str, Tensor]:
        """Return all weights of the policy, unsharded, by name (all ranks)."""


def new_policy(sizes: Mapping[str, Any], precision: str, seed: int, ranks: Ranks, sharded: bool) -> Policy:
    """Return a policy with the initial weights of a seed, bit by bit the same for replicas and shards.

    Args:
        sizes: see Policy.from_sizes.
        precision: of the trunk.
        seed: of the CPU's generator, which draws the weights of every device.
        ranks: of the training.
        sharded: hold this rank's shard of the trunk, at no time all of it.
    """
    torch.manual_seed(seed)
    if sharded and ranks.world_size > 1:
        from training.sharding import sharded_policy  # DTensor takes most of a second to import

        return sharded_policy(sizes, precision, ranks)
    return Policy.from_sizes(sizes, precision).to(ranks.device)


def is_sharded(policy: Policy) -> bool:
    """Whether this rank holds a shard of the trunk, by a method of FSDP's."""
    return hasattr(policy.trunk, "unshard")


def load_weights(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a whole policy, of which a sharded one takes its rows.

    Raises:
        RuntimeError: they are of another network.
    """
    if is_sharded(policy):
        from training.sharding import load_shards

        load_shards(policy, weights)
    else:
        policy.load_state_dict(weights)


def parallelize(objective: Objective, ranks: Ranks, sharded: bool) -> Parallel:
    """Prepare an objective's policy for training on these ranks."""
    if sharded and ranks.world_size > 1:
        from training.sharding import Sharded

        return Sharded(objective, ranks)
    return Replicated(objective, ranks)


def on_replicas(
    matrices: Sequence[Tensor], function: Callable[[Tensor], Tensor], ranks: Ranks
) -> list[Tensor]:
    """Apply a function to matrices that every rank has: each does its part, and gets the others' results."""
    each = -(-len(matrices) // ranks.world_size)
    mine = matrices[0].new_zeros(each, *matrices[0].shape)
    for place, matrix in zip(mine, matrices[each * ranks.rank :], strict=False):
        place.copy_(matrix)
    return list(ranks.join(function(mine))[: len(matrices)].unbind())


class Replicated:
    """Every rank holds all weights, gradients and moments: DistributedDataParallel, or a single rank."""

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self.policy = objective.policy
        self._ranks, self.world_size = ranks, ranks.world_size
        self.parameters = [parameter for _, parameter in objective.learnt()]
        self.objective: nn.Module = objective
        if ranks.world_size > 1:
            device_ids = [ranks.device] if ranks.device.type == "cuda" else None
            # The only buffers are rotary angles, the same everywhere: nothing to synchronise. torch 2.13
            # renamed the argument; 2.11 knows the old name only.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            no_sync: dict[str, Any] = {name: False}
            self.objective = DistributedDataParallel(
                objective, device_ids=device_ids, gradient_as_bucket_view=True, **no_sync
            )

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """The all-reduce overlaps with the last backward."""
        if is_last or not isinstance(self.objective, DistributedDataParallel):
            return nullcontext()
        return self.objective.no_sync()

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """DDP has averaged them in place."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return gradients, nn.utils.get_total_norm(gradients)

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return its own."""
        return parameter.shape

    def on_whole(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """All of them are replicated."""
        return on_replicas(matrices, function, self._ranks)

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return it unchanged."""
        return tensor

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return it unchanged."""
        return tensor

    def weights(self) -> dict[str, Tensor]:
        """Return the policy's own."""
        return self.policy.state_dict()
