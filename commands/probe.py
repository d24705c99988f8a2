"""``probe``: what plain models earn with the features of the lake, before anything large is trained on them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from commands import options
from data_sources.bars import DAY_NS, Bars
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.config import EnvConfig
from envs.market import Market
from evaluation.forecasts import RIDGE, TREES, import_lightgbm
from evaluation.measures import Interval
from evaluation.probe import Probe, RankIC, Rung, cut_days, probe
from evaluation.provenance import day_of
from evaluation.stale_opens import stale_opens
from evaluation.trained_policy import NEVER_NS
from monitoring.console import Console
from runtime.control import EXIT_NO_DATA, ExitProgram
from training import devices
from training.data_feed import data_request, holdout_start_ns, make_market
from training.distributed import Ranks

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

IC_COLUMNS = ("horizon", "rank IC", "95 %", "one bar late", "95 %")
SIGN_COLUMNS = ("horizon", "gross", "95 %", "traded", "break-even", "95 %", "one bar late", "95 %")
LADDER_COLUMNS = ("bp", "net bp/bar", "95 %", "gross", "traded", "break-even", "95 %")
RULE_COLUMNS = ("bp", "net one bar late", "95 %", "rule")


def parse_costs(text: str) -> tuple[float, ...]:
    """Return the costs of the ladder, ascending.

    Raises:
        ValueError: a cost is not a number of 0 or more.
    """
    costs = options.parse_costs(text)
    if not costs:
        raise ValueError("--costs must be at least one number of basis points, such as 0,0.5,1,2,5")
    return costs


def chosen_models(trees: bool | None) -> list[str]:
    """Return the models to fit; boosted trees where they are installed, or asked for.

    Raises:
        ValueError: they are asked for and lightgbm is not installed.
    """
    if trees is False:
        return [RIDGE]
    if import_lightgbm() is not None:
        return [RIDGE, TREES]
    if trees:
        raise ValueError("--trees needs lightgbm, which is not installed: .venv/bin/pip install lightgbm")
    return [RIDGE]


def command(
    settings: Settings, costs_bps: Sequence[float], models: Sequence[str], console: Console, as_json: bool
) -> None:
    """Probe the bars of the lake before the newest ``holdout_days``, and print what was found.

    Raises:
        ExitProgram: there are no bars, or too few days.
        FeatureError: a feature of one's own looks ahead, or cannot be used.
    """
    began = time.monotonic()
    device = devices.of_rank(settings.device, local_rank=0)
    bars = _bars_before_holdout(settings)
    try:
        edges_ns, market = prepare(settings, bars, device)
        judged_ns = edges_ns[1], edges_ns[-1]
        warning = "" if "simulated" in settings.sources else stale_opens(market, market.symbols, *judged_ns)
        first_ns = min(int(series.open_time[0]) for series in bars)
        title = (
            f"{len(bars)} symbols, {sum(map(len, bars)):,} bars from {day_of(first_ns)} to "
            f"{day_of(edges_ns[-1] - 1)}, {market.num_features} features; forecast from {day_of(edges_ns[0])} "
            f"on, rules chosen until {day_of(edges_ns[1])}, judged after"
        )
        log.info(title)
        found = []
        for model in models:
            found.append(probe(model, market, EnvConfig.from_settings(settings, 1), edges_ns, costs_bps))
            if not as_json:
                _print(found[-1], console)
    except ValueError as error:
        raise ExitProgram(EXIT_NO_DATA, f"{error}: fetch older bars, or lower holdout_days") from error
    if warning:
        log.warning(warning)
    if TREES not in models:
        log.info("Boosted trees were left out; --trees fits them, and needs: .venv/bin/pip install lightgbm")
    seconds = time.monotonic() - began
    log.info(
        f"The newest {settings.holdout_days} days were left out, for exams. {sum(p.num_trials for p in found)} "
        f"rules were tried for each cost, on the days of choice alone. {seconds:.1f} s"
    )
    if as_json:
        content: dict[str, Any] = {
            "symbols": list(market.symbols),
            "bars": sum(map(len, bars)),
            "features": list(market.statistics.names),
            "holdout_days": settings.holdout_days,
            "forecast_from": day_of(edges_ns[0]),
            "judged_from": day_of(edges_ns[1]),
            "last": day_of(edges_ns[-1] - 1),
            "warning": warning,
            "models": [result.as_json() for result in found],
            "seconds": seconds,
        }
        console.emit(json.dumps(content, indent=1, allow_nan=False))


def _bars_before_holdout(settings: Settings) -> list[Bars]:
    """Read the lake, less what exams are held on."""
    lake = Lake(Path(settings.data_dir))
    try:
        bars = load(lake, data_request(settings, time.time_ns())).bars
    except LakeError as error:
        raise ExitProgram(EXIT_NO_DATA, f"{error}: look at the disk, or use another --data-dir") from error
    if not bars:
        raise ExitProgram(
            EXIT_NO_DATA,
            f"No symbol has {settings.min_bars:,} bars in {lake.root}: fetch them with "
            "python continuous_training.py data, or try it on a simulated market with --demo",
        )
    end_ns = holdout_start_ns(settings, bars) if settings.holdout_days else NEVER_NS
    before = [series.between(0, end_ns) for series in bars]
    return [series for series in before if len(series)]


def prepare(settings: Settings, bars: Sequence[Bars], device: torch.device) -> tuple[list[int], Market]:
    """Return where the parts of these bars begin, and their market, its features scaled by the first part.

    Raises:
        ValueError: there are too few days.
        ExitProgram: there are too few bars before the first day that is forecast.
        FeatureError: a feature of one's own looks ahead, or cannot be used.
    """
    if not bars:
        raise ValueError("there are no bars before the holdout")
    edges_ns = cut_days(np.concatenate([series.open_time for series in bars]))
    newest_ns = max(int(series.open_time[-1]) for series in bars)
    unknown_days = -(-(newest_ns - edges_ns[0]) // DAY_NS)
    earlier = replace(settings, holdout_days=unknown_days)
    market = make_market(earlier, bars, Ranks(0, 1, device), None)
    return edges_ns, market.until(NEVER_NS)


def _print(found: Probe, console: Console) -> None:
    days = f"{found.num_days} days forecast, {found.num_judged_days} of them judged; {found.seconds:.1f} s"
    console.table(f"{found.model}: rank IC, {days}", IC_COLUMNS, map(_ic_cells, found.rank_ic))
    console.table(
        f"{found.model}: the sign of every forecast, bp a bar at no cost",
        SIGN_COLUMNS,
        map(_sign_cells, found.signs),
    )
    title = f"{found.model}: cost of a side in bp, and what its rule earned"
    console.table(title, LADDER_COLUMNS, map(_rung_cells, found.ladder))
    console.table(f"{found.model}: the same one bar late", RULE_COLUMNS, map(_rule_cells, found.ladder))


def _ic_cells(ic: RankIC) -> list[str]:
    return [
        _bars(ic.horizon),
        f"{ic.value:+.4f}",
        _interval(ic.interval, "+.4f"),
        f"{ic.late:+.4f}",
        _interval(ic.late_interval, "+.4f"),
    ]


def _sign_cells(rung: Rung) -> list[str]:
    late = rung.late
    horizon = _bars(rung.rule.horizon) if rung.rule else ""
    return [horizon, *_earned(rung), f"{late.net_bps:+.3f}", _interval(late.net_interval, "+.3f")]


def _rung_cells(rung: Rung) -> list[str]:
    net, interval, *trades = _earned(rung)
    return [f"{rung.cost_bps:g}", net, interval, f"{rung.margin.gross_bps:+.3f}", *trades]


def _earned(rung: Rung) -> list[str]:
    own = rung.margin
    return [
        f"{own.net_bps:+.3f}",
        _interval(own.net_interval, "+.3f"),
        f"{own.turnover:.4f}",
        "no trade" if own.break_even_bps is None else f"{own.break_even_bps:.2f}",
        _interval(own.break_even_interval, ".2f"),
    ]


def _rule_cells(rung: Rung) -> list[str]:
    rule, late = "flat: none earned for sure", rung.late
    if rung.rule is not None:
        enter, leave = 1e4 * rung.rule.enter, 1e4 * rung.rule.leave
        rule = f"beyond {enter:.2f} bp in {rung.rule.horizon}, until {leave:+.2f}"
    return [f"{rung.cost_bps:g}", f"{late.net_bps:+.3f}", _interval(late.net_interval, "+.3f"), rule]


def _interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _bars(number: int) -> str:
    return "1 bar" if number == 1 else f"{number} bars"
