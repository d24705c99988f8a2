"""The trades of a walk: from the fill that opens a position on one side to the fill that leaves that side.

Money is exact: every change of an account's equity belongs to one trade, so that the net of all trades is what the
account earned, to rounding. Where one order turns a position round, its fee is divided by the value that it closed
and the value that it opened. Shapes: T = decisions of a walk, n = trades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from evaluation.exam import Walk

MINUTE = np.timedelta64(60, "s")
LEAST_LOSS = 1e-9  # of a ruin; what is smaller is a rounding error
# How a trade ended: by a decision; by ruin or liquidation; bars were missing, and the account went on in cash; or
# the days were over, and the trade is open still.
DECISION, RUIN, HOLE, OPEN = "decision", "ruin", "hole", "open"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trades:
    """Columns of n trades. Money is a fraction of the money at the start, of the pool where there is one."""

    symbol: NDArray[np.str_]
    side: NDArray[np.int8]  # 1 long, -1 short
    entry: NDArray[np.datetime64]  # ns UTC
    exit: NDArray[np.datetime64]
    entry_price: Floats
    exit_price: Floats
    size: Floats  # largest value held, as a fraction of the account's equity
    gross: Floats  # before costs and funding
    costs: Floats  # fees, slippage and borrowing
    funding: Floats  # paid less received
    net: Floats  # gross less costs less funding
    gain: Floats  # net, as a fraction of the account's equity at the entry
    ended_by: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.symbol)

    @property
    def minutes(self) -> Floats:
        """How long each was held."""
        return np.asarray((self.exit - self.entry) / MINUTE, dtype=np.float64)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Trades:
        """Return some of them."""
        return Trades(*(getattr(self, field.name)[chosen] for field in fields(self)))


def trades_of(walks: Sequence[Walk]) -> Trades:
    """Return the trades of a pool of walks, by their entry; each walk began with an equal share of the money."""
    parts = [_trades_of(walk, 1.0 / len(walks)) for walk in walks]
    joined = Trades(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Trades))
    )
    return joined.where(np.lexsort((joined.symbol, joined.entry)))


def money_earned(walk: Walk) -> Floats:
    """Return what each decision earned, (T,), as a fraction of the account's money at the start."""
    return walk.equity_before * np.expm1(walk.log_returns)


def _trades_of(walk: Walk, share: float) -> Trades:
    """Return the trades of one account, whose money is this share of the pool's."""
    equity, earned = walk.equity_before, money_earned(walk)
    next_time, next_price = _ends(walk)
    fee = equity * (walk.costs - walk.borrowing)
    funding = equity * (0.0 if walk.funding is None else walk.funding)

    from_cash = np.ones(len(equity), np.bool_)
    from_cash[1:] = next_time[:-1] != walk.time[1:]  # after a hole
    side = np.sign(walk.position).astype(np.int8)
    before = np.where(from_cash, 0, np.roll(side, 1))
    # A ruined account holds nothing afterwards; in cash, it would have lost its fee alone.
    ruined = (side == 0) & (np.abs(earned + fee) > LEAST_LOSS)
    side = np.where(ruined, np.where(before == 0, np.sign(walk.price - next_price), before), side).astype(
        np.int8
    )
    before = np.where(from_cash, 0, np.roll(side, 1))
    changes = side != before
    # Of an order that turns a position round, what it opened; the rest of what it traded was closed.
    opened = np.abs(walk.position) * (1.0 - walk.costs + walk.borrowing)
    closed = np.where(changes & (before != 0), np.maximum(walk.traded - opened, 0.0), 0.0)
    parts = np.divide(closed, walk.traded, out=np.zeros(len(side)), where=walk.traded > 0)
    closing_fee = fee * np.minimum(parts, 1.0)

    first = np.flatnonzero(changes & (side != 0))
    held = side != 0
    number = np.cumsum(changes & held) - 1  # of the newest trade; where nothing is held, the one before
    # What a decision without a position earned is the cost of leaving the one before it.
    left = changes & (before != 0)
    leaver = np.where(held, number - 1, number)[left]

    def by_trade(holding: Floats, leaving: Floats) -> Floats:
        total: Floats = np.bincount(number[held], holding[held], len(first)).astype(np.float64)
        total += np.bincount(leaver, leaving[left], len(first))
        return share * total

    turned_round = closing_fee * held
    net = by_trade(earned + turned_round, np.where(held, -closing_fee, earned))
    costs = by_trade(equity * walk.costs - turned_round, np.where(held, closing_fee, equity * walk.costs))
    paid = by_trade(funding, np.zeros(len(side)))

    last = np.flatnonzero(held & np.append(changes[1:] | from_cash[1:], True))
    follows = np.minimum(last + 1, len(side) - 1)
    ended_by = np.full(len(first), DECISION, dtype="<U8")
    ended_by[from_cash[follows]] = HOLE
    ended_by[last == len(side) - 1] = OPEN
    ended_by[ruined[last]] = RUIN
    sizes = np.maximum.reduceat(np.abs(walk.position), first) if len(first) else np.zeros(0)
    return Trades(
        symbol=np.full(len(first), walk.symbol),
        side=side[first],
        entry=walk.time[first],
        exit=next_time[last],
        entry_price=walk.price[first],
        exit_price=next_price[last],
        size=sizes,
        gross=net + costs + paid,
        costs=costs,
        funding=paid,
        net=net,
        gain=net / (share * equity[first]),
        ended_by=ended_by,
    )


def _ends(walk: Walk) -> tuple[NDArray[np.datetime64], Floats]:
    """Return time and price of the next open after each fill, (T,) each."""
    if walk.next_time is not None and walk.next_price is not None:
        return walk.next_time, walk.next_price
    return np.append(walk.time[1:], walk.time[-1:] + MINUTE), np.append(walk.price[1:], walk.price[-1:])
