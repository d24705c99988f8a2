"""Matrix products in fp8 by torch's own kernels: on GPUs of compute capability 8.9 and newer, slowly on CPUs.

Every tensor has one scale (Micikevicius et al. 2022, arXiv:2209.05433): weights and gradients by their largest
number, activations none. A scale that is taken from a batch depends on its later bars and its other segments:
decisions would look ahead, and the update would not see the policy that acted. Nor do they need one: what enters
a product comes out of a norm, a mean of values or a GELU, and is about one (unit scaling: Blake et al. 2023,
arXiv:2303.11257); E4M3 has numbers from 0.002 to 448.

Shapes: M = rows, K = inputs, N = outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_CAPABILITY = (8, 9)  # Ada
MULTIPLE = 16  # of every size that the kernels sum over, and of K and N
# More bits for a forward's mantissa, or for the range of gradients.
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def has_kernels(capability: tuple[int, int]) -> bool:
    """Whether this torch multiplies fp8 numbers on a GPU of such a compute capability."""
    return capability >= FP8_CAPABILITY and not torch.version.hip


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., K) and (N, K) -> (..., N), in the precision of ``x``; K and N are multiples of 16."""
    rows = x.flatten(0, -2)
    missing = -len(rows) % MULTIPLE  # the gradient of the weights sums over rows
    y = _Product.apply(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight)
    return y[: len(rows)].view(*x.shape[:-1], -1)


class Scaled(NamedTuple):
    """fp8 numbers, and the scale () float32 that they are to be multiplied by."""

    numbers: Tensor
    scale: Tensor

    def turned(self) -> Scaled:
        """(A, B) -> (B, A), which is a copy: the kernels sum over the last dimension of both."""
        return Scaled(self.numbers.t().contiguous(), self.scale)


def unscaled(x: Tensor, kind: torch.dtype = FORWARD) -> Scaled:
    """Round each number by itself; what is beyond the kind's largest becomes that."""
    largest = torch.finfo(kind).max
    return Scaled(x.float().clamp(-largest, largest).to(kind), torch.ones((), device=x.device))


def scaled(x: Tensor, kind: torch.dtype = FORWARD) -> Scaled:
    """Round to numbers that use the kind's whole range."""
    smallest = torch.finfo(torch.float32).tiny  # of zeros
    scale = (x.abs().amax().float() / torch.finfo(kind).max).clamp(min=smallest)
    return Scaled(unscaled(x.float() / scale, kind).numbers, scale)


def multiply(left: Scaled, right: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """(M, K) and (N, K) -> (M, N), summed over K; ``fast``: on Hopper in fewer bits."""
    numbers, scales = (left.numbers, right.numbers.t()), (left.scale, right.scale)
    return torch._scaled_mm(*numbers, *scales, out_dtype=dtype, use_fast_accum=fast)


class _Product(torch.autograd.Function):
    # Of weights that come in float32 or, gathered by FSDP, in bf16, the numbers are the same.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(M, K) and (N, K) -> (M, N)."""
        left = unscaled(x)
        ctx.save_for_backward(left.numbers, weight)  # weights are rounded again, rather than kept
        ctx.dtype = x.dtype
        return multiply(left, scaled(weight.to(x.dtype)), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (numbers, weight), gradient = ctx.saved_tensors, scaled(gradients[0], GRADIENT)
        x = Scaled(numbers, torch.ones_like(gradient.scale))
        return (
            multiply(gradient, scaled(weight.to(ctx.dtype)).turned(), ctx.dtype),
            multiply(gradient.turned(), x.turned(), weight.dtype),
        )
