"""Checkpoints: written whole or not at all, found again, and never loaded as code.

``checkpoints/run1_epoch25.pt`` is for people: weights, configuration, symbols, run and epoch.
``checkpoints/resume/run1_epoch25.pt`` is for the next start: optimizer, random streams, accounts. It is
written first; the weights beside it are the sign that both are there.

Both are torch's zip files, whose entries carry a CRC32. ``torch.load`` does not check it, so every file is
checked before it is trusted: 60 of 60 random bit flips were found by it and none by torch.load
(docs/LOG.md). Files hold plain types and tensors only and are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.files import TEMPORARY_SUFFIX, write_atomically
from runtime.locking import FolderHeld, FolderLock, FolderLockError

log = logging.getLogger("continuous_training")

FORMAT = 1
NAME = re.compile(r"run(\d+)_epoch(\d+)(?:_step(\d+))?\.pt")
RESUME = "resume"
BEST = "best.pt"  # the champion; no part of the series, so that it is neither pruned nor gone on from
# The newest two: should the newest file turn out damaged, the one before still goes on exactly.
NUM_RESUME_STATES = 2
SPARE_BYTES = 1 << 20  # what a file takes beside its tensors


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the text says which file, why, and what happens next."""


class FolderInUse(Exception):
    """Another daemon trains in this folder; the text says which."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back. ``resume`` is None where only the weights are left."""

    path: Path
    weights: dict[str, Any]
    resume: dict[str, Any] | None


def name_of(run: int, epoch: int, step: int = 0) -> str:
    """Return the file name of a checkpoint after so many epochs, and optimizer steps of one more."""
    return f"run{run}_epoch{epoch}_step{step}.pt" if step else f"run{run}_epoch{epoch}.pt"


def existing(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first."""
    files = [path for path in folder.glob("*.pt") if path.is_file()]
    return sorted((path for path in files if NAME.fullmatch(path.name)), key=_numbers, reverse=True)


def save(folder: Path, weights: dict[str, Any], resume: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and prune old ones (rank 0 only).

    Where the disk has no room for it, files that the policy would drop sooner or later go first, each told.

    Args:
        folder: the checkpoint folder; made where missing.
        weights: what people use; must hold "run", "epoch" and "model". A "step" above 0 says that the save
            came before the end of an epoch; it gets a name of its own, so that it never replaces another.
        resume: what the next start needs beside the weights.
        keep: how many checkpoints stay; the last one of every older run stays besides.

    Raises:
        CheckpointError: the disk is full or refuses, or a weight is not finite; nothing torn is left, and
            whatever a restart needs is untouched.
    """
    name = name_of(weights["run"], weights["epoch"], weights.get("step", 0))
    path = folder / name
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(weights["model"])):
        raise CheckpointError(f"{path} was not saved: its weights are not finite. Training goes on.")
    try:
        (folder / RESUME).mkdir(parents=True, exist_ok=True)
        _make_room(folder, sum(map(_num_bytes, (weights, resume))) + SPARE_BYTES)
        write_atomically(folder / RESUME / name, lambda file: torch.save(resume, file))
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **weights}, file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} was not saved: {_reason(error)}. Training goes on.") from error
    try:
        prune(folder, keep)
    except OSError as error:
        log.warning(f"old checkpoints stay: {_reason(error)}")
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete old checkpoints: the newest ``keep`` stay, and the last of every run before them."""
    for path in _surplus(folder, keep, NUM_RESUME_STATES):
        path.unlink(missing_ok=True)


def sweep_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left behind; call it while nobody writes into the folder.

    Raises:
        OSError: a file cannot be removed.
    """
    for place in (folder, folder / RESUME):
        for name in ("run", BEST):
            for leftover in place.glob(f".{name}*{TEMPORARY_SUFFIX}"):
                leftover.unlink()


def _surplus(folder: Path, keep: int, num_resume_states: int) -> list[Path]:
    """List what exceeds a policy, in the order in which it should go: resume states first, then oldest first."""
    paths = existing(folder)
    last_of_run = {_numbers(path)[0]: path for path in reversed(paths)}
    wanted = {path.name for path in paths[:num_resume_states]}
    states = sorted(
        path for path in (folder / RESUME).glob("*.pt") if path.name not in wanted and path.is_file()
    )
    return states + [path for path in reversed(paths[keep:]) if last_of_run[_numbers(path)[0]] != path]


def _make_room(folder: Path, num_bytes: int) -> None:
    """See to it that the disk has ``num_bytes`` free, at the cost of files that no restart needs.

    Raises:
        OSError: even then there is too little room (ENOSPC); nothing was deleted.
    """
    missing = num_bytes - shutil.disk_usage(folder).free
    if missing <= 0:
        return
    # The champion is a second name of a checkpoint: to remove the first one would free nothing.
    surplus = [path for path in _surplus(folder, 1, 1) if path.stat().st_nlink == 1]
    if sum(path.stat().st_size for path in surplus) < missing:
        raise OSError(errno.ENOSPC, "the disk is full")
    for path in surplus:
        if shutil.disk_usage(folder).free >= num_bytes:
            return
        path.unlink(missing_ok=True)
        log.warning(f"the disk is full: {path} was removed to make room for a newer checkpoint")


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read one file that ``save`` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or not one of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
        loaded: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    except (pickle.UnpicklingError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {_reason(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a checkpoint of this program: holds a {type(loaded).__name__}")
    return loaded


def require_format(path: Path, weights: dict[str, Any]) -> None:
    """Refuse what ``load`` has read from ``path`` unless this program wrote it, in the format of today.

    Raises:
        CheckpointError: it is of another format, or no checkpoint's weights at all.
    """
    if weights.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {weights.get('format')}, this program reads {FORMAT}")


def named(folder: Path, name: str) -> Restored | None:
    """Read one checkpoint with its resume state; None where either is missing or damaged."""
    try:
        return Restored(folder / name, load(folder / name), load(folder / RESUME / name))
    except (CheckpointError, OSError):
        return None


def newest(folder: Path) -> tuple[Restored | None, list[str]]:
    """Find the newest checkpoint that can be trusted, and say what was wrong with newer ones.

    One with its resume state is preferred to a newer one without: going on exactly beats a few epochs.
    """
    warnings: list[str] = []
    weights_only: Restored | None = None
    for path in existing(folder):
        try:
            weights = load(path)
            require_format(path, weights)
        except CheckpointError as error:
            warnings.append(f"{error}; the one before it is used")
            continue
        resume_path = folder / RESUME / path.name
        if not resume_path.exists():
            weights_only = weights_only or Restored(path, weights, None)
            continue
        try:
            return Restored(path, weights, load(resume_path)), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; the one before it is used")
            weights_only = weights_only or Restored(path, weights, None)
    if weights_only:
        warnings.append(
            f"{weights_only.path} has no resume state left: its weights are used, "
            "optimizer and accounts start anew"
        )
    return weights_only, warnings


def tensors_of(nest: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, dict | list | tuple):
        for part in nest.values() if isinstance(nest, dict) else nest:
            yield from tensors_of(part)


def _num_bytes(nest: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(nest))


def _numbers(path: Path) -> tuple[int, int, int]:
    """Return run, epoch, and step of a name that fits NAME."""
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2]), int(found[3] or 0)


def _reason(error: BaseException) -> str:
    """Say what lies beneath: torch.save hides a full disk in a RuntimeError's context."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            return "the disk is full"
        cause = cause.__cause__ or cause.__context__
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


@contextmanager
def exclusive(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold the folder for one daemon; the operating system's lock ends with the process, however that ends.

    Args:
        folder: the checkpoint folder; made where missing.
        wanted: False on ranks that do not write.

    Raises:
        FolderInUse: another daemon holds it (named).
        CheckpointError: it cannot be written.
    """
    with ExitStack() as lock:
        try:
            if wanted:
                lock.enter_context(FolderLock(folder).held())
        except FolderHeld as error:
            raise FolderInUse(str(error)) from error
        except FolderLockError as error:
            raise CheckpointError(f"checkpoint_dir: {error}") from error
        yield
