"""Can the network still learn? Figures of the transformer on a small batch that stays the same for a market.

Networks that train for long lose plasticity: units fall silent, weights grow, features collapse onto few
directions. Dormant units: Sokar et al. 2023, arXiv:2302.12902, definition 3.1. Effective rank: Roy and
Vetterli 2007, EUSIPCO. Nothing is drawn and no gradient is kept, so the numbers of the training stay the same to
the last bit.

Shapes: B = segments, S = bars of a segment, D = d_model, U = units of one feed-forward layer, n = rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.market import Market
from models.policy import Policy
from models.transformer import Block, Trunk

NUM_SEGMENTS = 8
BARS_OF_EACH = 32  # rows of the feature matrix per segment
TAU = 0.025  # a unit is dormant when it does less than this share of what its layer's average unit does


def fixed_batch(market: Market) -> Tensor:
    """Return segments (B, C + H, F) spread evenly over the places where one may start."""
    total = market.starts.sum()
    number = (torch.arange(NUM_SEGMENTS, device=market.device) * total) // NUM_SEGMENTS
    stretch = torch.searchsorted(market.stretch_starts_before, number, right=True) - 1
    first = market.stretch_first[stretch] + number - market.stretch_starts_before[stretch]
    return market.windows(first, market.context_bars + market.horizon)


@torch.no_grad()
def plasticity(policy: Policy, bars: Tensor) -> dict[str, float]:
    """Measure the trunk on ``bars`` (B, S, F); waits for the device, so ask where the host waits anyway."""
    with policy.precision(bars.device):
        hidden, activity = activations(policy.trunk, bars)
    features = hidden[:, -BARS_OF_EACH:].reshape(-1, hidden.shape[-1])
    norm = torch.stack([parameter.double().square().sum() for parameter in policy.parameters()]).sum().sqrt()
    return {
        "plasticity/dormant_units": float(dormant_share(activity)),
        "plasticity/effective_rank": effective_rank(features),
        "plasticity/weight_norm": float(norm),
    }


def activations(trunk: Trunk, bars: Tensor) -> tuple[Tensor, Tensor]:
    """Run the trunk block by block, never compiled: (B, S, F) -> hidden (B, S, D) and mean |activation| (L, U).

    The same arithmetic as Trunk.forward, which would have to be compiled again for this batch.
    """
    length = bars.shape[1]
    cos, sin = trunk.cos[:length], trunk.sin[:length]
    x = trunk.embed(bars)
    activity = []
    for block in trunk.blocks:
        assert isinstance(block, Block)
        x = x + block.attention(block.attention_norm(x), cos, sin)
        units = F.gelu(block.up(block.feed_forward_norm(x)))
        activity.append(units.abs().float().mean(dim=(0, 1)))
        x = x + block.down(units)
    return trunk.norm(x.float()), torch.stack(activity)


def dormant_share(activity: Tensor, tau: float = TAU) -> Tensor:
    """Return the share of units whose mean |activation| (L, U) is at most ``tau`` of their layer's average."""
    return (activity <= tau * activity.mean(dim=1, keepdim=True)).double().mean()


def effective_rank(features: Tensor) -> float:
    """Return exp(entropy) of the singular values of (n, D), as shares of their sum: 1 to min(n, D); 0 for zeros.

    Not finite features give NaN.
    """
    # The smaller Gram matrix: singular values are the roots of its eigenvalues. On the CPU, where a
    # few hundred rows take milliseconds and no solver is started on the GPU.
    wide = features.double().cpu()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    if not bool(gram.isfinite().all()):
        return float("nan")
    singular = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt()
    if not float(singular.sum()):
        return 0.0
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())
