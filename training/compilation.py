"""torch.compile of the trunk, tried out before it is relied on."""

from __future__ import annotations

import torch
from torch._dynamo.exc import TorchDynamoException

from models.policy import Policy
from training.distributed import Ranks


def compile_trunk(
    policy: Policy, num_segments: int, segment_bars: int, ranks: Ranks, by_block: bool = False
) -> str:
    """Compile the trunk for rollouts and updates, on all ranks or on none; takes a minute for large ones.

    Compilers fail on machines that train well without: no C++ compiler, another driver, a full temporary
    folder. So one forward and backward of the size that is used is tried here, on zeros.

    Args:
        policy: changed in place; its weights and their names stay as they are.
        num_segments: of one micro-batch.
        segment_bars: context bars and horizon.
        ranks: all take part.
        by_block: compile block by block, for ranks that hold shares: a block's weights come when it is called.

    Returns:
        Why it was not compiled, in one line; empty where it was.
    """
    reason = ""
    device = ranks.device
    modules = list(policy.trunk.blocks) if by_block else [policy.trunk]
    for module in modules:  # the forward alone: hooks of FSDP stay outside, names of weights as they are
        module.forward = torch.compile(module.forward, dynamic=False)
    try:
        bars = torch.zeros(num_segments, segment_bars + 1, policy.trunk.config.num_features, device=device)
        with torch.no_grad():
            policy.encode(bars, 1)
        policy.encode(bars[:, 1:], 1).sum().backward()
    except (TorchDynamoException, RuntimeError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    policy.zero_grad()
    if ranks.any(bool(reason)):
        for module in modules:
            del module.forward  # the class has its own
        torch._dynamo.reset()
        return reason or "it failed on another rank"
    return ""
