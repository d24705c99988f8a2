"""Muon: matrices between hidden units move by orthogonalised momentum, all other weights by AdamW.

Jordan 2024 (https://kellerjordan.github.io/posts/muon/), with steps as large as AdamW's, so that rate and decay
mean the same for both (Liu et al. 2025, arXiv:2502.16982). torch.optim.Muon computes in bf16, which CPUs emulate,
one matrix at a time, all of them on every rank, and cannot skip a step without a host sync.

Shapes: N = matrices of one shape, R and C = their rows and columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.policy import Policy
    from training.parallel import Parallel

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # root mean square of an update, in learning rates, as AdamW's usually is (Liu et al. 2025)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: five steps bring all but tiny values near 1
NUM_STEPS = 5
MOST_AT_ONCE = 1 << 25  # weights of a batch, unless every rank has one matrix: more would only take memory


def hidden_matrices(policy: Policy) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices of the trunk's blocks, and those of the head from hidden units to hidden units."""
    of_blocks = [
        weight for block in policy.trunk.blocks for weight in block.parameters() if weight.dim() == 2
    ]
    once = {id(weight): weight for weight in of_blocks}  # blocks of one's own may share weights
    return list(once.values()), [policy.head.market.weight, policy.head.mix.weight]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, R, C) near 1 by Newton-Schulz steps, in their own precision."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(NUM_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW for all parameters but the matrices that it is given.

    Their one moment is ``exp_avg``, as AdamW's first: a training that changes to Muon goes on with it.
    Where ``found_inf`` is 1, as for AdamW's fused kernel, nothing changes.
    """

    found_inf: Tensor  # () on the device, set before every step

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        matrices: Sequence[Sequence[nn.Parameter]],
        parallel: Parallel,
        dtype: torch.dtype,
        **of_adamw: Any,
    ) -> None:
        """Divide the matrices into batches.

        Args:
            groups: of all parameters; the matrices are in the first.
            matrices: some lists of them, each of replicas or of this rank's shards.
            parallel: shares them out among the ranks.
            dtype: to orthogonalise in.
            of_adamw: see torch.optim.AdamW.
        """
        super().__init__(groups, **of_adamw)
        self._parallel, self._dtype = parallel, dtype
        self.matrices = [matrix for part in matrices for matrix in part]
        self._batches: list[list[nn.Parameter]] = []  # of one shape each, and held alike
        for part in matrices:
            by_shape = defaultdict(list)
            for matrix in part:
                by_shape[parallel.whole_shape(matrix)].append(matrix)
            for shape, alike in by_shape.items():
                size = max(parallel.world_size, MOST_AT_ONCE // shape.numel())
                self._batches += [alike[first : first + size] for first in range(0, len(alike), size)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; the matrices lose their gradients (all ranks)."""
        gradients = [[_take_gradient(matrix) for matrix in batch] for batch in self._batches]
        super().step()  # of all that have gradients now
        for batch, of_batch in zip(self._batches, gradients, strict=True):
            self._move(batch, of_batch)

    def _move(self, matrices: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        moments = [self._moment(matrix) for matrix in matrices]
        # A moment that takes itself for its gradient stays as it is, to the bit.
        skipped = self.found_inf > 0
        ahead = [torch.where(skipped, *pair) for pair in zip(moments, gradients, strict=True)]
        torch._foreach_lerp_(moments, ahead, 1.0 - MOMENTUM)
        torch._foreach_lerp_(ahead, moments, MOMENTUM)  # Nesterov's momentum
        ahead = [update.to(self._dtype) for update in ahead]
        updates = [update.float() for update in self._parallel.on_whole(matrices, ahead, orthogonalise)]
        del ahead  # as large as a batch
        group = self.param_groups[0]
        rate = group["lr"] * (1.0 - self.found_inf)
        torch._foreach_mul_(list(matrices), 1.0 - rate * group["weight_decay"])
        size = UPDATE_RMS * math.sqrt(max(self._parallel.whole_shape(matrices[0])))
        torch._foreach_mul_(updates, -rate * size)
        torch._foreach_add_(list(matrices), updates)

    def _moment(self, matrix: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[matrix]
        if not state:
            # AdamW reads the step of every state that it loads; nothing here does.
            state |= {"step": matrix.new_zeros(()), "exp_avg": torch.zeros_like(matrix)}
        return state["exp_avg"]


def _take_gradient(weight: Tensor) -> Tensor:
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    return gradient
