"""Which settings find the answer: a grid of them, at equal CPU seconds, on a market whose best policy is known.

    python benchmarks/settings_grid.py run weak --seeds 0,1 --seconds 60
    python benchmarks/settings_grid.py run strong --grid '{"update_passes": [1, 3], "learning_rate": [1e-3, 3e-3]}'
    python benchmarks/settings_grid.py report    # a row for each cell and market, the best first

The markets and their costs are those of answer.py. What the grid does not change comes from the small preset, with
a trunk that a thread trains in a minute: 64 wide, two layers. Every cell gets the epochs that fit in the time, so
that its learning rate and its costs end where they should; the third epoch of a first trainer is timed for that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from benchmarks.answer import DEVICE, MARKETS, KnownMarket, OurTraining, cpu_seconds, write
from commands.selftest import Sizes
from continuous_training import PRESETS, Settings
from envs.market import Market
from training.distributed import Ranks

LINES = peers.ROOT / "data_cache" / "settings_grid.jsonl"
OURS = (
    "envs_per_gpu context_bars horizon cost_ramp feature_encoding batch_size update_passes optimizer "
    "learning_rate warmup_steps gamma gae_lambda entropy_coef"
).split()  # of the preset; all else is the self-test's
SMALL = Settings(**PRESETS["small"])
NARROW = {"d_model": 64, "num_layers": 2, "num_heads": 4}
GRID = {
    "update_passes": [1, 2, 3],
    "batch_size": [4_096, 8_192],
    "learning_rate": [3e-4, 1e-3, 3e-3],
    "horizon": [128, 256],
}


def cells_of(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def training_of(known: KnownMarket, market: Market, changes: dict[str, Any], epochs: int) -> OurTraining:
    """Make a training of so many epochs, on one rank."""
    return OurTraining(known, known.settings(**changes, epochs=epochs), market, Ranks(0, 1, DEVICE))


def epochs_within(known: KnownMarket, market: Market, changes: dict[str, Any], seconds: float) -> int:
    """Return how many epochs fit into the CPU seconds."""
    times = [cpu_seconds() for _ in training_of(known, market, changes, 3).epochs()]
    return max(round(seconds / (times[-1] - times[-2])), 1)


def run(options: argparse.Namespace) -> None:
    """Train and examine all cells of all seeds; add a line for each."""
    torch.set_num_threads(1)
    write(examine_cells(options), options.lines)


def examine_cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each cell's training earned."""
    base = {name: getattr(SMALL, name) for name in OURS} | NARROW | json.loads(options.base)
    for seed in map(int, options.seeds.split(",")):
        known = KnownMarket(options.market, seed, Sizes(num_symbols=options.symbols))
        markets: dict[tuple[int, int], Market] = {}  # by lengths of context and segment
        for cell in cells_of(json.loads(options.grid)):
            changes = base | cell
            lengths = changes["context_bars"], changes["horizon"]
            if lengths not in markets:
                markets[lengths] = known.training_market(known.settings(**changes))
            market = markets[lengths]
            epochs = epochs_within(known, market, changes, options.seconds)
            begin = cpu_seconds()
            training = training_of(known, market, changes, epochs)
            for _ in training.epochs():
                pass
            spent = cpu_seconds() - begin
            share, flat = training.examine()
            facts = {"market": options.market, "seed": seed, "base": json.loads(options.base), "cell": cell}
            figures = {"epochs": epochs, "seconds": round(spent, 1), "share": round(share, 4)}
            yield facts | figures | {"flat": round(flat, 3)}


def report(options: argparse.Namespace) -> None:
    """Print a row for each cell and market."""
    trainings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for text in options.lines.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        words = ", ".join(f"{name} {value}" for name, value in (line["base"] | line["cell"]).items())
        trainings.setdefault((line["market"], words), []).append(line)

    def mean(name: str, lines: list[dict[str, Any]]) -> float:
        return statistics.fmean(line[name] for line in lines)

    print("| market | settings | seeds | share, mean | lowest, highest | epochs | CPU s |")
    print("|---|---|---|---|---|---|---|")
    ranked = sorted(trainings.items(), key=lambda item: (item[0][0], -mean("share", item[1])))
    for (market, words), lines in ranked:
        seeds = ", ".join(str(line["seed"]) for line in lines)
        shares = [line["share"] for line in lines]
        print(
            f"| {market} | {words} | {seeds} | {mean('share', lines):.1%} | {min(shares):.1%}, {max(shares):.1%} "
            f"| {mean('epochs', lines):.0f} | {mean('seconds', lines):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lines", type=Path, default=LINES, help="file of results, a line of JSON per training"
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train all cells")
    one.add_argument("market", choices=MARKETS)
    one.add_argument("--grid", default=json.dumps(GRID), help="JSON: the values of each setting")
    one.add_argument("--base", default="{}", help="JSON: settings that all cells have")
    one.add_argument("--seeds", default="0")
    one.add_argument("--symbols", type=int, default=Sizes.num_symbols, help="to train on, 60,000 bars each")
    one.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a training")
    one.set_defaults(command=run)
    table = commands.add_parser("report", help="print a table of all results")
    table.set_defaults(command=report)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
