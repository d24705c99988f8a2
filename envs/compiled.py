"""Steps by torch.compile: one at a time, or given actions in one call. The same functions as without."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from envs.account import AccountState, advance, advance_all, observe

# Steps that are compiled into one kernel: 8 take 30 s to compile; 32 take two minutes and gain nothing more.
UNROLLED = 8


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True, options={"size_asserts": False})


def _packed_step(
    amounts: Tensor,
    held: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    allowed: Tensor | None,
    impact: Tensor | None,
    counted: Tensor,
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> tuple[Tensor, ...]:
    # Few tensors in and out: each costs a check per call.
    in_cash, targets, played, flows, base_rate, *constants = shared
    now = AccountState.unpacked(amounts, held, alive)
    action = torch.where(alive if allowed is None else alive & allowed, wanted, in_cash)
    new, fill = advance(
        now,
        action,
        targets[action],
        price=quotes[0, 1],
        next_price=quotes[0, 2],
        cost_rate=quotes[3, 1],
        borrow=quotes[2, 1],
        impact=impact,
        **rules,
    )
    played.add_(alive)
    counted.copy_(action)
    done = torch.stack((fill.log_return, fill.traded, fill.costs))
    flows.add_(torch.stack((fill.costs, new.owed, fill.traded)))
    observed = observe(new, quotes[1, 1], played, base_rate, tuple(constants))
    return *new.packed(), done, fill.ruined, fill.log_return.float(), torch.zeros_like(alive), observed


@torch.no_grad()
def step(
    account: tuple[Tensor, Tensor, Tensor],
    actions: Tensor,
    view: tuple[Tensor | None, ...],
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Take one step.

    Args:
        account: packed, before it.
        actions: (N,) int64.
        view: one of ``Segment.views``.
        shared: index of cash, targets, decisions played and costs, borrow cost and value traded (both counted
            up), fee and slippage, and the constants of ``observe``.
        rules: the other arguments of ``advance``.

    Returns:
        The account after it, packed, in three; log return, value traded and costs (3, N); ruined; rewards; not
        truncated; and the next observations.
    """
    after: tuple[Tensor, ...] = _compiled(_packed_step)(*account, actions, *view, shared, rules)
    return after


@torch.no_grad()
def play(
    state: AccountState,
    actions: Tensor,
    targets: Tensor,
    segment: tuple[Tensor, Tensor, Tensor, Tensor | None],
    rules: dict[str, Any],
    by_compiler: bool,
) -> tuple[AccountState, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fill (T, N) actions one after the other; see ``advance_all``.

    Args:
        state: before the first.
        actions: (T, N) int64.
        targets: (K + 1,) fraction of equity of each action.
        segment: price (T + 1, N), cost rate, borrow cost and impact (T, N).
        rules: the other arguments of ``advance``.
        by_compiler: whether by torch.compile, in pieces of UNROLLED steps.

    Returns:
        What ``advance_all`` does, over all of them.
    """
    price, cost_rate, borrow, impact = segment
    tensors, parts = state.tensors(), []
    for first in range(0, len(actions), UNROLLED):
        piece = slice(first, first + UNROLLED)
        wanted = actions[piece]
        whole = by_compiler and len(wanted) == UNROLLED
        tensors, *rows = (_compiled(advance_all) if whole else advance_all)(
            tensors,
            wanted,
            targets,
            price[first : first + len(wanted) + 1],
            cost_rate[piece],
            borrow[piece],
            None if impact is None else impact[piece],
            **rules,
        )
        parts.append(rows)
    log_return, ruined, flows, played, held = zip(*parts, strict=True)
    totals = torch.stack(flows).sum(0), torch.stack(played).sum(0)
    return AccountState(*tensors), torch.cat(log_return), torch.cat(ruined), *totals, torch.cat(held)
