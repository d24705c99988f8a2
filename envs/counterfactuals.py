"""Counterfactuals: growth of equity and account observations, had another position been held or chosen.

Use them only to value decisions once the segment is known (``training/hindsight.py``), never to make them.
Shapes: N = environments, H = horizon, A = account features, K = target positions, J = positions that can be held:
the targets and, where 0 is not among them, cash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from envs.account import AccountState, Fill, advance


def growth_of_every_choice(
    fills: Mapping[str, Tensor], positions: Sequence[float], log_equity: Tensor
) -> Tensor:
    """Return log growth of equity for every held position and every chosen target, (N, H, J, K) float32."""
    return outcome_of_every_choice(fills, positions, log_equity).log_return.float()


def outcome_of_every_choice(
    fills: Mapping[str, Tensor], positions: Sequence[float], log_equity: Tensor
) -> Fill:
    """Return the fill of every chosen target from every held position, (N, H, J, K).

    The same ledger as ``TradingEnv.step``, but starting from the exact held position and without ruin,
    except that a perpetual future is liquidated for want of margin.

    Args:
        fills: of ``Segment.fills_ahead``, (N, H) each.
        positions: the K targets, as fractions of equity.
        log_equity: (N, H) before each fill, in start equities: orders scale with the account, which matters where
            they have an impact.
    """
    if "impact" in fills:
        equity = log_equity.exp()
        fills = {**fills, **{name: fills[name] * equity for name in fills if name.endswith("impact")}}
    price = fills["price"]
    held = _holdable(tuple(positions), price.dtype, price.device)
    shape = (*price.shape, len(held), len(positions))
    exposure = held[:, None].expand(shape)
    state = AccountState.fresh(1, price.dtype, price.device)
    state.cash = 1.0 - exposure
    state.units = exposure / price[..., None, None]
    state.target = exposure
    terms = {"next_cost_rate": fills["cost_rate"], **fills}
    _, fill = advance(
        state,
        held[: len(positions)].expand(shape),
        ruin_equity=0.0,
        # Without a margin, equity of 0 or less is the floor, whatever closing the position costs.
        **{name: value[..., None, None] for name, value in terms.items()},
    )
    return fill


def market_rewards_of_every_choice(others_growth: Tensor, positions: Sequence[float]) -> Tensor:
    """Return the ``market_rewards`` (``Segment``) of every chosen target, (N, H, 1, K) float32.

    Args:
        others_growth: of ``Segment``, (N, H).
        positions: the K targets.
    """
    held = _holdable(tuple(positions), others_growth.dtype, others_growth.device)
    return (others_growth[..., None, None] * held[: len(positions)]).float()


def accounts_in_every_position(accounts: Tensor, positions: Sequence[float]) -> Tensor:
    """Return each account's observations, had it held every position: (..., A) -> (..., J, A).

    At the position held they are unchanged. Any other position counts as reached just now, at no cost: no drift,
    no gain since.
    """
    num_targets, num_held = len(positions), len(positions) + (0.0 not in positions)
    one_hot = torch.eye(num_held, num_targets, dtype=accounts.dtype, device=accounts.device)
    same = (accounts[..., None, :num_targets] == one_hot).all(-1, keepdim=True)
    drift_and_gain = accounts[..., None, num_targets : num_targets + 2]
    rest = accounts[..., None, num_targets + 2 :].expand(*same.shape[:-1], -1)
    one_hot = one_hot.expand(*same.shape[:-1], -1)
    return torch.cat((one_hot, torch.where(same, drift_and_gain, 0.0), rest), dim=-1)


def held_index(accounts: Tensor, positions: Sequence[float]) -> Tensor:
    """Return the index of the position that each account holds: (..., A) -> (...) int64, below J."""
    one_hot = accounts[..., : len(positions)]
    return one_hot.argmax(-1).masked_fill(~one_hot.any(-1), len(positions))


@cache
def _holdable(positions: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # (J,). Kept: to copy it to a GPU makes the host wait for all that is queued there.
    return torch.tensor(positions if 0.0 in positions else (*positions, 0.0), dtype=dtype, device=device)
