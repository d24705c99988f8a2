"""Rewards: what a decision is paid in training; that of one's own is in ``training/own_reward.py``.

A reward of one's own is elementwise: a function of one decision's growth, of what was held and what was chosen. So
it is the same for the decision that was made and for every one that hindsight values, whose growth and positions
come in another shape. PPO's ratio and its clip never see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from envs.feature_errors import FeatureError, describe, import_own, place_of

OWN_FILE = Path(__file__).with_name("own_reward.py")


@dataclass(frozen=True)
class Decision:
    """Decisions, whose tensors broadcast to one shape; money is net of all costs."""

    growth: Tensor  # log growth of equity from this fill to the next one, less the market's where that is set
    held: Tensor  # position before the decision, as a fraction of equity
    chosen: Tensor  # position after it
    volatility: Tensor  # typical log return of one bar of the symbol


RewardFunction = Callable[[Decision], Tensor]
_registered: list[RewardFunction] = []


def reward(function: RewardFunction) -> RewardFunction:
    """Make this function the reward that is learnt from."""
    if _registered:
        raise ValueError(f"{_registered[0].__name__} is the reward already: there can be only one")
    _registered.append(function)
    return function


def own_reward(is_of_groups: bool = False) -> RewardFunction | None:
    """Return the reward of training/own_reward.py, checked; None without one.

    Raises:
        FeatureError: the file cannot be run, the function is none that can be learnt from, or accounts are over
            groups of symbols, where a choice is paid what it adds to the group.
    """
    import_own("training.own_reward", OWN_FILE, "a reward of your own")
    if not _registered:
        return None
    if is_of_groups:
        place = place_of(_registered[0])
        raise FeatureError(
            f"{place}: a reward of your own is for accounts of one symbol: train with --account single"
        )
    check_reward(_registered[0])
    return _registered[0]


def describe_reward() -> str:
    """Return the reward of one's own with its place, "" without one."""
    function = own_reward()
    return (
        f"Reward: {function.__name__} of {place_of(function)}, instead of growth of equity"
        if function
        else ""
    )


def paid(
    function: RewardFunction, growth: Tensor, held: Tensor, chosen: Tensor, volatility: Tensor
) -> Tensor:
    """Return what decisions are paid, in the shape of ``growth``; the others broadcast to it.

    Raises:
        FeatureError: the function failed.
    """
    try:
        value = function(Decision(growth, held, chosen, volatility))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise FeatureError(f"reward {function.__name__} failed: {describe(error, OWN_FILE)}") from error
    return value.to(growth.dtype)


def by_choice(positions: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return held and chosen positions that broadcast to ``like``, (N, T, J, K)."""
    targets = and_cash(positions, like.dtype, like.device)
    return targets[: like.shape[2], None], targets[: len(positions)]


@cache
def and_cash(positions: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the targets, and cash after them. Kept: to copy it to a GPU makes the host wait."""
    return torch.tensor((*positions, 0.0), dtype=dtype, device=device)


def check_reward(function: RewardFunction) -> None:
    """Check on made-up decisions that a reward is elementwise, finite, and leaves its input alone.

    Raises:
        FeatureError: one line, with file and line of the function.
    """
    place, name = place_of(function), f"reward {function.__name__}"
    random = torch.Generator().manual_seed(0)
    columns = (torch.randn(4, 6, generator=random) for _ in fields(Decision))
    growth, held, chosen, volatility = columns
    decision = Decision(0.01 * growth, held.sign(), chosen.sign(), volatility.abs() * 1e-3 + 1e-4)
    kept = replace(
        decision, **{field.name: getattr(decision, field.name).clone() for field in fields(Decision)}
    )
    whole = paid(function, decision.growth, decision.held, decision.chosen, decision.volatility)
    if whole.shape != decision.growth.shape:
        raise FeatureError(f"{place}: {name} must return one value for each decision, in the shape of growth")
    if not bool(whole.isfinite().all()):
        raise FeatureError(f"{place}: {name} must be finite for usual growth, such as -0.03 to 0.03")
    if not all(torch.equal(getattr(kept, f.name), getattr(decision, f.name)) for f in fields(Decision)):
        raise FeatureError(f"{place}: {name} changes its decision in place: work on a clone()")
    alone = torch.stack(
        [
            paid(function, *(getattr(decision, field.name)[row, column] for field in fields(Decision)))
            for row in range(4)
            for column in range(6)
        ]
    ).view(4, 6)
    if not torch.allclose(whole, alone, rtol=1e-5, atol=1e-9):
        raise FeatureError(
            f"{place}: {name} must be elementwise, as hindsight values decisions that were not made: no sums, "
            "means, sorts, random numbers or memory of other decisions"
        )
