"""The self-test's report: ``selftest.json`` for machines, ``selftest.png`` with the learning curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from commands.selftest import Result, Trial

matplotlib.rcdefaults()  # a matplotlibrc of the user's may need LaTeX
BASELINES = (("reference", "C2"), ("alone", "C4"), ("buy_and_hold", "C7"), ("random", "C3"))


def write(folder: Path, trials: Sequence[Trial], results: Sequence[Result]) -> list[Path]:
    """Write both files and return their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "selftest.json", folder / "selftest.png"
    rows = [asdict(result) | {"share": result.share, "passed": not result.failure} for result in results]
    table.write_text(json.dumps(rows, indent=1) + "\n")
    _plot(trials, results).savefig(picture, dpi=110)
    return [table, picture]


def _plot(trials: Sequence[Trial], results: Sequence[Result]) -> Figure:
    """Draw one panel per trial: each seed's learning curve, its result on fresh paths, and the baselines."""
    figure = Figure(figsize=(11, 3.1 * ((len(trials) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(trials) + 1) // 2, 2, squeeze=False).flat
    for trial, panel in zip(trials, panels, strict=False):  # trials first, so that no panel is lost
        own = [result for result in results if result.trial == trial.name]
        for result in own:
            panel.plot(_running_mean(result.curve), color="C0", alpha=0.7, label="policy, in training")
            panel.plot(len(result.curve), result.policy, "o", color="C0", label="policy, on fresh paths")
        for name, colour in BASELINES:
            earned = [value for result in own if (value := getattr(result, name)) is not None]
            if earned:
                mean = sum(earned) / len(earned)
                panel.axhline(mean, color=colour, linestyle="--", label=name.replace("_", " "))
        panel.set_title(trial.title)
        panel.set_xlabel("epoch")
        panel.set_ylabel("sigma per bar, net")
        lowest = min(-0.02, *(result.policy for result in own))
        highest = max(0.02, *(max(result.reference, *result.curve) for result in own))
        panel.set_ylim(2 * lowest, 1.2 * highest)
    for panel in list(panels):
        panel.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=5)
    return figure


def _running_mean(values: Sequence[float], width: int = 5) -> list[float]:
    """Average over the last ``width`` values."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
