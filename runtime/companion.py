"""The process beside a training that serves its page and sends its messages: it starts, gets events, and ends.

The supervisor owns it, so that it outlives crashes of the training; without one, the training does. It hears
through its standard input, a JSON object per line; when that ends without a farewell, its owner was killed. It
never delays its owner: what the pipe does not take at once is dropped. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

FAREWELL = "end"
RESTART_SECONDS = 60.0  # before one that died is started again
CLOSE_SECONDS = 20.0  # for messages under way


class Companion:
    """A companion process. A context manager: it ends with the block.

    Args:
        command: what to run.
        environment: of the process.
        errors: takes its standard error; None for that of this process.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], errors: BinaryIO | None = None
    ) -> None:
        self._command = command
        self._environment = dict(environment)
        self._errors = errors
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it; where the system cannot, training goes on without."""
        self._started = time.monotonic()
        options: dict[str, Any] = {"start_new_session": True}  # a terminal's Ctrl+C does not reach it
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                **options,
            )
            assert self._process.stdin is not None
            if sys.platform != "win32":
                os.set_blocking(self._process.stdin.fileno(), False)

    def keep_alive(self) -> None:
        """Start it again, if it has died for a while."""
        if self._process is None or self._process.poll() is None:
            return
        if time.monotonic() - self._started > RESTART_SECONDS:
            self._release()
            self.start()

    def send(self, event: str, text: str = "", count: int = 1) -> None:
        """Let it send a message."""
        if self._process is None or self._process.stdin is None:
            return
        line = json.dumps({"event": event, "text": text, "count": count}).encode() + b"\n"
        with contextlib.suppress(OSError, ValueError):  # it has died, or is stuck
            os.write(self._process.stdin.fileno(), line)

    def close(self) -> None:
        """Let it send what it has, and end."""
        self.send(FAREWELL)
        self._release(CLOSE_SECONDS)

    def _release(self, seconds: float = 0.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin:
                process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
