"""Decisions and their steps by torch.compile, several in one call: the functions are those of a plain step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from envs.account import AccountState, Fill, advance, observe
from envs.segment import Segment

# Takes the account observations (N, A) and the inputs of this step; returns actions (N,) int64 and any further
# outputs. To be compiled it must be tensor operations alone, and hold no numbers that change from call to call.
Decide = Callable[..., tuple[Tensor, ...]]
# Decisions with their steps in one compiled call: by fours they take a fifth longer.
UNROLLED_DECISIONS = 8
# Each number of environments and each policy compiles a variant of its own, and torch allows 8 in a process.
MOST_VARIANTS = 64


@cache
def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a function of tensors, several steps of a recursion over time, compiled for a type of device."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "size_asserts": False,
        # One loop over the accounts for a whole step: by default it is split after 64 operations, and values that
        # pass between the parts go through memory.
        "max_fusion_size": 1_000_000,
        "cpp_wrapper": device == "cpu",  # the call is half of a step's time
    }
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


class CompiledSteps:
    """Compiled steps of one environment; they change its account in place.

    Args:
        amounts: (7, N) of the account, see ``AccountState.of``.
        alive: (N,) bool.
        segment: the segment to play.
        shared: index of cash, targets, decisions played and sums of ``last_fill`` (both counted up), fee and
            slippage, and the constants of ``observe``.
    """

    def __init__(
        self,
        amounts: Tensor,
        alive: Tensor,
        segment: Segment,
        shared: tuple[Tensor, ...],
    ) -> None:
        rules = {
            "ruin_equity": segment.config.ruin_fraction,
            "with_impact": segment.impact is not None,
            "impact_limit": segment.impact_limit,
            "margin": segment.margin,
        }
        self._account = amounts, alive
        self._segment = segment
        self._terms = shared, rules
        self._device = amounts.device.type

    @torch.no_grad()
    def play(
        self,
        decide: Decide,
        inputs: tuple[Tensor, ...],
        observed: Tensor,
        log_start: Tensor | None = None,
        with_fills: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Take all decisions of the segment and their steps.

        Args:
            decide: see ``Decide``.
            inputs: (H, ...) each, one step's values go to each call of ``decide``.
            observed: (N, A), at the first decision.
            log_start: (N,) log equity at the start of the episode; None for 0.
            with_fills: also return what ``Fills`` holds.

        Returns:
            The observations after the last step, (N, A); and columns: observations (H, A, N), log equity and
            rewards (H, N), then those of ``Fills``, then the outputs of ``decide``, (H, N, ...) each.
        """
        segment, parts = self._segment, []
        horizon = len(segment.held)
        for first in range(0, horizon, UNROLLED_DECISIONS):
            length = min(UNROLLED_DECISIONS, horizon - first)
            run = compiled(_decisions, self._device) if length == UNROLLED_DECISIONS else _decisions
            rows = slice(first, first + length)
            observed, columns = run(
                decide,
                tuple(values[rows] for values in inputs),
                observed,
                *self._account,
                # (5 or 6, length + 2, N): the newest closed bar, and those that the decisions need beyond it.
                segment.quotes[:, first : first + length + 2],
                None if segment.allowed is None else segment.allowed[rows],
                *self._terms,
                log_start,
                with_fills,
            )
            parts.append(columns)
        return observed, [torch.cat(column) for column in zip(*parts, strict=True)]


def _decisions(
    decide: Decide,
    inputs: tuple[Tensor, ...],
    observed: Tensor,
    amounts: Tensor,
    alive: Tensor,
    quotes: Tensor,
    allowed: Tensor | None,
    shared: tuple[Tensor, ...],
    rules: dict[str, Any],
    log_start: Tensor | None,
    with_fills: bool,
) -> tuple[Tensor, list[Tensor]]:
    in_cash, targets, played, flows, base_rate, *constants = shared
    now, lived, sums = AccountState.of(amounts, alive), played, flows.unbind()
    rows = []
    for t in range(quotes.shape[1] - 2):
        # Accounts side by side, as in memory. No bool is stored: that would take longer than the rest of a step.
        before = observed.t().contiguous(), now.log_equity
        held = now.units, now.target
        outputs = decide(observed, *(values[t] for values in inputs))
        action = torch.where(now.alive if allowed is None else now.alive & allowed[t], outputs[0], in_cash)
        lived = torch.where(now.alive, lived + 1, lived)
        now, fill = _advance(now, targets[action], quotes, t, rules)
        last_fill = [fill.log_return, fill.traded, fill.costs, fill.borrow_cost]
        if fill.funding is not None:
            last_fill.append(fill.funding)
        sums = tuple(total + part for total, part in zip(sums, last_fill, strict=True))
        observed = observe(now, quotes[1, t + 1], lived, base_rate, tuple(constants), log_start)
        recorded = (*held, *last_fill) if with_fills else ()
        rows.append((*before, fill.log_return.float(), *recorded, *outputs))
    # Copied before the account changes in place.
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    played.copy_(lived)
    flows.copy_(torch.stack(sums))
    # All rows in one write: the compiler turns each row written into a loop over all of them.
    *values, living = now.tensors()
    amounts.copy_(torch.stack(values))
    alive.copy_(living)
    return observed, columns


def _advance(
    now: AccountState, target: Tensor, quotes: Tensor, t: int, rules: dict[str, Any]
) -> tuple[AccountState, Fill]:
    opens, _, borrow, cost_rate, impact, *funding = quotes.unbind()
    large = {}
    if rules["with_impact"]:
        limit = rules["impact_limit"]
        large = {"impact": impact[t + 1], "next_impact": impact[t + 2], "impact_limit": limit}
    return advance(
        now,
        target,
        price=opens[t + 1],
        next_price=opens[t + 2],
        cost_rate=cost_rate[t + 1],
        next_cost_rate=cost_rate[t + 2],
        borrow=borrow[t + 1],
        ruin_equity=rules["ruin_equity"],
        funding=funding[0][t + 2] if funding else None,
        margin=rules["margin"],
        **large,
    )
