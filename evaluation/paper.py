"""Paper trading: accounts on live bars, one minute at a time, by the ledger of the exam. No orders are sent.

At every minute's end two things happen, in this order. Decisions whose bars are settled are *booked*: what was
decided at the close of bar t fills at the open of bar t + 1 and is counted at the open of bar t + 2, as in exams.
Then the policy *decides* at the newest bar, and that is on disk before its fill can be known. A bar that came too
late for its order to fill at the next open is no decision: the account holds what it has, and it is said.

Bars are settled after ``SETTLED_MINUTES``, in which late ones come and wrong ones are put right; until then a fill
is provisional, computed again every minute. So what is booked equals, to the bit, what an exam of these bars says
whose accounts hold where nothing was decided in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import DAY_NS, MINUTE_NS, Bars
from data_sources.calendar import expected_minutes
from envs.market import Market, NoSegment
from envs.open_env import OpenAccount, OpenEnv
from evaluation.baselines import BUY_AND_HOLD, actions_after
from evaluation.exam import POLICY, Reader, Walk, one_thread, play_segment, walks_of
from evaluation.portfolio import Fill
from evaluation.trained_policy import NEVER_NS, Actor, training_panel

NAMES = (POLICY, BUY_AND_HOLD)
HOLD = -1  # no decision: whatever is held stays
SEGMENTS_AT_ONCE = 16  # per forward of the trunk
LONGEST_CLOSURE_NS = 7 * DAY_NS  # the next session begins within it
SETTLED_MINUTES = 5
WATCHED_BARS = 15  # so many of each symbol's newest bars are compared with what they were


@dataclass
class PaperState:
    """All that goes on from minute to minute, as plain values."""

    minute_ns: int = 0  # the newest one that is done
    accounts: dict[str, dict[str, OpenAccount]] = field(default_factory=lambda: {name: {} for name in NAMES})
    decided: dict[str, dict[int, float]] = field(
        default_factory=dict
    )  # symbol -> bar -> target, not booked yet
    seen: dict[str, dict[int, tuple[float, float]]] = field(
        default_factory=dict
    )  # symbol -> bar -> open, close


@dataclass(frozen=True)
class Minute:
    """What one minute brought."""

    state: PaperState
    booked: Mapping[str, Sequence[Walk]]  # contestant -> a walk per symbol that had something to book
    targets: Mapping[str, float]  # symbol -> decided at its newest bar, in time
    late: Mapping[str, Sequence[int]]  # symbol -> bars at which nothing was decided, booked now
    waiting: Mapping[str, str]  # symbol -> why nothing was decided at its newest bar
    revised: Mapping[str, Sequence[int]]  # symbol -> bars that are others than they were
    inserted: Mapping[str, Sequence[int]]  # symbol -> bars that came after newer ones
    fills: Sequence[Fill]  # of everything that was booked, for a portfolio


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
        return Minute(state, {name: [] for name in NAMES}, {}, {}, waiting, *changes, [])
    seen = [series.between(0, minute_ns) for series in others]
    market = _market(actor, [_with_next(series, minute_ns) for series in closed], seen)
    known = market.until(minute_ns)
    settled_ns = minute_ns - SETTLED_MINUTES * MINUTE_NS
    state, booked, late, fills = _book(actor, state, market, settled_ns)
    newest = {series.symbol: int(series.open_time[-1]) for series in closed}
    wanted: list[str] = []
    for series in closed if may_decide else ():
        if now_ns >= _next_open(series) + MINUTE_NS:
            behind = (minute_ns - newest[series.symbol]) // MINUTE_NS - 1
            minutes = f"{behind} minute{'s' if behind > 1 else ''}"
            waiting[series.symbol] = f"stale: its newest bar closed {minutes} ago"
        elif newest[series.symbol] not in state.decided.get(series.symbol, {}):  # after a restart it may be
            wanted.append(series.symbol)
    decided = {symbol: dict(own) for symbol, own in state.decided.items()}
    for symbol, target in _decide(actor, state, market, known, wanted, newest).items():
        decided.setdefault(symbol, {})[newest[symbol]] = 0.0 if to_cash else target
    for symbol in wanted:
        if newest[symbol] not in decided.get(symbol, {}):
            waiting[symbol] = "too few bars in a row since its last hole"
    targets = {
        symbol: decided[symbol][bar]
        for symbol, bar in newest.items()
        if symbol not in waiting and bar in decided.get(symbol, {})
    }
    return Minute(replace(state, decided=decided), booked, targets, late, waiting, *changes, fills)


def _book(
    actor: Actor, state: PaperState, market: Market, settled_ns: int
) -> tuple[PaperState, dict[str, list[Walk]], dict[str, list[int]], list[Fill]]:
    """Book what is settled; return the state after it, the walks, the bars without a decision, and all fills."""
    symbols = [
        symbol for symbol in market.symbols if symbol in state.accounts[POLICY] or state.decided.get(symbol)
    ]
    nothing: dict[str, list[Walk]] = {name: [] for name in NAMES}
    if not symbols:
        return state, nothing, {}, []
    config, device = actor.config, market.device
    starts = [min(state.decided.get(symbol) or [0]) for symbol in symbols]
    places = [place for _ in NAMES for place in zip(symbols, starts, strict=True)]
    standing = [state.accounts[name].get(symbol) for name in NAMES for symbol in symbols]
    try:
        known = market.until(settled_ns)
        env = OpenEnv(known, config, device, places, standing)
    except NoSegment:
        return state, nothing, {}, []
    schedule = env.schedule[:, : len(symbols)]  # (R, S)
    actions, late = _given(actor, state, known, symbols, schedule)
    first_bars = known.offsets[torch.tensor([known.symbols.index(s) for s in symbols], device=device)]
    buying = actions_after(BUY_AND_HOLD, known, config.positions, schedule.clamp(min=0), first_bars)
    given = torch.cat((actions, buying), dim=1)
    decide, played = _Given(len(config.positions)), []
    with one_thread(device):
        for row in range(len(schedule)):
            env.begin_segment()
            played.append(play_segment(env, decide, given[row : row + 1], ()))
    columns = list(np.concatenate(played, axis=1))
    walks = walks_of(NAMES, symbols, known, schedule, torch.arange(1, device=device), columns)
    now = iter(env.accounts())
    accounts = {
        name: state.accounts[name] | {symbol: account for symbol in symbols if (account := next(now))}
        for name in NAMES
    }
    decided = {
        symbol: {bar: target for bar, target in own.items() if bar >= accounts[POLICY][symbol].next_ns}
        if symbol in accounts[POLICY]
        else own
        for symbol, own in state.decided.items()
    }
    fills = _fills(actor, known, symbols, schedule, actions)
    return replace(state, accounts=accounts, decided=decided), walks, late, fills


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


def _given(
    actor: Actor, state: PaperState, known: Market, symbols: Sequence[str], schedule: Tensor
) -> tuple[Tensor, dict[str, list[int]]]:
    """Return what was decided in time at these bars, (R, S) actions, ``HOLD`` elsewhere, and where that is."""
    positions = actor.config.positions
    times = known.open_time[schedule.clamp(min=0)].tolist()
    late: dict[str, list[int]] = {}
    rows = []
    for bars, opened in zip(schedule.tolist(), times, strict=True):
        row = []
        for symbol, bar, time in zip(symbols, bars, opened, strict=True):
            target = state.decided.get(symbol, {}).get(time) if bar >= 0 else 0.0
            if target is None:
                late.setdefault(symbol, []).append(time)
            row.append(HOLD if target is None else positions.index(target))
        rows.append(row)
    return torch.tensor(rows, device=known.device).reshape(len(rows), len(symbols)), late


@torch.no_grad()
def _decide(
    actor: Actor,
    state: PaperState,
    market: Market,
    known: Market,
    symbols: Sequence[str],
    newest: Mapping[str, int],
) -> dict[str, float]:
    """Return what the policy wants at the newest bar of these symbols, for accounts that stand so by then."""
    config, device = actor.config, market.device
    numbers = [known.symbols.index(symbol) for symbol in symbols]
    bars = [int(known.offsets[number + 1]) for number in numbers]
    # Of the market with what comes next: its last two bars of each symbol are made up.
    at = torch.tensor([bar - 3 for bar in bars], device=device).long()
    starts = [
        int(known.segment_starts(number, bar[None], config.horizon))
        for number, bar in zip(numbers, at, strict=True)
    ]
    ready = [place for place, start in enumerate(starts) if start <= int(at[place])]
    symbols, at = [symbols[place] for place in ready], at[ready]
    if not symbols:
        return {}
    standing = [state.accounts[POLICY].get(symbol) for symbol in symbols]
    starting = [min(state.decided.get(symbol) or [newest[symbol]]) for symbol in symbols]
    env = OpenEnv(market, config, device, list(zip(symbols, starting, strict=True)), standing)
    given, _ = _given(actor, state, market, symbols, env.schedule)
    observed = torch.zeros(len(symbols), config.num_account_features, device=device)
    decide = _Given(len(config.positions))
    for row in range(env.num_segments):
        env.begin_segment()
        here = env.schedule[row] == at
        observed[here] = env.account_observations()[here]
        play_segment(env, decide, given[row : row + 1], ())
    reader = Reader(
        actor.policy, known, [numbers[place] for place in ready], config.horizon, SEGMENTS_AT_ONCE
    )
    projected = reader.read(at[None, :, None], lambda: None)[0, 0]  # (S, W)
    actions = actor.policy.head.decide(projected, observed[None])[0].argmax(-1).flatten()
    return {s: config.positions[k] for s, k in zip(symbols, actions.tolist(), strict=True)}


@dataclass(frozen=True)
class _Given:
    """Actions that were decided before, ``HOLD`` for whatever an account holds."""

    num_positions: int

    def __call__(self, accounts: Tensor, actions: Tensor) -> tuple[Tensor]:
        """Fill in what is held: observations (N, A), actions (N,)."""
        held = accounts[:, : self.num_positions].argmax(-1)
        return (torch.where(actions == HOLD, held, actions),)


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


def _next_open(bars: Bars) -> int:
    """Return when the order of the newest bar's decision fills, if the next minute of trading has a bar."""
    return _following(bars.asset_class, int(bars.open_time[-1]) + MINUTE_NS)


def _following(asset_class: str, time_ns: int) -> int:
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
