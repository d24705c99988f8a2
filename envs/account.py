"""The ledger of N accounts as tensors: fills, fees, slippage, borrow cost, equity and ruin.

Pure functions, without randomness or a market. ``tests/envs/account_reference.py`` is the same ledger in plain
Python floats; a test holds the two together. An account starts with equity 1: every cost is proportional, so its
size does not matter. All tensors are (N,); money is float64 unless the environment uses another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from envs.config import EQUITY_FLOOR


@dataclass
class AccountState:
    """N accounts between two fills."""

    cash: Tensor  # after the last fill, before `owed` is paid
    units: Tensor  # shares or coins held, negative when short
    owed: Tensor  # borrow cost and funding from the last fill to the next one, paid there
    log_equity: Tensor  # log of equity at the next fill's price, before it; 0 at the start of an episode
    log_peak: Tensor  # highest log equity at any fill so far
    log_at_trade: Tensor  # log equity right before the last trade
    target: Tensor  # target position held, as a fraction of equity; 0 before the first
    alive: Tensor  # bool, not ruined

    @staticmethod
    def fresh(num_envs: int, dtype: torch.dtype, device: torch.device) -> AccountState:
        """Return accounts with equity 1, all in cash."""
        amounts = torch.zeros(7, num_envs, dtype=dtype, device=device)
        amounts[0] = 1
        return AccountState.of(amounts, torch.ones(num_envs, dtype=torch.bool, device=device))

    @staticmethod
    def of(amounts: Tensor, alive: Tensor) -> AccountState:
        """Return a state of views of ``amounts``, (7, N), and of ``alive``, (N,)."""
        return AccountState(*[*amounts.unbind(), alive])

    def copy_(self, other: AccountState) -> None:
        """Copy another state's values into this one's memory."""
        for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
            ours.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


class Fill(NamedTuple):
    """The result of one fill, beside the new state."""

    log_return: Tensor  # log equity before the next fill less log equity before this one
    ruined: Tensor  # bool, by this step
    traded: Tensor  # value bought or sold at the market price, in start equities, liquidation included
    costs: Tensor  # fee and slippage paid for it, in start equities
    borrow_cost: Tensor  # until the next fill, in start equities; 0 where ruined
    funding: Tensor | None  # paid there, below 0 where received, in start equities; None without funding


def advance(
    state: AccountState,
    target: Tensor,
    *,
    price: Tensor,
    next_price: Tensor,
    cost_rate: Tensor,
    next_cost_rate: Tensor,
    borrow: Tensor,
    ruin_equity: float,
    funding: Tensor | None = None,
    margin: Tensor | None = None,
    impact: Tensor | None = None,
    next_impact: Tensor | None = None,
    impact_limit: float | Tensor = 0.0,
) -> tuple[AccountState, Fill]:
    """Fill one decision per account and hold the position until the next fill.

    A new target is reached exactly: after the trade the position is worth ``target`` times the equity that is left
    after paying ``cost_rate`` of the traded value. The same target again trades nothing. Borrowed shares and
    borrowed money cost ``borrow`` until the next fill. There a long position pays ``funding`` of its value at that
    price, and a short one receives it. If equity there is then ``ruin_equity`` or less, or ``margin`` of the value
    of the position or less, it is closed, at the costs of that bar, and the account stays in cash.

    Args:
        state: before the fill; not modified.
        target: wanted fraction of equity; 0 for ruined accounts.
        price: open at which this decision fills.
        next_price: open at which the next decision fills.
        cost_rate: fee plus slippage, as a fraction of traded value.
        next_cost_rate: the same in the bar that opens at ``next_price``.
        borrow: cost of borrowing until the next fill, as a fraction of the borrowed value.
        ruin_equity: in start equities.
        funding: rates since ``price``, up to and with the moment of ``next_price``, in sum; None: none anywhere.
        margin: maintenance margin, as a fraction of the position's value; None: nobody asks for one.
        impact: added to ``cost_rate``, per start equity of order value; the order is the wanted position less the
            one held, before costs.
        next_impact: the same in the bar that opens at ``next_price``; None where ``impact`` is.
        impact_limit: upper limit of that addition, as a fraction of traded value.
    """
    unchanged = target == state.target
    cash = state.cash - state.owed
    value = state.units * price
    # The trade after whose cost the position is `target` of the equity left: with a = value - target * equity,
    # bought = a / (rate * target * sign(a) - 1). In place, since launches dominate 40 kernels of this size.
    excess = torch.addcmul(value, target, cash + value, value=-1)
    rate = cost_rate if impact is None else _rate(cost_rate, excess.abs(), impact, impact_limit)
    bought = excess.div_(rate.copysign(excess).mul_(target).sub_(1)).masked_fill_(unchanged, 0)
    traded = bought.abs()
    costs = traded * rate
    units = torch.addcdiv(state.units, bought, price)
    cash = cash.sub_(bought).sub_(costs)
    # A short position borrows shares, negative cash is borrowed money; never both while equity is above zero.
    owed = torch.minimum(cash, value.add_(bought)).clamp_(max=0).mul_(borrow).neg_()

    next_value = units * next_price
    due, paid = owed, None
    if funding is not None:
        paid = next_value * funding
        due = owed + paid
    equity = (cash - due).add_(next_value)
    alive = torch.where(state.alive, equity, 0.0) > ruin_equity
    size = next_value.abs_()
    if margin is not None:
        alive = alive & (equity > size * margin)
    dead = ~alive
    liquidated = size.masked_fill_(alive, 0)
    rate = next_cost_rate
    if next_impact is not None:
        rate = _rate(next_cost_rate, liquidated, next_impact, impact_limit)
    traded.add_(liquidated)
    costs.addcmul_(liquidated, rate)
    # Living accounts are above ruin, far above the floor.
    equity.addcmul_(liquidated, rate, value=-1).clamp_(min=EQUITY_FLOOR)
    log_equity = equity.log()
    owed = owed.masked_fill_(dead, 0)
    new_state = AccountState(
        cash=torch.where(alive, cash, equity),
        units=units.masked_fill_(dead, 0),
        owed=owed if funding is None else due.masked_fill_(dead, 0),
        log_equity=log_equity,
        log_peak=torch.maximum(state.log_peak, state.log_equity),
        log_at_trade=torch.where(unchanged, state.log_at_trade, state.log_equity),
        target=target.masked_fill(dead, 0),
        alive=alive,
    )
    ruined = dead.logical_and_(state.alive)
    return new_state, Fill(log_equity - state.log_equity, ruined, traded, costs, owed, paid)


def flows_of(fill: Fill) -> Tensor:
    """Return (4, N): log_return, traded, costs and borrow_cost; (5, N) with the funding, where there is any."""
    flows = (fill.log_return, fill.traded, fill.costs, fill.borrow_cost)
    return torch.stack(flows if fill.funding is None else (*flows, fill.funding))


def observation_constants(
    positions: Sequence[float], episode_bars: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``constants`` of ``observe`` for these targets and this episode length."""
    # Observations beyond the held target are offset + scale x the account's quantities.
    offset_scale = torch.tensor(
        [(0, 10), (0, 50), (0, 10), (0, 10), (1, -1 / episode_bars), (0, 1e3)], dtype=dtype
    )
    offset, scale = offset_scale.to(device).T[..., None].unbind()
    return offset, scale, torch.tensor(positions, dtype=dtype, device=device)[:, None]


def observe(
    account: AccountState,
    close: Tensor,
    played: Tensor,
    cost_rate: Tensor,
    constants: tuple[Tensor, ...],
    log_start: Tensor | None = None,
) -> Tensor:
    """Return the account observations, (N, A) float32; TradingEnv documents their columns.

    Args:
        account: between two fills.
        close: newest close, which marks the position.
        played: decisions in this episode.
        cost_rate: fee and slippage.
        constants: offset and scale of the last 6 columns, (6, 1) each, and the targets, (K, 1).
        log_start: log equity at the start of the episode; None for 0.
    """
    offset, scale, targets = constants
    value = account.units * close
    equity = (account.cash + value).clamp_(min=EQUITY_FLOOR)
    log_equity = equity.log()
    columns = torch.stack(
        (
            value.div_(equity).sub_(account.target),
            log_equity - account.log_at_trade,
            log_equity - account.log_peak,
            log_equity if log_start is None else log_equity - log_start,
            played,
            cost_rate,
        )
    )
    columns = torch.addcmul(offset, columns, scale).clamp_(-8, 8)
    # Transposed last, so that accounts lie side by side in memory like all their other tensors.
    return torch.cat(((account.target == targets).float(), columns.float())).t()


def _rate(cost_rate: Tensor, size: Tensor, impact: Tensor, impact_limit: float | Tensor) -> Tensor:
    return (size * impact).clamp_(max=impact_limit).add_(cost_rate)
