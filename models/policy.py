"""Policy: the trunk over the market, and a small head that joins its output with the account.

A rollout evaluates only the head step by step. It is float32 throughout and never autocast to bf16, since PPO's
ratio comes from a difference of log-probabilities. On GPUs its matrix products are TF32, like all float32 ones
there (training/distributed.py): 10 bits of mantissa, the same in rollout and update.

Shapes: B = segments, S = bars of a segment, T = decisions (the last T bars of the segment),
D = d_model, A = account features, K = target positions, W = width of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fp8
from models.linear import Linear
from models.own import OwnTrunk
from models.transformer import TransformerConfig, Trunk

BF16_CAPABILITY = (8, 0)  # Ampere


class Head(nn.Module):
    """Account-aware actor and critic on top of the trunk's output.

    ``project`` is the market's part and runs once, in parallel, for all bars of a segment; ``decide`` adds the
    account, two small layers per step.
    """

    def __init__(self, d_model: int, num_account_features: int, num_positions: int) -> None:
        super().__init__()
        width = min(256, d_model)
        self.market = Linear(d_model, width)
        self.account = Linear(num_account_features, width, bias=False)
        self.mix = Linear(width, width)
        self.logits = nn.Linear(width, num_positions)
        self.value = nn.Linear(width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the last layers: an untrained policy is undecided and expects nothing."""
        for layer in (self.logits, self.value):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project(self, hidden: Tensor) -> Tensor:
        """Trunk output (..., D) -> the market's part of the head (..., W)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.market(hidden.float())

    def decide(self, projected: Tensor, account: Tensor) -> tuple[Tensor, Tensor]:
        """Join the market's part (..., W) with account observations (..., A).

        Returns:
            logits (..., K) over target positions and value (...,), both float32. The value is in units of
            scaled reward.
        """
        with torch.autocast(projected.device.type, enabled=False):
            x = F.silu(projected + self.account(account))
            x = x + F.silu(self.mix(x))
            return self.logits(x), self.value(x).squeeze(-1)

    def choose(self, account: Tensor, projected: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample a target position by the Gumbel-max trick: the argmax of log-probability plus ``noise``.

        Args:
            account: (..., A) observations.
            projected: (..., W) the market's part.
            noise: (..., K) Gumbel noise; zeros select the most likely position.

        Returns:
            index of the position (...,) int64, log-probability of every position (..., K), and value (...,).
        """
        logits, value = self.decide(projected, account)
        log_policy = torch.log_softmax(logits, dim=-1)
        return (log_policy + noise).argmax(dim=-1), log_policy, value


def precision_on(device: torch.device, wanted: str, capability: tuple[int, int] | None = None) -> str:
    """Return the precision of a trunk on a device: fp32, bf16 or fp8.

    Args:
        device: of the trunk.
        wanted: the setting. "auto" is bf16 on GPUs that compute it, else fp32: those below 8.0 emulate it. Where
            fp8 would take kernels that a GPU lacks, which training refuses, bf16 comes nearest.
        capability: the GPU's compute capability; by default that of ``device``.
    """
    if device.type != "cuda" or wanted not in ("auto", "fp8"):
        return "fp32" if wanted == "auto" else wanted
    capability = capability or torch.cuda.get_device_capability(device)
    if wanted == "auto":
        return "bf16" if capability >= BF16_CAPABILITY else "fp32"
    return "bf16" if wanted == "fp8" and not fp8.has_kernels(capability) else wanted


class Policy(nn.Module):
    """Actor and critic of one trading account: logits over target positions, and value."""

    def __init__(
        self,
        config: TransformerConfig,
        num_account_features: int,
        num_positions: int,
        precision: str = "fp32",
        own_model: Mapping[str, str] | None = None,
    ) -> None:
        """Draw fresh weights.

        Args:
            config: of the trunk.
            num_account_features, num_positions: A and K.
            precision: of the trunk, see precision_on; with fp8 blocks multiply in it, and the rest is bf16.
            own_model: what models.own.identify_own returned, where the trunk is no transformer.

        Raises:
            OwnModelError: models/own_model.py has another model, or none.
        """
        super().__init__()
        self.trunk: Trunk | OwnTrunk = OwnTrunk(config, own_model) if own_model else Trunk(config)
        self.head = Head(config.d_model, num_account_features, num_positions)
        self.precision = precision
        for module in self.trunk.modules():
            if isinstance(module, Linear) and module.bias is None:
                module.in_fp8 = precision == "fp8"

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any], precision: str = "fp32") -> Policy:
        """Build a policy with fresh weights from what ``sizes`` returned; other entries are ignored."""
        trunk = TransformerConfig(**sizes["trunk"])
        others = sizes["num_account_features"], sizes["num_positions"]
        return cls(trunk, *others, precision, sizes.get("own_model"))

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes as plain types, for checkpoints and exports."""
        own = {"own_model": self.trunk.identity} if isinstance(self.trunk, OwnTrunk) else {}
        return {
            "trunk": asdict(self.trunk.config),
            "num_account_features": self.head.account.in_features,
            "num_positions": self.head.logits.out_features,
        } | own

    @property
    def num_features(self) -> int:
        """F."""
        return self.trunk.config.num_features

    @property
    def num_account_features(self) -> int:
        """A."""
        return self.head.account.in_features

    @property
    def min_length(self) -> int:
        """The shortest segment that is of use, in bars."""
        return 2

    @property
    def max_length(self) -> int:
        """The longest segment, in bars."""
        return self.trunk.config.max_length

    @property
    def dtype(self) -> torch.dtype:
        """Of what passes between the trunk's blocks; fp8 is for their products alone."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Return the context for the trunk: bf16 unless it is fp32; weights and head stay float32."""
        if self.precision == "fp32":
            return nullcontext()
        # Every weight is used once per forward, and a cache would keep its bf16 copy until the end.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)

    def hidden(self, bars: Tensor, num_decisions: int, depth: Tensor | None = None) -> Tensor:
        """Run the trunk in its precision: (B, S, F) -> (B, T, D) float32, T = ``num_decisions``.

        ``depth`` (B, L): the blocks that each segment of a training skips, see ``transformer.draw_depth``.
        """
        more = () if depth is None else (depth,)
        with self.autocast(bars.device):
            hidden: Tensor = self.trunk(bars, num_decisions, *more)
        return hidden

    def encode(self, bars: Tensor, num_decisions: int) -> Tensor:
        """Run the trunk and the market's part of the head: (B, S, F) -> (B, T, W), T = ``num_decisions``."""
        return self.head.project(self.hidden(bars, num_decisions))

    def forward(self, bars: Tensor, accounts: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate all decisions of whole segments at once.

        Args:
            bars: (B, S, F) normalised features.
            accounts: (B, T, A) account observations at the last T bars.

        Returns:
            logits (B, T, K) and values (B, T), float32.
        """
        return self.head.decide(self.encode(bars, accounts.shape[1]), accounts)

    def num_parameters(self) -> int:
        """Count the weights."""
        return sum(parameter.numel() for parameter in self.parameters())
