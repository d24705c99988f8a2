"""Walk forward over markets with a weak edge planted, and over noise: how often is which called an edge?

    nice python benchmarks/planted_walks.py --strength 0.15 --seeds 5     # 12 windows of a week each
    nice python benchmarks/planted_walks.py --strength 0 --seeds 5        # nothing to find

The bars are hourly, of 8 symbols; their drift is ``strength`` standard deviations of a bar, and its sign mostly
lasts a day. Everything else is the command ``walkforward``: training, exams, gate, verdict.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands.walkforward import WalkOptions, command
from continuous_training import Settings, train
from evaluation.exam import POLICY
from evaluation.walk_summary import WalkSummary, summarize
from monitoring.console import Console
from tests.commands import hourly

FIRST_DAY = 20_100  # since 1970, 2025-01-12


def walk(strength: float, seed: int, windows: int, is_fresh: bool, epochs: int) -> WalkSummary:
    """Walk over one market, and sum up."""
    first = str(np.datetime64("2026-02-01") - 7 * windows)
    hourly.plant(strength=strength, seed=seed, first_day=FIRST_DAY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {f"{kind}_dir": str(folder / kind) for kind in ("data", "log", "report", "checkpoint")}
        settings = Settings(**(hourly.LEARNABLE | folders | {"seed": seed, "epochs": epochs}))
        options = WalkOptions(first_day=first, fresh=is_fresh, output=folder / "walk")
        with Console(folder / "log", log_level="warning") as console:
            command(settings, train, options, console)
        results = [json.loads(path.read_text()) for path in sorted((folder / "walk" / "windows").iterdir())]
    found = summarize(results, options.costs_bps)
    assert found is not None
    return found


def main(
    strength: Annotated[float, typer.Option(help="drift, in standard deviations of a bar")] = 0.15,
    seeds: Annotated[int, typer.Option(help="markets and trainings")] = 5,
    windows: Annotated[int, typer.Option(help="weeks")] = 12,
    epochs: Annotated[int, typer.Option(help="a window")] = 20,
    fresh: Annotated[bool, typer.Option("--fresh", help="every window from nothing")] = False,
) -> None:
    """Walk over several markets of one strength."""
    print(
        "| seed | verdict | days | champions | net | mean day, bps | Sharpe | probability | alone | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(seeds):
        began = time.process_time()
        found = walk(strength, seed, windows, fresh, epochs)
        own = found.measures[POLICY]
        low, high = own.mean_daily_interval or (float("nan"), float("nan"))
        champions = len({row.champion for row in found.windows} - {""})
        print(
            f"| {seed} | {'edge' if found.verdict.edge else 'no edge'} | {len(found.days)} | {champions} "
            f"| {own.total_return:+.1%} | {1e4 * own.mean_daily_return:+.1f} "
            f"[{1e4 * low:+.1f}, {1e4 * high:+.1f}] "
            f"| {own.sharpe or 0.0:.1f} | {found.verdict.probability or 0.0:.2%} after {found.num_trials} "
            f"| {found.probability_alone or 0.0:.2%} | {time.process_time() - began:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
