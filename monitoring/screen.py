"""The alternate screen of the terminal, drawn by its own thread: a stopped terminal blocks nothing else."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from runtime.control import ENTER, LEAVE

FRAME_SECONDS = 0.5
REPAINT_SECONDS = 2.0  # then what other programs wrote on the screen is gone
CLOSE_SECONDS = 2.0


class Screen:
    """Draws lines on a terminal until it is closed. A terminal that is gone ends the drawing and nothing else.

    Args:
        stream: a terminal.
        draw: (width, height) -> at most ``height`` lines, each at most ``width`` columns, colours included.
        on_taken: called with True before the alternate screen is on, with False when it is off again.
    """

    def __init__(
        self, stream: TextIO, draw: Callable[[int, int], Sequence[str]], on_taken: Callable[[bool], None]
    ) -> None:
        self._stream = stream
        # Without Python's buffer: a thread stuck in a write holds its lock, and the interpreter aborts at exit.
        self._raw = getattr(stream.buffer, "raw", stream.buffer)
        self._draw = draw
        self._on_taken = on_taken
        self._shown: list[str] = []
        self._shown_size = (0, 0)
        self._painted = 0.0
        self.opened = math.inf  # by time.monotonic
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    @property
    def is_on(self) -> bool:
        """Whether it is being drawn; False once the terminal is gone."""
        return self._thread.is_alive()

    def open(self) -> None:
        """Take the terminal."""
        self._on_taken(True)
        self.opened = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Restore the terminal.

        Raises:
            OSError: it takes no output, having been stopped with Ctrl+S.
        """
        self._over.set()
        if self._thread.ident is not None:  # else Ctrl+C came before it was started
            self._thread.join(CLOSE_SECONDS)
        if self.is_on:
            raise OSError("the terminal takes no output")
        self._on_taken(False)

    def _run(self) -> None:
        try:
            self._write(ENTER)
            while not self._over.is_set():
                self._draw_frame()
                self._over.wait(FRAME_SECONDS)
        except OSError:
            return  # the terminal is gone, as the next print will notice, too
        finally:
            with contextlib.suppress(OSError):
                self._write(LEAVE)

    def _draw_frame(self) -> None:
        width, height = size = terminal_size(self._stream)
        lines = list(self._draw(width, height))
        lines += [""] * (height - len(lines))
        now = time.monotonic()
        if size != self._shown_size or now - self._painted >= REPAINT_SECONDS:
            self._shown, self._painted = [], now
        parts = [
            f"\x1b[{number + 1};1H{line}\x1b[0m\x1b[K"
            for number, line in enumerate(lines)
            if number >= len(self._shown) or self._shown[number] != line
        ]
        if parts:
            # Synchronised output: terminals that know it show the frame at once, others ignore the marks.
            self._write("\x1b[?2026h" + "".join(parts) + "\x1b[?2026l")
        self._shown, self._shown_size = lines, size

    def _write(self, text: str) -> None:
        rest = text.encode(self._stream.encoding, "replace")
        while rest:
            count = self._raw.write(rest)
            if count is None:
                raise BlockingIOError("the terminal does not block")
            rest = rest[count:]


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Return the terminal's columns and lines; where it reports none, COLUMNS and LINES, or 80 x 24.

    Raises:
        OSError: the terminal is gone.
    """
    size = os.get_terminal_size(stream.fileno())
    fallback = shutil.get_terminal_size((80, 24))
    return size.columns or fallback.columns, size.lines or fallback.lines
