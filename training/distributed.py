"""This process among its ranks: device, reductions, agreement. The same code runs without torchrun.

One rank never creates a process group. Decisions that rest on a clock, a signal or a file are agreed
through ``any``: ranks see those at different moments, and a branch with a collective in it that only some
ranks take is a hang.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from runtime.control import Control, heartbeat
from training import devices

# Rank 0 may download for hours on a first start while the others wait.
OBJECT_TIMEOUT = timedelta(hours=24)
# Training steps take seconds; a rank that is silent for this long is dead.
STEP_TIMEOUT = timedelta(minutes=15)
# Launchers start their ranks when all machines have joined. A rank that waits longer joined the previous
# rendezvous, with a machine whose group was about to end; it must be back while that one waits
# (launch.RENDEZVOUS_SECONDS).
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """Who this process is: ``rank`` of ``world_size``, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any = None  # a gloo group on the CPU: flags and objects, which never wait for the GPU

    def __str__(self) -> str:
        return f"{self.world_size} x {self.device.type}"

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which downloads, prints and saves."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (all ranks take part)."""
        return self.max(int(flag)) > 0

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers (all ranks take part)."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        torch_distributed.all_reduce(shared, op=torch_distributed.ReduceOp.MAX, group=self.cpu_group)
        return int(shared)

    def min(self, number: int) -> int:
        """Return the smallest of the ranks' numbers (all ranks take part)."""
        return -self.max(-number)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a device tensor over ranks, in place (all ranks take part)."""
        if self.world_size > 1:
            torch_distributed.all_reduce(tensor)
        return tensor

    def join(self, tensor: Tensor) -> Tensor:
        """Join the ranks' device tensors of one shape along their first axis (all ranks take part)."""
        if self.world_size == 1:
            return tensor
        joined = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        # Not all_gather_into_tensor: torch 2.13 deprecates it, and 2.11 has nothing in its place.
        torch_distributed.all_gather(list(joined.split(len(tensor))), tensor.contiguous())
        return joined

    def exchange(self, tensor: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """Send every rank its part of a device tensor (sum of ``given``,), and get a part from each.

        Args:
            tensor: the parts in rank order.
            given, taken: how many elements go to, and come from, each rank.

        Returns:
            What came in rank order, (sum of ``taken``,) (all ranks take part).
        """
        if self.world_size == 1:
            return tensor
        got = tensor.new_empty(sum(taken))
        torch_distributed.all_to_all_single(got, tensor, taken, given)
        return got

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; plain picklable types (all ranks take part)."""
        if self.world_size == 1:
            return value
        box = [value]
        torch_distributed.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def copy_from_first(self, tensor: Tensor) -> None:
        """Give a device tensor rank 0's values, in place (all ranks take part)."""
        if self.world_size > 1:
            torch_distributed.broadcast(tensor, src=0)

    def gather_to_first(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on rank 0; nothing on the others (all ranks take part)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_first else []
        torch_distributed.gather_object(value, values or None, dst=0, group=self.cpu_group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank (all ranks take part)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_distributed.all_gather_object(values, value, group=self.cpu_group)
        return values


@contextmanager
def start(timeout: timedelta = RENDEZVOUS_TIMEOUT, wanted: str = "auto") -> Iterator[Ranks]:
    """Join the ranks that torchrun (or the supervisor) started; a single process needs no group.

    NCCL with one GPU per local rank on GPUs, gloo on CPUs.

    Args:
        wanted: the setting ``device``.
        timeout: how long the ranks wait for each other.

    Raises:
        DeviceError: there is no such GPU.
        torch.distributed.DistStoreError: one of them did not join.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = devices.of_rank(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    store, rank, _ = next(torch_distributed.rendezvous("env://", timeout=timeout))
    store.set(f"rank {rank} is here", "")
    store.wait([f"rank {number} is here" for number in range(world_size)], timeout)
    torch_distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=STEP_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    cpu_group = torch_distributed.new_group(backend="gloo", timeout=OBJECT_TIMEOUT)
    yield Ranks(torch_distributed.get_rank(), world_size, device, cpu_group)
    # Not in a finally: after an error the other ranks may never arrive, and the launcher ends the group.
    torch_distributed.barrier(group=cpu_group)
    torch_distributed.destroy_process_group()


def agreed_stop(level: int, ranks: Ranks, control: Control) -> bool:
    """Return whether any rank was asked to stop at ``level`` or above (all ranks take part)."""
    heartbeat()
    return ranks.any(control.stop_level >= level)
