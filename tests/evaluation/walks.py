"""Walks by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.exam import Walk


def walk_of(
    log_returns: Sequence[float],
    hours: Sequence[float] | None = None,
    symbol: str = "AAA",
    asset_class: str = "crypto",
    position: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
    traded: Sequence[float] | None = None,
    borrowing: Sequence[float] | None = None,
    funding: Sequence[float] | None = None,
) -> Walk:
    """A walk; decisions fill ``hours`` after 2026-01-05 00:00 UTC, or once a day at noon."""
    length = len(log_returns)
    hours = np.arange(length) * 24.0 + 12.0 if hours is None else np.asarray(hours)
    time = np.datetime64("2026-01-05T00:00", "ns") + (hours * 3_600 * 10**9).astype("timedelta64[ns]")

    def column(values: Sequence[float] | None, default: float) -> np.ndarray:
        return np.full(length, default) if values is None else np.asarray(values, dtype=np.float64)

    return Walk(
        symbol,
        asset_class,
        time,
        np.full(length, 100.0),
        column(position, 1.0),
        np.asarray(log_returns, dtype=np.float64),
        column(costs, 0.0),
        column(traded, 0.0),
        column(borrowing, 0.0),
        None if funding is None else column(funding, 0.0),
    )


def of_daily(*returns: float, **given: object) -> Walk:
    """A walk with one decision a day, with these simple returns."""
    return walk_of(np.log1p(np.array(returns)), **given)
