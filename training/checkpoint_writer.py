"""Checkpoints in the background: training waits for a copy in host memory, a thread does the rest.

The copy is what a checkpoint holds at that moment, so the numbers of a resumed training do not depend on how
long the disk takes. One checkpoint is written at a time, and the last one is on disk before the program ends.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import champion
from training import checkpoint

log = logging.getLogger("continuous_training")


class Snapshot:
    """Copies nests of tensors to host memory that is kept for the next time: pinned, where a GPU is read."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, nest: Any) -> Any:
        """Return the nest with every tensor copied; valid until the next call."""
        copied = self._copied(nest, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copied(self, nest: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(nest, dict):
            return {key: self._copied(part, (*place, key)) for key, part in nest.items()}
        if isinstance(nest, list | tuple):
            return type(nest)(self._copied(part, (*place, number)) for number, part in enumerate(nest))
        if not isinstance(nest, Tensor):
            return nest
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (nest.shape, nest.dtype):
            buffer = torch.empty(nest.shape, dtype=nest.dtype, pin_memory=nest.is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(nest, non_blocking=True)


class BackgroundWriter:
    """Writes checkpoints one after the other (rank 0; on others it does nothing). A context manager.

    A checkpoint that cannot be written is a warning, and ``owes`` one until the next is written.
    """

    def __init__(self, folder: Path, keep: int, wanted: bool) -> None:
        """``wanted`` is False on ranks that do not write. The folder is held by this process."""
        self._folder = folder
        self._keep = keep
        self._wanted = wanted
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.newest = "none"
        self.owes = False
        self._owed_lines: list[dict[str, Any]] = []
        if wanted:
            try:
                checkpoint.sweep_unfinished(folder)
            except OSError as error:
                log.warning(f"leftovers of a killed start stay in {folder}: {error.strerror}")

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def save(self, weights: dict[str, Any], resume: dict[str, Any]) -> None:
        """Copy the state, and write it while training goes on; waits for the one before it."""
        if not self._wanted:
            return
        self.finish()
        self._writing = self._thread.submit(self._write, *self._snapshot.take((weights, resume)))

    def finish(self) -> str:
        """Wait until all is on disk; return where the newest checkpoint is, or why there is none."""
        if self._writing:
            self._writing.result()
            self._writing = None
        return self.newest

    def _write(self, weights: dict[str, Any], resume: dict[str, Any]) -> None:
        try:
            path = checkpoint.save(self._folder, weights, resume, self._keep)
        except checkpoint.CheckpointError as error:
            log.warning(str(error))
            self.newest, self.owes = f"not saved: {error}", True
            return
        log.info(f"Saved {path}")
        champion.settle(self._folder, weights.get("exam", {}), self._owed_lines)
        self.newest, self.owes = str(path), False
