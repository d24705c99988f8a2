"""What the command ``signals`` tells: the position that a policy wants now, per symbol, and how old its bars are.

No order is sent anywhere. The observation is that of the training and of the exam (envs/latest.py); the account is
a new one, in cash unless ``--holding`` says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_sources.bars import DAY_NS, MINUTE_NS, AssetClass
from data_sources.calendar import expected_minutes
from data_sources.coverage import minutes_behind
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.progress import Progress, WarningCollector
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.universe import top_of
from evaluation.trained_policy import Decision, TrainedPolicy
from monitoring.console import Console
from training.data_feed import data_request

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

LOOK_BACK_DAYS = 45  # of bars that features are computed from; the deepest looks back 10 days of trade
# Of trade that the newest bar may lie back: a quiet minute has no bar, a vendor takes seconds.
FRESH_MINUTES = 5
PUBLISHED_SECONDS = 6.0  # after its end a minute is asked for; data_sources takes none before 5


@dataclass(frozen=True)
class Wishes:
    """What was asked for: symbols (all of the training where empty), and the position held of some of them."""

    symbols: tuple[str, ...] = ()
    holdings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refreshes: bool = True
    as_json: bool = False

    @staticmethod
    def parsed(
        symbols: str, holdings: Sequence[str], refreshes: bool, as_json: bool, positions: Sequence[float]
    ) -> Wishes:
        """Read the flags: symbols with commas, and each holding as SYMBOL=POSITION.

        Raises:
            ValueError: a holding is no such pair, or of a position that the policy does not know.
        """
        held = {}
        for text in holdings:
            symbol, _, number = text.partition("=")
            try:
                held[symbol.strip()] = float(number)
            except ValueError:
                raise ValueError(f"--holding {text} must be such as BTCUSDT=1") from None
            if held[symbol.strip()] not in positions:
                known = ", ".join(f"{each:g}" for each in positions)
                raise ValueError(f"--holding {text} must be one of the policy's positions: {known}")
        names = tuple(dict.fromkeys(name.strip() for name in symbols.split(",") if name.strip()))
        return Wishes(names, held, refreshes, as_json)


@dataclass(frozen=True)
class Signal:
    """One symbol's decision, for an account that holds ``holding``."""

    decision: Decision
    holding: float
    minutes_behind: int  # of trade, since the newest bar
    # ok; closed: the exchange is, the order would fill when it opens; stale: newer bars should exist
    state: Literal["ok", "closed", "stale"]
    in_training: bool


def request_of(settings: Settings, now_ns: int, symbols: Sequence[str]) -> DataRequest:
    """Say which bars the signals rest on.

    Raises:
        ValueError: a symbol is among none of those that the settings ask a source for.
    """
    request = data_request(settings, now_ns)
    start_ns = max(request.start_ns, request.end_ns - LOOK_BACK_DAYS * DAY_NS)
    request = dataclasses.replace(request, start_ns=start_ns, min_bars=settings.context_bars + 1)
    if not symbols or "simulated" in request.sources:
        return request
    kept = {
        setting: [name for name in names if name in symbols or top_of((name,))]
        for setting, names in request.symbols.items()
    }
    has_rule = any(map(top_of, kept.values()))
    unknown = [name for name in symbols if not has_rule and not any(name in names for names in kept.values())]
    if unknown:
        flags = " or ".join(f"--{setting.replace('_', '-')}" for setting in kept)
        raise ValueError(f"--symbols {','.join(unknown)}: no source is asked for it; add it to {flags}")
    return dataclasses.replace(request, symbols=kept)


def signals_of(
    trained: TrainedPolicy, data: LoadedData, now_ns: int, wishes: Wishes
) -> tuple[list[Signal], dict[str, str]]:
    """Ask the policy about every symbol that is wanted.

    Returns:
        The signals, and of the symbols without one the reason.

    Raises:
        ValueError: a wanted symbol is not among those that were loaded.
    """
    asked = {row.symbol for row in data.rows}
    for name, flag in [(each, "--symbols") for each in wishes.symbols] + [
        (each, "--holding") for each in wishes.holdings
    ]:
        if name not in asked:
            raise ValueError(f"{flag} {name} is unknown; there are: {', '.join(sorted(asked)) or 'none'}")
    trained_on = set(trained.checkpoint.symbols)
    wanted = set(wishes.symbols) or asked & trained_on
    missing = {symbol: why for symbol, why in data.dropped.items() if symbol in wanted}
    if not wishes.symbols:
        new = "not in the training; name it in --symbols to see it all the same"
        missing |= dict.fromkeys(sorted(asked - trained_on), new)
    closed_until = now_ns - MINUTE_NS + 1  # bars that opened before it have closed
    bars = [one.between(0, closed_until) for one in data.bars if one.symbol in wanted]
    bars = [one for one in bars if len(one)]
    if not bars:
        return [], missing
    decisions, unavailable = trained.actor.decide(bars)
    signals = []
    for decision in decisions:
        behind, state = freshness(decision.open_time, decision.asset_class, now_ns)
        holding = wishes.holdings.get(decision.symbol, 0.0)
        signals.append(Signal(decision, holding, behind, state, decision.symbol in trained_on))
    return signals, missing | unavailable


def freshness(
    open_time: int, asset_class: AssetClass, now_ns: int
) -> tuple[int, Literal["ok", "closed", "stale"]]:
    """Return the minutes of trade since the newest bar, and what that means: see ``Signal``."""
    behind = minutes_behind(open_time, asset_class, now_ns) or 0
    if behind > FRESH_MINUTES:
        return behind, "stale"
    minute = now_ns - now_ns % MINUTE_NS
    if asset_class == "stock":
        trading = expected_minutes(minute, minute + MINUTE_NS)
        if trading is not None and not len(trading):
            return behind, "closed"
    return behind, "ok"


def tell(
    trained: TrainedPolicy,
    wishes: Wishes,
    console: Console,
    now_ns: int,
    progress: Progress,
    indent: int | None,
) -> bool:
    """Refresh, read and ask once, and print the answer.

    Returns:
        Whether there is a signal.

    Raises:
        ValueError: a symbol is unknown.
        DataError: the lake cannot be read.
    """
    settings = trained.settings
    request = request_of(settings, now_ns, wishes.symbols)
    lake = Lake(Path(settings.data_dir), progress)
    if wishes.refreshes:
        refresh(lake, request, now_ns, progress)
    data = load(lake, request)
    signals, missing = signals_of(trained, data, now_ns, wishes)
    if wishes.as_json:
        told = report(trained, signals, missing, now_ns, data.fingerprint)
        console.emit(json.dumps(told, indent=indent))
    elif signals:
        console.table(*table(trained, signals, now_ns, console.width))
    for reason in dict.fromkeys(missing.values()):
        symbols = ", ".join(symbol for symbol, why in missing.items() if why == reason)
        log.warning(f"no signal of {symbols}: {reason}")
    if settings.end_date and any(each.state == "stale" for each in signals):
        log.warning(f"bars end at end_date={settings.end_date}, as in the training: --end-date none lifts it")
    return bool(signals)


def watch(
    trained: TrainedPolicy,
    wishes: Wishes,
    console: Console,
    clock: Callable[[], int] = time.time_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Tell the signals just after every minute has closed, until interrupted; JSON is one object a line then."""
    warned: list[str] = []
    try:
        tell(trained, wishes, console, clock(), console, None)
        while True:
            sleep(seconds_to_next_minute(clock()))
            heard = WarningCollector()
            tell(trained, wishes, console, clock(), heard, None)
            for warning in heard.warnings:
                if warning not in warned:  # a source that stays down is told once
                    log.warning(warning)
            warned = heard.warnings
    except KeyboardInterrupt:
        return


def seconds_to_next_minute(now_ns: int) -> float:
    """Return how long it takes until the bar of the running minute can be asked for."""
    into = now_ns / 1e9 % 60
    return PUBLISHED_SECONDS - into if into < PUBLISHED_SECONDS else 60 + PUBLISHED_SECONDS - into


def report(
    trained: TrainedPolicy,
    signals: Sequence[Signal],
    missing: Mapping[str, str],
    now_ns: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Return all that is known as plain types; times are ISO 8601 in UTC. docs/use.md explains the fields."""
    return {
        "time": _iso(now_ns),
        "checkpoint": trained.checkpoint.path.name,
        "run": trained.checkpoint.run,
        "epoch": trained.checkpoint.epoch,
        "data_fingerprint": fingerprint,
        "signals": [_entry(each, now_ns) for each in signals],
        "no_signal": dict(missing),
    }


def _entry(signal: Signal, now_ns: int) -> dict[str, Any]:
    decision = signal.decision

    def choice(holding: float) -> dict[str, Any]:
        target, probability = decision.when_holding(holding)
        odds = decision.probabilities[decision.positions.index(holding)]
        return {
            "holding": holding,
            "target": target,
            "probability": probability,
            "probabilities": {f"{p:g}": each for p, each in zip(decision.positions, odds, strict=True)},
        }

    return {
        "symbol": decision.symbol,
        "asset_class": decision.asset_class,
        **choice(signal.holding),
        "bar": _iso(decision.open_time),
        "closed": _iso(decision.close_time),
        "close": decision.close,
        "age_seconds": round((now_ns - decision.close_time) / 1e9, 3),
        "minutes_behind": signal.minutes_behind,
        "state": signal.state,
        "must_be_in_cash": decision.only_cash,
        "in_training": signal.in_training,
        "if_holding": [choice(position) for position in decision.positions],
    }


def table(
    trained: TrainedPolicy, signals: Sequence[Signal], now_ns: int, width: int
) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows for people; where they are too wide, without what can be missed first."""
    title = f"{trained.checkpoint.path.name} at {_utc(now_ns)} UTC; no orders are sent"
    from_each = [f"from {_signed(position)}" for position in trained.env_config(1).positions]
    rows = [_row(each, now_ns) | dict(zip(from_each, _targets(each), strict=True)) for each in signals]
    columns = list(rows[0])
    for spare in (from_each, ["holding"], ["closed, UTC"]):
        widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
        if sum(widths) + 2 * (len(widths) - 1) > width:
            columns = [column for column in columns if column not in spare]
    return title, columns, [[row[column] for column in columns] for row in rows]


def _row(signal: Signal, now_ns: int) -> dict[str, str]:
    decision = signal.decision
    target, probability = decision.when_holding(signal.holding)
    notes: list[str] = [signal.state]
    notes += ["must be in cash"] if decision.only_cash else []
    notes += [] if signal.in_training else ["not in the training"]
    return {
        "symbol": decision.symbol,
        "holding": _signed(signal.holding),
        "target": _signed(target),
        "probability": f"{probability:.1%}",
        "closed, UTC": _utc(decision.close_time)[5:16],
        "age": _span((now_ns - decision.close_time) / 1e9),
        "state": ", ".join(notes),
    }


def _targets(signal: Signal) -> list[str]:
    return [_signed(signal.decision.when_holding(each)[0]) for each in signal.decision.positions]


def _signed(position: float) -> str:
    return f"{position:+g}" if position else "0"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 72 * 60 else f"{minutes / 1440:.0f} d"


def _iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _utc(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")
