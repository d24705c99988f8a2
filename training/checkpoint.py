"""Checkpoints: written whole or not at all, checked when read, and never loaded as code.

``checkpoints/run1_epoch25.pt`` is for people: weights, configuration, symbols, run and epoch.
``checkpoints/resume/run1_epoch25.pt`` is for the next start: optimizer, random streams, accounts. It is
written first, so weights in place mean that both files are complete.

Both are torch's zip files, whose entries carry a CRC32. ``torch.load`` does not check it, so every file is
checked before it is trusted: that found 60 of 60 random bit flips, torch.load none (docs/LOG.md).
Files hold plain types and tensors only and are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from envs.config import FIRST_FEATURES, GroupConfig
from envs.features import FeatureStatistics, chosen_features
from models.embedding import FIRST_ENCODING
from models.policy import Policy
from runtime.files import TEMPORARY_SUFFIX, free_bytes, make_folder, write_atomically
from runtime.locking import FolderHeld, FolderLock, FolderLockError
from training.checkpoint_names import BEST, NAME, NUM_RESUME_STATES, RESUME
from training.distributed import Ranks
from training.model_checks import warn_if_changed, why_not_trained_here
from training.retention import thin_out
from training.torch_files import DISK_IS_FULL, CheckpointError, load_file, root_cause

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

FORMAT = 1
WEIGHTS_DEPEND_ON = ("d_model", "num_layers", "num_heads", "feature_encoding", "positions", "context_bars")
SPARE_BYTES = 1 << 20  # what a file takes beside its tensors


class FolderInUse(Exception):
    """Another daemon trains in this folder; the text names it."""


@dataclass(frozen=True)
class ResumeState:
    """What the next start needs beside the weights: one attribute per key of the file."""

    clock: dict[str, Any]  # counters
    learner: dict[str, Any]  # optimizer moments and step count
    ranks: list[dict[str, Any]]  # per rank: accounts, random streams, an interrupted update

    @staticmethod
    def read(path: Path) -> ResumeState:
        """Read a file of the folder ``resume``.

        Raises:
            CheckpointError: it is missing, damaged, or of another version.
        """
        contents = load_file(path, "cpu")
        with same_version(path):
            return ResumeState(**{key: contents[key] for key in _keys(ResumeState)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A training between two optimizer steps: one attribute per key of the file (docs/checkpoints.md).

    ``resume`` is None where only the weights are read, or left.
    """

    path: Path
    run: int
    epoch: int  # finished epochs of the run
    step: int = 0  # optimizer steps of the next epoch, if its update was interrupted
    transitions: int
    model: dict[str, Tensor] = field(repr=False)
    model_config: dict[str, Any]  # Policy.sizes
    symbols: list[str]
    features: dict[str, Any]  # see statistics
    config: dict[str, Any]  # the settings
    data_fingerprint: str
    data_cutoff_ns: int
    trained_until_ns: int  # no bar that opens at or after it was ever trained on
    metrics: dict[str, Any]
    exam: dict[str, Any] = field(default_factory=dict)
    resume: ResumeState | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The file name in the series, also of a champion."""
        return name_of(self.run, self.epoch, self.step)

    @staticmethod
    def read(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
        """Read a checkpoint without its resume state.

        Raises:
            CheckpointError: it is missing or damaged, or of another format or version.
        """
        contents = load_file(path, device)
        if contents.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {contents.get('format')}, this program reads {FORMAT}")
        # Files written before exams existed: all of their bars count as trained on.
        contents = {"step": 0, "exam": {}, "trained_until_ns": contents.get("data_cutoff_ns")} | contents
        with same_version(path):
            contents["config"] = {"feature_encoding": FIRST_ENCODING} | contents["config"]
            return Checkpoint(path=path, **{key: contents[key] for key in _WEIGHTS_KEYS})

    def with_resume(self) -> Checkpoint:
        """Read the resume state, too.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return replace(self, resume=ResumeState.read(self._resume_path))

    def save(self, keep: int, keep_runs: int | None = None) -> None:
        """Write both files, make their folder where missing, and prune old checkpoints (rank 0 only).

        If the disk has no room, files that pruning would remove sooner or later go first.

        Args:
            keep: how many checkpoints stay, of any run.
            keep_runs: of how many runs the last one stays (see retention); None: of all.

        Raises:
            CheckpointError: the disk is full or refuses, or a weight is not finite; nothing torn is left, and
                everything that a restart needs is untouched.
        """
        path = self.path
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(self.model)):
            raise CheckpointError(f"{path} was not saved: its weights are not finite")
        assert self.resume is not None
        weights = {"format": FORMAT} | {key: getattr(self, key) for key in _WEIGHTS_KEYS}
        resume = {key: getattr(self.resume, key) for key in _keys(ResumeState)}
        # Where exams end the run early, the next one begins with this.
        best = str(self.resume.clock.get("best_exam", ""))
        try:
            make_folder(self._resume_path.parent)
            _make_room(path.parent, sum(map(_num_bytes, (weights, resume))) + SPARE_BYTES, keep_runs, best)
            write_atomically(self._resume_path, lambda file: torch.save(resume, file))
            write_atomically(path, lambda file: torch.save(weights, file))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} was not saved: {root_cause(error)}") from error
        try:
            prune(path.parent, keep, keep_runs, best)
        except OSError as error:
            log.warning(f"old checkpoints were not removed: {root_cause(error)}")

    def policy(self, device: torch.device, precision: str) -> Policy:
        """Build the policy with these weights, in evaluation mode; random streams are left as they are.

        Raises:
            CheckpointError: the weights are of another version's network.
        """
        # The fresh weights drawn here are replaced at once.
        with same_version(self.path), torch.random.fork_rng(devices=[]):
            if reason := "own_model" in self.model_config and why_not_trained_here(
                self.model_config, self.model
            ):
                raise CheckpointError(f"{self.path} cannot be used: {reason}; put that model back")
            warn_if_changed(self.model_config, self.path)
            policy = Policy.from_sizes(self.model_config, precision)
            policy.load_state_dict(self.model)
        return policy.to(device).eval()

    @property
    def feature_groups(self) -> tuple[str, ...]:
        """The setting ``features`` of its training."""
        return tuple(self.config.get("features", FIRST_FEATURES))

    @property
    def statistics(self) -> FeatureStatistics:
        """The scale of the features."""
        with same_version(self.path):
            return FeatureStatistics.from_state_dict(self.features)

    def mismatch(self, settings: Settings) -> str:
        """Return why training cannot resume from it with these settings and features, "" if it can."""
        with same_version(self.path):
            return self._mismatch(settings)

    def _mismatch(self, settings: Settings) -> str:
        for name in (*WEIGHTS_DEPEND_ON, "horizon"):
            if self.config[name] != getattr(settings, name):
                return (
                    f"{name}={getattr(settings, name)}, but {self.path} was trained with "
                    f"{name}={self.config[name]}: set it back, or start a new training with another "
                    "--checkpoint-dir"
                )
        account, theirs = GroupConfig.from_settings(settings), GroupConfig.of_record(self.config)
        if account != theirs:
            return (
                f"account: {GroupConfig.describe(account)}, but {self.path} was trained with "
                f"{GroupConfig.describe(theirs)}: set it back, or start a new training with another "
                "--checkpoint-dir"
            )
        if set(self.feature_groups) != set(settings.features):
            return (
                f"features={','.join(settings.features)}, but {self.path} was trained with "
                f"features={','.join(self.feature_groups)}: set it back, or start a new training with another "
                "--checkpoint-dir"
            )
        if reason := why_not_trained_here(self.model_config, self.model):
            return (
                f"{self.path}: {reason}; put that back, or start a new training with another --checkpoint-dir"
            )
        names = self.statistics.names
        if names != tuple(chosen_features(settings.features)):
            return (
                f"{self.path} was trained with other features: {', '.join(names)}; use those, or start a new "
                "training with another --checkpoint-dir"
            )
        return ""

    @property
    def max_length(self) -> int:
        """The longest segment that the network takes, in bars."""
        with same_version(self.path):
            return int(self.model_config["trunk"]["max_length"])

    @property
    def _resume_path(self) -> Path:
        return self.path.parent / RESUME / self.path.name


def _keys(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record))


_WEIGHTS_KEYS = tuple(key for key in _keys(Checkpoint) if key not in ("path", "resume"))


@contextmanager
def same_version(path: Path) -> Iterator[None]:
    """Turn the errors of contents that do not fit this program into a CheckpointError."""
    try:
        yield
        return
    except KeyError as error:
        reason = f"it has no {error.args[0]}"
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
    raise CheckpointError(f"{path} is of another version of this program: {reason}")


def name_of(run: int, epoch: int, step: int = 0) -> str:
    """Return the file name of a checkpoint; one between two epochs never replaces another."""
    return f"run{run}_epoch{epoch}_step{step}.pt" if step else f"run{run}_epoch{epoch}.pt"


def existing(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    return [folder / name for name in newest_first(path.name for path in _series(folder))]


def newest_first(names: Iterable[str]) -> list[str]:
    """Return those of the names that are checkpoints of the series, newest first."""
    return sorted((name for name in names if NAME.fullmatch(name)), key=_numbers, reverse=True)


def _series(folder: Path) -> list[Path]:
    # Not glob, which takes a folder that cannot be read for an empty one: nothing would count as kept.
    try:
        with os.scandir(folder) as entries:
            return [Path(entry) for entry in entries if NAME.fullmatch(entry.name) and entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def prune(folder: Path, keep: int, keep_runs: int | None = None, best: str = "") -> None:
    """Delete old checkpoints, except the newest ``keep``, the last of ``keep_runs`` runs, and the one named."""
    for path in _surplus(folder, keep, keep_runs, NUM_RESUME_STATES, best):
        path.unlink(missing_ok=True)


def sweep_unfinished(folder: Path) -> None:
    """Delete the temporary files of writers that were killed; call it while no process writes into the folder.

    Raises:
        OSError: a file cannot be removed.
    """
    for place in (folder, folder / RESUME):
        for name in ("run", BEST):
            for leftover in place.glob(f".{name}*{TEMPORARY_SUFFIX}"):
                leftover.unlink()


def _surplus(folder: Path, keep: int, keep_runs: int | None, num_resume_states: int, best: str) -> list[Path]:
    """List the files beyond what is kept, in order of removal: resume states first, then oldest first."""
    paths = existing(folder)
    last_of_run = {_numbers(path.name)[0]: path for path in reversed(paths)}  # runs from the oldest
    lasts = list(reversed(last_of_run.values()))
    stay = {folder / best, *paths[:keep], *(lasts if keep_runs is None else thin_out(lasts, keep_runs))}
    kept = {path.name for path in paths[:num_resume_states]}
    states = sorted(path for path in _series(folder / RESUME) if path.name not in kept)
    return states + [path for path in reversed(paths) if path not in stay]


def _make_room(folder: Path, num_bytes: int, keep_runs: int | None, best: str = "") -> None:
    """Make sure that the disk has ``num_bytes`` free, at the cost of files that no restart needs.

    Raises:
        OSError: that would not free enough (ENOSPC); nothing was deleted.
    """
    free = free_bytes(folder)
    if free is None or (missing := num_bytes - free) <= 0:
        return
    # The champion is a second name of a checkpoint: removing the first one would free nothing.
    surplus = [path for path in _surplus(folder, 1, keep_runs, 1, best) if path.stat().st_nlink == 1]
    if sum(path.stat().st_size for path in surplus) < missing:
        raise OSError(errno.ENOSPC, DISK_IS_FULL)
    for path in surplus:
        if (free_bytes(folder) or 0) >= num_bytes:
            return
        path.unlink(missing_ok=True)
        log.warning(f"the disk is full: {path} was removed to make room for a newer checkpoint")


def read_complete(folder: Path, name: str) -> Checkpoint | None:
    """Read one checkpoint with its resume state; None if either is missing or damaged."""
    try:
        return Checkpoint.read(folder / name).with_resume()
    except (CheckpointError, OSError):
        return None


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that can be trusted; return it, and warnings about newer ones.

    One with its resume state is preferred to a newer one without: an exact continuation beats a few epochs.

    Raises:
        CheckpointError: the folder exists and cannot be read; or none in it can, as the disk refuses: training
            would begin afresh.
    """
    warnings: list[str] = []
    refused: CheckpointError | None = None  # by the disk; what is damaged stays so
    weights_only: Checkpoint | None = None
    try:
        paths = existing(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {root_cause(error)}") from error
    for path in paths:
        try:
            checkpoint = Checkpoint.read(path)
        except CheckpointError as error:
            warnings.append(f"{error}; the one before it is used")
            refused = refused or (error if isinstance(error.__cause__, OSError) else None)
            continue
        try:
            if checkpoint._resume_path.exists():
                return checkpoint.with_resume(), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; the one before it is used")
        weights_only = weights_only or checkpoint
    if weights_only:
        warnings.append(
            f"{weights_only.path} has no resume state left: its weights are used, "
            "optimizer and accounts start afresh"
        )
    elif refused:
        raise CheckpointError(
            f"{refused}, and no other in {folder} is whole: check the disk and the rights, or start a new "
            "training with another --checkpoint-dir"
        ) from refused
    return weights_only, warnings


def newest_for_all(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """Find the newest checkpoint; rank 0 chooses, since ranks could see different files (all ranks take part).

    Every rank reads it from the disk; where one cannot, the folder is not shared, and rank 0 sends its own.
    """
    saved = None
    if ranks.is_first:
        saved, warnings = newest(folder)
        for warning in warnings:
            log.warning(warning)
    name = ranks.broadcast(saved.path.name if saved else "")
    if not name:
        return None
    if not ranks.is_first:
        saved = read_complete(folder, name)
    if len(set(ranks.gather((saved.transitions, saved.resume is None) if saved else None))) > 1:
        saved = ranks.broadcast(saved)
    return saved


def tensors_of(nest: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, dict | list | tuple):
        for part in nest.values() if isinstance(nest, dict) else nest:
            yield from tensors_of(part)


def _num_bytes(nest: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(nest))


def _numbers(name: str) -> tuple[int, int, int]:
    """Return run, epoch, and step of a name that fits NAME."""
    found = NAME.fullmatch(name)
    assert found is not None
    return int(found[1]), int(found[2]), int(found[3] or 0)


@contextmanager
def exclusive(folder: Path, wanted: bool = True, is_trial: bool = False) -> Iterator[None]:
    """Lock the folder for one daemon; the operating system releases the lock however the process ends.

    Args:
        folder: the checkpoint folder; made where missing.
        wanted: False on ranks that do not write.
        is_trial: leave nothing behind.

    Raises:
        FolderInUse: another daemon holds it (named).
        CheckpointError: it cannot be written.
    """
    with ExitStack() as lock:
        try:
            if wanted:
                lock.enter_context(FolderLock(folder).hold(is_trial=is_trial))
        except FolderHeld as error:
            raise FolderInUse(str(error)) from error
        except FolderLockError as error:
            raise CheckpointError(f"checkpoint_dir: {error}") from error
        yield
