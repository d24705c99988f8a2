"""Train at several costs on bars of your own, and judge on days that nothing was tuned on, beside plain models.

    python benchmarks/real_bars.py --data FOLDER    # a model of the demo's size at each cost
    python benchmarks/real_bars.py --data FOLDER --last-days 40 --times 1 --no-trees    # smaller
    python benchmarks/real_bars.py --data FOLDER --seeds 3 --times 0 --epochs 400 --d-model 256 --num-layers 4

Every folder in FOLDER with CSV or Parquet files is a market of its own; files right in FOLDER make all of it one
(docs/data.md has their form). Its days are cut in order: 50 % to train and fit on, 15 % to choose a threshold rule
for each cost, 35 % to judge; before a later part a day is left out, and all moves that reach into it. The product
trains from scratch at each flat cost and for each seed, and walks the judged days greedily by the exam's code:
with its last weights, with those of all seeds as one ensemble, and with those that did best on the days of choice,
flat where none surely earned there, as for rules. Ridge and trees see the same features, and their rules the same
fills; at no cost the sign of the next bar's forecast trades, too. Net is in basis points per bar
and symbol, bars without a position included, with 95 % intervals by bootstrap over days. Every flag of the
training is one of this program's.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands.cli import command_from
from commands.probe import chosen_models, parse_costs
from continuous_training import PRESETS, Settings
from data_sources.bars import DAY_NS, Bars
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.progress import WarningCollector
from data_sources.refresh import refresh
from data_sources.vendors.files_find import Folder
from envs.ahead import HORIZONS
from envs.config import EnvConfig
from envs.market import Market, bars_before
from evaluation.baselines import ALWAYS_FLAT, BASELINES
from evaluation.exam import POLICY, Walk, examine
from evaluation.forecasts import FITS, BarTable, forecasts_of, targets_of
from evaluation.measures import Margin, jsonable, margin
from evaluation.probe import EMBARGO_NS, cut_days, judge
from evaluation.provenance import day_of
from evaluation.rules import STANDARD_ERRORS, Decisions, Rule, choose_rules, play, walks_of
from evaluation.stale_opens import stale_opens
from evaluation.trained_policy import NEVER_NS
from models.ensemble import Ensemble, View
from models.policy import Policy
from runtime.wording import count_of
from training import devices
from training.data_feed import data_request
from training.distributed import Ranks
from training.memory import plan_memory
from training.progress import TrainingProgress
from training.trainer import Trainer

FEES = ("stock_fee_bps", "crypto_fee_bps", "perpetual_fee_bps")
SHARES = (0.5, 0.65)  # of the days: where the days of choice and the judged days begin
SIGN = Rule(1, 0.0, 0.0)  # of the next bar's forecast
LAST_EPOCHS = 0.1  # of a training, whose mean reward stands for what it believes
# A demo's size, which two cores train in a minute or two, at a lower rate: real edges are small.
SIZES = dict(PRESETS["demo"]) | {
    "sources": ("files",),
    "files_dir": ".",  # each market has its own
    "start_date": "2003-01-01",
    "envs_per_gpu": 64,
    "feature_encoding": "piecewise",
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "min_bars": 500,
    "runs": None,
}


@dataclass(frozen=True)
class Row:
    """One contestant at one cost."""

    market: str
    cost_bps: float
    name: str
    judged: Margin
    late: Margin | None = None  # every order one bar late
    training_bps: float | None = None  # reward a bar in the last epochs
    rule: str = ""


def run(
    settings: Settings,
    data: Annotated[Path, typer.Option("--data", help="folder with files of bars, or with folders of them")],
    costs: Annotated[str, typer.Option("--costs", help="flat costs of a side, bp")] = "0,0.5,1,2,5",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="trainings at each cost")] = 1,
    times: Annotated[
        float, typer.Option("--times", min=0, help="to learn from each bar; 0: as often as --epochs says")
    ] = 4.0,
    last_days: Annotated[int, typer.Option("--last-days", min=0, help="newest days to use; 0: all")] = 0,
    trees: Annotated[
        bool | None, typer.Option("--trees/--no-trees", help="default: where lightgbm is installed")
    ] = None,
    markets: Annotated[str, typer.Option("--markets", help="names of folders; default: all")] = "",
    output: Annotated[Path | None, typer.Option("--output", help="a JSON file of all figures")] = None,
) -> None:
    """Train and judge on every market of a folder."""
    costs_bps, models = parse_costs(costs), chosen_models(trees)
    device, began, rows = devices.of_rank(settings.device, local_rank=0), time.monotonic(), []
    for name, folder in folders_of(data, [word for word in markets.split(",") if word]):
        with tempfile.TemporaryDirectory() as lake:
            bars = read_bars(replace(settings, files_dir=str(folder), data_dir=lake), last_days)
            rows += measure(name, settings, bars, device, costs_bps, seeds, times, models)
        if output:
            output.write_text(json.dumps([jsonable(asdict(row)) for row in rows], indent=1) + "\n")
    print(f"\n{time.monotonic() - began:,.0f} s on {device.type}, {torch.get_num_threads()} threads")


def folders_of(data: Path, wanted: Sequence[str]) -> list[tuple[str, Path]]:
    """Return name and path of every folder that is a market.

    Raises:
        ValueError: there is none, or one that is wanted is not there.
    """
    names = [file.name for file in Folder.read(data).files]
    found = {name.split("/")[0]: data / name.split("/")[0] for name in names if "/" in name}
    if any("/" not in name for name in names):
        found = {data.resolve().name: data}  # the files source reads what is below it, too
    if not found:
        raise ValueError(
            f"--data {data} must have CSV or Parquet files, or folders with some: there are none"
        )
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"--markets {','.join(missing)} must be among: {', '.join(found)}")
    return [(name, path) for name, path in found.items() if not wanted or name in wanted]


def read_bars(settings: Settings, last_days: int) -> list[Bars]:
    """Read the files of a market through the lake."""
    lake, progress, now_ns = Lake(Path(settings.data_dir)), WarningCollector(), time.time_ns()
    request = data_request(settings, now_ns)
    refresh(lake, request, now_ns, progress)
    bars = [  # copies: the lake goes away
        series.select(np.ones(len(series), np.bool_)) for series in load(lake, request).bars
    ]
    for warning in progress.warnings:
        print(f"Note: {warning}")
    if last_days and bars:
        days = np.unique(np.concatenate([series.open_time // DAY_NS for series in bars]))
        first_ns = int(days[-last_days:][0]) * DAY_NS
        bars = [series.between(first_ns, NEVER_NS) for series in bars]
    return [series for series in bars if len(series) >= settings.min_bars]


def measure(
    name: str,
    settings: Settings,
    bars: Sequence[Bars],
    device: torch.device,
    costs_bps: Sequence[float],
    seeds: int,
    times: float,
    models: Sequence[str],
) -> list[Row]:
    """Let all contestants trade the judged days of one market, and print a table."""
    if not bars:
        raise ValueError(f"{name}: no symbol has {settings.min_bars:,} bars; lower --min-bars")
    choice_ns, judged_ns, end_ns = cut_days(np.concatenate([series.open_time for series in bars]), SHARES)
    known = Market.from_settings(bars, settings, device, choice_ns - EMBARGO_NS)
    market = known.until(NEVER_NS)
    if times:
        per_epoch = settings.envs_per_gpu * settings.horizon * settings.update_passes
        num_bars = sum(bars_before(bars, choice_ns - EMBARGO_NS))
        settings = replace(settings, epochs=math.ceil(times * num_bars / per_epoch))
    trained, chosen, judged_from = map(day_of, (choice_ns - EMBARGO_NS - 1, choice_ns, judged_ns))
    num_epochs = count_of(settings.epochs, "epoch")
    print(
        f"\n**{name}**: {len(bars)} symbols, {sum(map(len, bars)):,} bars, {market.num_features} features; "
        f"trained to {trained} in {num_epochs}, chosen from {chosen}, judged from {judged_from} to "
        f"{day_of(end_ns - 1)}\n",
        flush=True,
    )
    if warning := stale_opens(market, market.symbols, judged_ns, end_ns):
        print(f"Warning: {warning}\n")
    rows: list[Row] = []
    for cost_bps in costs_bps:
        at_cost = replace(settings, **dict.fromkeys(FEES, cost_bps), slippage_bps=0.0)
        contestants: dict[str, Policy | Ensemble | None] = {}
        believed: dict[str, float] = {}
        last_ones: list[Policy] = []
        for seed in range(settings.seed, settings.seed + seeds):
            trained = train(known, market, replace(at_cost, seed=seed), choice_ns, judged_ns)
            for title, policy in (("", trained.last), (", by its exams", trained.chosen)):
                contestants[f"product, seed {seed}{title}"] = policy
                believed[f"product, seed {seed}{title}"] = trained.bps
            last_ones.append(trained.last)
        if seeds > 1:
            ensemble = Ensemble(last_ones, [View(skipped_bars=0, scale=0)] * seeds)
            contestants[f"product, {seeds} seeds as an ensemble"] = ensemble
        walks = walk(contestants, market, EnvConfig.from_settings(at_cost), judged_ns, end_ns)
        for title in contestants:
            decisions = decisions_of(market, at_cost, walks[title])
            late = replay(market, decisions, walks[title], cost_bps, late=1)
            training_bps = believed.get(title)
            rows.append(Row(name, cost_bps, title, margin(walks[title]), margin(late), training_bps))
            print(line_of(rows[-1]), flush=True)
        rows += [Row(name, cost_bps, rule, margin(walks[rule])) for rule in BASELINES]
    trainings = len(costs_bps) * seeds
    num_trials = trainings * math.ceil(settings.epochs / settings.checkpoint_every)  # one an exam
    for model in models:
        edges_ns = choice_ns, judged_ns
        found, tried = rules_of(name, model, market, settings, decisions.rows, edges_ns, costs_bps)
        rows += found
        num_trials += tried
    print_table(rows)
    print(f"\n{num_trials:,} trials, {trainings} of them trainings, the others rules on the days of choice.")
    return rows


@dataclass(frozen=True)
class Trained:
    """A training's policies: the last, and that of the exam that earned most for sure on the days of choice."""

    last: Policy
    chosen: Policy | None  # None where no exam earned anything for sure
    bps: float  # reward a bar in the last epochs


def train(known: Market, market: Market, settings: Settings, choice_ns: int, judged_ns: int) -> Trained:
    """Train on ``known``, which ends before the days of choice; ``market`` has all days."""
    ranks = Ranks(0, 1, known.device)
    memory_plan = plan_memory(settings, known.num_bytes, ranks)
    trainer, curve = Trainer(known, settings, ranks, memory_plan, TrainingProgress()), []
    best, chosen = 0.0, None
    for epoch in range(1, settings.epochs + 1):
        trainer.update(trainer.collect())
        totals = trainer.env.episode_statistics()
        curve.append(1e4 * float(totals["rewards"] / totals["decisions"]))
        if epoch % settings.checkpoint_every and epoch < settings.epochs:
            continue
        policy = trainer.full_policy()
        exam = walk({POLICY: policy}, market, trainer.env.config, choice_ns, judged_ns - EMBARGO_NS)
        if (earned := earned_for_sure(exam[POLICY])) > best:
            best, chosen = earned, copy.deepcopy(policy)
    return Trained(policy, chosen, float(np.mean(curve[-math.ceil(LAST_EPOCHS * len(curve)) :])))


def walk(
    policies: Mapping[str, Policy | Ensemble | None],
    market: Market,
    config: EnvConfig,
    start_ns: int,
    end_ns: int,
) -> dict[str, list[Walk]]:
    """Let policies walk some days greedily, and the baselines; None stays in cash."""
    deciding = {name: policy for name, policy in policies.items() if policy}
    walks = examine(deciding, market, config, market.symbols, start_ns, end_ns, chunk_segments=16)
    return dict.fromkeys(policies, walks[ALWAYS_FLAT]) | walks


def earned_for_sure(walks: Sequence[Walk]) -> float:
    """Return the sum over minutes, all symbols together, less two standard errors, as rules are chosen by."""
    _, minute = np.unique(np.concatenate([walk.time for walk in walks]), return_inverse=True)
    net = np.bincount(minute, np.concatenate([walk.log_returns for walk in walks]))
    return float(net.sum() - STANDARD_ERRORS * np.sqrt(net @ net))


def rules_of(
    name: str,
    model: str,
    market: Market,
    settings: Settings,
    judged: NDArray[np.int64],
    edges_ns: tuple[int, int],
    costs_bps: Sequence[float],
) -> tuple[list[Row], int]:
    """Fit a model to the days of training, choose a rule for each cost, and judge it at ``judged`` bars (n,)."""
    table, config, (choice_ns, judged_ns) = (
        BarTable.of(market),
        EnvConfig.from_settings(settings, 1),
        edges_ns,
    )
    known = table.rows_before(choice_ns - EMBARGO_NS, max(HORIZONS))
    forecast = FITS[model](market, torch.from_numpy(known), targets_of(table, known))
    choice = table.rows_between(choice_ns, judged_ns - EMBARGO_NS)
    if not len(choice):
        raise ValueError(f"{name}: the days are too few to choose a rule on: 10 are needed")
    rules, num_trials = choose_rules(
        Decisions.at(market, table, config, choice),
        forecasts_of(forecast, table, choice),
        HORIZONS,
        costs_bps,
    )
    decisions, forecasts = Decisions.at(market, table, config, judged), forecasts_of(forecast, table, judged)
    rows = []
    for cost_bps, rule in zip(costs_bps, rules, strict=True):
        rung = judge(market, table, decisions, forecasts, rule, cost_bps)
        text = f"beyond {1e4 * rule.enter:.2f} bp in {rule.horizon}" if rule else "none earned: flat"
        rows.append(Row(name, cost_bps, f"{model}, best rule", rung.margin, rung.late, rule=text))
        if not cost_bps:
            rung = judge(market, table, decisions, forecasts, SIGN, cost_bps)
            rows.append(Row(name, cost_bps, f"{model}, sign of the next bar", rung.margin, rung.late))
    return rows, num_trials


def decisions_of(market: Market, settings: Settings, walks: Sequence[Walk]) -> Decisions:
    """Return the decisions of walks, so that rules meet the same fills."""
    table, rows = BarTable.of(market), []
    for walk in walks:
        number = market.symbols.index(walk.symbol)
        first, last = np.searchsorted(table.symbol, (number, number + 1))
        fills = first + np.searchsorted(table.open_time[first:last], walk.time.astype(np.int64))
        rows.append(fills - 1)
    return Decisions.at(market, table, EnvConfig.from_settings(settings, 1), np.concatenate(rows))


def replay(
    market: Market, decisions: Decisions, walks: Sequence[Walk], cost_bps: float, late: int
) -> list[Walk]:
    """Return what the positions of walks earn in the rules' ledger, every order ``late`` bars late."""
    # Rounded, as cash may hold a coin's last bit.
    sides = np.sign(np.concatenate([walk.position for walk in walks]).round(6)).astype(np.int8)
    played = play(decisions, decisions.targets(sides, late), cost_bps)
    return walks_of(market, BarTable.of(market), decisions, played)


def print_table(rows: Sequence[Row]) -> None:
    """Print a Markdown table, cost by cost."""
    print(
        "| bp a side | who | net bp/bar | gross | traded/bar | break-even bp | net one bar late | in training |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row.cost_bps):
        print(line_of(row), flush=True)


def line_of(row: Row) -> str:
    """Return a contestant's line of the table."""
    own = row.judged
    cells = [
        f"{row.cost_bps:g}",
        row.name,
        f"{own.net_bps:+.3f}{_range(own.net_interval)}",
        f"{own.gross_bps:+.3f}",
        f"{own.turnover:.4f}",
        "" if own.break_even_bps is None else f"{own.break_even_bps:.2f}",
        "" if row.late is None else f"{row.late.net_bps:+.3f}{_range(row.late.net_interval)}",
        row.rule if row.training_bps is None else f"{row.training_bps:+.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"


if __name__ == "__main__":
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    # These sizes stand where the program has its own: every setting is a flag that overrides them.
    program.command(help=__doc__)(command_from(Settings, {"full": SIZES}, run))
    try:
        program()
    except ValueError as error:
        sys.exit(str(error))
