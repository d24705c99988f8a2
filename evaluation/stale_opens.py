"""A warning about bars whose opens are no prices: orders fill at the next open, and there it is the last close."""

from __future__ import annotations

from collections.abc import Sequence

from envs.market import Market
from runtime.wording import first_of

NEARLY_ALL = 0.95  # of real bars at most 0.53, measured on 32 symbols of three markets
LEAST_BARS = 100
VOLUME = 4  # column of Market.quotes


def stale_opens(market: Market, symbols: Sequence[str], start_ns: int, end_ns: int) -> str:
    """Return a warning about symbols where nearly all opens repeat the previous close; empty without any.

    Only bars with trades count.

    Args:
        market: has the bars; waits for its device.
        symbols: to look at.
        start_ns: of the bars.
        end_ns: of the bars, exclusive.
    """
    opens, closes, times = market.quotes[1:, 0], market.quotes[:-1, 1], market.open_time[1:]
    counts = (times >= start_ns) & (times < end_ns) & (market.quotes[1:, VOLUME] > 0)
    repeats = counts & (opens == closes)
    offsets = market.offsets.tolist()
    found = []
    for symbol in symbols:
        number = market.symbols.index(symbol)
        own = slice(offsets[number], offsets[number + 1] - 1)  # pairs of bars of this symbol
        num_bars = int(counts[own].sum())
        if num_bars >= LEAST_BARS and int(repeats[own].sum()) >= NEARLY_ALL * num_bars:
            found.append(symbol)
    if not found:
        return ""
    return (
        f"Nearly all opens of {first_of(found)} repeat the previous close: they are no "
        "prices, nobody could trade at them, and what is earned in the bar after a decision is fiction. Trust "
        "only what is left one bar late, or take bars of another source"
    )
