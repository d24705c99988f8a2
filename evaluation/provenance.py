"""Where a checkpoint comes from: its data, its training curves, and the champion in its folder."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_sources.load import LoadedData
from evaluation import champion, ledger
from evaluation.revision import Revision
from evaluation.trained_policy import TrainedPolicy
from training.checkpoint import BEST, Checkpoint, CheckpointError

if TYPE_CHECKING:
    from continuous_training import Settings


def champion_beside(trained: TrainedPolicy, start_ns: int) -> tuple[Checkpoint | None, list[str]]:
    """Read the champion in the checkpoint's folder; return it, or None if it cannot be compared, and a note."""
    path, this = trained.checkpoint.path.parent / BEST, trained.checkpoint
    if not path.exists():
        return None, [f"There is no champion beside it: {BEST} does not exist."]
    if path.samefile(this.path):
        return None, ["This checkpoint is the champion itself."]
    try:
        best = champion.read(path, trained.statistics, trained.env_config(1))
    except CheckpointError as error:
        return None, [f"The champion is left out: {error}."]
    if (best.run, best.epoch, best.transitions) == (this.run, this.epoch, this.transitions):
        return None, ["This checkpoint is the champion itself."]
    if best.trained_until_ns > start_ns:
        return None, [f"The champion, {best.name}, is left out: it was trained on some of these days."]
    return best, [f"The champion is {best.name}."]


def num_trials(checkpoint: Checkpoint, fingerprint: str) -> int:
    """Count the exams in the ledger beside the checkpoint, this one included."""
    this = {"run": checkpoint.run, "epoch": checkpoint.epoch, "data": fingerprint}
    lines = [*ledger.read(checkpoint.path.parent / ledger.NAME), this]
    return len(set(map(ledger.key_of, lines)))


def changed_days(checkpoint: Checkpoint, revision: Revision) -> list[str]:
    """Return a note on the days that an exam in the ledger beside the checkpoint scored on other bars."""
    days = revision.days_changed_since(ledger.read(checkpoint.path.parent / ledger.NAME))
    if not days:
        return []
    return [f"An exam of the training scored {', '.join(days)} on other bars than there are of it now."]


def training_rows(trained: TrainedPolicy) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the epochs up to the checkpoint from metrics.jsonl; return them, and notes if that is impossible."""
    path = Path(trained.settings.log_dir) / "metrics.jsonl"
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [], [f"No training curves: {path} cannot be read; give its folder with --log-dir."]
    for line in lines:
        try:
            row = json.loads(line)
            # The last record of an epoch counts, should it have been repeated.
            rows[(row["run"], row["epoch"])] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # torn by a kill
    here = (trained.checkpoint.run, trained.checkpoint.epoch)
    if rows.get(here, {}).get("transitions") != trained.checkpoint.transitions:
        return [], [f"No training curves: {path} belongs to another training than this checkpoint."]
    return [rows[place] for place in sorted(rows) if place <= here], []


def how_it_was_made(
    trained: TrainedPolicy, data: LoadedData, revision: Revision, num_symbols: int, device: torch.device
) -> dict[str, str]:
    """Return what is needed to reproduce a report."""
    checkpoint, settings = trained.checkpoint, trained.settings
    slippage = f"{settings.slippage_bps:g} bps"
    if settings.range_slippage or settings.volume_slippage:
        slippage += f", {settings.range_slippage:g} of the range, {settings.volume_slippage:g} of the volume"
    return {
        "checkpoint": checkpoint.path.name,
        "training": f"run {checkpoint.run}, epoch {checkpoint.epoch}, {checkpoint.transitions:,} transitions",
        "trained on bars up to": f"{minute_of(checkpoint.trained_until_ns)} UTC",
        "policy": f"{trained.policy.num_parameters():,} parameters: {settings.d_model} wide, "
        f"{settings.num_layers} layers, {settings.num_heads} heads; the most likely position, never a drawn one",
        "positions": ", ".join(f"{position:g}" for position in settings.positions),
        "bars": f"{num_symbols} symbols from {', '.join(settings.sources)}; data {data.fingerprint}",
        "revision of the evaluated bars": revision.digest,
        "data of the training": checkpoint.data_fingerprint,
        "fees": f"stocks {settings.stock_fee_bps:g} bps, crypto {settings.crypto_fee_bps:g} bps of traded value",
        **_of_perpetuals(settings, data),
        "slippage": slippage,
        "borrowing": f"{settings.borrow_rate:.3g} a year",
        "context and horizon": f"{settings.context_bars} and {settings.horizon} bars",
        "learning": f"{settings.advantages} advantages, learning rate {settings.learning_rate:g}, gamma "
        f"{settings.gamma:g}, seed {settings.seed}",
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, torch "
        f"{torch.__version__}, on {device.type}",
    }


def _of_perpetuals(settings: Settings, data: LoadedData) -> dict[str, str]:
    if all(series.asset_class != "perpetual" for series in data.bars):
        return {}
    fee, margin = settings.perpetual_fee_bps, settings.maintenance_margin
    terms = (
        f"fee {fee:g} bps of traded value; liquidated at equity below {margin:.3g} of the position's value"
    )
    return {"perpetual futures": f"{terms}; funding at its times, at the open of that minute"}


def day_of(time_ns: int) -> str:
    """Return the UTC day of a time."""
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d}"


def minute_of(time_ns: int) -> str:
    """Return the UTC day and minute of a time."""
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d %H:%M}"
