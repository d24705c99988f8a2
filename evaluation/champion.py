"""The champion: ``checkpoints/best.pt``, which changes only when the exam's line in the ledger says so.

A checkpoint carries its own exam with the decision in it. Only when the checkpoint is on disk is the decision
carried out, and only then is its line appended; a start that follows a kill in between does it again, from the
newest checkpoint, with the same outcome.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation import ledger
from models.policy import Policy
from models.transformer import TransformerConfig
from runtime.files import TEMPORARY_SUFFIX, sync_folder, write_atomically
from training import checkpoint
from training.trainer import Trainer

log = logging.getLogger("continuous_training")

PROMOTED, REFUSED = "promoted", "refused"


@dataclass(frozen=True)
class Champion:
    """The weights of ``best.pt``, ready to play the exam."""

    name: str  # of the checkpoint that it is
    trained_until_ns: int
    policy: Policy


def settle(folder: Path, exam: Mapping[str, Any], owed: list[dict[str, Any]] | None = None) -> None:
    """Carry out what a checkpoint's exam decided, once: replace ``best.pt`` or leave it, and put it on record.

    Whatever the disk refuses is a warning.

    Args:
        folder: the checkpoint folder; holds the checkpoint.
        exam: what its "exam" says; nothing to do when empty, or when it is on record.
        owed: lines that the disk refused before, which go first; those that it refuses now stay in it.
    """
    owed, path = [] if owed is None else owed, folder / ledger.NAME
    try:
        if exam and ledger.key_of(exam["line"]) not in map(ledger.key_of, [*owed, *ledger.read(path)]):
            owed.append(_carried_out(folder, exam["line"]))
    except OSError as error:
        log.warning(f"{path} cannot be read: {error.strerror}; nothing is promoted without it")
        return
    try:
        while owed:
            ledger.append(path, owed[0])
            del owed[0]
    except OSError as error:
        log.warning(f"{path} was not written: {error.strerror}; it is tried again with the next checkpoint")


def _carried_out(folder: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    # Returns the line as it is to be put on record.
    line = dict(line)
    if line["decision"] == PROMOTED:
        try:
            _put_in_place(folder / line["checkpoint"], folder / checkpoint.BEST)
        except OSError as error:
            line |= {"decision": REFUSED, "reason": f"{checkpoint.BEST} was not written: {error.strerror}"}
            log.warning(f"{line['checkpoint']} was to become the champion, but {line['reason']}")
    return line


def read(path: Path, trainer: Trainer) -> Champion:
    """Read ``best.pt`` for an exam on the trainer's market.

    Raises:
        CheckpointError: it is damaged, or of another model or feature scale than the trainer's.
    """
    weights = checkpoint.load(path)
    checkpoint.require_format(path, weights)
    env, market = trainer.env.config, trainer.env.market
    theirs, ours = weights["features"], market.statistics.state_dict()
    same_features = list(theirs["names"]) == ours["names"] and all(
        torch.equal(theirs[name], ours[name]) for name in ("mean", "std")
    )
    trunk = TransformerConfig(**weights["model_config"]["trunk"])
    other = [
        name
        for name, same in (
            ("features", same_features),
            ("positions", tuple(weights["config"]["positions"]) == env.positions),
            ("context_bars", weights["config"]["context_bars"] == env.context_bars),
            ("horizon", trunk.max_length > env.context_bars + env.horizon),
        )
        if not same
    ]
    if other:
        raise checkpoint.CheckpointError(f"{path} was trained with other {', '.join(other)}")
    sizes = weights["model_config"]
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are not kept
        policy = Policy(trunk, sizes["num_account_features"], sizes["num_positions"], trainer.policy.bf16)
    policy.load_state_dict(weights["model"])
    name = checkpoint.name_of(weights["run"], weights["epoch"])
    trained_until_ns = weights.get("trained_until_ns", weights["data_cutoff_ns"])
    return Champion(name, trained_until_ns, policy.to(market.device).eval())


def _put_in_place(path: Path, best: Path) -> None:
    # A second name for the same file takes no room, and outlives the first one.
    temporary = best.with_name(f".{best.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        os.link(path, temporary)
    except OSError:  # this file system has one name per file
        with path.open("rb") as source:
            write_atomically(best, lambda file: shutil.copyfileobj(source, file))
        return
    temporary.replace(best)
    sync_folder(best.parent)
