"""Linear layers that use AVX-512 on any CPU that has it.

torch multiplies float32 matrices with Intel's MKL, which does not use AVX-512 on CPUs of other vendors; oneDNN,
which torch includes too, does. Without AVX-512, and on GPUs, these are torch's own layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import fp8

# The operator is not public: a version of torch without it uses its own layers.
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
FEWEST_ROWS = 256  # with fewer, the call costs more than it saves

# Opaque to the compiler, which would treat the weights of oneDNN's operator as frozen, and materialise the
# transposes of the gradients.
_LIBRARY = torch.library.Library("trading_models", "DEF")
_LIBRARY.define("product(Tensor left, Tensor right) -> Tensor")
_LIBRARY.define("weight_gradient(Tensor gradient, Tensor x) -> Tensor")


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) and (N, K) -> (M, N), over K."""
    return torch.ops.mkldnn._linear_pointwise.default(left, right, None, "none", [], "")


def _shape_of_product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(M, N) and (M, K) -> (N, K), over M."""
    left, right = gradient.t(), x.t()
    # oneDNN copies the left matrix to transpose it, so that should be the narrow one.
    return _product(left, right) if len(left) <= len(right) else _product(right, left).t().contiguous()


def _shape_of_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(gradient.shape[1], x.shape[1])


_LIBRARY.impl("product", _product, "CPU")
torch.library.register_fake("trading_models::product", _shape_of_product, lib=_LIBRARY)
_LIBRARY.impl("weight_gradient", _weight_gradient, "CPU")
torch.library.register_fake("trading_models::weight_gradient", _shape_of_weight_gradient, lib=_LIBRARY)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(M, K) and (N, K) -> (M, N)."""
        ctx.save_for_backward(x, weight)
        return torch.ops.trading_models.product.default(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        ops = torch.ops.trading_models
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return (
            ops.product.default(gradient, weight.t()) if of_x else None,
            ops.weight_gradient.default(gradient, x) if of_weight else None,
        )


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where that is faster, or in fp8."""

    in_fp8 = False  # of layers without bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.in_fp8:
            return fp8.linear(x, self.weight)
        if (
            HAS_ONEDNN
            and not torch.compiler.is_exporting()  # first: a graph may have any number of rows
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() >= FEWEST_ROWS * self.in_features
            and not torch.is_autocast_enabled("cpu")
        ):
            y = _Product.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)
