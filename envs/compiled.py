"""Steps by torch.compile: one at a time, or many in one call. The same functions as without."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from envs.account import AccountState, Fill, advance, observe
from envs.segment import Segment

# Of account observations (N, A) and whatever else it is given: actions (N,) int64, and what it tells beside them.
# To be compiled it must be tensor operations alone, and hold no numbers that change from call to call.
Decide = Callable[..., tuple[Tensor, ...]]
# Steps of given actions in one compiled call: 16 take 15 seconds to compile, 32 twice as long, and gain a sixth.
UNROLLED = 16
# Decisions with their steps in one compiled call: by fours they take a fifth longer.
UNROLLED_DECISIONS = 8
# Every number of environments and every policy is a variant of its own, of which torch allows 8 in a process.
MOST_VARIANTS = 64


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "size_asserts": False,
        # One loop over the accounts for all that a step does: by default it is cut after 64 operations, and what
        # lies between goes through memory.
        "max_fusion_size": 1_000_000,
        "cpp_wrapper": device == "cpu",  # the call is half of a step's time
    }
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


class CompiledSteps:
    """One environment's steps, which change its account in place.

    Args:
        amounts: (7, N) of the account, see ``AccountState.of``.
        alive: (N,) bool.
        segment: what is played.
        shared: index of cash, targets, decisions played and sums of what was done (both counted up), fee and
            slippage, and the constants of ``observe``.
        rules: ruin_equity, with_impact and impact_limit.
    """

    def __init__(
        self,
        amounts: Tensor,
        alive: Tensor,
        segment: Segment,
        shared: tuple[Tensor, ...],
        rules: dict[str, Any],
    ) -> None:
        self._account = amounts, alive
        self._segment = segment
        self._terms = shared, rules
        self._device = amounts.device.type

    def step(self, actions: Tensor, number: int) -> tuple[Tensor, ...]:
        """Take step ``number`` with actions (N,).

        Returns:
            What was done, (4, N); ruined; rewards; and the next observations.
        """
        run = _compiled(_step, self._device)
        done: tuple[Tensor, ...] = run(*self._account, actions, *self._segment.views[number], *self._terms)
        return done

    @torch.no_grad()
    def replay(self, wanted: Tensor, by_compiler: bool) -> Tensor:
        """Take all steps with given targets.

        Args:
            wanted: (H, N) targets; those of the ruined do not count.
            by_compiler: whether by torch.compile, in pieces of UNROLLED steps.

        Returns:
            (H, N) log returns, float32.
        """
        parts = []
        for number, targets in enumerate(wanted.split(UNROLLED)):
            whole = by_compiler and len(targets) == UNROLLED
            run = _compiled(_steps, self._device) if whole else _steps
            quotes = self._quotes(number * UNROLLED, len(targets))
            parts.append(run(*self._account, targets, quotes, *self._terms))
        return torch.cat(parts)

    @torch.no_grad()
    def play(
        self, decide: Decide, given: tuple[Tensor, ...], observed: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Take all decisions and their steps.

        Args:
            decide: see ``Decide``.
            given: (H, N, ...) each, what it is given beside the observations.
            observed: (N, A), at the first decision.

        Returns:
            The observations after the last step, (N, A); and observations, (H, A, N), log equity and rewards,
            (H, N), and what ``decide`` told, (H, N, ...) each.
        """
        segment, parts = self._segment, []
        horizon = len(segment.held)
        for first in range(0, horizon, UNROLLED_DECISIONS):
            length = min(UNROLLED_DECISIONS, horizon - first)
            run = _compiled(_decisions, self._device) if length == UNROLLED_DECISIONS else _decisions
            rows = slice(first, first + length)
            observed, columns = run(
                decide,
                tuple(each[rows] for each in given),
                observed,
                *self._account,
                self._quotes(first, length),
                None if segment.allowed is None else segment.allowed[rows],
                *self._terms,
            )
            parts.append(columns)
        return observed, [torch.cat(column) for column in zip(*parts, strict=True)]

    def _quotes(self, first: int, length: int) -> Tensor:
        # (5, length + 2, N): of the newest closed bar, and of those that the decisions need beyond it.
        return self._segment.quotes[:, first : first + length + 2]


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
    done = torch.stack(_done(fill, new))
    flows.add_(done)
    observed = observe(new, quotes[1, 1], played, base_rate, tuple(constants))
    _write(new, amounts, alive)
    return done, fill.ruined, fill.log_return.float(), observed


def _steps(
    amounts: Tensor,
    alive: Tensor,
    wanted: Tensor,
    quotes: Tensor,
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> Tensor:
    _, _, played, flows, *_ = shared
    now, lived, sums = AccountState.of(amounts, alive), played, flows.unbind()
    rows = []
    for t, target in enumerate(wanted.unbind()):
        # Numbers of this width alone: what is stored as bool takes longer than the rest of the step.
        lived = torch.where(now.alive, lived + 1, lived)
        now, fill = _advance(now, torch.where(now.alive, target, 0.0), quotes, t, rules)
        sums = _added(sums, _done(fill, now))
        rows.append(fill.log_return)
    played.copy_(lived)
    flows.copy_(torch.stack(sums))
    _write(now, amounts, alive)
    return torch.stack([row.float() for row in rows])


def _decisions(
    decide: Decide,
    given: tuple[Tensor, ...],
    observed: Tensor,
    amounts: Tensor,
    alive: Tensor,
    quotes: Tensor,
    allowed: Tensor | None,
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
) -> tuple[Tensor, list[Tensor]]:
    in_cash, targets, played, flows, base_rate, *constants = shared
    now, lived, sums = AccountState.of(amounts, alive), played, flows.unbind()
    rows = []
    for t in range(quotes.shape[1] - 2):
        # Account by account, as they lie in memory; and nothing of type bool, see ``_steps``.
        known = observed.t().contiguous(), now.log_equity
        told = decide(observed, *(each[t] for each in given))
        action = torch.where(now.alive if allowed is None else now.alive & allowed[t], told[0], in_cash)
        lived = torch.where(now.alive, lived + 1, lived)
        now, fill = _advance(now, targets[action], quotes, t, rules)
        sums = _added(sums, _done(fill, now))
        observed = observe(now, quotes[1, t + 1], lived, base_rate, tuple(constants))
        rows.append((*known, fill.log_return.float(), *told))
    # Before the account changes under what was known.
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    played.copy_(lived)
    flows.copy_(torch.stack(sums))
    _write(now, amounts, alive)
    return observed, columns


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


def _done(fill: Fill, after: AccountState) -> tuple[Tensor, ...]:
    return fill.log_return, fill.traded, fill.costs, after.owed


def _added(sums: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(total + part for total, part in zip(sums, parts, strict=True))


def _write(account: AccountState, amounts: Tensor, alive: Tensor) -> None:
    # Whole, not row by row: the compiler makes a loop over all of them of each row that is written.
    *rows, living = account.tensors()
    amounts.copy_(torch.stack(rows))
    alive.copy_(living)
