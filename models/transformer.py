"""Causal transformer over market bars: the trunk, with 99.9 % of the weights.

It reads only the market, never the account. Since a position does not change the next bar, one parallel forward
over a segment is all that a whole rollout needs of it (training/rollout.py).

Notable choices: pre-norm RMSNorm without learned gain in attention (QK norm, Henry et al. 2020,
arXiv:2010.04245), rotary positions (Su et al. 2021, arXiv:2104.09864), GELU feed-forward of four widths,
no biases, no dropout (dropout would make the policy of the update differ from that of the rollout; the blocks that
a segment skips in training, stochastic depth, are drawn with the rollout and stay the same). What attention adds
counts a tenth in new policies: where bars are few it learns noise sooner than anything else (docs/LOG.md).

Shapes: B = segments, S = bars of a segment, F = features of a bar, D = d_model, L = num_layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.embedding import FIRST_ENCODING, PiecewiseLinear
from models.linear import Linear

FIRST_SCALE = 1.0  # of attention, in policies that are older than the scale
ATTENTION_SCALE = 0.1  # in new ones


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the trunk."""

    num_features: int  # F, of one bar
    d_model: int  # width of the residual stream
    num_layers: int
    num_heads: int
    max_length: int  # longest segment, bars
    feature_encoding: str = FIRST_ENCODING  # or piecewise, see models/embedding.py
    attention_scale: float = FIRST_SCALE  # of what attention adds to the residual stream

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads or (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} must be num_heads={self.num_heads} times an even number, "
                "since rotary positions rotate pairs"
            )


def rotary_angles(length: int, head_width: int) -> Tensor:
    """Return angles (length, head_width / 2) of rotary positions, base 10,000."""
    # On the CPU whatever the default: on the device "meta", arange alone would import torch's compiler.
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, **exact) / head_width)
    return torch.arange(length, **exact)[:, None] * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of ``x`` (B, heads, S, head_width) by each position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """(..., D) -> (..., D), normalised in float32, returned in the input's precision, on CPUs and GPUs alike."""
    # Autocast on a GPU, not on a CPU, would keep a float32 copy of the input for the backward, and return float32.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps)


def draw_depth(num_segments: int, num_layers: int, chance: float, generator: torch.Generator) -> Tensor:
    """Draw which blocks each segment skips: (B, L), 0 where it does, else 1 over the chance that it does not.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382): the chance grows linearly from 0 below the first block
    to ``chance`` at the last, and what a block adds is the same on average as without it.
    """
    keep = 1.0 - chance * torch.arange(1, num_layers + 1, device=generator.device) / num_layers
    drawn = torch.rand(num_segments, num_layers, generator=generator, device=generator.device)
    return (drawn < keep) / keep


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in the input's precision, with a float32 gain.

    Under bf16 autocast the residual stream is bf16; the gain is cast to it, which keeps the kernel fused.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention with QK norm and rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = config.d_model // config.num_heads
        self.scale = config.attention_scale
        self.qkv = Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: int = 0) -> Tensor:
        """(B, S, D) -> (B, S - first, D): bars before ``first`` are attended to, but have no queries."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, head_width)
        q = rotate(rms_norm(q), cos, sin).type_as(v)
        k = rotate(rms_norm(k), cos, sin).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.scale * self.out(y.transpose(1, 2)[:, first:].reshape(batch, length - first, width))


class Block(nn.Module):
    """Attention, then a feed-forward of four widths; both add to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.up = Linear(config.d_model, 4 * config.d_model, bias=False)
        self.down = Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, first: int = 0, weight: Tensor | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S - first, D): bars before ``first`` are attended to, and then dropped.

        ``weight`` (B,): of what the block adds to each segment; 1 where it is None.
        """
        x = x[:, first:] + _weighed(self.attention(self.attention_norm(x), cos, sin, first), weight)
        return x + _weighed(self.down(F.gelu(self.up(self.feed_forward_norm(x)))), weight)


def _weighed(added: Tensor, weight: Tensor | None) -> Tensor:
    return added if weight is None else weight[:, None, None].type_as(added) * added


class Trunk(nn.Module):
    """Bars in, one vector per bar out; the vector of bar t depends on bars up to t only."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # recompute blocks in the backward instead of keeping activations: less memory
        embedding = PiecewiseLinear if config.feature_encoding == "piecewise" else Linear
        self.embed = embedding(config.num_features, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model)
        angles = torch.empty(config.max_length, config.d_model // config.num_heads // 2)
        # Not persistent: derived from the configuration, so that checkpoints hold only weights.
        self.register_buffer("cos", angles, persistent=False)
        self.register_buffer("sin", angles.clone(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights; layers that write to the residual stream shrink with depth, as in GPT-2.

        Fills rotary angles and edges, too, for a trunk that was made without memory.
        """
        if self.embed.weight.is_meta:  # where normal_ would import torch's compiler, for seconds
            return
        angles = rotary_angles(self.config.max_length, self.config.d_model // self.config.num_heads)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        if isinstance(self.embed, PiecewiseLinear):
            self.embed.fill_edges()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
        shrink = 1.0 / math.sqrt(2 * self.config.num_layers)
        for module in self.modules():
            if isinstance(module, Block):
                for writer in (module.attention.out, module.down):
                    nn.init.normal_(writer.weight, std=shrink / math.sqrt(writer.in_features))
        nn.init.zeros_(self.embed.bias)

    def forward_flops(self, length: int, num_last: int | None = None) -> int:
        """Count the floating-point operations of one ``forward`` over one segment.

        Two per matrix weight and bar, plus two products of queries, keys and values, of which a causal model needs
        half (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); a backward takes twice as many.
        """
        width, layers = self.config.d_model, self.config.num_layers
        weights = self.embed.in_features * width + layers * 12 * width**2
        skipped = length - (length if num_last is None else num_last)
        # The last feed-forward, and the output projection of the last attention.
        saved = skipped * 9 * width**2
        return 2 * (length * weights - saved) + layers * 2 * length**2 * width

    def forward(self, bars: Tensor, num_last: int | None = None, depth: Tensor | None = None) -> Tensor:
        """Normalised features (B, S, F) -> hidden (B, S, D) float32; S at most ``max_length``.

        With ``num_last``, only the last ``num_last`` bars, (B, num_last, D): the last layer skips the others after
        its attention. ``depth`` (B, L) weighs what each block adds to each segment, see ``draw_depth``.

        Raises:
            ValueError: the segment is longer than ``max_length``, or has another number of features.
        """
        length = bars.shape[1]
        if length > self.config.max_length or bars.shape[2] != self.config.num_features:
            raise ValueError(
                f"bars must be (B, S <= {self.config.max_length}, {self.config.num_features}), "
                f"was {tuple(bars.shape)}"
            )
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed(bars)
        firsts = [0] * (len(self.blocks) - 1) + [0 if num_last is None else length - num_last]
        weights = [None] * len(firsts) if depth is None else depth.unbind(1)
        for block, first, weight in zip(self.blocks, firsts, weights, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, cos, sin, first, weight, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin, first, weight)
        return self.norm(x.float())
