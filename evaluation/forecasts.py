"""Forecasts of moves after the next open, by models that fit in seconds: what the features are worth to anyone.

A decision after bar t fills at the open of bar t + 1, so a move over h bars goes from that open to the one of bar
t + 1 + h. Both models read the features of the market, whichever are registered, and are fitted to moves in the
symbol's volatility, clipped, so that no symbol and no crash decides alone.
Shapes: B = bars of all symbols, F = features, K = horizons, n = rows (bars that are fitted or forecast).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.ahead import HORIZONS, LARGEST_MOVE
from envs.market import Market

RIDGE, TREES = "ridge", "trees"
PENALTY = 0.01  # of ridge, per row, on coefficients of features with variance 1
CHUNK_ROWS = 1 << 16
MOST_TREE_ROWS = 500_000  # of a fit; of more, every second, third ... row
NUM_TREES, LEAST_LEAF_ROWS = 150, 500
TREE_SETTINGS = {
    "objective": "l2",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}

Fit = Callable[[Market, Tensor, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class BarTable:
    """What fills and forecasts need of a market's bars, on the host: (B,) each."""

    open_time: NDArray[np.int64]
    price: NDArray[np.float64]  # open
    symbol: NDArray[np.int64]
    stretch_last: NDArray[np.int64]  # last bar of the bar's stretch; -1 beyond the market's end
    volatility: NDArray[np.float64]  # of the bar's symbol, a log return

    @staticmethod
    def of(market: Market) -> BarTable:
        """Copy them from the device."""
        offsets, first, last = (
            tensor.cpu().numpy() for tensor in (market.offsets, market.stretch_first, market.stretch_last)
        )
        sizes = np.diff(offsets)
        ends = np.full(offsets[-1], -1)
        for begin, end in zip(first, last, strict=True):
            ends[begin : end + 1] = end
        return BarTable(
            market.open_time.cpu().numpy(),
            market.quotes[:, 0].double().cpu().numpy(),
            np.repeat(np.arange(len(sizes)), sizes),
            ends,
            np.repeat(market.volatility.double().cpu().numpy(), sizes),
        )

    def moves(self, horizon: int, late: int = 0) -> NDArray[np.float64]:
        """Return the log move over ``horizon`` bars from the fill after each bar, (B,); NaN where bars end.

        Args:
            horizon: bars.
            late: bars by which the order comes late.
        """
        result = np.full(len(self.price), np.nan)
        entry = np.arange(len(self.price)) + 1 + late
        bars = np.flatnonzero(entry + horizon <= self.stretch_last)
        result[bars] = np.log(self.price[entry[bars] + horizon] / self.price[entry[bars]])
        return result

    def rows_before(self, time_ns: int, horizon: int) -> NDArray[np.int64]:
        """Return the bars whose moves over ``horizon`` bars are all over before a time, (n,)."""
        last = np.arange(len(self.price)) + 1 + horizon
        rows = np.flatnonzero(last <= self.stretch_last)
        return rows[self.open_time[last[rows]] < time_ns]

    def rows_between(self, start_ns: int, end_ns: int) -> NDArray[np.int64]:
        """Return the bars in [start_ns, end_ns) after which a position can be filled and valued, (n,)."""
        bars = np.arange(len(self.price))
        inside = (self.open_time >= start_ns) & (self.open_time < end_ns)
        return np.flatnonzero(inside & (bars + 2 <= self.stretch_last))


def targets_of(table: BarTable, rows: NDArray[np.int64], horizons: Sequence[int] = HORIZONS) -> Tensor:
    """Return what the models are fitted to: moves in volatilities, clipped, (n, K) float64."""
    moves = np.stack([table.moves(horizon)[rows] for horizon in horizons], axis=1)
    scale = table.volatility[rows, None] * np.sqrt(horizons)
    return torch.from_numpy(np.clip(moves / scale, -LARGEST_MOVE, LARGEST_MOVE))


def forecasts_of(
    forecast: Callable[[Tensor], Tensor],
    table: BarTable,
    rows: NDArray[np.int64],
    horizons: Sequence[int] = HORIZONS,
) -> NDArray[np.float32]:
    """Return a fitted model's forecasts after given bars as log moves, (n, K)."""
    scale = table.volatility[rows, None] * np.sqrt(horizons)
    return (forecast(torch.from_numpy(rows)).cpu().numpy() * scale).astype(np.float32)


# --- ridge ----------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Sums from which a linear regression follows: rows, features, targets and their products; float64."""

    count: int
    features: Tensor  # (F,)
    targets: Tensor  # (K,)
    squares: Tensor  # (F, F)
    products: Tensor  # (F, K)

    @staticmethod
    def measure(chunks: Iterator[tuple[Tensor, Tensor]]) -> Moments:
        """Add up chunks of features (c, F) and targets (c, K), one at a time."""
        total: Moments | None = None
        for features, targets in chunks:
            part = Moments(
                len(features), features.sum(0), targets.sum(0), features.T @ features, features.T @ targets
            )
            total = part if total is None else total + part
        if total is None:
            raise ValueError("there is no row to fit to")
        return total

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(self._sums(), other._sums(), strict=True)))

    def _sums(self) -> tuple[Any, ...]:
        return self.count, self.features, self.targets, self.squares, self.products

    def solve(self, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
        """Return the ridge coefficients (F, K) and intercepts (K,), from the normal equations.

        The penalty is on coefficients of features with variance 1; what never varies has the coefficient 0.
        """
        mean, target_mean = self.features / self.count, self.targets / self.count
        covariance = self.squares / self.count - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0.0).sqrt()
        varies = deviation > 1e-6
        scale = torch.where(varies, deviation, 1.0).reciprocal() * varies
        correlation = covariance * torch.outer(scale, scale)
        correlation.diagonal().add_(penalty)
        with_target = scale[:, None] * (self.products / self.count - torch.outer(mean, target_mean))
        coefficients = scale[:, None] * torch.linalg.solve(correlation, with_target)
        return coefficients, target_mean - mean @ coefficients


def fit_ridge(market: Market, rows: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a ridge regression in closed form, on float64 normal equations summed up in chunks."""
    moments = Moments.measure(_chunks(market, rows, targets))
    coefficients, intercept = moments.solve()

    def forecast(rows: Tensor) -> Tensor:
        parts = [features @ coefficients + intercept for features in _features(market, rows)]
        return torch.cat([part.float() for part in parts])

    return forecast


def _chunks(market: Market, rows: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    parts = targets.split(CHUNK_ROWS)
    for features, part in zip(_features(market, rows), parts, strict=True):
        yield features, part.to(features)


def _features(market: Market, rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(CHUNK_ROWS):
        yield market.features[part.to(market.device)].double()


# --- boosted trees --------------------------------------------------------------------------------------------


def import_lightgbm() -> ModuleType | None:
    """Return lightgbm, which is no dependency of the program; None where it is not installed."""
    try:
        import lightgbm
    except ImportError:
        return None
    return lightgbm


def fit_trees(market: Market, rows: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit boosted trees, one model per horizon, to evenly spaced rows where there are very many."""
    lightgbm = import_lightgbm()
    if lightgbm is None:
        raise ValueError("boosted trees need lightgbm: .venv/bin/pip install lightgbm")
    step = -(-len(rows) // MOST_TREE_ROWS)
    some, own_targets = rows[::step], targets[::step]
    table = torch.cat([part.float() for part in _features(market, some)]).cpu().numpy()
    # Fewer bars in a leaf, so that a small lake can be split at all.
    leaf = min(LEAST_LEAF_ROWS, max(20, len(some) // 100))
    settings = TREE_SETTINGS | {"num_threads": torch.get_num_threads(), "seed": 0, "min_data_in_leaf": leaf}
    models = []
    for target in own_targets.T.numpy():
        dataset = lightgbm.Dataset(table, target, params=settings, free_raw_data=True)
        models.append(lightgbm.train(settings, dataset, NUM_TREES))

    def forecast(rows: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        parts = []
        for features in _features(market, rows):
            part = features.float().cpu().numpy()
            columns = [model.predict(part, num_threads=threads) for model in models]
            parts.append(torch.from_numpy(np.stack(columns, axis=1)).float())
        return torch.cat(parts)

    return forecast


FITS: dict[str, Fit] = {RIDGE: fit_ridge, TREES: fit_trees}
