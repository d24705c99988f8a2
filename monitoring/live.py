"""A dashboard that goes on: frames from wherever a training's state is read, be it another process's."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from functools import cached_property
from typing import TextIO

from monitoring.dashboard import Painter
from monitoring.machine import Gauges
from monitoring.screen import FRAME_SECONDS, Screen
from monitoring.state import DashboardState


class Frame:
    """Draws one frame of the dashboard; called by the screen's thread only."""

    def __init__(self, read: Callable[[], DashboardState], painter: Painter) -> None:
        self._read, self._painter = read, painter

    @cached_property
    def _gauges(self) -> Gauges:
        return Gauges()

    def __call__(self, width: int, height: int) -> list[str]:
        """Return at most ``height`` lines of at most ``width`` columns."""
        state = self._read()
        if state.host == socket.gethostname():
            state.machine = self._gauges.read()
        return self._painter(state, width, height)


def watch(read: Callable[[], DashboardState], stream: TextIO) -> bool:
    """Show the dashboard of another process's training until Ctrl+C.

    Args:
        read: returns the training's state.
        stream: standard output.

    Returns:
        False if that is no terminal that can be drawn on.
    """
    painter = Painter.of(stream)
    if painter is None:
        return False
    screen = Screen(stream, Frame(read, painter), lambda is_taken: None)
    with contextlib.suppress(KeyboardInterrupt):  # perhaps before the first frame is whole
        screen.open()
        while screen.is_on:
            time.sleep(FRAME_SECONDS)
    with contextlib.suppress(OSError):  # the terminal is gone, as the user knows
        screen.close()
    return True
