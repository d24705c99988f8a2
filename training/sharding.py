"""Policies of which every rank holds a shard of the trunk (FSDP2), from their first weights on.

No rank ever holds the whole trunk: it is made without memory, sharded block by block, and filled shard by shard. A
model of one's own is made whole on the CPU first.
A block's weights are gathered only while it computes. The head, which a rollout uses at every bar, is replicated:
it is a thousandth of a large model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from models.own import OwnTrunk
from models.policy import Policy
from training.distributed import Ranks
from training.losses import Objective
from training.parallel import on_replicas


def sharded_policy(sizes: Mapping[str, Any], precision: str, ranks: Ranks) -> Policy:
    """Make a policy of fresh weights: shards of those that ``Policy.from_sizes`` draws on the CPU."""
    with torch.device("meta"):
        policy = Policy.from_sizes(sizes, precision)
    shard_policy(policy, ranks)
    policy.to_empty(device=ranks.device)
    if isinstance(policy.trunk, OwnTrunk):  # how it draws its weights only its author knows
        whole = Policy.from_sizes(sizes, precision)
        load_shards(policy, whole.state_dict())
        drawn = dict(whole.named_buffers())
        for name, buffer in policy.named_buffers():
            buffer.copy_(drawn[name])
        return policy
    with _DrawnOnCpu():
        policy.apply(_reset)  # children first, as they were made
    return policy


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


class _DrawnOnCpu(TorchDispatchMode):
    """Fills a tensor with the numbers that a whole one on the CPU would get, one tensor at a time."""

    DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.DRAWS:
            return func(*args, **(kwargs or {}))
        tensor, *bounds = args
        whole = func(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), *bounds, **(kwargs or {}))
        _fill(tensor, whole)
        return tensor


def _fill(tensor: Tensor, whole: Tensor) -> None:
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(shard_of(whole, tensor))
    else:
        tensor.copy_(whole)


def shard_policy(policy: Policy, ranks: Ranks) -> None:
    """Keep this rank's shard of every weight of the trunk, in place, float32.

    Where the trunk computes in bf16 or fp8, blocks are gathered so, which is what autocast would make of them: but
    autograd would keep its copies, of all weights, from the forward to the backward.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy()
    if policy.precision != "fp32":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in policy.trunk.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy.trunk, mesh=mesh)


def shard_of(whole: Tensor, sharded: DTensor) -> Tensor:
    """Return the rows of a whole tensor that this rank holds of the sharded one."""
    mesh = sharded.device_mesh
    return whole.split(shares(len(whole), mesh.size()))[mesh.get_local_rank()]


def shares(count: int, num_ranks: int) -> list[int]:
    """Return how many of some things each rank gets, as FSDP cuts rows; the last ranks may get none."""
    each = -(-count // num_ranks)
    return [max(0, min(each, count - each * rank)) for rank in range(num_ranks)]


def load_shards(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a whole policy into a sharded one: its rows of each, one by one.

    Raises:
        RuntimeError: they are of another network.
    """
    held = policy.state_dict()
    if {name: w.shape for name, w in held.items()} != {name: w.shape for name, w in weights.items()}:
        raise RuntimeError(f"weights of another network: {sorted(weights)}, expected {sorted(held)}")
    for name, tensor in held.items():
        _fill(tensor, weights[name])


@contextmanager
def without_communication(policy: Policy) -> Iterator[None]:
    """Let a sharded policy compute what it does with all ranks, as much and with as much memory, on zeros.

    Where one rank may run out of memory, the others would wait in a collective for it.
    """
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_custom_all_gather(_ZerosGathered())
        part.set_custom_reduce_scatter(_ZerosScattered())
    try:
        yield
    finally:
        for part in parts:
            part.set_custom_all_gather(DefaultAllGather())
            part.set_custom_reduce_scatter(DefaultReduceScatter())


class _ZerosGathered(DefaultAllGather):
    def __call__(self, output_tensor: Tensor, *_: Any, **__: Any) -> None:
        output_tensor.zero_()


class _ZerosScattered(DefaultReduceScatter):
    def __call__(self, output_tensor: Tensor, *_: Any, **__: Any) -> None:  # type: ignore[override]
        output_tensor.zero_()


class Sharded:
    """Every rank holds a shard of the trunk's weights, gradients and moments (FSDP2, ``fully_shard``).

    Weights are float32, gradients are reduced in float32, and blocks compute in the precision of
    Replicated, so that both learn the same (Zhao et al. 2023, arXiv:2304.11277).
    """

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        """Shard the policy, unless ``sharded_policy`` has made it so."""
        self.policy = objective.policy
        self.objective: nn.Module = objective
        self._ranks, self.world_size = ranks, ranks.world_size
        if not isinstance(self.policy.trunk, FSDPModule):
            shard_policy(self.policy, ranks)
        parameters = [parameter for _, parameter in objective.learnt()]
        # The optimizer gets plain tensors over the same memory: its fused kernel takes no others.
        self.parameters = [nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p for p in parameters]
        pairs = list(zip(self.parameters, parameters, strict=True))
        self._sharded = {id(local): (local, p) for local, p in pairs if isinstance(p, DTensor)}
        self._head = [p for p in parameters if not isinstance(p, DTensor)]

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Every backward reduces and scatters: to keep full gradients until the last one takes their memory."""
        return nullcontext()

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Trunk: this rank's shard, averaged by FSDP. Heads: averaged here."""
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

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the sharded tensor's, or its own."""
        return self._sharded[id(parameter)][1].shape if id(parameter) in self._sharded else parameter.shape

    def on_whole(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """Of shards, every rank gets all rows of its part, and gives back the others' rows of the results."""
        if id(parameters[0]) not in self._sharded:
            return on_replicas(matrices, function, self._ranks)
        held = torch.stack(list(matrices))  # (N, this rank's rows, columns)
        num_rows, num_columns = self.whole_shape(parameters[0])
        parts, rows = shares(len(matrices), self.world_size), shares(num_rows, self.world_size)
        num_mine = parts[self._ranks.rank]
        others = [count * held.shape[1] * num_columns for count in parts]  # what this rank holds of each part
        own = [num_mine * count * num_columns for count in rows]  # what each rank holds of this rank's part
        got = self._ranks.exchange(held.flatten(), others, own).split(own)
        shards = [flat.view(num_mine, count, num_columns) for flat, count in zip(got, rows, strict=True)]
        done = function(torch.cat(shards, dim=1))
        back = torch.cat([shard.flatten() for shard in done.split(rows, dim=1)])
        return list(self._ranks.exchange(back, own, others).view_as(held).unbind())

    def unshard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Gather it to the host: all of them together may be more than a GPU has to spare."""
        if id(parameter) not in self._sharded:
            return tensor
        sharded = self._sharded[id(parameter)][1]
        shape, stride = sharded.shape, sharded.stride()
        mesh = sharded.device_mesh
        shard = DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return shard.full_tensor().cpu()

    def shard(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Cut it as the weight is cut; every rank has the full tensor, so nothing is communicated."""
        if id(parameter) not in self._sharded:
            return tensor
        return shard_of(tensor, self._sharded[id(parameter)][1]).to(self._ranks.device)

    def weights(self) -> dict[str, Tensor]:
        """Gather them one by one, to the host."""
        weights = self.policy.state_dict()
        return {name: w.full_tensor().cpu() if isinstance(w, DTensor) else w for name, w in weights.items()}
