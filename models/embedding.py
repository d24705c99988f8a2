"""Bars into the residual stream of the transformer.

Shapes: F = features of a bar, K = intervals between EDGES, D = d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.linear import Linear

FIRST_ENCODING = "linear"  # all that there was before there were others
EDGES = (-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0)  # of normalised features, whose deviation is 1


class PiecewiseLinear(Linear):
    """(..., F) -> (..., D), linear in each feature and in how far it is through each interval between EDGES.

    Piecewise-linear encoding (Gorishniy et al. 2022, "On embeddings for numerical features in tabular deep
    learning", arXiv:2203.05556): a small network treats a feature's tails otherwise than its middle, as trees do.
    Edges are fixed, and not quantiles of the data, since features are normalised already.
    """

    def __init__(self, num_features: int, d_model: int) -> None:
        super().__init__(num_features * len(EDGES), d_model)
        # Not persistent: derived, so that checkpoints hold only weights.
        self.register_buffer("edges", torch.empty(len(EDGES)), persistent=False)
        self.edges: Tensor

    def fill_edges(self) -> None:
        """Fill the buffer of a layer that was made without memory."""
        self.edges.copy_(torch.tensor(EDGES, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., D)."""
        return super().forward(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., F * (1 + K)): each feature, then -1 before an interval to 1 behind it."""
        low, high = self.edges[:-1], self.edges[1:]
        place = ((x[..., None] - low) / (high - low)).clamp(0.0, 1.0)
        return torch.cat((x[..., None], 2.0 * place - 1.0), dim=-1).flatten(-2)
