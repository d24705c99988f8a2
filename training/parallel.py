"""Data-parallel training: the model is replicated on every rank (DDP) or sharded over the ranks (FSDP2).

Either way every rank plays and learns from its own accounts, gradients are averaged over ranks before every
optimizer step, and the optimizer sees plain tensors of this rank: full weights, or its shards.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from training.distributed import Ranks
from training.losses import Objective


class Parallel(Protocol):
    """The interface of both, as the learner uses it."""

    objective: nn.Module  # called like an Objective
    parameters: list[nn.Parameter]  # of this rank's optimizer, in the policy's order

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward; gradients are averaged after the last."""

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Set the averaged gradients of ``parameters`` (all ranks).

        Returns:
            The gradients, and the norm () of the full gradient, which is the same on every rank.
        """

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return the full tensor of which ``tensor`` is this rank's shard (all ranks)."""

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a full tensor; the inverse of ``unshard``."""

    def weights(self) -> dict[str, Tensor]:
        """Return all weights of the policy, unsharded, by name (all ranks)."""


def parallelize(objective: Objective, ranks: Ranks, sharded: bool) -> Parallel:
    """Prepare an objective's policy for training on these ranks."""
    return Sharded(objective, ranks) if sharded and ranks.world_size > 1 else Replicated(objective, ranks)


class Replicated:
    """Every rank holds all weights, gradients and moments: DistributedDataParallel, or a single rank."""

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self.policy = objective.policy
        self.parameters = list(self.policy.parameters())
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

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return it unchanged."""
        return tensor

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return it unchanged."""
        return tensor

    def weights(self) -> dict[str, Tensor]:
        """Return the policy's own."""
        return self.policy.state_dict()


class Sharded:
    """Every rank holds a shard of the trunk's weights, gradients and moments (FSDP2, ``fully_shard``).

    A block's weights are unsharded only while it computes. The head, which a rollout uses at every bar, is
    replicated: it is a thousandth of a large model. Weights are gathered and gradients reduced in float32, as in
    Replicated, so that both learn the same (Zhao et al. 2023, arXiv:2304.11277).
    """

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self.policy = objective.policy
        self.objective: nn.Module = objective
        self._ranks = ranks
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in self.policy.trunk.blocks:
            fully_shard(block, mesh=self._mesh)
        fully_shard(self.policy.trunk, mesh=self._mesh)
        parameters = list(self.policy.parameters())
        # The optimizer gets plain tensors over the same memory: its fused kernel takes no others.
        self.parameters = [nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p for p in parameters]
        pairs = list(zip(self.parameters, parameters, strict=True))
        self._sharded = {id(local): (local, p) for local, p in pairs if isinstance(p, DTensor)}
        self._head = [p for p in parameters if not isinstance(p, DTensor)]

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Every backward reduces and scatters: to keep full gradients until the last one takes their memory."""
        return nullcontext()

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Trunk: this rank's shard, averaged by FSDP. Head: averaged here."""
        trunk = []
        for local, parameter in self._sharded.values():
            assert isinstance(parameter.grad, DTensor)
            local.grad, parameter.grad = parameter.grad.to_local(), None
            trunk.append(local.grad)
        head = [p.grad for p in self._head if p.grad is not None]
        mean = self._ranks.sum(torch.cat([gradient.flatten() for gradient in head])) / self._ranks.world_size
        for gradient, part in zip(head, mean.split([gradient.numel() for gradient in head]), strict=True):
            gradient.copy_(part.view_as(gradient))
        # Squares of shards add up over ranks, those of the replicated head count once.
        trunk_square = self._ranks.sum(nn.utils.get_total_norm(trunk).square())
        head_square = nn.utils.get_total_norm(head).square()
        return [*trunk, *head], (trunk_square + head_square).sqrt()

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Gather it to the host: all of them together may be more than a GPU has to spare."""
        if id(parameter) not in self._sharded:
            return tensor
        sharded = self._sharded[id(parameter)][1]
        shape, stride = sharded.shape, sharded.stride()
        shard = DTensor.from_local(
            tensor, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        return shard.full_tensor().cpu()

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Cut it as the weight is cut; every rank has the full tensor, so nothing is communicated."""
        if id(parameter) not in self._sharded:
            return tensor
        on_device = tensor.to(self._ranks.device)
        return distribute_tensor(on_device, self._mesh, [Shard(0)], src_data_rank=None).to_local()

    def weights(self) -> dict[str, Tensor]:
        """Gather them one by one, to the host."""
        weights = self.policy.state_dict()
        return {name: w.full_tensor().cpu() if isinstance(w, DTensor) else w for name, w in weights.items()}
