"""Scales that a few extreme bars, or one symbol unlike the others, do not decide: of rewards and of features.

Both are the usual ones, to the bit, unless blocks of bars stand out so far that they would decide alone: a print
ten times away, a frozen or delisted stretch, a slip in a quiet symbol. What recurs, such as nights and earnings of
stocks, stays as it is: nothing in 0.7 million real bars of 32 stocks and coins stands out so far, holes apart.

Shapes: S = symbols, B = bars, F = features, K = blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.bars import Bars, find_breaks

BLOCK_BARS = 512  # more than a session of stocks has
# A tenth of a basis point per bar: limits how far a dead market's returns are scaled up.
VOLATILITY_FLOOR = 1e-5
FROM_TYPICAL_BLOCK = 3.0  # a symbol's mean move is within this factor of that of its typical block
# Half a basis point per bar, a quarter of what a major currency moves: in a quieter symbol orders cost as much,
# and the costs would fill its rewards.
LEAST_REWARD_SCALE = 5e-5
HIGH_QUANTILE = 0.9  # of the blocks' mean squares
LARGEST_BLOCK = 100.0  # times that quantile
LEAST_VARIANCE = 1e-12  # what varies less is constant


def reward_scales(bars: Sequence[Bars], training_bars: Sequence[int]) -> NDArray[np.float64]:
    """Return the typical log return of one bar of each symbol, (S,): scales its rewards.

    Args:
        bars: of S symbols.
        training_bars: per symbol, the number of bars before the holdout.
    """
    moves = [_typical_move(*given) for given in zip(bars, training_bars, strict=True)]
    return np.maximum(moves, LEAST_REWARD_SCALE)


def _typical_move(bars: Bars, num_bars: int) -> float:
    # Mean absolute log return, scaled to a normal's standard deviation: gaps and bad prints count linearly, not
    # squared. A break is no return.
    breaks = find_breaks(bars.rows(0, num_bars))
    moves = np.delete(np.abs(np.diff(np.log(bars.close[:num_bars]))), breaks - 1)
    if not len(moves):
        return 0.0
    mean = float(moves.mean())
    starts = np.arange(0, len(moves), BLOCK_BARS)
    means = np.add.reduceat(moves, starts) / np.diff(np.append(starts, len(moves)))
    if (means > 0).any():
        typical = float(np.median(means[means > 0]))
        mean = min(max(mean, typical / FROM_TYPICAL_BLOCK), typical * FROM_TYPICAL_BLOCK)
    return math.sqrt(math.pi / 2) * mean


def robust_moments(parts: Iterable[Tensor], num_features: int) -> tuple[int, Tensor, Tensor]:
    """Return the number of rows of all parts, their mean and their standard deviation, (F,) float64.

    A block whose mean square about the typical block's mean is over 100 times that of nine in ten blocks (of those
    that vary) is drawn towards that mean until it is 100 times. A feature that never varies has deviation 1.

    Args:
        parts: per symbol, (B, F) float64; consumed one at a time, and changed.
        num_features: F.
    """
    count = 0
    total = squares = torch.zeros(num_features, dtype=torch.float64)
    blocks = []
    for part in parts:
        count += len(part)
        sums = _block_sums(part)
        total = total.to(part.device) + part.sum(0)
        squares = squares.to(part.device) + part.square_().sum(0)
        sizes = part.new_full((len(sums), 1), BLOCK_BARS)
        if len(part):
            sizes[-1] = len(part) - BLOCK_BARS * (len(sums) - 1)
        blocks.append(torch.cat([sizes, sums, _block_sums(part)], dim=1))
    if not count:
        return 0, total, squares
    size, sums, block_squares = torch.cat(blocks).split([1, num_features, num_features], dim=1)
    less, less_squares = _excess(size, sums, block_squares)
    mean = (total - less) / count
    # Raw features are at most a thousand, so float64 is precise enough for the difference of squares.
    std = ((squares - less_squares) / count - mean.square()).clamp_(min=0.0).sqrt()
    return count, mean, torch.where(std > math.sqrt(LEAST_VARIANCE), std, torch.ones_like(std))


def _block_sums(part: Tensor) -> Tensor:
    """Return the sums of every BLOCK_BARS rows, (K, F); the last block may have fewer."""
    whole = len(part) // BLOCK_BARS * BLOCK_BARS
    sums = part[:whole].view(-1, BLOCK_BARS, part.shape[1]).sum(1)
    return torch.cat([sums, part[whole:].sum(0, keepdim=True)]) if whole < len(part) else sums


def _excess(size: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much blocks that stand out raise the sum and the sum of squares, (F,); 0 without one."""
    centre = (sums / size).median(0).values
    spread = (
        (squares - 2 * centre * sums).div(size).add(centre.square()).clamp_(min=0.0)
    )  # mean square about it
    num_varying = (spread > LEAST_VARIANCE).sum(0)
    place = len(spread) - num_varying + (HIGH_QUANTILE * (num_varying - 1)).clamp(min=0).long()
    usual = spread.sort(0).values.gather(0, place.clamp(max=len(spread) - 1)[None])
    limit = LARGEST_BLOCK * usual
    stands_out = (spread > limit) & (num_varying > 0)
    shrink = (limit / spread.clamp(min=LEAST_VARIANCE)).sqrt()
    nothing = torch.zeros_like(spread)
    less = torch.where(stands_out, (1 - shrink) * (sums - size * centre), nothing)
    less_squares = torch.where(stands_out, size * (spread - limit) + 2 * centre * less, nothing)
    return less.sum(0), less_squares.sum(0)
