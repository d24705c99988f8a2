"""The exam of accounts over groups: policies and baselines walk the same minutes, one account per group.

The symbols of a kind of market, in the order of the market, are cut into groups; where the last would be smaller,
it is filled up with the first symbols. As in ``exam.py`` the trunk reads segments that are laid out by the clock
(``Grid.segment_starts``), wherever the walk begins, so that a live decision sees what an exam would.

Shapes: P = contestants, Q = groups, G = symbols of a group, N = P x Q accounts, H = horizon, W = width of the
head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.compiled import Decide
from envs.config import EnvConfig, GroupConfig
from envs.grid import Grid
from envs.group_walk_env import GroupExamEnv, walk_of_clock
from envs.market import Market, NoSegment
from evaluation.baselines import BASELINES, BUY_AND_HOLD, actions_after
from evaluation.exam import ENCODED_SEGMENTS, POLICY, Decisions, Walk, at_flat_cost, examine, one_thread
from models.ensemble import Decider


def examine_accounts(
    policies: Decider | Mapping[str, Decider],
    market: Market,
    config: EnvConfig,
    symbols: Sequence[str],
    start_ns: int,
    end_ns: int,
    **terms: Any,
) -> dict[str, list[Walk]]:
    """Let policies and baselines walk with the accounts of ``config``; see ``examine`` and ``examine_groups``."""
    if config.group is None:
        return examine(policies, market, config, symbols, start_ns, end_ns, **terms)
    groups = groups_of(market, config.group.size, symbols)
    return examine_groups(policies, market, config, groups, start_ns, end_ns, **terms)


def notes_on_walks(
    walks: Sequence[Walk], market: Market, config: EnvConfig, symbols: Sequence[str]
) -> list[str]:
    """Return in words which symbols did not walk, or which ones each group has."""
    walked = {walk.symbol for walk in walks}
    if config.group:
        groups = groups_of(market, config.group.size, symbols)
        return [
            *(
                f"{each.name.capitalize()}: {', '.join(each.symbols)}."
                for each in groups
                if each.name in walked
            ),
            "A row is an account over a group of symbols; its price is an index of them.",
        ]
    missing = [symbol for symbol in symbols if symbol not in walked]
    return [f"Too few bars for a segment of {config.horizon}: {', '.join(missing)}."] if missing else []


@dataclass(frozen=True)
class Group:
    """Who has an account: a name, and the symbols that it trades."""

    name: str
    symbols: tuple[str, ...]


def groups_of(
    market: Market, size: int, symbols: Sequence[str] | None = None, before: Sequence[Group] = ()
) -> list[Group]:
    """Cut a market's symbols into groups, or those of them that are given.

    Args:
        market: has the symbols.
        size: of a group.
        symbols: None: all of the market.
        before: groups that there are: those whose symbols are all given go on, first, and only symbols that none
            of them has are cut.

    Raises:
        ValueError: a kind of market has fewer than ``size`` of those.
    """
    chosen = [symbol for symbol in market.symbols if symbols is None or symbol in set(symbols)]
    groups = [each for each in before if set(each.symbols) <= set(chosen)]
    has_group = {symbol for each in groups for symbol in each.symbols}
    kinds = [market.asset_classes[market.symbols.index(symbol)] == "stock" for symbol in chosen]
    taken = {each.name for each in before}
    names = (name for number in count(1) if (name := f"group {number}") not in taken)
    most = 0
    for kind in (False, True):
        own = [symbol for symbol, is_stock in zip(chosen, kinds, strict=True) if is_stock == kind]
        most = max(most, len(own))
        if len(own) < size:
            continue
        left = [symbol for symbol in own if symbol not in has_group]
        for first in range(0, len(left), size):
            members = left[first : first + size]
            members += [symbol for symbol in own if symbol not in members][: size - len(members)]
            groups.append(Group(next(names), tuple(members)))
    if not groups:
        raise ValueError(f"a group needs {size} symbols of one kind, stocks or coins: there are {most}")
    return groups


@torch.no_grad()
def examine_groups(
    policies: Decider | Mapping[str, Decider],
    market: Market,
    config: EnvConfig,
    groups: Sequence[Group],
    start_ns: int,
    end_ns: int,
    cost_scale: float = 1.0,
    chunk_segments: int = 64,
    check_stop: Callable[[], None] = lambda: None,
    flat_costs_bps: Sequence[float] = (),
    on_segment: Callable[[int, int], None] = lambda done, total: None,
    max_segments: int | None = None,
) -> dict[str, list[Walk]]:
    """Let policies and baselines walk with groups; arguments as of ``exam.examine``.

    Buying and holding has no cap on its net exposure, which would leave it in cash: it is the market's return.

    Returns:
        Walks of the policies, then of the baselines, one per group: ``price`` is an index of its symbols, and
        ``position`` longs and shorts together.

    Raises:
        NoSegment: no group has the minutes of a segment there.
    """
    assert config.group is not None
    policies = dict(policies) if isinstance(policies, Mapping) else {POLICY: policies}
    market = market.until(end_ns)
    grid = grid_of(market, config.group.size)
    groups = [each for each, _ in walkable(grid, groups, [start_ns] * len(groups))]
    first, *others = policies
    names = [first, *(at_flat_cost(first, bps) for bps in flat_costs_bps), *others, *BASELINES]
    costs = [None, *flat_costs_bps, *(None for _ in (*others, *BASELINES))]
    env = GroupExamEnv(
        market,
        config,
        market.device,
        [group.symbols for _ in names for group in groups],
        [start_ns for _ in names for _ in groups],
        nets_of(config.group, names, len(groups)),
        [cost for cost in costs for _ in groups],
        grid=grid,
    )
    env.cost_scale = cost_scale
    per_head = (1 + len(flat_costs_bps), *(1 for _ in others))
    decide = Decisions(tuple(policy.head for policy in policies.values()), per_head)
    num_groups, size, horizon = len(groups), config.group.size, config.horizon
    schedule = env.schedule[:max_segments, :num_groups]  # (R, Q)
    symbols = env._groups[:num_groups]
    first_bars = market.offsets[symbols.flatten()]
    ahead = torch.arange(horizon, device=env.device)
    num_ahead = max(1, ENCODED_SEGMENTS // (num_groups * size))
    played: list[NDArray[np.float64]] = []
    prices = []
    for number in range(len(schedule)):
        check_stop()
        if number % num_ahead == 0:
            rows = schedule[number : number + num_ahead, :, None]
            minutes = torch.where(rows < 0, -1, rows + ahead)
            # A policy with two names reads the market once.
            by_policy = {
                id(p): read(p, env.grid, horizon, symbols, minutes, chunk_segments, check_stop)
                for p in {id(policy): policy for policy in policies.values()}.values()
            }
            projected = [by_policy[id(policy)] for policy in policies.values()]
        env.begin_segment_unread()
        minutes_now = env.minute[:num_groups] + ahead[:, None]  # (H, Q)
        bars = env.grid.bars_at(symbols, minutes_now[..., None]).clamp(min=0).flatten(1)
        rules = [actions_after(name, market, config.positions, bars, first_bars) for name in BASELINES]
        encoded = [segments[number % num_ahead] for segments in projected]
        with one_thread(env.device):
            played.append(play_group_segment(env, decide, torch.cat(rules, dim=1), encoded))
        prices.append(index_of_prices(env, num_groups))
        on_segment(number + 1, len(schedule))
    columns = list(np.concatenate(played, axis=1))
    return group_walks_of(names, groups, env, schedule, columns, np.concatenate(prices))


def grid_of(market: Market, size: int) -> Grid:
    """Lay out a market's bars by the minute.

    Raises:
        NoSegment: too few symbols have bars, or none has the minutes of a segment.
    """
    try:
        return Grid.of(market, size)
    except ValueError as error:
        raise NoSegment(str(error)) from error


def walkable(grid: Grid, groups: Sequence[Group], starts: Sequence[int]) -> list[tuple[Group, int]]:
    """Return the groups that have a segment to walk from their starts on, with these.

    Raises:
        NoSegment: none has.
    """
    number_of = {symbol: number for number, symbol in enumerate(grid.market.symbols)}
    clock_of = grid.clock_of.tolist()
    found = []
    for group, start_ns in zip(groups, starts, strict=True):
        clock, *others = {clock_of[number_of[symbol]] for symbol in group.symbols}
        if clock >= 0 and not others and walk_of_clock(grid, clock, start_ns):
            found.append((group, start_ns))
    if not found:
        raise NoSegment("no group has the minutes of a segment after the start")
    return found


def nets_of(group: GroupConfig, names: Sequence[str], num_groups: int) -> list[float]:
    """Return the cap on the net exposure of every account, name after name; buying and holding has none."""
    return [math.inf if name == BUY_AND_HOLD else group.net for name in names for _ in range(num_groups)]


def read(
    policy: Decider,
    grid: Grid,
    horizon: int,
    symbols: Tensor,
    minutes: Tensor,
    chunk_segments: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run a policy's trunk for groups (Q, G) at ``minutes`` (r, Q, h), -1 for none: (r, h, Q x G, W).

    As in ``Reader`` every forward has as many segments: what a decision sees depends on no other one's bits.
    """
    context = grid.market.context_bars
    starts = torch.where(minutes < 0, -1, grid.segment_starts(minutes.clamp(min=0), horizon))
    num_minutes = len(grid.minutes)
    group = torch.arange(len(symbols), device=minutes.device)[None, :, None]
    keys, place = torch.unique(torch.where(starts < 0, -1, group * num_minutes + starts), return_inverse=True)
    walked = keys >= 0
    begin, of_group = keys.clamp(min=0) % num_minutes, keys.clamp(min=0) // num_minutes
    last = grid.span_last[torch.searchsorted(grid.span_first, begin, right=True) - 1]
    tokens = begin[:, None] + torch.arange(-context, horizon + 1, device=minutes.device)
    # A segment may reach beyond the last minute; nothing is decided there.
    tokens = torch.minimum(tokens, last[:, None])
    encoded = None
    size = symbols.shape[1]
    numbers = torch.arange(len(keys), device=minutes.device)[walked]
    at_once = max(1, chunk_segments // size)
    for part in numbers.split(at_once):
        check_stop()
        padded = torch.cat((part, part[:1].expand(at_once - len(part))))
        bars = grid.bars_at(symbols[of_group[padded]][..., None], tokens[padded][:, None])
        found = policy.encode(grid.tokens(bars.flatten(0, 1)), horizon + 1).unflatten(0, (-1, size))
        if encoded is None:
            encoded = found.new_zeros(len(keys), size, horizon + 1, found.shape[-1])
        encoded[part] = found[: len(part)]
    assert encoded is not None  # some group walks every segment
    within = (minutes - starts).clamp(min=0)
    # (r, Q, h, G, W) -> (r, h, Q x G, W)
    return encoded[place, :, within].transpose(1, 2).flatten(2, 3)


def play_group_segment(
    env: GroupExamEnv, decide: Decide, rules: Tensor, projected: Sequence[Tensor]
) -> NDArray[np.float64]:
    """Play one segment; return position, log return, costs, traded, borrowing, and funding if any: (5-6, H, N)."""
    played = env.play(decide, rules, *projected)
    equity = played.log_equity.exp()
    fills = [torch.stack(column) for column in zip(*(fill[:5] for fill in played.fills), strict=True)]
    log_return, _, traded, costs, borrowing = fills
    paid = [costs + borrowing, traded, borrowing]
    if played.fills[0].funding is not None:
        paid.append(torch.stack([fill.funding for fill in played.fills if fill.funding is not None]))
    columns = (played.weights.abs().sum(-1), log_return, *(part / equity for part in paid))
    return torch.stack(columns).cpu().numpy()


def index_of_prices(env: GroupExamEnv, num_groups: int) -> NDArray[np.float64]:
    """Return the geometric means of what the first groups' symbols cost at the fills of a segment, (H, Q)."""
    return env.segment.fills["price"][:, :num_groups].log().mean(-1).exp().cpu().numpy()


def group_walks_of(
    names: Sequence[str],
    groups: Sequence[Group],
    env: GroupExamEnv,
    schedule: Tensor,
    columns: Sequence[NDArray[np.float64]],
    prices: NDArray[np.float64],
) -> dict[str, list[Walk]]:
    """Cut the columns of what was played, (R x H, N) each, into walks; ``prices`` (R x H, Q) are their indices."""
    market, horizon = env.market, env.config.horizon
    walks: dict[str, list[Walk]] = {name: [] for name in names}
    ahead = torch.arange(horizon, device=schedule.device)
    for number, group in enumerate(groups):
        first = schedule[:, number]
        walked = (first >= 0).repeat_interleave(horizon).cpu().numpy()
        if not walked.any():
            continue
        minutes = (first[first >= 0, None] + 1 + ahead).flatten()
        time = env.grid.minutes[minutes].cpu().numpy().astype("datetime64[ns]")
        kind = market.asset_classes[market.symbols.index(group.symbols[0])]
        asset_class = "stock" if kind == "stock" else "crypto"
        for place, name in enumerate(names):
            own = (column[walked, place * len(groups) + number] for column in columns)
            walks[name].append(Walk(group.name, asset_class, time, prices[walked, number], *own))
    return walks
