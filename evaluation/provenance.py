"""Where a checkpoint comes from: what it was trained on, how it learned, who is the champion beside it."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_sources.refresh import LoadedData
from evaluation import ledger
from evaluation.trained_policy import TrainedPolicy
from training import checkpoint

DAY_NS = 86_400 * 10**9


def trained_until(trained: TrainedPolicy) -> int:
    """Return the time from which on no bar was trained on by these weights, or by those that they began as."""
    # Written before that was on record: all of its bars count as trained on.
    return int(trained.weights.get("trained_until_ns", trained.weights["data_cutoff_ns"]))


def champion_beside(trained: TrainedPolicy, start_ns: int) -> tuple[TrainedPolicy | None, list[str]]:
    """Read the champion of the checkpoint's folder, where it can be compared; else say why not."""
    path = trained.path.parent / checkpoint.BEST
    if not path.exists():
        return None, [f"There is no champion beside it: {checkpoint.BEST} does not exist."]
    if path.samefile(trained.path):
        return None, ["This checkpoint is the champion itself."]
    try:
        best = TrainedPolicy.read(path, type(trained.settings), trained.device)
    except (checkpoint.CheckpointError, ValueError) as error:
        return None, [f"The champion is left out: {error}."]
    name = checkpoint.name_of(best.weights["run"], best.weights["epoch"])
    if all(best.weights[key] == trained.weights[key] for key in ("run", "epoch", "transitions")):
        return None, ["This checkpoint is the champion itself."]
    same = best.weights["config"]["positions"] == trained.weights["config"]["positions"]
    same &= all(
        best.weights["config"][key] == trained.weights["config"][key] for key in ("context_bars", "horizon")
    )
    features = (best.statistics.state_dict(), trained.statistics.state_dict())
    same &= all(torch.equal(features[0][key], features[1][key]) for key in ("mean", "std"))
    if not same:
        return None, [f"The champion, {name}, is left out: it is of another training."]
    if trained_until(best) > start_ns:
        return None, [f"The champion, {name}, is left out: it was trained on some of these days."]
    return best, [f"The champion is {name}."]


def num_trials(trained: TrainedPolicy, fingerprint: str) -> int:
    """Count the exams on record beside the checkpoint, this one included."""
    this = {"run": trained.weights["run"], "epoch": trained.weights["epoch"], "data": fingerprint}
    lines = [*ledger.read(trained.path.parent / ledger.NAME), this]
    return len(set(map(ledger.key_of, lines)))


def training_rows(trained: TrainedPolicy) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the epochs up to the checkpoint from metrics.jsonl; where it cannot be, say why."""
    path = Path(trained.settings.log_dir) / "metrics.jsonl"
    weights = trained.weights
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [], [f"No training curves: {path} cannot be read; --log-dir says where it is."]
    for line in lines:
        try:
            row = json.loads(line)
            # An epoch that was played again counts as it was the last time.
            rows[(row["run"], row["epoch"])] = row
        except (ValueError, TypeError, KeyError):
            continue  # a line that a kill tore
    here = (weights["run"], weights["epoch"])
    if rows.get(here, {}).get("transitions") != weights["transitions"]:
        return [], [f"No training curves: {path} is not of the training that wrote this checkpoint."]
    return [rows[place] for place in sorted(rows) if place <= here], []


def how_it_was_made(
    trained: TrainedPolicy, data: LoadedData, num_symbols: int, device: torch.device
) -> dict[str, str]:
    """Say what a report should be repeated with."""
    weights, settings = trained.weights, trained.settings
    slippage = f"{settings.slippage_bps:g} bps"
    if settings.range_slippage or settings.volume_slippage:
        slippage += f", {settings.range_slippage:g} of the range, {settings.volume_slippage:g} of the volume"
    return {
        "checkpoint": trained.path.name,
        "training": f"run {weights['run']}, epoch {weights['epoch']}, {weights['transitions']:,} transitions",
        "trained on bars up to": f"{minute_of(trained_until(trained))} UTC",
        "policy": f"{trained.policy.num_parameters():,} parameters: {settings.d_model} wide, "
        f"{settings.num_layers} layers, {settings.num_heads} heads; the most likely position, never a drawn one",
        "positions": ", ".join(f"{position:g}" for position in settings.positions),
        "bars": f"{num_symbols} symbols from {', '.join(settings.sources)}; data {data.fingerprint}",
        "data of the training": str(weights["data_fingerprint"]),
        "fees": f"stocks {settings.stock_fee_bps:g} bps, crypto {settings.crypto_fee_bps:g} bps of traded value",
        "slippage": slippage,
        "borrowing": f"{settings.borrow_rate:.3g} a year",
        "context and horizon": f"{settings.context_bars} and {settings.horizon} bars",
        "learning": f"{settings.advantages} advantages, learning rate {settings.learning_rate:g}, gamma "
        f"{settings.gamma:g}, seed {settings.seed}",
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, torch "
        f"{torch.__version__}, on {device.type}",
    }


def day_of(time_ns: int) -> str:
    """Return the UTC day of a time."""
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d}"


def minute_of(time_ns: int) -> str:
    """Return the UTC day and minute of a time."""
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d %H:%M}"
