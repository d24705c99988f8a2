"""The ledger of N accounts that hold G symbols each: one cash, caps on exposure, fills, costs, funding, ruin.

Pure functions, without randomness or a market; the symbols are the last dimension of what has one per symbol, and
come before it any number of dimensions, (..., G) and (...). ``tests/envs/group_reference.py`` is the same ledger
in plain Python floats; a test holds the two together. A group of one symbol is an account of ``account.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from envs.config import EQUITY_FLOOR

# Of weights: those that differ by less, by the rounding of a sum, are the same.
SAME_WEIGHT = 1e-9
# Each finds the equity left after the costs for given directions of all trades. One more follows where a trade of
# the size of the costs turns round; so few are exact.
COST_ROUNDS = 3


@dataclass
class GroupState:
    """Accounts between two fills."""

    cash: Tensor  # (...) after the last fill, before `owed` is paid
    units: Tensor  # (..., G) held, negative when short
    weight: Tensor  # (..., G) to which each symbol was last traded, as a fraction of equity
    choice: Tensor  # (..., G) int64, index of the target position behind it
    owed: Tensor  # (...) borrow cost and funding from the last fill to the next one, paid there
    log_equity: (
        Tensor  # (...) log of equity at the next fill's prices, before it; 0 at the start of an episode
    )
    log_peak: Tensor  # (...) highest log equity at any fill so far
    alive: Tensor  # (...) bool, not ruined

    @staticmethod
    def fresh(
        num_groups: int, size: int, cash_index: int, dtype: torch.dtype, device: torch.device
    ) -> GroupState:
        """Return accounts with equity 1, all in cash."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return GroupState(
            cash=zeros(num_groups) + 1,
            units=zeros(num_groups, size),
            weight=zeros(num_groups, size),
            choice=torch.full((num_groups, size), cash_index, device=device),
            owed=zeros(num_groups),
            log_equity=zeros(num_groups),
            log_peak=zeros(num_groups),
            alive=torch.ones(num_groups, dtype=torch.bool, device=device),
        )

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class GroupFill(NamedTuple):
    """The result of one fill, (...) each, beside the new state."""

    log_return: Tensor  # log equity before the next fill less log equity before this one
    ruined: Tensor  # bool, by this step
    traded: Tensor  # value bought or sold at the market prices, in start equities, liquidation included
    costs: Tensor  # fee and slippage paid for it, in start equities
    borrow_cost: Tensor  # until the next fill, in start equities; 0 where ruined
    funding: Tensor | None  # paid there, below 0 where received, in start equities; None without funding


def project(wanted: Tensor, gross: float, net: float | Tensor) -> Tensor:
    """Bring the weights that are wanted, (..., G), within the caps.

    The heavier side, longs or shorts, is scaled down until the two differ by ``net`` at most; then all is scaled
    down until they add up to ``gross`` at most. So no weight grows or changes its sign, symbols in cash stay
    there, and shuffled symbols have shuffled weights.

    Args:
        wanted: fractions of equity.
        gross: cap on longs and shorts together.
        net: cap on longs less shorts, either way; a tensor has one per group, (..., 1).
    """
    longs = wanted.clamp(min=0).sum(-1, keepdim=True)
    shorts = wanted.clamp(max=0).sum(-1, keepdim=True).neg()
    fewer_longs, fewer_shorts = torch.minimum(longs, shorts + net), torch.minimum(shorts, longs + net)
    side = torch.where(wanted > 0, _ratio(fewer_longs, longs), _ratio(fewer_shorts, shorts))
    return wanted * side * _ratio(torch.full_like(longs, gross), fewer_longs + fewer_shorts).clamp(max=1)


def weights_of_every_position(index: Tensor, targets: Tensor, gross: float, net: float | Tensor) -> Tensor:
    """Return the weights of whole groups for every position of each symbol: (..., G) -> (..., G, K, G).

    Args:
        index: (..., G) int64, the position of each symbol.
        targets: (K,) the weight that each position asks for.
        gross, net: see ``project``; a tensor fits (..., G, K, 1).
    """
    size, num_targets = index.shape[-1], len(targets)
    wanted = targets[index][..., None, None, :].expand(*index.shape, num_targets, size)
    own = torch.eye(size, dtype=torch.bool, device=index.device)[:, None]
    return project(torch.where(own, targets[:, None], wanted), gross, net)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # 1 of nothing: there is nothing to scale.
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 1.0)


def advance_group(
    state: GroupState,
    weight: Tensor,
    choice: Tensor,
    *,
    price: Tensor,
    next_price: Tensor,
    cost_rate: Tensor,
    next_cost_rate: Tensor,
    borrow: Tensor,
    is_filled: Tensor,
    ruin_equity: float,
    funding: Tensor | None = None,
    margin: Tensor | None = None,
    impact: Tensor | None = None,
    next_impact: Tensor | None = None,
    impact_limit: float | Tensor = 0.0,
) -> tuple[GroupState, GroupFill]:
    """Fill one decision of every symbol and hold the positions until the next fill.

    All orders of an account fill together: after them each of its traded positions is worth its weight times the
    equity that is left after the costs of all. A symbol whose weight is the one that it was last traded to, or
    that is not filled, trades nothing: its units are held. Short positions borrow shares, and longs beyond the
    equity borrow money (what shorts were sold for stays as their collateral), at ``borrow`` until the next fill.
    There the positions pay or receive ``funding``. If equity there is ``ruin_equity`` or less, or what the
    ``margin`` of all positions asks for or less, all are closed at the costs of that bar, and the account stays in
    cash.

    Args:
        state: before the fill; not modified.
        weight: (..., G) within the caps, see ``project``; 0 for ruined accounts.
        choice: (..., G) int64, the target positions behind them.
        price: (..., G) at which orders fill, the newest known one of symbols that are not filled.
        next_price: (..., G) the same at the next fill.
        cost_rate: (..., G) fee plus slippage, as a fraction of traded value.
        next_cost_rate: (..., G) the same in the bars of the next fill.
        borrow: (..., G) cost of borrowing until the next fill, as a fraction of the borrowed value; 0 of symbols
            that borrow nothing.
        is_filled: (..., G) bool, False where an order meets no bar.
        ruin_equity: in start equities.
        funding: (..., G) rates of the next fill; None: none anywhere.
        margin: (..., G) maintenance margin, as a fraction of a position's value; None: nobody asks for one.
        impact: (..., G) added to ``cost_rate``, per start equity of order value before costs.
        next_impact: (..., G) the same in the bars of the next fill; None where ``impact`` is.
        impact_limit: upper limit of that addition.
    """
    cash, value = state.cash - state.owed, state.units * price
    is_held = is_kept(state, weight, is_filled)
    bought, tolls = fill_orders(cash, value, weight, is_held, cost_rate, impact, impact_limit)
    traded, costs = bought.abs().sum(-1), tolls.sum(-1)
    units, value = state.units + bought / price, value + bought
    cash = cash - bought.sum(-1) - costs
    borrowed = value.clamp(max=0).neg().mul(borrow).sum(-1)
    longs = torch.where(borrow > 0, value, 0.0).clamp(min=0).sum(-1)
    owed = borrowed + (longs - (cash + value.sum(-1))).clamp(min=0) * borrow.amax(-1)

    next_value = units * next_price
    due, paid = owed, None
    if funding is not None:
        paid = (next_value * funding).sum(-1)
        due = owed + paid
    equity, size = cash - due + next_value.sum(-1), next_value.abs()
    alive = state.alive & (equity > ruin_equity)
    if margin is not None:
        alive = alive & (equity > (size * margin).sum(-1))
    dead = ~alive
    liquidated, rate = size.masked_fill(alive[..., None], 0), next_cost_rate
    if next_impact is not None:
        rate = rate_with_impact(rate, liquidated, next_impact, impact_limit)
    traded, toll = traded + liquidated.sum(-1), (liquidated * rate).sum(-1)
    equity = (equity - toll).clamp(min=EQUITY_FLOOR)
    log_equity = equity.log()
    owed = owed.masked_fill(dead, 0)
    new_state = GroupState(
        cash=torch.where(alive, cash, equity),
        units=units.masked_fill(dead[..., None], 0),
        weight=torch.where(is_held, state.weight, weight).masked_fill(dead[..., None], 0),
        choice=torch.where(is_filled, choice, state.choice),
        owed=due.masked_fill(dead, 0),
        log_equity=log_equity,
        log_peak=torch.maximum(state.log_peak, state.log_equity),
        alive=alive,
    )
    ruined = dead & state.alive
    return new_state, GroupFill(log_equity - state.log_equity, ruined, traded, costs + toll, owed, paid)


def is_kept(state: GroupState, weight: Tensor, is_filled: Tensor) -> Tensor:
    """Return of which symbols the units stay as they are, (..., G) bool; see ``advance_group``."""
    return ((weight - state.weight).abs() <= SAME_WEIGHT) | ~is_filled


def fill_orders(
    cash: Tensor,
    value: Tensor,
    weight: Tensor,
    is_held: Tensor,
    cost_rate: Tensor,
    impact: Tensor | None,
    impact_limit: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what accounts buy, below 0 where they sell, and what that costs: (..., G) each, as money.

    Args:
        cash: (...) before the fill.
        value: (..., G) of what is held, at the prices of the fill.
        weight: (..., G) wanted of the equity that is left after all costs.
        is_held: (..., G) bool, where nothing is traded.
        cost_rate, impact, impact_limit: see ``advance_group``.
    """
    equity = cash + value.sum(-1)
    wanted, before = weight.masked_fill(is_held, 0), value.masked_fill(is_held, 0)
    rate = cost_rate
    if impact is not None:
        rate = rate_with_impact(rate, (wanted * equity[..., None] - before).abs(), impact, impact_limit)
    # left = equity - sum of rate x |weight x left - value|: linear once the directions of the trades are known.
    left = equity
    for _ in range(COST_ROUNDS):
        toll = rate * (wanted * left[..., None] - before).sign()
        left = (equity + (toll * before).sum(-1)) / (1 + (toll * wanted).sum(-1))
    bought = wanted * left[..., None] - before
    return bought, bought.abs() * rate


def rate_with_impact(cost_rate: Tensor, size: Tensor, impact: Tensor, impact_limit: float | Tensor) -> Tensor:
    """Return the cost rate of orders of this size, in start equities."""
    return (size * impact).clamp(max=impact_limit) + cost_rate
