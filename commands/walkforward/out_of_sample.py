"""One window traded: by the champion of that moment, on bars that came after it, and by all beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from commands.walkforward.schedule import Window
from data_sources.bars import DAY_NS, MINUTE_NS, Bars
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.ahead import HORIZONS
from envs.config import EnvConfig
from envs.features import FeatureStatistics
from envs.market import Market, NoSegment
from evaluation.baselines import BASELINES, BUY_AND_HOLD
from evaluation.courses import symbols_of
from evaluation.ensemble import side_by_side
from evaluation.exam import CHAMPION, POLICY, Walk
from evaluation.forecasts import FITS, TREES, BarTable, forecasts_of, targets_of
from evaluation.measures import daily_growth, days_of_fills, trades_by_day
from evaluation.open_walk import walk_on
from evaluation.plots import FIRST
from evaluation.record import Accounts
from evaluation.record_summary import pool_days
from evaluation.rules import Decisions, apply_rule, choose_rules, play, walks_of
from models.ensemble import Decider, Ensemble, View
from models.policy import precision_on
from training.checkpoint import Checkpoint
from training.data_feed import data_request

if TYPE_CHECKING:
    from continuous_training import Settings

SEGMENTS_AT_ONCE = {"cpu": 16, "cuda": 64}  # per forward of the trunk


@dataclass(frozen=True)
class Contestants:
    """Who trades in a window; None is in cash."""

    newest: Checkpoint  # of the window's training: its symbols are the universe as known then
    champion: Checkpoint | None
    first: Checkpoint | None  # the first champion of all, which was never trained again
    # Champions before it that decide together with it; then it trades alone, too. None: only it trades.
    former: tuple[Checkpoint, ...] | None = None

    @property
    def members(self) -> dict[str, tuple[Checkpoint, ...]]:
        """Who decides for each contestant; of several by the average of their probabilities, of none in cash."""
        alone = (self.champion,) if self.champion else ()
        others = {} if self.former is None else {CHAMPION: alone}
        first = (self.first,) if self.first else ()
        return {POLICY: (*alone, *(self.former or ())), **others, FIRST: first}


def trade(
    window: Window,
    who: Contestants,
    lake: Lake,
    settings: Settings,
    device: torch.device,
    accounts: Accounts,
    costs_bps: Sequence[float],
    trees: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Accounts]:
    """Let every contestant trade on a window's bars, with accounts that go on from the window before.

    Symbols are those that the training knew at the window's start, and those with an account from before. Their
    bars are as known at the window's end: splits, funding.

    Args:
        window: the bars to trade on.
        who: decides.
        lake: has the bars.
        settings: of the training.
        device: to compute on.
        accounts: as they stood after the window before.
        costs_bps: flat costs at which the champion trades again.
        trees: whether boosted trees trade, too, fitted to the bars before the window.
        check_stop: called every few bars; an exception from it ends the walk.

    Returns:
        What is kept of the window, and the accounts as they stand now. A window without a bar that anything can
        be decided on has no days.

    Raises:
        LakeError: the bars cannot be read.
        CheckpointError: a champion is of another version.
    """
    symbols = list(dict.fromkeys([*who.newest.symbols, *symbols_of(accounts)]))
    bars = _bars_until(window.end_ns, symbols, lake, settings)
    if not bars:
        return _row(window, who, {}, {}), accounts
    config = EnvConfig.from_settings(settings, 1)
    policies, statistics = _policies(who, device, precision_on(device, settings.precision))
    try:
        walked = walk_on(
            policies,
            _market(bars, settings, device, window, statistics),
            config,
            [series.symbol for series in bars],
            accounts,
            # At the close of the last bar that it may have been chosen on: the fill is the first new price.
            decides_from_ns=window.start_ns - MINUTE_NS,
            end_ns=window.end_ns,
            chunk_segments=settings.micro_batch_segments or SEGMENTS_AT_ONCE[device.type],
            check_stop=check_stop,
            rules=BASELINES,
            flat_costs_bps=costs_bps,
        )
    except NoSegment:
        return _row(window, who, {}, {}), accounts
    found = dict(walked.walks)
    if trees:
        market = _market(bars, settings, device, window, None)
        found[TREES] = trade_by_trees(market, config, window, settings.holdout_days)
    equity = {
        name: {symbol: math.exp(account.log_equity) for symbol, account in accounts.get(name, {}).items()}
        for name in found
    }
    return _row(window, who, found, equity), walked.accounts


def _bars_until(end_ns: int, symbols: Sequence[str], lake: Lake, settings: Settings) -> list[Bars]:
    # What became of a symbol within the window must not decide whether it is walked.
    least = settings.context_bars + 3
    request = replace(data_request(settings, end_ns), min_bars=least, keep_pegged=True)
    return [series for series in load(lake, request).bars if series.symbol in set(symbols)]


def _market(
    bars: Sequence[Bars],
    settings: Settings,
    device: torch.device,
    window: Window,
    statistics: FeatureStatistics | None,
) -> Market:
    holdout_ns = window.start_ns - settings.holdout_days * DAY_NS
    return Market.from_settings(bars, settings, device, holdout_ns, statistics)


def _policies(
    who: Contestants, device: torch.device, precision: str
) -> tuple[dict[str, Decider | None], FeatureStatistics]:
    """Return who decides for each contestant, and the scales of features that they see, side by side.

    With --fresh every training has its own. What has two names is one policy, which reads the market once.
    """
    known = {_key(saved): saved for members in who.members.values() for saved in members}
    places, statistics = side_by_side([saved.statistics for saved in known.values() or [who.newest]])
    place_of = dict(zip(known, places, strict=False))
    loaded = {key: saved.policy(device, precision) for key, saved in known.items()}
    deciders: dict[tuple[object, ...], Decider | None] = {(): None}
    policies = {}
    for name, members in who.members.items():
        keys = tuple(map(_key, members))
        if keys not in deciders:
            is_plain = len(keys) == 1 and not any(places)
            views = [View(0, place_of[key]) for key in keys]
            deciders[keys] = loaded[keys[0]] if is_plain else Ensemble([loaded[key] for key in keys], views)
        policies[name] = deciders[keys]
    return policies, statistics


def _key(saved: Checkpoint) -> tuple[str, int]:
    """Tell a checkpoint of this walk from all others: with --fresh many have the same name."""
    return saved.name, saved.data_cutoff_ns


def trade_by_trees(market: Market, config: EnvConfig, window: Window, holdout_days: int) -> list[Walk]:
    """Let boosted trees trade on a window by the ledger of the probe; in cash at its start.

    They are fitted to the bars before the exam's days, less a day; a rule is chosen on the exam's days; both as
    known at the window's start. Costs are each symbol's fee and slippage, flat.
    """
    market = market.until(window.end_ns)
    table = BarTable.of(market)
    known_ns = table.open_time[table.open_time < window.start_ns]
    if not len(known_ns):
        return []
    # As the exam's days they count back from the newest bar: there may be months without one before a window.
    chosen_ns = int(known_ns.max()) - holdout_days * DAY_NS
    known = table.rows_before(chosen_ns - DAY_NS, max(HORIZONS))
    rows = table.rows_between(chosen_ns, window.end_ns)
    if not len(known) or not len(rows):
        return []
    forecast = FITS[TREES](market, torch.from_numpy(known), targets_of(table, known))
    forecasts = forecasts_of(forecast, table, rows)
    # A move that ends after the window's start was not known then.
    on_exam = table.open_time[rows + 2] < window.start_ns
    costs_bps = 1e4 * market.cost_rates(config, torch.float64).cpu().numpy()
    before = Decisions.at(market, table, config, rows[on_exam])
    mean_bps = float(costs_bps[table.symbol[rows[on_exam]]].mean()) if on_exam.any() else 0.0
    ((rule,), _) = choose_rules(before, forecasts[on_exam], HORIZONS, [mean_bps])
    traded = table.open_time[rows] >= window.start_ns - MINUTE_NS
    if not traded.any():
        return []
    decisions = Decisions.at(market, table, config, rows[traded])
    sides = np.zeros(len(decisions), np.int8)
    if rule is not None:
        forecasts = forecasts[traded]
        sides = apply_rule(rule, forecasts[:, HORIZONS.index(rule.horizon)], decisions.begins)
    played = play(decisions, decisions.targets(sides), costs_bps[table.symbol[decisions.rows]])
    return walks_of(market, table, decisions, played)


def _row(
    window: Window,
    who: Contestants,
    found: Mapping[str, list[Walk]],
    equity: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return what is kept of a window; evaluation/walk_summary.py reads it."""
    row: dict[str, Any] = {
        "format": 1,
        "number": window.number,
        "start_ns": window.start_ns,
        "end_ns": window.end_ns,
        "champion": who.champion.name if who.champion else None,
        "champion_trained_until_ns": who.champion.trained_until_ns if who.champion else None,
        "newest": who.newest.name,
        **({} if who.former is None else {"members": [saved.name for saved in who.members[POLICY]]}),
        "days": {name: pool_days(walks, equity[name]) for name, walks in found.items() if walks},
        "trades": {},
        "symbols": {},
    }
    own = found.get(POLICY, [])
    if own:
        days, sums = trades_by_day(own)
        row["trades"] = {str(day): line.tolist() for day, line in zip(days, sums, strict=True)}
    hold = {walk.symbol: walk for walk in found.get(BUY_AND_HOLD, [])}
    for walk in own:
        row["symbols"][walk.symbol] = {
            "asset_class": walk.asset_class,
            "decisions": len(walk.time),
            "traded": float(walk.traded.sum()),
            "costs": float(walk.costs.sum()),
            "funding": 0.0 if walk.funding is None else float(walk.funding.sum()),
            "days": {
                name: _growth_by_day(each)
                for name, each in ((POLICY, walk), (BUY_AND_HOLD, hold[walk.symbol]))
            },
        }
    return row


def _growth_by_day(walk: Walk) -> dict[str, float]:
    days = np.unique(days_of_fills(walk))
    growth = daily_growth([walk])[:, 0]
    return {str(day): float(value) for day, value in zip(days, growth, strict=True)}
