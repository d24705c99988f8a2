"""The command ``signals``: the position that a policy wants in each symbol now, and how old its bars are.

No order is sent anywhere. Observations are those of training and exam (envs/latest.py); the account is a new one,
in cash unless ``--holding`` says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from commands.options import parse_holding
from data_sources.bars import DAY_NS, MINUTE_NS, AssetClass, Bars
from data_sources.calendar import expected_minutes
from data_sources.coverage import minutes_behind
from data_sources.errors import LakeBusy, LakeError
from data_sources.lake.lake import Lake
from data_sources.load import LoadedData, load
from data_sources.progress import Progress, WarningCollector
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.universe import top_of
from evaluation.group_decisions import decide_groups
from evaluation.trained_policy import Decision, TrainedPolicy
from monitoring.console import Console
from monitoring.format import age, iso_time, utc_time
from runtime.wording import first_of
from training.data_feed import data_request

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

LOOK_BACK_DAYS = 45  # of bars for the features; the longest window is 10 days of trading
# Minutes of trading that the newest bar may lag: a quiet minute has no bar, and a vendor takes seconds.
FRESH_MINUTES = 5
WAIT_SECONDS = 120.0  # for a refresh by the daemon; a usual one takes seconds
SPARE = ("holding", "closed, UTC", "probability", "age")  # columns, in a narrow terminal
NO_BARS_AND_NEW = "no bars, and not in the training"
NOT_ASKED = "in the training, but no source has it with these settings"
PUBLISHED_SECONDS = 6.0  # from a minute's end to the request for its bar; data_sources accepts none before 5


@dataclass(frozen=True)
class SignalOptions:
    """The options: symbols (all of the training if empty), and the positions held in some of them."""

    symbols: tuple[str, ...] = ()
    holdings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refreshes: bool = True
    as_json: bool = False
    has_details: bool = False

    @staticmethod
    def parse(
        symbols: str,
        holdings: Sequence[str],
        refreshes: bool,
        as_json: bool,
        positions: Sequence[float],
        has_details: bool = False,
    ) -> SignalOptions:
        """Parse the flags: comma-separated symbols, and holdings as SYMBOL=POSITION.

        Raises:
            ValueError: a holding has another form, or is not one of the policy's positions.
        """
        positions_held = {}
        for text in holdings:
            symbol, position = parse_holding(text)
            if position not in positions:
                known = ", ".join(f"{position:g}" for position in positions)
                raise ValueError(f"--holding {text} must be one of the policy's positions: {known}")
            positions_held[symbol] = position
        names = tuple(dict.fromkeys(name.strip() for name in symbols.split(",") if name.strip()))
        return SignalOptions(names, positions_held, refreshes, as_json, has_details)


@dataclass(frozen=True)
class Signal:
    """One symbol's decision, for an account that holds ``holding``."""

    decision: Decision
    holding: float
    minutes_behind: int  # of trading, since the newest bar
    # ok; closed: the exchange is closed, an order would fill at the open; stale: newer bars should exist
    state: Literal["ok", "closed", "stale"]
    in_training: bool
    late: tuple[str, ...] = ()  # other symbols that it sees without their bar of this minute
    group: str = ""  # of a training of groups: the account that it belongs to
    weight: float | None = None  # and the target's weight there, within the caps


def request_of(
    settings: Settings, now_ns: int, symbols: Sequence[str], sees_others: bool = False
) -> DataRequest:
    """Return which bars the signals need: with ``sees_others`` those of all symbols, whatever is asked for.

    Raises:
        ValueError: the settings request a symbol from no source.
    """
    request = data_request(settings, now_ns)
    start_ns = max(request.start_ns, request.end_ns - LOOK_BACK_DAYS * DAY_NS)
    # A position that is held needs a decision, however quiet its symbol has become.
    request = dataclasses.replace(
        request, start_ns=start_ns, min_bars=settings.context_bars + 1, keep_pegged=True
    )
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
    return request if sees_others else dataclasses.replace(request, symbols=kept)


def compute_signals(
    trained: TrainedPolicy, data: LoadedData, now_ns: int, options: SignalOptions
) -> tuple[list[Signal], dict[str, str]]:
    """Compute the policy's decision for every requested symbol.

    Returns:
        The signals, and the reason for every symbol without one.

    Raises:
        ValueError: a symbol of the options was not loaded.
    """
    loaded = {row.symbol for row in data.rows}
    for flag, names in (("--symbols", options.symbols), ("--holding", options.holdings)):
        for name in names:
            if name not in loaded:
                known = ", ".join(sorted(loaded)) or "none"
                raise ValueError(f"{flag} {name} is unknown; there are: {known}")
    trained_on = set(trained.symbols)
    wanted = set(options.symbols) or loaded & trained_on
    missing = {symbol: why for symbol, why in data.dropped.items() if symbol in wanted}
    if not options.symbols:
        without = {row.symbol for row in data.rows if not row.num_bars}
        new = "not in the training; name it in --symbols to see it anyway"
        missing |= dict.fromkeys(sorted(loaded - trained_on - without), new)
        missing |= dict.fromkeys(sorted((loaded - trained_on) & without), NO_BARS_AND_NEW)
        missing |= dict.fromkeys(sorted(trained_on - loaded), NOT_ASKED)
    closed_until = now_ns - MINUTE_NS + 1  # bars that opened before it have closed
    closed = [bars.between(0, closed_until) for bars in data.bars if bars.symbol in wanted]
    closed = [bars for bars in closed if len(bars)]
    if not closed:
        return [], missing
    others = [bars.between(0, closed_until) for bars in data.bars if bars.symbol in trained_on - wanted]
    actor = trained.actor
    decided: list[tuple[Decision, str, float | None]]
    if actor.config.group:
        found, unavailable = decide_groups(actor, closed, others, options.holdings)
        decided = [(each.decision, each.group, each.weight) for each in found]
    else:
        decisions, unavailable = actor.decide(closed, others)
        decided = [(decision, "", None) for decision in decisions]
    seen = [bars for bars in (*closed, *others) if len(bars) and bars.symbol in trained_on]
    signals = []
    for decision, group, weight in decided:
        behind, state = freshness(decision.open_time, decision.asset_class, now_ns)
        holding = options.holdings.get(decision.symbol, 0.0)
        late = late_symbols(decision, seen) if actor.sees_others else ()
        in_training = decision.symbol in trained_on
        signals.append(Signal(decision, holding, behind, state, in_training, late, group, weight))
    return signals, {symbol: why for symbol, why in unavailable.items() if symbol in loaded} | missing


def late_symbols(decision: Decision, seen: Sequence[Bars]) -> tuple[str, ...]:
    """Return the symbols of its asset class without a bar of the decision's minute, as quiet or halted ones."""
    same = [bars for bars in seen if bars.asset_class == decision.asset_class]
    return tuple(bars.symbol for bars in same if bars.open_time[-1] < decision.open_time)


def freshness(
    open_time: int, asset_class: AssetClass, now_ns: int
) -> tuple[int, Literal["ok", "closed", "stale"]]:
    """Return the minutes of trading since the newest bar, and the state of a ``Signal``."""
    behind = minutes_behind(open_time, asset_class, now_ns) or 0
    if behind > FRESH_MINUTES:
        return behind, "stale"
    minute = now_ns - now_ns % MINUTE_NS
    if asset_class == "stock":
        trading = expected_minutes(minute, minute + MINUTE_NS)
        if trading is not None and not len(trading):
            return behind, "closed"
    return behind, "ok"


def run(
    trained: TrainedPolicy,
    options: SignalOptions,
    console: Console,
    now_ns: int,
    progress: Progress,
    indent: int | None,
) -> bool:
    """Refresh the bars, compute the signals once, and print them.

    Returns:
        Whether there is a signal.

    Raises:
        ValueError: a symbol is unknown.
        DataError: the lake cannot be read.
    """
    settings = trained.settings
    lake = Lake(Path(settings.data_dir), progress)
    if options.refreshes:
        now_ns = refresh_bars(lake, trained, options, now_ns, progress)
    data = load(lake, request_of(settings, now_ns, options.symbols, trained.actor.sees_others))
    signals, missing = compute_signals(trained, data, now_ns, options)
    if options.as_json:
        content = report(trained, signals, missing, now_ns, data.fingerprint)
        console.emit(json.dumps(content, indent=indent))
    elif signals:
        console.table(*table(trained, signals, now_ns, options.has_details), SPARE, summary(signals))
    if not options.as_json:
        verdict, reason = verdict_of(trained)
        log.info(f"Verdict of its exam: {verdict}: {reason}" if verdict else f"No verdict: {reason}")
    for reason in dict.fromkeys(missing.values()):
        symbols = ", ".join(symbol for symbol, why in missing.items() if why == reason)
        log.warning(f"no signal for {symbols}: {reason}")
    if settings.end_date and any(signal.state == "stale" for signal in signals):
        log.warning(
            f"bars end at end_date={settings.end_date}, as in the training: --end-date none lifts that"
        )
    return bool(signals)


def refresh_bars(
    lake: Lake, trained: TrainedPolicy, options: SignalOptions, now_ns: int, progress: Progress
) -> int:
    """Refresh the bars, after another process's refresh if one is under way; return the time of the request."""
    given = options.symbols, trained.actor.sees_others
    request_of(trained.settings, now_ns, *given)  # an unknown symbol needs no wait
    try:
        with lake.writing(WAIT_SECONDS, progress) as waited_ns:
            now_ns += waited_ns
            refresh(lake, request_of(trained.settings, now_ns, *given), now_ns, progress)
    except LakeBusy as error:
        now_ns += int(WAIT_SECONDS * 1e9)
        progress.warn("lake", f"not refreshed, as it is still busy after {WAIT_SECONDS:.0f} s: {error}")
    except LakeError as error:
        progress.warn("lake", f"not refreshed: {error}")
    return now_ns


def watch(
    trained: TrainedPolicy,
    options: SignalOptions,
    console: Console,
    clock: Callable[[], int] = time.time_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Print the signals just after every minute has closed, until interrupted; JSON is one object per line."""
    warned: list[str] = []
    try:
        run(trained, options, console, clock(), console, None)
        while True:
            sleep(seconds_to_next_minute(clock()))
            collector = WarningCollector()
            run(trained, options, console, clock(), collector, None)
            for warning in collector.warnings:
                if warning not in warned:  # a source that stays down is reported once
                    log.warning(warning)
            warned = collector.warnings
    except KeyboardInterrupt:
        return


def seconds_to_next_minute(now_ns: int) -> float:
    """Return the time until the bar of the current minute can be requested."""
    into = now_ns / 1e9 % 60
    return PUBLISHED_SECONDS - into if into < PUBLISHED_SECONDS else 60 + PUBLISHED_SECONDS - into


def report(
    trained: TrainedPolicy,
    signals: Sequence[Signal],
    missing: Mapping[str, str],
    now_ns: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Return everything as plain types; times are ISO 8601 in UTC. docs/use.md explains the fields."""
    return {
        "time": iso_time(now_ns),
        "checkpoint": trained.name,
        "run": None if trained.members else trained.checkpoint.run,
        "epoch": None if trained.members else trained.checkpoint.epoch,
        "members": [
            {"checkpoint": name, "run": checkpoint.run, "epoch": checkpoint.epoch}
            for name, checkpoint in zip(trained.names, trained.checkpoints, strict=True)
        ],
        "verdict": verdict_of(trained)[0],
        "verdict_reason": verdict_of(trained)[1],
        "data_fingerprint": fingerprint,
        "signals": [_entry(signal, now_ns) for signal in signals],
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
            "probabilities": {f"{p:g}": odd for p, odd in zip(decision.positions, odds, strict=True)},
        }

    return {
        "symbol": decision.symbol,
        "asset_class": decision.asset_class,
        **choice(signal.holding),
        "bar": iso_time(decision.open_time),
        "closed": iso_time(decision.close_time),
        "close": decision.close,
        "age_seconds": round((now_ns - decision.close_time) / 1e9, 3),
        "minutes_behind": signal.minutes_behind,
        "state": signal.state,
        "must_be_in_cash": decision.only_cash,
        "in_training": signal.in_training,
        "late_symbols": list(signal.late),
        **({"group": signal.group, "weight": signal.weight} if signal.group else {}),
        "if_holding": [choice(position) for position in decision.positions],
    }


def table(
    trained: TrainedPolicy, signals: Sequence[Signal], now_ns: int, has_details: bool
) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows for people; ``has_details``: with a target from every position."""
    title = f"{trained.name} at {utc_time(now_ns)} UTC; no orders are sent"
    rows = [_row(signal, now_ns) for signal in signals]
    if has_details:
        per_position = [f"from {_format_position(position)}" for position in trained.env_config(1).positions]
        rows = [
            row | dict(zip(per_position, _targets(signal), strict=True))
            for row, signal in zip(rows, signals, strict=True)
        ]
    return title, list(rows[0]), [list(row.values()) for row in rows]


def summary(signals: Sequence[Signal]) -> str:
    """Return how many symbols are wanted at which position, and which bars are not fresh."""
    targets: Counter[float] = Counter(signal.decision.when_holding(signal.holding)[0] for signal in signals)
    wanted = ", ".join(
        f"{count} at {_format_position(position)}" for position, count in sorted(targets.items())
    )
    states = [
        (state, [s.decision.symbol for s in signals if s.state == state]) for state in ("stale", "closed")
    ]
    others = [f"; {state}: {first_of(symbols)}" for state, symbols in states if symbols]
    return f"{len(signals)} symbol{'s' if len(signals) != 1 else ''}: {wanted}{''.join(others)}"


def verdict_of(trained: TrainedPolicy) -> tuple[str | None, str]:
    """Return the verdict of the exam of these weights, None if they had none, and its reason."""
    if trained.members:
        found = (verdict_of(part)[0] or "no exam" for part in trained.parts)
        own = ", ".join(f"{name} {text}" for name, text in zip(trained.names, found, strict=True))
        return None, f"no exam is known of this ensemble, evaluate holds one; of its members: {own}"
    line = trained.checkpoint.exam.get("line") if trained.checkpoint.exam else None
    if not line or "verdict" not in line:
        return None, "no exam is known of these weights"
    return str(line["verdict"]), str(line.get("verdict_reason") or "no reason was recorded")


def _row(signal: Signal, now_ns: int) -> dict[str, str]:
    decision = signal.decision
    target, probability = decision.when_holding(signal.holding)
    notes: list[str] = [signal.state]
    notes += ["must be in cash"] if decision.only_cash else []
    notes += [] if signal.in_training else ["not trained on"]
    notes += [f"{len(signal.late)} late"] if signal.late else []
    return {
        **({"group": signal.group} if signal.group else {}),
        "symbol": decision.symbol,
        "holding": _format_position(signal.holding),
        "target": _format_position(target),
        **({"weight": f"{signal.weight:+.2%}"} if signal.weight is not None else {}),
        "probability": f"{probability:.1%}",
        "closed, UTC": utc_time(decision.close_time, "%m-%d %H:%M"),
        "age": age((now_ns - decision.close_time) / 1e9),
        "state": ", ".join(notes),
    }


def _targets(signal: Signal) -> list[str]:
    return [
        _format_position(signal.decision.when_holding(position)[0]) for position in signal.decision.positions
    ]


def _format_position(position: float) -> str:
    return f"{position:+g}" if position else "0"
