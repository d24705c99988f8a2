"""Funding that is known only after its bar was booked: what accounts were charged there, and what is due since.

A row of funding may come hours late, or correct the rate that was charged for it. So an account keeps what it held
wherever funding may be due, and where it stands next it pays, or gets back, what the bars say otherwise by then.

Shapes: B = bars of a walk, N = accounts, ... = symbols of each, if it has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import DAY_NS, HOUR_NS, MINUTE_NS
from envs.market import NUM_QUOTES, Market

KEPT_NS = 2 * DAY_NS  # a refresh asks again for the rows of a day
KEPT_MINUTES = KEPT_NS // MINUTE_NS


class Charge(NamedTuple):
    """What an account was charged from the charge before it, which the first one lacks, up to a bar."""

    time_ns: int  # at which the bar opened
    rate: float  # sum of the rates
    value: float  # at the bar's open of what was held until then, below 0 when short


Charges = tuple[Charge, ...]


class SymbolFunding:
    """The funding of a symbol, by the bars as they are now."""

    def __init__(self, market: Market, number: int) -> None:
        self._market = market
        self._first, self._end = market.offsets[number : number + 2].tolist()
        self.is_known = market.has_funding and bool(market.quotes[self._first : self._end, NUM_QUOTES].any())
        # Of a perpetual future a first row may still come.
        self.is_due = self.is_known or market.asset_classes[number] == "perpetual"

    def of(
        self, bars: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return when bars of the market opened, ns UTC, their opens and their rates, (B,) each."""
        where = torch.from_numpy(bars).to(self._market.device)
        quotes = self._market.quotes[where].double().cpu().numpy()
        rates = quotes[:, NUM_QUOTES] if self.is_known else np.zeros(len(bars))
        return self._market.open_time[where].cpu().numpy(), quotes[:, 0], rates

    def between(self, times: Sequence[int]) -> list[float | None]:
        """Return the sum of the rates after each time up to the next one; None where bars do not reach back."""
        if not self.is_known or len(times) < 2:
            return [0.0] * (len(times) - 1)
        own = self._market.open_time[self._first : self._end].contiguous()
        edges = torch.searchsorted(own, torch.tensor(times, device=own.device), right=True).tolist()
        span = slice(self._first + edges[0], self._first + edges[-1])
        rates = self._market.quotes[span, NUM_QUOTES].double().cpu().numpy()
        return [
            float(rates[low - edges[0] : high - edges[0]].sum()) if low else None
            for low, high in pairwise(edges)
        ]


def settle(charges: Charges, funding: SymbolFunding, until_ns: int) -> tuple[float, Charges]:
    """Return what is due of the charges up to a time, below 0 if money comes back, and these as they are then.

    Where no funding at all is known of the symbol now, its ledger was lost, and nothing is due.
    """
    kept = tuple(charge for charge in charges if charge.time_ns <= until_ns)
    if not funding.is_known:
        return 0.0, kept
    due, settled = 0.0, list(kept[:1])
    for charge, rate in zip(kept[1:], funding.between([each.time_ns for each in kept]), strict=True):
        now = charge if rate is None else charge._replace(rate=rate)
        due += (now.rate - charge.rate) * charge.value
        settled.append(now)
    return due, tuple(settled)


def add_charges(
    charges: Charges, funding: SymbolFunding, bars: NDArray[np.int64], units: NDArray[np.float64]
) -> Charges:
    """Return the charges of the newest days, after a walk over bars at whose opens funding was charged.

    Kept are the first bar of each hour, at which exchanges charge, others with funding, and the newest two, where
    the account stands.

    Args:
        charges: before the walk, settled.
        funding: of the symbol.
        bars: (B,) of the market, in the order of the walk; those that came before, and -1, are ignored.
        units: (B,) held until then.
    """
    if not funding.is_due:
        return ()
    is_new = bars > np.maximum.accumulate(np.append(-1, bars))[:-1]
    times, opens, rates = funding.of(bars[is_new])
    is_later = times > (charges[-1].time_ns if charges else -1)
    has_rate = np.append([charge.rate != 0 for charge in charges], rates[is_later] != 0).astype(bool)
    values = np.append([charge.value for charge in charges], (units[is_new] * opens)[is_later])
    times = np.append(np.array([charge.time_ns for charge in charges], np.int64), times[is_later])
    if not len(times):
        return ()
    keeps = has_rate | (np.diff(times // HOUR_NS, prepend=-1) != 0)
    keeps[-2:] = True
    keeps &= times >= times[-1:] - KEPT_NS
    known = {charge.time_ns: charge.rate for charge in charges}
    stamps = times[keeps].tolist()
    sums = [0.0, *(rate or 0.0 for rate in funding.between(stamps))]
    return tuple(
        Charge(time, known.get(time, rate), value)
        for time, rate, value in zip(stamps, sums, values[keeps].tolist(), strict=True)
    )


class HeldUnits:
    """What accounts held before and after the fill of each decision of a walk, of the newest days."""

    def __init__(self, num_decisions: int, units: Tensor) -> None:
        """``units``: (N, ...) as those to come."""
        self._kept = units.new_zeros(min(num_decisions, KEPT_MINUTES), 2, *units.shape)

    def put(self, decision: int, decides: Tensor, before: Tensor, after: Tensor) -> None:
        """Take the units, (N, ...) each, of those that made this decision, (N,) bool."""
        kept = self._kept[decision % len(self._kept)]
        where = decides.view(-1, *[1] * (before.dim() - 1))
        kept.copy_(torch.where(where, torch.stack((before, after)), kept))

    def newest(self, account: int, num_decisions: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the numbers of an account's newest decisions, and what it held, (2, ...) each."""
        numbers = np.arange(max(0, num_decisions - len(self._kept)), num_decisions)
        kept = self._kept[torch.from_numpy(numbers % len(self._kept)), :, account]
        return numbers, kept.double().cpu().numpy()
