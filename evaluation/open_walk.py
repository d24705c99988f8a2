"""A walk that goes on: accounts of policies and of rules, over the bars that came since they last stood.

Shapes: K = accounts of a contestant, over a symbol or a group each, G = symbols of one, W = width of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.market import Market
from envs.open_env import HOLD
from envs.open_group_env import AnyAccount
from evaluation.baselines import BUY_AND_HOLD, actions_after
from evaluation.courses import Accounts, course_of, owners_of
from evaluation.exam import ENCODED_SEGMENTS, POLICY, Walk, at_flat_cost, one_thread
from models.ensemble import Decider, EnsembleHead
from models.policy import Head


@dataclass(frozen=True)
class OpenWalks:
    """What was walked, by contestant, and the accounts as they stand now: those that did not walk as before."""

    walks: dict[str, list[Walk]]
    accounts: dict[str, dict[str, AnyAccount]]
    held: int  # decisions of the policy's accounts before ``decides_from_ns``
    is_whole: bool  # else it was stopped before the newest bar


@torch.no_grad()
def walk_on(
    policies: Decider | Mapping[str, Decider | None],
    market: Market,
    config: EnvConfig,
    symbols: Sequence[str],
    accounts: Accounts,
    decides_from_ns: int,
    end_ns: int,
    chunk_segments: int = 64,
    check_stop: Callable[[], None] = lambda: None,
    is_late: Callable[[], bool] = lambda: False,
    rules: Sequence[str] = (BUY_AND_HOLD,),
    flat_costs_bps: Sequence[float] = (),
) -> OpenWalks:
    """Let the accounts walk on to the newest bar whose outcome is known, as an exam would, greedily.

    Args:
        policies: by name; a single one is called "policy". The trunk reads segments as in an exam. None: the
            contestant is in cash.
        market: has the bars.
        config: of the accounts, with the horizon of the training.
        symbols: to walk.
        accounts: as they stood; a symbol without one begins with money 1, at ``decides_from_ns``. A group goes on
            while all its symbols are there; of symbols without one, groups are made as in an exam.
        decides_from_ns: at the close of older bars accounts of policies keep what they hold: a policy knows what
            comes.
        end_ns: of the bars.
        chunk_segments: segments per forward of the trunk.
        check_stop: called every few bars; an exception from it ends the walk.
        is_late: asked likewise; then the walk ends where it is.
        rules: baselines that walk, too.
        flat_costs_bps: costs of traded value, instead of all fees and slippage, at which the first policy walks
            again, as further contestants named ``at_flat_cost(name, bps)``.

    Raises:
        NoSegment: there is nothing to walk.
    """
    policies = dict(policies) if isinstance(policies, Mapping) else {POLICY: policies}
    ladder = {at_flat_cost(next(iter(policies)), bps): bps for bps in flat_costs_bps}
    deciders = {**policies, **dict.fromkeys(ladder, next(iter(policies.values())))}
    names = [*deciders, *rules]
    market = replace(market, horizon=1).until(end_ns)
    owners = owners_of(market, config, symbols, accounts)
    costs = [ladder.get(name) for name in names]
    course = course_of(market, config, owners, names, lambda _: decides_from_ns, accounts, costs)
    schedule, horizon = course.schedule, config.horizon
    # A policy with several names reads the market once.
    acting = {id(policy): policy for policy in deciders.values() if policy}
    readers = [course.reader(policy, chunk_segments) for policy in acting.values()]
    place_of = {key: place for place, key in enumerate(acting)}
    who = tuple(place_of[id(policy)] if policy else None for policy in deciders.values())
    heads = tuple(policy.head for policy in acting.values())
    decide = _Decide(heads, who, config.positions.index(0.0))
    at_once = max(horizon, ENCODED_SEGMENTS * horizon // len(course.first_bars))
    done, held = 0, 0
    for first in range(0, len(schedule), at_once):
        if first and is_late():
            break
        rows = schedule[first : first + at_once]
        encoded = [read(rows, check_stop) for read in readers]  # (r, K x G, W) each
        may_decide = course.times(rows) >= decides_from_ns
        held += int(((rows >= 0) & ~may_decide).sum())
        may_decide = may_decide.repeat_interleave(course.size, dim=1)
        bars = course.bars(rows)
        ruled = [actions_after(name, market, config.positions, bars, course.first_bars) for name in rules]
        by_rule = torch.cat(ruled, dim=1) if ruled else bars[:, :0]
        with one_thread(market.device):
            for row in range(len(rows)):
                if row % 64 == 0:
                    check_stop()
                course.env.begin_segment_unread()
                here = slice(row, row + 1)
                inputs = may_decide[here], by_rule[here], *(segments[here] for segments in encoded)
                course.play(decide, *inputs)
        done += len(rows)
    after = course.accounts(names)
    accounts_now = {name: {**accounts.get(name, {}), **after[name]} for name in names}
    return OpenWalks(course.walks(names), accounts_now, held, done == len(schedule))


@dataclass(frozen=True)
class _Decide:
    """The actions of all accounts at one bar: first those of policies, then those of rules."""

    heads: tuple[Head | EnsembleHead, ...]
    who: tuple[int | None, ...]  # the head of each contestant that is no rule; None: it goes to cash
    flat: int  # the position 0

    def __call__(
        self, accounts: Tensor, may_decide: Tensor, by_rule: Tensor, *projected: Tensor
    ) -> tuple[Tensor]:
        """Join observations (N, A), who may decide (n,), the rules' actions, the market's part (n, W)."""
        own = accounts[: len(self.who) * len(may_decide)].unflatten(0, (len(self.who), len(may_decide)))
        chosen = torch.full(own.shape[:2], self.flat, device=own.device)
        for number, (head, market) in enumerate(zip(self.heads, projected, strict=True)):
            places = [place for place, of in enumerate(self.who) if of == number]
            chosen[places] = head.decide(market, own[places])[0].argmax(-1)
        return (torch.cat((torch.where(may_decide, chosen, HOLD).flatten(), by_rule)),)
