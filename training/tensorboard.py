"""TensorBoard's event files: each epoch's figures as scalars, at step = transitions.

One record per epoch, written at once by whoever calls: the tensorboard package's own writer would do it in a
thread, where a full disk ends in a traceback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_numbers = count()  # files of one process in one second


class EventFile:
    """Scalars in a folder that TensorBoard reads. A file begins with the first figures.

    A start that goes on from a checkpoint, and a return to one, take back what was written of later steps:
    TensorBoard forgets every scalar from the new file's first step on, so that curves never run twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._last_step = -1

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one epoch's figures; they are in the file when this returns.

        Raises:
            OSError: the folder cannot be written; the next call begins a new file, for this one may be torn.
        """
        try:
            if self._file is None or step <= self._last_step:
                self.close()
                self._open(step)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._append(Event(step=step, summary=Summary(value=values)))
        except OSError:
            self.close()
            raise
        self._last_step = step

    def close(self) -> None:
        """Close the file, if one is open."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of what could not be written before, which was told
                file.close()

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (self._folder / name).open("xb")
        self._append(Event(step=step, file_version="brain.Event:2"))
        self._append(Event(step=step, session_log=SessionLog(status=SessionLog.START)))  # forgets later steps

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        assert self._file is not None
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()
