"""Time to the answer: CPU seconds until a trainer earns most of what a market holds whose best policy is known.

    python benchmarks/answer.py run ours strong           # one training; adds lines to data_cache/answer.jsonl
    python benchmarks/answer.py run "stable-baselines3, MLP" weak --seconds 900
    python benchmarks/answer.py report --plot docs/time_to_answer.png    # a table and a plot of all lines

The markets are those of the self-test: ``strong`` is its drift that keeps its sign, ``weak`` its weak drift. All
pay the same costs and meet the same bars; the others train through ``envs.gymnasium_env`` (answer_peers.py), in
the peers' virtual environment, which is made on first use. Every training has one thread, and its clock is the
CPU seconds of its process: imports, the drawing of the market and its features count; exams do not. In an exam
policy and reference trade the same accounts from the same bars of fresh paths. Ours also runs on several ranks,
``torchrun --nproc-per-node 2 benchmarks/answer.py run ours strong``; the clock is then that on the wall, since
torchrun began.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from commands.selftest import POSITIONS, TRIALS, Sizes, Trial, trial_settings
from commands.selftest.known_markets import SIGMA, Paths, apply_rule, draw_paths, find_best_rule
from continuous_training import Settings
from envs.config import EnvConfig
from envs.features import FeatureStatistics
from envs.gymnasium_env import TradingVectorEnv
from envs.market import Market
from envs.trading_env import TradingEnv
from evaluation.trained_policy import NEVER_NS
from training import distributed
from training.distributed import Ranks
from training.memory import MemoryNeeds, plan
from training.progress import TrainingProgress
from training.rollout import collect
from training.trainer import Trainer

MARKETS = {"strong": "persistent_sign", "weak": "weak_edge"}
GOALS = {"strong": (0.95, 60.0), "weak": (0.90, 240.0)}  # share, CPU seconds: 30 and 120 s on two cores
LINES = peers.ROOT / "data_cache" / "answer.jsonl"
FACTS = ("contender", "market", "symbols", "seed", "changes")  # of a training, in each of its lines
EXAM_ACCOUNTS, EXAM_BARS = 256, 512  # 131,072 decisions
EXAM_EVERY = 1.4  # times the CPU seconds of the last one
DEVICE = torch.device("cpu")

# Observations (N, D), symbols (N,), newest closed bars (N,) -> actions (N,).
Choose = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# Yields transitions so far, and an exam of the policy as it is: its share and how long it holds nothing.
Training = Iterator[tuple[int, Callable[[], tuple[float, float]]]]


@dataclass(frozen=True)
class KnownMarket:
    """One of the self-test's markets, drawn from one seed."""

    name: str
    seed: int
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def trial(self) -> Trial:
        """The self-test's trial on this market."""
        return next(trial for trial in TRIALS if trial.name == MARKETS[self.name])

    @property
    def num_symbols(self) -> int:
        """Symbols to train on."""
        return min(self.sizes.num_symbols, self.trial.most_symbols)

    def settings(self, **changes: Any) -> Settings:
        """Return the self-test's settings for this market, with some of them changed."""
        return replace(trial_settings(Settings(), self.trial, self.sizes, self.seed, 1), **changes)

    def training_market(self, settings: Settings) -> Market:
        """Draw the paths to train on."""
        paths = draw_paths(self.trial.market, self.num_symbols, self.sizes.num_bars, seed=1_000 + self.seed)
        return Market.from_settings(paths.bars, settings, DEVICE, NEVER_NS)

    @cached_property
    def fresh_paths(self) -> Paths:
        """Fresh paths, which no training has seen."""
        return draw_paths(
            self.trial.market, self.sizes.exam_symbols, self.sizes.num_bars, seed=2_000 + self.seed
        )

    @cached_property
    def reference(self) -> np.ndarray:
        """(S, T) actions of the best rule on the fresh paths."""
        forecast = self.trial.market.forecast(self.fresh_paths.returns)
        return apply_rule(find_best_rule(self.trial.market, self.trial.cost), forecast) + 1

    def exam_market(self, settings: Settings, statistics: FeatureStatistics) -> Market:
        """Return the fresh paths, their features normalised as in training."""
        return Market.from_settings(self.fresh_paths.bars, settings, DEVICE, NEVER_NS, statistics)

    def choose_best(self, _: np.ndarray, symbol: np.ndarray, bar: np.ndarray) -> np.ndarray:
        """Act as the reference."""
        return self.reference[symbol, bar]

    def earned(
        self, rewards: np.ndarray, actions: np.ndarray, symbol: np.ndarray, bar: np.ndarray
    ) -> np.ndarray:
        """Return rewards in sigma, without what the unpredictable noise of the next bar added to them."""
        return rewards / SIGMA - np.asarray(POSITIONS)[actions] * self.fresh_paths.noise[symbol, bar + 1]


def places(env: TradingEnv) -> tuple[np.ndarray, np.ndarray]:
    """Return each account's symbol and the index of its newest closed bar there, (N,) both."""
    symbol = torch.searchsorted(env.market.offsets, env.cursor, right=True) - 1
    return symbol.numpy(), (env.cursor - env.market.offsets[symbol]).numpy()


def play_steps(known: KnownMarket, accounts: TradingVectorEnv, choose: Choose) -> tuple[float, float]:
    """Play the exam step by step; return what was earned, and the fraction of bars with no position."""
    observations, _ = accounts.reset(seed=known.seed)
    total, flat = 0.0, 0.0
    for _ in range(EXAM_BARS):
        where = places(accounts.env)
        actions = choose(observations, *where)
        observations, rewards, *_ = accounts.step(actions)
        total += float(known.earned(rewards, actions, *where).mean())
        flat += float((actions == POSITIONS.index(0.0)).mean()) / EXAM_BARS
    return total, flat


def play_segments(known: KnownMarket, trainer: Trainer, market: Market, best: bool) -> tuple[float, float]:
    """Play the same exam a segment at a time, by the policy as our trainer does, or as the ``best`` one would."""
    config = replace(trainer.env.config, num_envs=EXAM_ACCOUNTS)
    env = TradingEnv(market, config, DEVICE, seed=known.seed)
    reference = torch.from_numpy(known.reference.astype(np.int64))
    total, flat, num_segments = 0.0, 0.0, EXAM_BARS // config.horizon
    for _ in range(num_segments):
        if best:
            env.begin_segment()
            symbol, start = places(env)
            bars = start[:, None] + np.arange(config.horizon)
            actions = reference[symbol[:, None], bars]
            rewards = torch.stack([env.step(row)[0] for row in actions.unbind(1)], dim=1)
        else:
            rollout = collect(env, trainer.policy, trainer.learner.generator, 16, greedy=True)
            actions, rewards = rollout.actions, rollout.rewards * env.volatility[:, None]
            symbol, end = places(env)
            bars = end[:, None] - config.horizon + np.arange(config.horizon)
        total += float(known.earned(rewards.numpy(), actions.numpy(), symbol[:, None], bars).mean())
        flat += float((actions == POSITIONS.index(0.0)).double().mean()) / num_segments
    return total * config.horizon, flat


class OurTraining:
    """A training by our trainer, and its exam."""

    def __init__(self, known: KnownMarket, settings: Settings, market: Market, ranks: Ranks) -> None:
        """``market``: paths to train on, from ``training_market`` with the same features."""
        needs = MemoryNeeds.of(settings, market.num_bytes, ranks.world_size, precision="fp32")
        memory_plan = plan(needs, None, settings.micro_batch_segments)
        self.trainer = Trainer(market, settings, ranks, memory_plan, TrainingProgress())
        self._known, self._settings = known, settings

    @cached_property
    def _fresh(self) -> tuple[Market, float]:
        market = self._known.exam_market(self._settings, self.trainer.env.market.statistics)
        return market, play_segments(self._known, self.trainer, market, best=True)[0]

    def examine(self) -> tuple[float, float]:
        """Return the share of the reference, and the fraction of bars with no position."""
        market, most = self._fresh
        earned, flat = play_segments(self._known, self.trainer, market, best=False)
        return earned / most, flat

    def epochs(self) -> Training:
        """Train as the self-test does."""
        for _ in range(self._settings.epochs):
            self.trainer.update(self.trainer.collect())
            yield self.trainer.progress.transitions, self.examine


class Accounts:
    """The market for everybody else: accounts to train on, accounts for the exam, and the scale of rewards."""

    def __init__(self, known: KnownMarket, num_envs: int, context: int, cost_ramp: int) -> None:
        """``cost_ramp``: transitions over which costs grow to full ones."""
        self.known = known
        settings = known.settings(context_bars=context, horizon=1, batch_size=1, envs_per_gpu=num_envs)
        market = known.training_market(settings)
        config = EnvConfig.from_settings(settings)
        self.training = TradingVectorEnv(market, config, seed=known.seed)
        self.gamma, self.gae_lambda = settings.gamma, settings.gae_lambda
        # As ours: discounted sums of unit noise have a deviation of about one.
        self.reward_scale = (1.0 - settings.gamma**2) ** 0.5 / SIGMA
        self._settings, self._statistics, self._cost_ramp = settings, market.statistics, cost_ramp

    @cached_property
    def fresh(self) -> tuple[TradingVectorEnv, float]:
        """Accounts of the exam, and what the reference earns with them."""
        market = self.known.exam_market(self._settings, self._statistics)
        accounts = TradingVectorEnv(market, EnvConfig.from_settings(self._settings, EXAM_ACCOUNTS))
        return accounts, play_steps(self.known, accounts, self.known.choose_best)[0]

    def grow_costs(self, transitions: int) -> None:
        """Charge the share of costs that is due after so many transitions."""
        self.training.env.cost_scale = min(1.0, transitions / self._cost_ramp) if self._cost_ramp else 1.0

    def examine(self, act: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Examine a greedy policy: observations (N, D) -> actions (N,)."""
        accounts, most = self.fresh
        earned, flat = play_steps(self.known, accounts, lambda observations, *_: act(observations))
        return earned / most, flat


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


def seconds_of_torchrun() -> float:
    """Return the seconds since this rank's launcher began."""
    return time.time() - psutil.Process(os.getppid()).create_time()


def race(
    name: str,
    training: Training,
    facts: dict[str, Any],
    limit: float,
    clock: Callable[[], float] = cpu_seconds,
) -> Iterator[dict[str, Any]]:
    """Train until the seconds of the clock are used up; yield a line per exam, the last one at the end."""
    paused, due, spent, transitions = 0.0, 2.0, 0.0, 0
    examine: Callable[[], tuple[float, float]] | None = None
    for transitions, examine in training:
        spent = clock() - paused
        if spent >= min(due, limit):
            due = spent * EXAM_EVERY
            yield _line(name, facts, spent, transitions, examine)
            paused, examine = clock() - spent, None
        if spent >= limit:
            break
    if examine is not None:
        yield _line(name, facts, spent, transitions, examine)


def _line(
    name: str, facts: dict[str, Any], spent: float, transitions: int, examine: Callable
) -> dict[str, Any]:
    share, flat = examine()
    figures = {"seconds": round(spent, 1), "share": round(share, 4), "flat": round(flat, 3)}
    return {"contender": name, **facts, **figures, "transitions": transitions}


def run(options: argparse.Namespace) -> None:
    """Train one contender, in the environment that has its packages."""
    from benchmarks.answer_peers import CONTENDERS  # which imports this module

    if options.contender not in ("ours", *CONTENDERS):
        raise SystemExit(f"contender must be ours or one of {', '.join(CONTENDERS)}; was {options.contender}")
    torch.set_num_threads(1)
    changes = json.loads(options.changes)
    if options.contender != "ours" and not options.here:
        python = peers.make_venv(options.peers_venv)
        subprocess.run(
            [str(python), *sys.argv, "--here"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return
    known = KnownMarket(options.market, options.seed, Sizes(num_symbols=options.symbols))
    facts = {"market": options.market, "symbols": options.symbols, "seed": options.seed, "changes": changes}
    name = options.name or options.contender
    if options.contender != "ours":
        write(
            race(name, CONTENDERS[options.contender](known, **changes), facts, options.seconds), options.lines
        )
        return
    with distributed.start(wanted="cpu") as ranks:
        settings = known.settings(**changes)
        training = OurTraining(known, settings, known.training_market(settings), ranks).epochs()
        # All ranks hold the same exams at the same time: each goes by rank 0's clock.
        clock = cpu_seconds if ranks.world_size == 1 else lambda: ranks.broadcast(seconds_of_torchrun())
        lines = race(name, training, facts, options.seconds, clock)
        if ranks.is_first:
            write(lines, options.lines)
        else:
            list(lines)


def write(lines: Iterator[dict[str, Any]], path: Path) -> None:
    """Print every line as it comes, and add it to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in lines:
        print(json.dumps(line), flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def report(options: argparse.Namespace) -> None:
    """Print a row per training, and draw all of them."""
    lines = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    trainings: dict[str, list[dict[str, Any]]] = {}  # by their facts
    for line in lines:
        trainings.setdefault(json.dumps([line[fact] for fact in FACTS]), []).append(line)
    exams_of = sorted(trainings.values(), key=lambda exams: (exams[0]["market"], exams[0]["contender"]))
    print(
        "| market | contender | seed | seconds to the goal | last share | after | transitions | per second |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for exams in exams_of:
        last, goal = exams[-1], GOALS[exams[0]["market"]][0]
        reached = (f"{exam['seconds']:.0f}" for exam in exams if exam["share"] >= goal)
        goal_at = next(reached, "not reached")
        print(
            f"| {last['market']} | {last['contender']} | {last['seed']} | {goal_at} | {last['share']:.1%} "
            f"| {last['seconds']:.0f} | {last['transitions']:,} "
            f"| {last['transitions'] / last['seconds']:,.0f} |"
        )
    if options.plot:
        draw(exams_of, options.plot)


def draw(trainings: list[list[dict[str, Any]]], path: Path) -> None:
    """Draw the share of the reference against CPU seconds, a panel for each market."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    markets = [market for market in MARKETS if any(exams[0]["market"] == market for exams in trainings)]
    size = 5.5 * len(markets), 4.2
    figure, (axes,) = pyplot.subplots(
        1, len(markets), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    contenders = sorted(
        {exams[0]["contender"] for exams in trainings}, key=lambda name: (not name.startswith("ours"), name)
    )
    colours = dict(zip(contenders, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for axis, market in zip(axes, markets, strict=True):
        for exams in trainings:
            if exams[0]["market"] == market:
                name = exams[0]["contender"]
                seconds, shares = zip(*((exam["seconds"], exam["share"]) for exam in exams), strict=True)
                label = None if name in axis.get_legend_handles_labels()[1] else name
                axis.plot(seconds, shares, ".-", color=colours[name], label=label, linewidth=1)
        axis.axhline(GOALS[market][0], color="grey", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", ylim=(-0.25, 1.05), xlabel="CPU seconds of one thread", title=f"{market} edge")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("share of what can be earned, fresh paths")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=Path, default=LINES, help="file of results, a line of JSON per exam")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train one contender")
    one.add_argument("contender", help="ours, or one of answer_peers.py")
    one.add_argument("market", choices=MARKETS)
    one.add_argument("--name", help="in the table and the plot; default: the contender")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--symbols", type=int, default=Sizes.num_symbols, help="to train on, 60,000 bars each")
    one.add_argument("--seconds", type=float, default=900.0, help="at most; with several ranks on the wall")
    one.add_argument("--changes", default="{}", help="JSON: settings of ours, or arguments of the contender")
    one.add_argument("--peers-venv", type=Path, default=peers.VENV)
    one.add_argument(
        "--here", action="store_true", help="in this environment, which has the contender's packages"
    )
    one.set_defaults(command=run)
    table = commands.add_parser("report", help="print a table of all results, and draw them")
    table.add_argument("--plot", type=Path, help="PNG to write")
    table.set_defaults(command=report)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
