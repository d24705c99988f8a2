"""backtesting.py as a referee of the ledger: it fills recorded orders at the opens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd


def backtest(
    prices: np.ndarray,
    orders: Sequence[int],
    cash: float,
    rate: float,
    funding: np.ndarray | None = None,
    start: str = "2024-01-01",
    step: str = "min",
) -> pd.Series:
    """Return the statistics of a run; order t fills at ``prices[t]``, for a fee of ``rate``.

    It knows no funding, so its cash pays it: ``funding[t]`` of the value of what is held at ``prices[t]``, before
    the order that fills there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants a notebook when imported
        from backtesting import Backtest, Strategy

    class Recorded(Strategy):
        def init(self):
            pass

        def next(self):
            # An order fills at the next bar's open, and there are two bars at first.
            fill = len(self.data) - 2
            if funding is not None and fill < len(prices):
                self._broker._cash -= self.position.size * prices[fill] * funding[fill]
            if fill < len(orders) and orders[fill] > 0:
                self.buy(size=orders[fill])
            elif fill < len(orders) and orders[fill] < 0:
                self.sell(size=-orders[fill])

    # Two bars in front, since it starts at the second; bar 2 + t opens at prices[t].
    opens = np.concatenate([[prices[0]] * 2, prices])
    close = np.concatenate([opens[1:], opens[-1:]])
    frame = pd.DataFrame(
        {"Open": opens, "High": np.maximum(opens, close), "Low": np.minimum(opens, close), "Close": close},
        index=pd.date_range(start, periods=len(opens), freq=step),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Backtest(frame, Recorded, cash=cash, commission=rate, margin=0.05).run()
