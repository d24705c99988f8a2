"""Ensemble: several policies that decide together, by the average of their probabilities.

Members may differ in size, in context, and in the scale of their features. A segment has the longest context and,
side by side, all scales; each member reads its part.

Shapes: as in models/policy.py; F = features of one scale, G = scales, W = widths of all heads together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.policy import Head, Policy


@dataclass(frozen=True)
class View:
    """What a member reads of a segment."""

    skipped_bars: int  # at its beginning, where the member's context is shorter than the longest
    scale: int  # place of its features among the scales


@dataclass(frozen=True)
class EnsembleHead:
    """The heads of all members, in the place of one."""

    heads: tuple[Head, ...]

    def decide(self, projected: Tensor, account: Tensor) -> tuple[Tensor, Tensor]:
        """Join the market's parts of all heads (..., W) with account observations (..., A).

        Returns:
            The log of the mean probability of every position (..., K), and the mean value (...,), both float32;
            of a single member its own logits.
        """
        parts = projected.split([head.market.out_features for head in self.heads], dim=-1)
        decided = [head.decide(part, account) for head, part in zip(self.heads, parts, strict=True)]
        if len(decided) == 1:
            return decided[0]
        log_policies = torch.stack([torch.log_softmax(logits, dim=-1) for logits, _ in decided])
        values = torch.stack([value for _, value in decided])
        return log_policies.logsumexp(dim=0) - math.log(len(decided)), values.mean(dim=0)


class Ensemble(nn.Module):
    """Several trained policies, used like one; each computes in its own precision."""

    def __init__(self, members: Sequence[Policy], views: Sequence[View]) -> None:
        """``views[i]`` is what ``members[i]`` reads."""
        super().__init__()
        self.members = nn.ModuleList(members)
        self.views = tuple(views)

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any], precision_of: Callable[[str], str]) -> Ensemble:
        """Build one with fresh weights from what ``sizes`` returned, with a ``precision`` in each member."""
        members = [Policy.from_sizes(own, precision_of(own["precision"])) for own in sizes["members"]]
        return cls(members, [View(**own["view"]) for own in sizes["members"]])

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes as plain types, for exports."""
        return {
            "members": [
                member.sizes | {"view": asdict(view)}
                for member, view in zip(self._policies, self.views, strict=True)
            ]
        }

    @property
    def head(self) -> EnsembleHead:
        """What joins encoded bars with accounts."""
        return EnsembleHead(tuple(member.head for member in self._policies))

    @property
    def num_features(self) -> int:
        """Columns of a bar, G x F."""
        return self._policies[0].num_features * (1 + max(view.scale for view in self.views))

    @property
    def num_account_features(self) -> int:
        """A."""
        return self._policies[0].num_account_features

    @property
    def min_length(self) -> int:
        """The shortest segment, in bars."""
        return max(
            member.min_length + view.skipped_bars
            for member, view in zip(self._policies, self.views, strict=True)
        )

    @property
    def max_length(self) -> int:
        """The longest segment, in bars."""
        return min(
            member.max_length + view.skipped_bars
            for member, view in zip(self._policies, self.views, strict=True)
        )

    def encode(self, bars: Tensor, num_decisions: int) -> Tensor:
        """Let each member encode its part of the segments: (B, S, G x F) -> (B, T, W), T = ``num_decisions``."""
        encoded = []
        for member, view in zip(self._policies, self.views, strict=True):
            first = view.scale * member.num_features
            own = bars[:, view.skipped_bars :, first : first + member.num_features]
            encoded.append(member.encode(own, num_decisions))
        return torch.cat(encoded, dim=-1)

    def forward(self, bars: Tensor, accounts: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate all decisions of whole segments at once, as a policy does."""
        return self.head.decide(self.encode(bars, accounts.shape[1]), accounts)

    def num_parameters(self) -> int:
        """Count the weights."""
        return sum(member.num_parameters() for member in self._policies)

    @property
    def _policies(self) -> list[Policy]:
        return [member for member in self.members if isinstance(member, Policy)]


Decider = Policy | Ensemble
