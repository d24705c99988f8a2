"""Paper trading: accounts on live bars, one minute at a time, by the ledger of the exam. No orders are sent.

At every minute's end two things happen, in this order. Decisions whose bars are settled are *booked*: what was
decided at the close of bar t fills at the open of bar t + 1 and is counted at the open of bar t + 2, as in exams.
Then the policy *decides* at the newest bar, and that is on disk before its fill can be known. A bar that came too
late for its order to fill at the next open is no decision: the account holds what it has, and it is said.

Bars are settled after ``SETTLED_MINUTES``, in which late ones come and wrong ones are put right; until then a fill
is provisional, computed again every minute. So what is booked equals, to the bit, what an exam of these bars says
whose accounts hold where nothing was decided in time.

An account over a group is decided on once a minute of its market, for all its symbols: one whose bar is late or
missing is seen as in training, with the one before. What is kept of accounts has a symbol or a group as its key.

Shapes: K = accounts, G = symbols of each, R = decisions of the longest walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import DAY_NS, MINUTE_NS, AssetClass, Bars
from data_sources.calendar import expected_minutes
from envs.market import Market, NoSegment
from envs.open_env import HOLD, OpenAccount
from envs.open_group_env import AnyAccount
from evaluation.baselines import BUY_AND_HOLD, actions_after
from evaluation.courses import Course, Trade, course_of
from evaluation.exam import POLICY, Walk, one_thread
from evaluation.group_exam import Group, groups_of
from evaluation.portfolio import Fill
from evaluation.trained_policy import NEVER_NS, Actor, training_panel

NAMES = (POLICY, BUY_AND_HOLD)
SEGMENTS_AT_ONCE = 16  # per forward of the trunk
LONGEST_CLOSURE_NS = 7 * DAY_NS  # the next session begins within it
SETTLED_MINUTES = 5
WATCHED_BARS = 15  # so many of each symbol's newest bars are compared with what they were


@dataclass
class PaperState:
    """All that goes on from minute to minute, as plain values."""

    minute_ns: int = 0  # the newest one that is done
    accounts: dict[str, dict[str, AnyAccount]] = field(default_factory=lambda: {name: {} for name in NAMES})
    # key -> bar or minute -> a target per symbol, not booked yet
    decided: dict[str, dict[int, tuple[float, ...]]] = field(default_factory=dict)
    seen: dict[str, dict[int, tuple[float, float]]] = field(
        default_factory=dict
    )  # symbol -> bar -> open, close
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of accounts over groups: their symbols


@dataclass(frozen=True)
class Minute:
    """What one minute brought."""

    state: PaperState
    booked: Mapping[str, Sequence[Walk]]  # contestant -> a walk per key that had something to book
    trades: Sequence[Trade]  # of the policy, booked now
    targets: Mapping[str, tuple[float, ...]]  # key -> decided at its newest bar or minute, in time
    late: Mapping[str, Sequence[int]]  # key -> bars or minutes at which nothing was decided, booked now
    waiting: Mapping[str, str]  # key or symbol -> why nothing was decided at its newest bar
    unseen: Mapping[str, Sequence[str]]  # group -> its symbols without a bar of the minute decided on
    revised: Mapping[str, Sequence[int]]  # symbol -> bars that are others than they were
    inserted: Mapping[str, Sequence[int]]  # symbol -> bars that came after newer ones
    fills: Sequence[Fill]  # of all symbols' accounts that were booked, for a portfolio
    late_funding: Mapping[str, Sequence[tuple[int, float]]]  # symbol -> bar, rate that it has more by now


def run_minute(
    actor: Actor,
    state: PaperState,
    bars: Sequence[Bars],
    now_ns: int,
    may_decide: bool = True,
    others: Sequence[Bars] = (),
    to_cash: bool = False,
) -> Minute:
    """Book what is known by now, and decide at the newest closed bars.

    Args:
        actor: the policy that decides.
        state: after the minute before; not modified.
        bars: of each symbol, with some weeks of history (docs/features.md).
        now_ns: the time; a minute that it is in has no closed bar yet.
        may_decide: else only book: with the clock off, nobody knows which bar is the newest.
        others: of more symbols of the training, which features look at.
        to_cash: decide for cash, whatever the policy wants.
    """
    minute_ns = now_ns // MINUTE_NS * MINUTE_NS
    closed = [series.between(0, minute_ns) for series in bars]
    needed = actor.config.context_bars + 3
    waiting = {s.symbol: f"{len(s)} bars, needs {needed}" for s in closed if len(s) < needed}
    closed = [series for series in closed if series.symbol not in waiting]
    changes = _compare(state.seen, closed)
    state = replace(state, minute_ns=minute_ns, seen=_newest(closed))
    if not closed:
        return Minute(state, {name: [] for name in NAMES}, [], {}, {}, waiting, {}, *changes, [], {})
    seen = [series.between(0, minute_ns) for series in others]
    market = _market(actor, [_with_next(series, minute_ns) for series in closed], seen)
    owners, state, missing = _owners(actor, state, market)
    waiting |= missing
    settled_ns = minute_ns - SETTLED_MINUTES * MINUTE_NS
    before = state.accounts[POLICY]
    state, booked, trades, late, fills = _book(actor, state, market, owners, settled_ns)
    late_funding = _late_funding(before, state.accounts[POLICY])
    wanted: list[Group] = []
    newest: dict[str, int] = {}
    for each in owners:
        asset_class, newest[each.name] = _newest_of(each, closed)
        at, following = newest[each.name], _following(asset_class, newest[each.name] + MINUTE_NS)
        if may_decide and now_ns >= following + MINUTE_NS:
            behind = (minute_ns - at) // MINUTE_NS - 1
            minutes = f"{behind} minute{'s' if behind > 1 else ''}"
            waiting[each.name] = f"stale: its newest bar closed {minutes} ago"
        elif may_decide and at not in state.decided.get(each.name, {}):  # after a restart it may be
            wanted.append(each)
    decided = {key: dict(own) for key, own in state.decided.items()}
    for key, targets in _decide(actor, state, market, wanted, newest).items():
        decided.setdefault(key, {})[newest[key]] = tuple(0.0 for _ in targets) if to_cash else targets
    for each in wanted:
        if newest[each.name] not in decided.get(each.name, {}):
            waiting[each.name] = "too few bars in a row since its last hole"
    in_time = {
        key: decided[key][at]
        for key, at in newest.items()
        if key not in waiting and at in decided.get(key, {})
    }
    last = {series.symbol: int(series.open_time[-1]) for series in closed}
    unseen = {
        each.name: absent
        for each in owners
        if each.name in in_time and (absent := [s for s in each.symbols if last[s] < newest[each.name]])
    }
    state = replace(state, decided=decided)
    return Minute(state, booked, trades, in_time, late, waiting, unseen, *changes, fills, late_funding)


def _owners(
    actor: Actor, state: PaperState, market: Market
) -> tuple[list[Group], PaperState, dict[str, str]]:
    """Return whose accounts there are: of each symbol, or of groups as they were and of other symbols' ones.

    Returns:
        The keys with their symbols, all of which have bars; the state with the groups; why others have to wait.
    """
    if actor.config.group is None:
        return [Group(symbol, (symbol,)) for symbol in market.symbols], state, {}
    before = [Group(name, tuple(symbols)) for name, symbols in state.groups.items()]
    try:
        found = groups_of(market, actor.config.group.size, before=before)
    except ValueError as error:
        return [], state, {symbol: str(error) for symbol in market.symbols}
    here = {each.name for each in found}
    missing = {each.name: "not all its symbols have bars" for each in before if each.name not in here}
    grouped = {each.name: each.symbols for each in [*before, *found]}
    alone = set(market.symbols) - {symbol for each in found for symbol in each.symbols}
    missing |= dict.fromkeys(sorted(alone), "too few symbols of its kind for a group")
    return found, replace(state, groups=grouped), missing


def _newest_of(owner: Group, bars: Sequence[Bars]) -> tuple[AssetClass, int]:
    """Return the kind and the newest bar of a symbol, or the newest minute of the market of a group's symbols."""
    (first,) = [series for series in bars if series.symbol == owner.symbols[0]]
    if owner.name == first.symbol:
        return first.asset_class, int(first.open_time[-1])
    is_stock = first.asset_class == "stock"
    same = [series for series in bars if (series.asset_class == "stock") == is_stock]
    return first.asset_class, max(int(series.open_time[-1]) for series in same)


def _book(
    actor: Actor, state: PaperState, market: Market, owners: Sequence[Group], settled_ns: int
) -> tuple[PaperState, dict[str, list[Walk]], list[Trade], dict[str, list[int]], list[Fill]]:
    """Book what is settled.

    Returns:
        The state after it, the walks, the policy's trades, where nothing was decided, and all fills.
    """
    own = [each for each in owners if each.name in state.accounts[POLICY] or state.decided.get(each.name)]
    nothing: dict[str, list[Walk]] = {name: [] for name in NAMES}
    if not own:
        return state, nothing, [], {}, []
    config = actor.config

    def start_of(key: str) -> int:
        return min(state.decided.get(key) or [0])

    try:
        known = market.until(settled_ns)
        course = course_of(known, config, own, NAMES, start_of, state.accounts)
    except NoSegment:
        return state, nothing, [], {}, []
    actions, late = _given(config.positions, state, course)
    bars = course.bars(course.schedule)
    buying = actions_after(BUY_AND_HOLD, known, config.positions, bars, course.first_bars)
    given = torch.cat((actions, buying), dim=1)
    trades: list[Trade] = []
    with one_thread(known.device):
        for row in range(len(given)):
            course.env.begin_segment_unread()
            course.play(_as_given, given[row : row + 1])
            trades += course.trades(row)
    now = course.accounts(NAMES)
    accounts = {name: state.accounts[name] | now[name] for name in NAMES}
    decided = {
        key: {at: targets for at, targets in waiting.items() if at >= accounts[POLICY][key].next_ns}
        if key in accounts[POLICY]
        else waiting
        for key, waiting in state.decided.items()
    }
    fills = [] if config.group else _fills(actor, known, course.keys, course.schedule, actions)
    state = replace(state, accounts=accounts, decided=decided)
    return state, course.walks(NAMES), trades, late, fills


def _fills(
    actor: Actor, known: Market, symbols: Sequence[str], schedule: Tensor, actions: Tensor
) -> list[Fill]:
    """Return the bars at whose opens these actions, (R, S), filled."""
    config, positions = actor.config, actor.config.positions
    fees = known.cost_rates(config, torch.float64).tolist()
    most = config.max_rate - config.volume_slippage
    fills = []
    for bars, chosen in zip(schedule.tolist(), actions.tolist(), strict=True):
        for symbol, bar, action in zip(symbols, bars, chosen, strict=True):
            if bar < 0:
                continue
            number = known.symbols.index(symbol)
            price, _, _, spread, volume, *funding = known.quotes[bar + 1].double().tolist()
            fills.append(
                Fill(
                    int(known.open_time[bar + 1]),
                    symbol,
                    None if action == HOLD else positions[action],
                    price,
                    min(spread * config.range_slippage + fees[number], most),
                    volume,
                    funding[0] if funding else 0.0,
                    known.asset_classes[number] != "perpetual",
                )
            )
    return fills


def _late_funding(
    before: Mapping[str, AnyAccount], now: Mapping[str, AnyAccount]
) -> dict[str, list[tuple[int, float]]]:
    """Return the bars of symbols' accounts whose funding was another when they were booked, and the difference."""
    found: dict[str, list[tuple[int, float]]] = {}
    for symbol, account in now.items():
        former = before.get(symbol)
        if isinstance(account, OpenAccount) and isinstance(former, OpenAccount):
            then = {charge.time_ns: charge.rate for charge in former.charges}
            for charge in account.charges:
                if more := charge.rate - then.get(charge.time_ns, charge.rate):
                    found.setdefault(symbol, []).append((charge.time_ns, more))
    return found


def _given(
    positions: Sequence[float], state: PaperState, course: Course
) -> tuple[Tensor, dict[str, list[int]]]:
    """Return what was decided in time, (R, K x G) actions, ``HOLD`` elsewhere, and where that is."""
    times = course.times(course.schedule).tolist()
    late: dict[str, list[int]] = {}
    rows = []
    for places, opened in zip(course.schedule.tolist(), times, strict=True):
        row: list[int] = []
        for key, place, time in zip(course.keys, places, opened, strict=True):
            targets = state.decided.get(key, {}).get(time)
            if targets is None and place >= 0:
                late.setdefault(key, []).append(time)
            row += [HOLD] * course.size if targets is None else map(positions.index, targets)
        rows.append(row)
    return torch.tensor(rows, device=course.schedule.device), late


def _as_given(accounts: Tensor, actions: Tensor) -> tuple[Tensor]:
    """Do what was decided before."""
    return (actions,)


@torch.no_grad()
def _decide(
    actor: Actor,
    state: PaperState,
    market: Market,
    owners: Sequence[Group],
    newest: Mapping[str, int],
) -> dict[str, tuple[float, ...]]:
    """Return what the policy wants at the newest bar of these accounts, as they stand by then."""
    positions = actor.config.positions

    def start_of(key: str) -> int:
        return min(state.decided.get(key) or [newest[key]])

    try:
        course = course_of(market, actor.config, owners, (POLICY,), start_of, state.accounts)
    except NoSegment:
        return {}
    given, _ = _given(positions, state, course)
    at = torch.tensor([newest[key] for key in course.keys], device=market.device)
    is_newest = (course.times(course.schedule) == at) & (course.schedule >= 0)  # (R, K)
    observed = torch.zeros(len(course.first_bars), actor.config.num_account_features, device=market.device)
    for row in range(len(given)):
        course.env.begin_segment_unread()
        here = is_newest[row].repeat_interleave(course.size)
        observed[here] = course.env.account_observations()[here]
        course.play(_as_given, given[row : row + 1])
    place = torch.where(is_newest, course.schedule, -1).amax(0)
    if not (place >= 0).any():
        return {}
    projected = course.reader(actor.policy, SEGMENTS_AT_ONCE)(place[None], lambda: None)[0]  # (K x G, W)
    chosen = actor.policy.head.decide(projected, observed[None])[0].argmax(-1).view(-1, course.size)
    return {
        key: tuple(positions[index] for index in row)
        for key, row, is_ready in zip(course.keys, chosen.tolist(), (place >= 0).tolist(), strict=True)
        if is_ready
    }


def _market(actor: Actor, bars: Sequence[Bars], others: Sequence[Bars]) -> Market:
    device = next(actor.policy.parameters()).device
    return Market.from_bars(
        bars,
        device=device,
        holdout_start_ns=NEVER_NS,
        context_bars=actor.config.context_bars,
        horizon=1,
        statistics=actor.statistics,
        features=actor.features,
        panel=training_panel(bars, others, device, actor.symbols),
    )


def _with_next(bars: Bars, minute_ns: int) -> Bars:
    """Add two bars that stand still at the newest close, where the next ones will be.

    They give the account of the last decision a state to be observed in; nothing of it depends on their prices.
    """
    following = _following(bars.asset_class, minute_ns)
    times = np.array([following, _following(bars.asset_class, following + MINUTE_NS)])
    columns = {
        name: np.concatenate([getattr(bars, name), np.full(2, bars.close[-1])]) for name in bars.columns
    }
    columns["open_time"] = np.concatenate([bars.open_time, times])
    for name in bars.columns[5:]:  # volume and flow
        columns[name][-2:] = 0.0
    added = Bars.known_valid(bars.symbol, bars.asset_class, columns)
    return added if bars.funding is None else added.with_funding(np.append(bars.funding, [0.0, 0.0]))


def _following(asset_class: AssetClass, time_ns: int) -> int:
    """Return the first minute of trading from ``time_ns`` on."""
    if asset_class != "stock":
        return time_ns
    scheduled = expected_minutes(time_ns, time_ns + LONGEST_CLOSURE_NS)
    return time_ns if scheduled is None or not len(scheduled) else int(scheduled[0])


def _newest(bars: Sequence[Bars]) -> dict[str, dict[int, tuple[float, float]]]:
    return {
        series.symbol: {
            int(time): (float(open_), float(close))
            for time, open_, close in zip(
                series.open_time[-WATCHED_BARS:],
                series.open[-WATCHED_BARS:],
                series.close[-WATCHED_BARS:],
                strict=True,
            )
        }
        for series in bars
    }


def _compare(
    seen: Mapping[str, Mapping[int, tuple[float, float]]], bars: Sequence[Bars]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return which of the bars that were seen are others now, and which came after newer ones."""
    revised: dict[str, list[int]] = {}
    inserted: dict[str, list[int]] = {}
    for symbol, now in _newest(bars).items():
        before = seen.get(symbol, {})
        for time, prices in now.items():
            if time in before and before[time] != prices:
                revised.setdefault(symbol, []).append(time)
            elif before and time not in before and min(before) < time < max(before):
                inserted.setdefault(symbol, []).append(time)
    return revised, inserted
