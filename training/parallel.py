"""How ranks share a model: each holds all of it (DDP), or each holds a share (FSDP2).

Either way every rank plays and learns from its own accounts, gradients are averaged over ranks before every
optimizer step, and the optimizer walks over plain tensors of this rank: weights that it holds alone, or its share.
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
    """What the learner asks of either way."""

    objective: nn.Module  # called as an Objective is
    parameters: list[nn.Parameter]  # what this rank's optimizer walks over, in the policy's order

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward; gradients are averaged after the last."""

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Hand the averaged gradients of ``parameters`` to the optimizer (all ranks).

        Returns:
            The gradients, and the norm () of the whole one, which is the same on every rank.
        """

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return what this rank's ``tensor``, shaped like one of ``parameters``, is a share of (all ranks)."""

    def share(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return this rank's share of a whole tensor; the inverse of ``whole``."""

    def weights(self) -> dict[str, Tensor]:
        """Return the whole policy's weights by name (all ranks)."""


def parallel(objective: Objective, ranks: Ranks, sharded: bool) -> Parallel:
    """Prepare an objective's policy for training on these ranks; one alone needs neither way."""
    return Shares(objective, ranks) if sharded and ranks.world_size > 1 else Copies(objective, ranks)


class Copies:
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
        """They are where the optimizer looks for them, and whole."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return gradients, nn.utils.get_total_norm(gradients)

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """It is whole."""
        return tensor

    def share(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor

    def weights(self) -> dict[str, Tensor]:
        """Return the policy's own."""
        return self.policy.state_dict()


class Shares:
    """Every rank holds its share of the trunk's weights, gradients and moments (FSDP2, ``fully_shard``).

    A block's weights are whole only while it computes. The head, which a rollout asks at every bar, stays
    whole on every rank; it is a thousandth of a large model. Weights travel and add up in float32, as in
    Copies, so that both ways learn the same (Zhao et al. 2023, arXiv:2304.11277).
    """

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self.policy = objective.policy
        self.objective: nn.Module = objective
        self._ranks = ranks
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in self.policy.trunk.blocks:
            fully_shard(block, mesh=self._mesh)
        fully_shard(self.policy.trunk, mesh=self._mesh)
        held = list(self.policy.parameters())
        # The optimizer gets plain tensors over the same memory: its fused kernel knows no others.
        self.parameters = [nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p for p in held]
        pairs = list(zip(self.parameters, held, strict=True))
        self._shared = {id(own): (own, p) for own, p in pairs if isinstance(p, DTensor)}
        self._head = [p for p in held if not isinstance(p, DTensor)]

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Every backward scatters its gradients: to keep them whole up to the last one would take their memory."""
        return nullcontext()

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Trunk: this rank's share, averaged by the last backward. Head: averaged here."""
        shares = []
        for own, held in self._shared.values():
            assert isinstance(held.grad, DTensor)
            own.grad, held.grad = held.grad.to_local(), None
            shares.append(own.grad)
        head = [p.grad for p in self._head if p.grad is not None]
        mean = self._ranks.sum(torch.cat([each.flatten() for each in head])) / self._ranks.world_size
        for gradient, part in zip(head, mean.split([each.numel() for each in head]), strict=True):
            gradient.copy_(part.view_as(gradient))
        # Squares of shares add up over ranks, those of the head count once.
        of_shares = self._ranks.sum(nn.utils.get_total_norm(shares).square())
        of_head = nn.utils.get_total_norm(head).square()
        return [*shares, *head], (of_shares + of_head).sqrt()

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Gather it; on the host, since together they may be more than a GPU has to spare."""
        if id(parameter) not in self._shared:
            return tensor
        held = self._shared[id(parameter)][1]
        shape, stride = held.shape, held.stride()
        share = DTensor.from_local(
            tensor, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        return share.full_tensor().cpu()

    def share(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Cut it as the weight is cut; every rank has the whole, nothing travels."""
        if id(parameter) not in self._shared:
            return tensor
        on_device = tensor.to(self._ranks.device)
        return distribute_tensor(on_device, self._mesh, [Shard(0)], src_data_rank=None).to_local()

    def weights(self) -> dict[str, Tensor]:
        """Gather them one by one, on the host."""
        whole = self.policy.state_dict()
        return {name: w.full_tensor().cpu() if isinstance(w, DTensor) else w for name, w in whole.items()}
