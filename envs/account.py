"""The ledger of N accounts as tensors: fills, fees, slippage, borrow cost, equity and ruin.

Pure functions, no randomness, no market. ``account_reference.py`` is the same ledger in plain Python floats,
and a test holds the two together. An account starts with equity 1: every cost is proportional, so the
size does not matter. All tensors are (N,); money is float64 unless the environment is asked for less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

# What is left after a loss beyond everything: the log of equity stays finite (-13.8).
EQUITY_FLOOR = 1e-6


@dataclass
class AccountState:
    """N accounts between two fills."""

    cash: Tensor  # after the newest fill, before `owed` is paid
    units: Tensor  # shares or coins held, negative when short
    owed: Tensor  # borrow cost from the newest fill to the next one, paid there
    log_equity: Tensor  # log of equity at the next fill's price, before it; 0 at the start of an episode
    log_peak: Tensor  # highest log equity at any fill so far
    log_at_trade: Tensor  # log equity right before the newest trade
    target: Tensor  # target position that is held, as a fraction of equity; 0 before the first
    alive: Tensor  # bool, not ruined

    @staticmethod
    def fresh(num_envs: int, dtype: torch.dtype, device: torch.device) -> AccountState:
        """Return accounts with equity 1, all in cash."""
        amounts = torch.zeros(7, num_envs, dtype=dtype, device=device)
        amounts[0] = 1
        return AccountState.of(amounts, torch.ones(num_envs, dtype=torch.bool, device=device))

    @staticmethod
    def of(amounts: Tensor, alive: Tensor) -> AccountState:
        """Return views of the seven amounts, (7, N), and whether alive, (N,)."""
        return AccountState(*[*amounts.unbind(), alive])

    def copy_(self, other: AccountState) -> None:
        """Copy another state's values into this one's memory."""
        for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
            ours.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


class Fill(NamedTuple):
    """What one fill did, beside the new state."""

    log_return: Tensor  # log equity before the next fill less log equity before this one
    ruined: Tensor  # bool, by this step
    traded: Tensor  # value bought or sold at the market's price, in start equities, liquidation included
    costs: Tensor  # fee and slippage paid for it, in start equities


def advance(
    state: AccountState,
    target: Tensor,
    *,
    price: Tensor,
    next_price: Tensor,
    cost_rate: Tensor,
    borrow: Tensor,
    ruin_equity: float,
    impact: Tensor | None = None,
    impact_limit: float | Tensor = 0.0,
) -> tuple[AccountState, Fill]:
    """Fill one decision per account and hold it until the next fill.

    A new target is reached exactly: after the trade the position is worth ``target`` times the equity
    that is left after ``cost_rate`` of the traded value is gone. The same target again trades nothing.
    What is borrowed, shares or money, costs ``borrow`` until the next fill. Equity at or below
    ``ruin_equity`` there closes the position, at the same costs, and freezes the account in cash.

    Args:
        state: before the fill; not modified.
        target: wanted fraction of equity; 0 for the ruined.
        price: open at which this decision fills.
        next_price: open at which the next one does.
        cost_rate: fee plus slippage, as a fraction of traded value.
        borrow: cost of borrowing until the next fill, as a fraction of what is borrowed.
        ruin_equity: in start equities.
        impact: what a large order pays beside ``cost_rate``, per start equity of order value; the order is
            what lies between the position held and the one wanted, before costs.
        impact_limit: the most of it, as a fraction of traded value.
    """
    unchanged = target == state.target
    cash = state.cash - state.owed
    value = state.units * price
    # The trade after whose cost the position is `target` of what is left: with a = value - target * equity,
    # bought = a / (rate * target * sign(a) - 1). Written in place: 40 kernels of this size are all launch.
    excess = torch.addcmul(value, target, cash + value, value=-1)
    rate = cost_rate if impact is None else _rate(cost_rate, excess.abs(), impact, impact_limit)
    bought = excess.div_(rate.copysign(excess).mul_(target).sub_(1)).masked_fill_(unchanged, 0)
    traded = bought.abs()
    costs = traded * rate
    units = torch.addcdiv(state.units, bought, price)
    cash = cash.sub_(bought).sub_(costs)
    # Short: the shares are borrowed. Cash below zero: the money is. Never both while equity is above zero.
    owed = torch.minimum(cash, value.add_(bought)).clamp_(max=0).mul_(borrow).neg_()

    next_value = units * next_price
    equity = (cash - owed).add_(next_value)
    alive = torch.where(state.alive, equity, 0.0) > ruin_equity
    dead = ~alive
    liquidated = next_value.abs_().masked_fill_(alive, 0)
    rate = cost_rate if impact is None else _rate(cost_rate, liquidated, impact, impact_limit)
    traded.add_(liquidated)
    costs.addcmul_(liquidated, rate)
    # The living are above ruin, so the floor is far below them.
    equity.addcmul_(liquidated, rate, value=-1).clamp_(min=EQUITY_FLOOR)
    log_equity = equity.log()
    new_state = AccountState(
        cash=torch.where(alive, cash, equity),
        units=units.masked_fill_(dead, 0),
        owed=owed.masked_fill_(dead, 0),
        log_equity=log_equity,
        log_peak=torch.maximum(state.log_peak, state.log_equity),
        log_at_trade=torch.where(unchanged, state.log_at_trade, state.log_equity),
        target=target.masked_fill(dead, 0),
        alive=alive,
    )
    return new_state, Fill(log_equity - state.log_equity, dead.logical_and_(state.alive), traded, costs)


def observation_constants(
    positions: Sequence[float], episode_bars: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``constants`` of ``observe`` for accounts of these targets and length of an episode."""
    # Observations of the account beside the held target are offset + scale x its quantities.
    observed = torch.tensor(
        [(0, 10), (0, 50), (0, 10), (0, 10), (1, -1 / episode_bars), (0, 1e3)], dtype=dtype
    )
    offset, scale = observed.to(device).T[..., None].unbind()
    return offset, scale, torch.tensor(positions, dtype=dtype, device=device)[:, None]


def observe(
    account: AccountState,
    close: Tensor,
    played: Tensor,
    cost_rate: Tensor,
    constants: tuple[Tensor, ...],
) -> Tensor:
    """Return what each account knows of itself, (N, A) float32; TradingEnv says what the columns are.

    Args:
        account: between two fills.
        close: the newest one, which marks the position.
        played: decisions in this episode.
        cost_rate: fee and slippage.
        constants: offset and scale of the last 6 columns, (6, 1) each, and the targets, (K, 1).
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
            log_equity,
            played,
            cost_rate,
        )
    )
    columns = torch.addcmul(offset, columns, scale).clamp_(-8, 8)
    # Put together with the accounts side by side in memory, as everything else of theirs is.
    return torch.cat(((account.target == targets).float(), columns.float())).t()


def _rate(cost_rate: Tensor, size: Tensor, impact: Tensor, impact_limit: float | Tensor) -> Tensor:
    return (size * impact).clamp_(max=impact_limit).add_(cost_rate)
