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

from envs.account import AccountState, Fill, advance, observe

# Steps that are compiled into one kernel: 16 take 15 seconds to compile, 32 twice as long, and gain a sixth.
UNROLLED = 16


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    options = {
        "size_asserts": False,
        # One loop over the accounts for all that a step does: by default it is cut after 64 operations, and what
        # lies between goes through memory.
        "max_fusion_size": 1_000_000,
        "cpp_wrapper": device == "cpu",  # the call is half of a step's time
    }
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


@torch.no_grad()
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
    done = torch.stack((fill.log_return, fill.traded, fill.costs, new.owed))
    flows.add_(done)
    observed = observe(new, quotes[1, 1], played, base_rate, tuple(constants))
    _write(new, amounts, alive)
    return done, fill.ruined, fill.log_return.float(), observed


def _steps(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    played: Tensor,
    flows: Tensor,
    rules: dict[str, Any],
) -> Tensor:
    now, rows = AccountState.of(amounts, alive), []
    nothing = torch.zeros_like(played)
    lived, sums = nothing, [nothing] * 4
    for t, target in enumerate(wanted.unbind()):
        # Numbers of this width alone: what is stored as bool takes longer than the rest of the step.
        lived = torch.where(now.alive, lived + 1, lived)
        now, fill = _advance(now, torch.where(now.alive, target, 0.0), quotes, t, rules)
        rows.append(fill.log_return)
        done = (fill.log_return, fill.traded, fill.costs, now.owed)
        sums = [total + part for total, part in zip(sums, done, strict=True)]
    played.add_(lived)
    flows.add_(torch.stack(sums))
    _write(now, amounts, alive)
    return torch.stack([row.float() for row in rows])


def _write(account: AccountState, amounts: Tensor, alive: Tensor) -> None:
    # Whole, not row by row: the compiler makes a loop over all of them of each row that is written.
    *rows, living = account.tensors()
    amounts.copy_(torch.stack(rows))
    alive.copy_(living)


def _advance(
    now: AccountState, target: Tensor, quotes: Tensor, t: int, rules: dict[str, Any]
) -> tuple[AccountState, Fill]:
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


@cache
def one_step(device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return what takes one step on a kind of device, which changes the account in place.

        step(amounts, alive, actions, *view, shared, rules)

    - amounts: (7, N) of the account, see ``AccountState.of``; alive: (N,) bool; actions: (N,) int64.
    - view: one of ``Segment.views``.
    - shared: index of cash, targets, decisions played and sums of what was done (both counted up), fee and
      slippage, and the constants of ``observe``.
    - rules: ruin_equity, with_impact and impact_limit.

    It returns what was done, (4, N); ruined; rewards; and the next observations.
    """
    return _compiled(_step, device)


@torch.no_grad()
def play(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    played: Tensor,
    flows: Tensor,
    rules: dict[str, Any],
    by_compiler: bool,
) -> Tensor:
    """Take T steps, one after the other, which changes the account in place.

    Args:
        amounts: (7, N) of the account, see ``AccountState.of``.
        alive: (N,) bool.
        wanted: (T, N) targets; those of the ruined do not count.
        quotes: (5, T + 2, N).
        played: (N,), to which the decisions of the living are added.
        flows: (4, N), sums of what was done, to which theirs are added.
        rules: ruin_equity, with_impact and impact_limit.
        by_compiler: whether by torch.compile, in pieces of UNROLLED steps.

    Returns:
        (T, N) log returns, float32.
    """
    parts = []
    for number, targets in enumerate(wanted.split(UNROLLED)):
        first, length = number * UNROLLED, len(targets)
        run = _compiled(_steps, amounts.device.type) if by_compiler and length == UNROLLED else _steps
        view = quotes[:, first : first + length + 2]
        parts.append(run(amounts, alive, targets, view, played, flows, rules))
    return torch.cat(parts)
