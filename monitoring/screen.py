"""The terminal while the dashboard is on it: an alternate screen, drawn by a thread that nobody waits for.

Knows neither what is drawn nor by which library. A terminal that is gone ends the drawing and nothing else.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from runtime.control import ENTER, LEAVE

FRAME_SECONDS = 0.25  # at least, between two frames
IDLE_SECONDS = 1.0  # at most: clocks go on
REPAINT_SECONDS = 2.0  # what others wrote on the screen goes away
CLOSE_SECONDS = 2.0  # a terminal that was stopped with Ctrl+S takes nothing

Draw = Callable[[int, int], Sequence[str]]


class Screen:
    """Shows what ``draw`` returns, from a thread of its own.

    Args:
        stream: a terminal.
        draw: (width, height) -> at most so many lines, each no wider, colours included.
        changed: set by others when there is something new to see.
        on_taken: told whether the alternate screen is on, before it is and after it was.
    """

    def __init__(
        self,
        stream: TextIO,
        draw: Draw,
        changed: threading.Event,
        on_taken: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._stream = stream
        self._draw = draw
        self._changed = changed
        self._on_taken = on_taken
        self._shown: list[str] = []
        self._shown_size = (0, 0)
        self._painted = 0.0
        self.opened = math.inf  # when, by time.monotonic
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    @property
    def is_on(self) -> bool:
        """Whether it is being drawn; False once the terminal is gone."""
        return self._thread.is_alive()

    def open(self) -> None:
        """Take the terminal.

        Raises:
            OSError: it is gone.
        """
        self._on_taken(True)
        self._write(ENTER)
        self.opened = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Give the terminal back as it was.

        Raises:
            OSError: it is gone.
        """
        self._over.set()
        self._changed.set()
        self._thread.join(CLOSE_SECONDS)
        self._write(LEAVE)
        self._on_taken(False)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._changed.clear()
                self._frame()
                self._over.wait(FRAME_SECONDS)
                self._changed.wait(IDLE_SECONDS - FRAME_SECONDS)
        except OSError:
            return  # the terminal is gone; whoever prints next finds out, too

    def _frame(self) -> None:
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
        self._stream.write(text)
        self._stream.flush()


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Return columns and lines as the terminal tells them now; where it does not, COLUMNS and LINES, or 80 x 24.

    Raises:
        OSError: the terminal is gone.
    """
    size = os.get_terminal_size(stream.fileno())
    told = shutil.get_terminal_size((80, 24))
    return size.columns or told.columns, size.lines or told.lines
