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
from runtime.files import identity_of, sha256_of
from training.checkpoint import BEST, Checkpoint, CheckpointError

if TYPE_CHECKING:
    from continuous_training import Settings


def champion_beside(trained: TrainedPolicy, start_ns: int) -> tuple[Checkpoint | None, list[str]]:
    """Read the champion in the checkpoints' folder; return it, or None if it cannot be compared, and a note."""
    folders, first = folders_of(trained), trained.parts[0]
    if len(folders) > 1:
        return None, ["No champion is compared, as the members are of several folders."]
    path = folders[0] / BEST
    if not path.exists():
        return None, [f"There is no champion beside it: {BEST} does not exist."]
    if not trained.members and path.samefile(trained.checkpoint.path):
        return None, ["This checkpoint is the champion itself."]
    try:
        best = champion.read(path, first.statistics, first.env_config(1))
    except CheckpointError as error:
        return None, [f"The champion is left out: {error}."]
    if not trained.members and _place(best) == _place(trained.checkpoint):
        return None, ["This checkpoint is the champion itself."]
    if best.trained_until_ns > start_ns:
        return None, [f"The champion, {best.name}, is left out: it was trained on some of these days."]
    return best, [f"The champion is {best.name}."]


def _place(checkpoint: Checkpoint) -> tuple[int, int, int]:
    return checkpoint.run, checkpoint.epoch, checkpoint.transitions


def folders_of(trained: TrainedPolicy) -> list[Path]:
    """Return the folders of the checkpoints, each once."""
    folders = {checkpoint.path.parent.resolve(): checkpoint.path.parent for checkpoint in trained.checkpoints}
    return list(folders.values())


def num_trials(trained: TrainedPolicy, fingerprint: str) -> int:
    """Count the exams in the ledgers beside the checkpoints, this one included."""
    numbers = []
    for folder in folders_of(trained):
        keys = set(map(ledger.key_of, ledger.read(folder / ledger.NAME)))
        if not trained.members:
            keys.add(
                ledger.key_of(
                    {"run": trained.checkpoint.run, "epoch": trained.checkpoint.epoch, "data": fingerprint}
                )
            )
        numbers.append(len(keys))
    return sum(numbers) + bool(trained.members)  # of an ensemble no ledger has a line


def members_of(trained: TrainedPolicy) -> list[dict[str, Any]]:
    """Return what tells each checkpoint from others, with the hash of its file."""
    return [
        {
            "checkpoint": name,
            "run": part.checkpoint.run,
            "epoch": part.checkpoint.epoch,
            "transitions": part.checkpoint.transitions,
            "trained_until": minute_of(part.checkpoint.trained_until_ns),
            "sha256": _sha256_of(part),
        }
        for name, part in zip(trained.names, trained.parts, strict=True)
    ]


def _sha256_of(trained: TrainedPolicy) -> str | None:
    """Return the hash of the file; None where it is another by now, as a champion's may be."""
    path = trained.checkpoint.path
    try:
        digest = sha256_of(path)
        return digest if identity_of(path) == trained.file else None
    except OSError:
        return None


def changed_days(trained: TrainedPolicy, revision: Revision) -> list[str]:
    """Return a note on the days that an exam in a ledger beside the checkpoints scored on other bars."""
    lines = [line for folder in folders_of(trained) for line in ledger.read(folder / ledger.NAME)]
    days = revision.days_changed_since(lines)
    if not days:
        return []
    return [f"An exam of the training scored {', '.join(days)} on other bars than there are of it now."]


def training_rows(trained: TrainedPolicy) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the epochs up to the checkpoint from metrics.jsonl; return them, and notes if that is impossible."""
    if trained.members:
        return [], ["No training curves: each member of an ensemble has its own."]
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
    settings = trained.settings
    slippage = f"{settings.slippage_bps:g} bps"
    if settings.range_slippage or settings.volume_slippage:
        slippage += f", {settings.range_slippage:g} of the range, {settings.volume_slippage:g} of the volume"
    return {
        **_of_checkpoints(trained),
        "trained on bars up to": f"{minute_of(trained.newest.trained_until_ns)} UTC",
        "positions": ", ".join(f"{position:g}" for position in settings.positions),
        "bars": f"{num_symbols} symbols from {', '.join(settings.sources)}; data {data.fingerprint}",
        "revision of the evaluated bars": revision.digest,
        "fees": f"stocks {settings.stock_fee_bps:g} bps, crypto {settings.crypto_fee_bps:g} bps of traded value",
        **_of_perpetuals(settings, data),
        "slippage": slippage,
        "borrowing": f"{settings.borrow_rate:.3g} a year",
        "context and horizon": f"{settings.context_bars} and {settings.horizon} bars",
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, torch "
        f"{torch.__version__}, on {device.type}",
    }


def _of_checkpoints(trained: TrainedPolicy) -> dict[str, str]:
    """Return name and value of all that each checkpoint has of its own; those of members carry their names."""
    rows = {}
    if trained.members:
        total = f"{trained.policy.num_parameters():,} parameters"
        rows["ensemble"] = f"{len(trained.members)} members, whose probabilities are averaged; {total}"
    for number, (member, part) in enumerate(zip(members_of(trained), trained.parts, strict=True), 1):
        checkpoint, settings = part.checkpoint, part.settings
        digest, network = member["sha256"], part.policy.sizes.get("own_model")
        model = f"{network['name']} of models/own_model.py, " if network else ""
        own = {
            "checkpoint": f"{member['checkpoint']}, "
            + (f"SHA-256 {digest[:16]}" if digest else "whose file was replaced since"),
            "training": f"run {checkpoint.run}, epoch {checkpoint.epoch}, {checkpoint.transitions:,} transitions, "
            f"on bars up to {minute_of(checkpoint.trained_until_ns)} UTC",
            "data of the training": checkpoint.data_fingerprint,
            "policy": f"{part.policy.num_parameters():,} parameters: {model}{settings.d_model} wide, "
            f"{settings.num_layers} layers, {settings.num_heads} heads, context {settings.context_bars} bars; "
            "the most likely position, never a drawn one",
            "learning": f"{settings.advantages} advantages, {settings.optimizer}, learning rate "
            f"{settings.learning_rate:g}, gamma {settings.gamma:g}, seed {settings.seed}",
        }
        rows |= {
            f"{name} of member {number}" if trained.members else name: text for name, text in own.items()
        }
    return rows


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
