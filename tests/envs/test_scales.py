"""Scales of rewards and features: the usual ones to the bit, whatever a few bars or one odd symbol do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from data_sources.bars import Bars
from envs.features import WARM_UP_BARS, FeatureStatistics, compute, registered_features
from envs.scales import BLOCK_BARS, LARGEST_BLOCK, LEAST_REWARD_SCALE, reward_scales, robust_moments
from tests.envs.markets import constant, walk

NUM_BARS = 20 * BLOCK_BARS
FACTOR = math.sqrt(math.pi / 2)


def priced(closes: np.ndarray) -> Bars:
    opens = np.append(closes[:1], closes[:-1])
    bars = walk(num_bars=len(closes))
    low, high = np.minimum(opens, closes), np.maximum(opens, closes)
    return Bars("ODD", "crypto", bars.open_time, opens, high, low, closes, bars.volume)


def frozen(share: float, at_end: bool = False) -> Bars:
    """Return a walk that stands still for a share of its bars."""
    moving = walk(num_bars=int((1 - share) * NUM_BARS)).close
    still = np.full(NUM_BARS - len(moving), moving[-1] if at_end else moving[0])
    return priced(np.concatenate([moving, still] if at_end else [still, moving]))


def printed(factor: float, num_bars: int = NUM_BARS) -> Bars:
    closes = walk(num_bars=num_bars).close.copy()
    closes[num_bars // 3] *= factor
    return priced(closes)


def slipped() -> Bars:
    """Return a quiet series in small steps that falls by a tenth within 45 bars, and recovers."""
    steps = np.random.default_rng(3).integers(-1, 2, NUM_BARS // 128)
    closes = 1 + 1e-4 * np.repeat(steps, 128)
    slip = np.concatenate([np.linspace(0, 0.1, 45), np.linspace(0.1, 0, 600)])
    closes[3000:3645] -= slip
    return priced(closes)


ODD = {
    "constant": constant("ODD", NUM_BARS),
    "frozen for most of its time": frozen(0.8),
    "with a constant tail": frozen(0.8, at_end=True),
    "one print ten times away": printed(10.0),
    "one print at a tenth": printed(0.1),
    "quiet with a slip": slipped(),
    "fifty times as volatile": walk("ODD", NUM_BARS, sigma=5e-2),
}


def plain_scale(bars: Bars) -> float:
    moves = np.abs(np.diff(np.log(bars.close)))
    return FACTOR * float(moves.mean())


def plain_moments(values: np.ndarray, blocks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return mean and deviation of one feature, with the blocks that stand out drawn in."""
    middle = sorted(block.mean() for block in blocks)[(len(blocks) - 1) // 2]
    spreads = [float(np.mean((block - middle) ** 2)) for block in blocks]
    varying = sorted(spread for spread in spreads if spread > 1e-12)
    if varying:
        limit = LARGEST_BLOCK * varying[int(0.9 * (len(varying) - 1))]
        drawn = [
            middle + (block - middle) * min(1.0, math.sqrt(limit / max(spread, 1e-300)))
            for block, spread in zip(blocks, spreads, strict=True)
        ]
        values = np.concatenate(drawn)
    deviation = float(values.std())
    return float(values.mean()), deviation if deviation > 1e-6 else 1.0


def raws_of(*series: Bars) -> list[Tensor]:
    return [compute(bars, torch.device("cpu"))[WARM_UP_BARS:].double() for bars in series]


@cache
def usual_raws() -> list[Tensor]:
    return raws_of(*[walk(f"S{seed}", NUM_BARS, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("name", ODD)
def test_features_are_scaled_as_by_a_plain_reference_and_one_odd_symbol_does_not_decide(name: str) -> None:
    alone = usual_raws()
    raws = [*alone, *raws_of(ODD[name])]
    _, _, before = robust_moments([raw.clone() for raw in alone], raws[0].shape[1])
    count, mean, std = robust_moments([raw.clone() for raw in raws], raws[0].shape[1])
    assert count == 4 * (NUM_BARS - WARM_UP_BARS)
    for column, feature in enumerate(registered_features()):
        values = [raw[:, column].numpy() for raw in raws]
        blocks = [part for v in values for part in np.split(v, range(BLOCK_BARS, len(v), BLOCK_BARS))]
        expected = plain_moments(np.concatenate(values), blocks)
        assert (float(mean[column]), float(std[column])) == pytest.approx(expected, rel=1e-9, abs=1e-9), (
            feature
        )
        if feature.startswith("return") or feature == "bar_range":
            assert 0.5 * before[column] < std[column] < 4 * before[column], feature


def test_without_odd_bars_the_statistics_are_the_plain_ones_to_the_bit() -> None:
    usual = [walk("AAA", NUM_BARS), walk("BBB", 3_000, "stock", seed=1), walk("CCC", 40, seed=2)]
    raws = raws_of(*usual)
    total = sum(raw.sum(0) for raw in raws)
    squares = sum(raw.square().sum(0) for raw in raws)
    count = sum(map(len, raws))
    mean = total / count
    std = (squares / count - mean.square()).clamp_(min=0.0).sqrt()
    statistics = FeatureStatistics.measure(
        tuple(registered_features()),
        [compute(bars, torch.device("cpu")) for bars in usual],
        [*map(len, usual)],
    )
    assert torch.equal(statistics.mean, mean.float())
    assert torch.equal(statistics.std, torch.where(std > 1e-6, std, 1.0).float())


def test_a_feature_that_most_symbols_never_change_keeps_its_deviation() -> None:
    rare = [torch.zeros(NUM_BARS, 1, dtype=torch.float64) for _ in range(20)]
    rare.append(torch.ones(NUM_BARS, 1, dtype=torch.float64))
    _, mean, std = robust_moments([part.clone() for part in rare], 1)
    assert (float(mean), float(std)) == pytest.approx((1 / 21, math.sqrt(20) / 21))


@pytest.mark.parametrize("name", ODD)
def test_rewards_are_in_moves_of_bars_that_move_and_few_extreme_ones_do_not_decide(name: str) -> None:
    usual = walk(num_bars=NUM_BARS)
    scale, others = reward_scales([ODD[name], usual], [NUM_BARS, NUM_BARS])
    assert others == plain_scale(usual)  # to the bit, whatever the other symbol is
    if name == "fifty times as volatile":
        assert scale == plain_scale(ODD[name])
    elif name in ("constant", "quiet with a slip"):
        assert scale == LEAST_REWARD_SCALE
    else:
        assert others / 3.3 < scale < 3 * others


def test_one_print_in_few_bars_changes_a_scale_by_a_factor_of_three_at_most() -> None:
    bars = printed(10.0, 4 * BLOCK_BARS)
    (scale,) = reward_scales([bars], [len(bars)])
    moves = np.abs(np.diff(np.log(bars.close)))
    typical = np.median([part.mean() for part in np.split(moves, range(BLOCK_BARS, len(moves), BLOCK_BARS))])
    assert scale == pytest.approx(3 * FACTOR * typical)
    assert plain_scale(bars) > scale
    assert reward_scales([bars], [1]) == [LEAST_REWARD_SCALE]  # no move before the holdout
