"""Steps by torch.compile: one at a time, or given actions in one call. The same functions as without.

Quotes are (5, L + 2, N), of the newest closed bar and the ones that L decisions need beyond it: the rows of
``Segment.quotes``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from envs.account import AccountState, advance, observe

# Steps that are compiled into one kernel.
UNROLLED = 8


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True, options={"size_asserts": False})


def _step(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    allowed: Tensor | None,
    counted: Tensor,
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> tuple[Tensor, ...]:
    # Few tensors in and out: each costs a check per call.
    in_cash, targets, played, flows, base_rate, *constants = shared
    now = AccountState.of(amounts, alive)
    action = torch.where(alive if allowed is None else alive & allowed, wanted, in_cash)
    new, fill = _advance(now, targets[action], quotes, 0, rules)
    played.add_(alive)
    counted.copy_(action)
    done = (fill.log_return, fill.traded, fill.costs, new.owed)
    for total, part in zip(flows.unbind(), done, strict=True):
        total.add_(part)
    observed = observe(new, quotes[1, 1], played, base_rate, tuple(constants))
    now.become(new)
    return torch.stack(done), fill.ruined, fill.log_return.float(), observed


def _steps(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    log_return: Tensor,
    lived: Tensor,
    flows: Tensor,
    rules: dict[str, Any],
) -> None:
    before = now = AccountState.of(amounts, alive)
    sums = list(flows.unbind())
    for t, target in enumerate(wanted.unbind()):
        lived[t].copy_(now.alive)
        now, fill = _advance(now, torch.where(now.alive, target, 0.0), quotes, t, rules)
        log_return[t].copy_(fill.log_return)
        done = (fill.log_return, fill.traded, fill.costs, now.owed)
        sums = [total + part for total, part in zip(sums, done, strict=True)]
    for total, part in zip(flows.unbind(), sums, strict=True):
        total.copy_(part)
    before.become(now)


def _advance(now: AccountState, target: Tensor, quotes: Tensor, t: int, rules: dict[str, Any]) -> Any:
    opens, _, borrow, cost_rate, impact = quotes.unbind()
    large = {"impact": impact[t + 1], "impact_limit": rules["impact_limit"]} if rules["with_impact"] else {}
    return advance(
        now,
        target,
        price=opens[t + 1],
        next_price=opens[t + 2],
        cost_rate=cost_rate[t + 1],
        borrow=borrow[t + 1],
        ruin_equity=rules["ruin_equity"],
        **large,
    )


@torch.no_grad()
def step(
    amounts: Tensor,
    alive: Tensor,
    actions: Tensor,
    view: tuple[Tensor | None, ...],
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Take one step, which changes the account in place.

    Args:
        amounts: (7, N) of the account, see ``AccountState.of``.
        alive: (N,) bool.
        actions: (N,) int64.
        view: one of ``Segment.views``.
        shared: index of cash, targets, decisions played and sums of what was done (both counted up), fee and
            slippage, and the constants of ``observe``.
        rules: ruin_equity, with_impact and impact_limit.

    Returns:
        What was done, (4, N); ruined; rewards; and the next observations.
    """
    after: tuple[Tensor, ...] = _compiled(_step)(amounts, alive, actions, *view, shared, rules)
    return after


@torch.no_grad()
def play(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    flows: Tensor,
    rules: dict[str, Any],
    by_compiler: bool,
) -> tuple[Tensor, Tensor]:
    """Take T steps, one after the other, which changes the account in place.

    Args:
        amounts: (7, N) of the account, see ``AccountState.of``.
        alive: (N,) bool.
        wanted: (T, N) targets; those of the ruined do not count.
        quotes: (5, T + 2, N).
        flows: (4, N), sums of what was done, to which theirs are added.
        rules: ruin_equity, with_impact and impact_limit.
        by_compiler: whether by torch.compile, in pieces of UNROLLED steps.

    Returns:
        Log returns, float32, and who was alive at each decision, (T, N).
    """
    log_return = torch.empty(wanted.shape, dtype=torch.float32, device=wanted.device)
    lived = torch.empty(wanted.shape, dtype=torch.bool, device=wanted.device)
    pieces = zip(wanted.split(UNROLLED), log_return.split(UNROLLED), lived.split(UNROLLED), strict=True)
    for number, (targets, returns, living) in enumerate(pieces):
        first, length = number * UNROLLED, len(targets)
        run = _compiled(_steps) if by_compiler and length == UNROLLED else _steps
        run(amounts, alive, targets, quotes[:, first : first + length + 2], returns, living, flows, rules)
    return log_return, lived
