"""Which bars an exam scored: a digest of all of them, and one of each day that was over.

The bars of a day may change after an exam has scored it: a file of Polygon's takes the place of Yahoo's minutes,
a vendor corrects itself, a source that was down has sent the rest. The earlier exam's line in the ledger stays; a
later one knows by the digests, and says, which days it scored on other bars.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_sources.bars import DAY_NS
from envs.market import Market

# Of Market.quotes, where it has them; the other is the distance of the next bar, which may be a later day's.
SCORED = (0, 1, 3, 4, 5)


@dataclass(frozen=True)
class Revision:
    """``digest``: of all scored bars, 16 hex digits; ``days``: of each UTC day, with its number of symbols."""

    digest: str
    days: dict[str, str]

    def days_changed_since(self, lines: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the days that the newest earlier exam of as many symbols scored on other bars.

        Args:
            lines: of the ledger, oldest first; those of before digests were kept say nothing.
        """
        known: dict[tuple[str, str], str] = {}
        for line in lines:
            known |= {(day, _count(digest)): digest for day, digest in line.get("bars", {}).items()}
        return [
            day for day, digest in self.days.items() if known.get((day, _count(digest)), digest) != digest
        ]


def revision_of(market: Market, start_ns: int, end_ns: int) -> Revision:
    """Read the bars of [start_ns, end_ns), and the whole days that it touches, back from the device.

    Args:
        market: has the bars, older ones too.
        start_ns: of the first decision.
        end_ns: of the bars; a day that ends later is not over, and only in the digest of all.
    """
    whole = hashlib.sha256()
    days: dict[int, Any] = {}
    counts: Counter[int] = Counter()
    first_ns = start_ns // DAY_NS * DAY_NS
    offsets = market.offsets.tolist()
    edges = torch.tensor([first_ns, start_ns, max(start_ns, end_ns)], device=market.open_time.device)
    for symbol, first, last in zip(market.symbols, offsets, offsets[1:], strict=False):
        low, scored, high = torch.searchsorted(market.open_time[first:last].contiguous(), edges).tolist()
        span = slice(first + low, first + high)
        time = market.open_time[span].cpu().numpy()
        quotes = np.ascontiguousarray(
            market.quotes[span].cpu().numpy()[:, SCORED[: market.quotes.shape[1] - 1]]
        )
        whole.update(symbol.encode() + time[scored - low :].tobytes() + quotes[scored - low :].tobytes())
        starts = np.flatnonzero(np.diff(time // DAY_NS, prepend=-1))
        for begin, end in itertools.pairwise([*starts, len(time)]):
            day = int(time[begin]) // DAY_NS
            if (day + 1) * DAY_NS <= end_ns:
                digest = days.setdefault(day, hashlib.sha256())
                digest.update(symbol.encode() + time[begin:end].tobytes() + quotes[begin:end].tobytes())
                counts[day] += 1
    return Revision(
        whole.hexdigest()[:16],
        {str(np.datetime64(day, "D")): f"{days[day].hexdigest()[:12]}-{counts[day]}" for day in sorted(days)},
    )


def _count(digest: str) -> str:
    return digest.rpartition("-")[2]
