"""The champion: ``checkpoints/best.pt``, which changes, or loses its title, only by the decision of an exam.

A checkpoint carries its own exam, and with it the decision. Only once the checkpoint is on disk is the decision
applied and its line appended to the ledger; after a kill in between, the next start does both from the newest
checkpoint, with the same outcome.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from envs.config import EnvConfig, GroupConfig
from envs.features import FeatureStatistics
from evaluation import ledger
from runtime.files import TEMPORARY_SUFFIX, move_over, sha256_of, sync_folder, write_atomically
from training.checkpoint import BEST, Checkpoint, CheckpointError, existing, same_version

log = logging.getLogger("continuous_training")

PROMOTED, REFUSED = "promoted", "refused"
DETHRONED = "dethroned.pt"  # the newest champion that lost its title


def apply_decision(checkpoint: Checkpoint, pending: list[dict[str, Any]] | None = None) -> None:
    """Apply the decision of a checkpoint's exam, once: replace ``best.pt`` or not, and record it in the ledger.

    Disk errors are warnings.

    Args:
        checkpoint: on disk; nothing happens if it has no exam, or if its exam is in the ledger.
        pending: ledger lines that could not be written before. They go first; those that fail again stay in it.
    """
    folder = checkpoint.path.parent
    pending, path = [] if pending is None else pending, folder / ledger.NAME
    try:
        if checkpoint.exam:
            line = checkpoint.exam["line"]
            if ledger.key_of(line) not in map(ledger.key_of, [*pending, *ledger.read(path)]):
                pending.append(_replace_best(folder, line))
    except OSError as error:
        log.warning(f"{path} cannot be read: {error.strerror}; nothing is promoted without it")
        return
    try:
        while pending:
            ledger.append(path, pending[0])
            del pending[0]
    except OSError as error:
        log.warning(f"{path} was not written: {error.strerror}; the next checkpoint tries again")


def _replace_best(folder: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``best.pt`` or take it away if that was decided; return the line for the ledger."""
    line = dict(line)
    if line["decision"] != PROMOTED and line.get("dethroned"):
        _dethrone(folder / BEST)
    if line["decision"] == PROMOTED:
        path, best = folder / line["checkpoint"], folder / BEST
        try:
            _put_in_place(path, best)
        except OSError as error:
            if _is_in_place(path, best):
                log.warning(f"{best} was written, but a power cut may undo that: {error.strerror}")
                return line
            line |= {"decision": REFUSED, "reason": f"{BEST} was not written: {error.strerror}"}
            log.warning(f"{line['checkpoint']} should have become the champion, but {line['reason']}")
    return line


def _dethrone(best: Path) -> None:
    """Take the title away; the file is kept, under another name. Killed before the ledger, it is gone already."""
    try:
        if best.exists():
            move_over(best, best.with_name(DETHRONED))
            sync_folder(best.parent)
    except OSError as error:
        log.warning(f"{best} has lost the title, and cannot be moved to {DETHRONED}: {error.strerror}")


def find_champion(folder: Path) -> Path:
    """Return the champion's file.

    Raises:
        CheckpointError: there is none; names the newest checkpoint.
    """
    best = folder / BEST
    try:
        if best.exists():
            return best
        newest = next(iter(existing(folder)), None)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    why = f"{best} lost its title, and there is no champion" if (folder / DETHRONED).exists() else ""
    why = why or f"there is no champion in {folder} yet: an exam has to prove one better than cash"
    raise CheckpointError(f"{why}; name a checkpoint" + (f", such as {newest}" if newest else ""))


def read(path: Path, statistics: FeatureStatistics, env: EnvConfig) -> Checkpoint:
    """Read ``best.pt`` to compare it with a policy that has these feature statistics and accounts.

    Raises:
        CheckpointError: it is damaged, or cannot be compared.
    """
    best = Checkpoint.read(path)
    theirs = best.statistics
    with same_version(path):
        same = {
            "features": theirs.names == statistics.names
            and torch.equal(theirs.mean, statistics.mean.cpu())
            and torch.equal(theirs.std, statistics.std.cpu()),
            "positions": tuple(best.config["positions"]) == env.positions,
            "account": GroupConfig.of_record(best.config) == env.group,
            "context_bars": best.config["context_bars"] == env.context_bars,
            "horizon": best.max_length > env.context_bars + env.horizon,
        }
    if not all(same.values()):
        other = ", ".join(name for name, is_same in same.items() if not is_same)
        raise CheckpointError(f"{path} was trained with other {other}")
    return best


def _put_in_place(path: Path, best: Path) -> None:
    # A second name for the same file takes no room and outlives the first one.
    # Put there by a start that was killed before the ledger; rename does nothing then.
    if best.exists() and best.samefile(path):
        sync_folder(best.parent)
        return
    temporary = best.with_name(f".{best.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        with path.open("rb") as source:
            write_atomically(best, lambda file: shutil.copyfileobj(source, file))
        return
    try:
        move_over(temporary, best)
    except OSError:
        with contextlib.suppress(OSError):  # the first error matters
            temporary.unlink()
        raise
    sync_folder(best.parent)


def _is_in_place(path: Path, best: Path) -> bool:
    return best.exists() and (best.samefile(path) or sha256_of(best) == sha256_of(path))
