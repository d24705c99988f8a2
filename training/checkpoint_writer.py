"""Checkpoints in the background: training waits only for a copy in host memory, a thread writes it.

The copy is the state at that moment, so the numbers of a resumed training do not depend on the speed of the
disk. One checkpoint is written at a time, and the last one is on disk before the program ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.checkpoint import Checkpoint, CheckpointError, existing, sweep_unfinished
from training.torch_files import DISK_IS_FULL

log = logging.getLogger("continuous_training")

Nest = TypeVar("Nest")


class Snapshot:
    """Copies nests of tensors to host memory that is kept for the next copy: pinned, if a GPU is read."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, nest: Nest) -> Nest:
        """Return the nest of dicts, lists, tuples and dataclasses with every tensor copied.

        It is valid until the next call.
        """
        copied: Nest = self._copy(nest, ())
        if torch.cuda.is_initialized():  # else the copies were made by the CPU
            torch.cuda.synchronize()
        return copied

    def _copy(self, nest: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(nest, dict):
            return {key: self._copy(part, (*place, key)) for key, part in nest.items()}
        if isinstance(nest, list | tuple):
            return type(nest)(self._copy(part, (*place, number)) for number, part in enumerate(nest))
        if is_dataclass(nest) and not isinstance(nest, type):
            names = [field.name for field in fields(nest)]
            return replace(nest, **{name: self._copy(getattr(nest, name), (*place, name)) for name in names})
        if not isinstance(nest, Tensor):
            return nest
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (nest.shape, nest.dtype):
            buffer = torch.empty(nest.shape, dtype=nest.dtype, pin_memory=nest.is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(nest, non_blocking=True)


class CheckpointWriter:
    """Writes checkpoints one after the other (rank 0; does nothing on others). A context manager.

    A checkpoint that cannot be written is a warning; ``last_save_failed`` then asks for another one soon.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        wanted: bool,
        on_saved: Callable[[Checkpoint], None] = lambda _: None,
        keep_runs: int | None = None,
    ) -> None:
        """Remove what a killed writer left in the folder, which this process has locked.

        Args:
            folder: the checkpoint folder.
            keep: see Checkpoint.save.
            wanted: False on ranks that do not write.
            on_saved: called in the writing thread with every checkpoint that is on disk.
            keep_runs: see Checkpoint.save.
        """
        self._keep = (keep,) if keep_runs is None else (keep, keep_runs)
        self._folder = folder
        self._wanted = wanted
        self._on_saved = on_saved
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.newest = str(next(iter(existing(folder)), "none"))
        self.last_save_failed = False
        if wanted:
            try:
                sweep_unfinished(folder)
            except OSError as error:
                log.warning(f"temporary files of a killed start stay in {folder}: {error.strerror}")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the state and write it while training continues; waits for the save before it."""
        if not self._wanted:
            return
        self.finish()
        self.last_save_failed = False
        self._writing = self._thread.submit(self._write, self._snapshot.take(checkpoint))

    def finish(self) -> str:
        """Wait until all is on disk; return the path of the newest checkpoint, or why there is none."""
        if self._writing:
            self._writing.result()
            self._writing = None
        return self.newest

    def describe_failure(self) -> str:
        """Return a sentence on a last save that failed, for the end of a training."""
        # The line above it has the reason.
        fix = (
            "free disk space in" if self.newest.endswith(DISK_IS_FULL) else "check the disk and the rights of"
        )
        return (
            f"The final checkpoint was not saved: {fix} {self._folder}. "
            "The next start resumes from the previous checkpoint."
        )

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            checkpoint.save(*self._keep)
        except CheckpointError as error:
            log.warning(f"{error}. Training continues.")
            self.newest, self.last_save_failed = str(error), True
            return
        log.info(f"Saved {checkpoint.path}")
        self._on_saved(checkpoint)
        self.newest = str(checkpoint.path)
