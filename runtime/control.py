"""The folder through which the supervisor and its workers talk: five small files, no sockets, no signals.

* ``stop``: one byte, supervisor to workers: 0 run, 1 stop at the end of the epoch, 2 at the next safe point
* ``heartbeat``: its time of change says that the workers live (LOCAL_RANK 0 of each machine, once a second)
* ``progress``: its time of change says that an epoch is finished (LOCAL_RANK 0)
* ``screen``: one byte, 1 while a worker's dashboard has the terminal; the supervisor gives back what the dead left
* ``exit_code``: what the workers mean to end with, as text; torchrun does not pass it on reliably

All exist, with content, before a worker starts, and are written over in place: that works on a full disk,
where a new file would not. The environment variable CONTROL_DIR names the folder. Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from types import FrameType

from runtime.processes import die_with_parent, hold_folder

CONTROL_DIR = "CONTROL_DIR"

# The terminal's alternate screen, which a dashboard takes and its supervisor gives back when a rank died.
ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
LEAVE = "\x1b[?25h\x1b[?1049l"

RUN = 0
STOP_AT_EPOCH_END = 1
STOP_NOW = 2  # at the next safe point

EXIT_OK = 0
EXIT_CRASH = 1  # the supervisor starts the training again
EXIT_SETTING = 2
EXIT_NO_DATA = 3
EXIT_DOES_NOT_FIT = 4
EXIT_LOCKED = 75
EXIT_ABORTED = 130
FINAL_CODES = frozenset(
    {EXIT_OK, EXIT_SETTING, EXIT_NO_DATA, EXIT_DOES_NOT_FIT, EXIT_LOCKED}
)  # no use retrying

LAUNCHER_SECONDS = 1.0  # the supervisor needs a tenth of it to pass a SIGTERM on
KEY_BOUNCE_SECONDS = (
    1.0  # a second Ctrl+C within it is the same one: a bouncing key, or a launcher that repeats it
)

_STOP, _HEARTBEAT, _PROGRESS, _SCREEN = "stop", "heartbeat", "progress", "screen"
_EXIT_CODE = "exit_code"
_NO_CODE = b"none"


def _overwrite(path: Path, content: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(content)


class SupervisorControl:
    """The supervisor's side. A context manager: makes the folder, holds it, and removes it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="continuous_training_"))
        self._held = hold_folder(self.folder)
        for name in (_STOP, _HEARTBEAT, _PROGRESS, _SCREEN):
            (self.folder / name).write_bytes(b"0")
        (self.folder / _EXIT_CODE).write_bytes(_NO_CODE)

    def __enter__(self) -> SupervisorControl:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)

    def command(self, level: int) -> None:
        """Tell the workers to stop: STOP_AT_EPOCH_END or STOP_NOW."""
        _overwrite(self.folder / _STOP, b"%d" % level)

    def forget_exit_code(self) -> None:
        """Before a new group starts: what the last one meant to end with does not count for it."""
        _overwrite(self.folder / _EXIT_CODE, _NO_CODE)

    def exit_code(self) -> int | None:
        """Read the code that the workers mean to end with; None when they have not said."""
        text = (self.folder / _EXIT_CODE).read_bytes().strip()
        return int(text) if text.isdigit() else None

    def screen_is_taken(self) -> bool:
        """Tell whether a worker's dashboard has the terminal."""
        return (self.folder / _SCREEN).read_bytes() == b"1"

    def screen_is_left(self) -> bool:
        """Tell, once, whether a worker that is dead now had the terminal."""
        taken = self.screen_is_taken()
        _overwrite(self.folder / _SCREEN, b"0")
        return taken

    def heartbeat(self) -> int:
        """Return a number that changes with every sign of life. No time of day: clocks may jump."""
        return (self.folder / _HEARTBEAT).stat().st_mtime_ns

    def progress(self) -> int:
        """Return a number that changes with every finished epoch."""
        return (self.folder / _PROGRESS).stat().st_mtime_ns


class _Heartbeat:
    """The heartbeat of this process. The Control made last owns it; without a supervisor there is none."""

    def __init__(self) -> None:
        self.start(None)

    def start(self, file: Path | None) -> None:
        self._file = file
        self._last = -math.inf

    def record(self) -> None:
        now = time.monotonic()
        if self._file is not None and now - self._last >= 1.0:
            os.utime(self._file)
            self._last = now


_heartbeat = _Heartbeat()


def heartbeat() -> None:
    """Record a heartbeat, at most once a second.

    Does nothing in a process that made no Control, such as one that refreshes bars in the background, or that
    has no supervisor.
    """
    _heartbeat.record()


@contextlib.contextmanager
def heartbeat_thread(max_seconds: float) -> Iterator[None]:
    """Record heartbeats from a thread during one long call, such as a compiler's.

    They end after ``max_seconds``, so that a longer call counts as a hang in the end.
    """
    done = Event()

    def keep_beating() -> None:
        end = time.monotonic() + max_seconds
        while time.monotonic() < end and not done.wait(1.0):
            heartbeat()

    thread = Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def heartbeat_while_waiting() -> contextlib.AbstractContextManager[None]:
    """Record heartbeats while this machine waits for rank 0's, which downloads or runs an exam.

    Not on rank 0's own machine: there, silence means that rank 0 hangs.
    """
    is_elsewhere = os.environ.get("LOCAL_RANK") == "0" and os.environ.get("RANK", "0") != "0"
    return heartbeat_thread(math.inf) if is_elsewhere else contextlib.nullcontext()


class Control:
    """A worker's side; works without a supervisor too (``python continuous_training.py``, bare torchrun).

    Make it first of all, before torch is imported: from then on the worker dies with its launcher, and at
    once when told to end while it still starts. ``listen`` follows when the process group stands.
    """

    def __init__(self) -> None:
        name = os.environ.get(CONTROL_DIR)
        self.folder: Path | None = Path(name) if name else None
        _heartbeat.start(self.folder / _HEARTBEAT if self.folder else None)
        self._signalled = RUN
        self._first_signal = 0.0
        self.has_progressed = False  # an epoch was finished since the start
        self._screen_taken = False
        if self.folder is not None:
            die_with_parent(self.folder)
            # It came ignored from the supervisor. torchrun ends the other ranks of a broken group with
            # SIGTERM; one that ignores it while it waits for its peers holds up the restart for 30 s.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def listen(self) -> None:
        """Take signals as wishes to stop, where no supervisor does. Call after init_process_group."""
        if self.folder is None:
            signal.signal(signal.SIGINT, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)
            return
        if sys.platform == "win32":
            return
        # A SIGTERM that reaches a worker is either for the whole service (systemd), and then the supervisor
        # has it too and sets the stop byte, or it is torchrun's, which ends the ranks whose peer died. A
        # thread tells them apart: the main thread may be stuck in a collective, and torchrun would wait 30 s.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._leave_when_told_by_launcher, args=(reader,), daemon=True).start()

    @property
    def stop_level(self) -> int:
        """What this rank is asked for now: RUN, STOP_AT_EPOCH_END or STOP_NOW. Act on the ranks' maximum."""
        commanded = RUN
        if self.folder is not None:
            commanded = int((self.folder / _STOP).read_bytes() or b"0")
        return max(self._signalled, commanded)

    def progressed(self) -> None:
        """Tell that an epoch is finished; a crash afterwards counts as the first one again."""
        self.has_progressed = True
        if self.folder is not None:
            os.utime(self.folder / _PROGRESS)

    def screen(self, taken: bool) -> None:
        """Tell that the dashboard takes the terminal, or has given it back."""
        self._screen_taken = taken
        if self.folder is not None:
            _overwrite(self.folder / _SCREEN, b"1" if taken else b"0")

    def report_exit_code(self, code: int) -> None:
        """Report the exit code to the supervisor, just before exiting with it."""
        if self.folder is not None:
            _overwrite(self.folder / _EXIT_CODE, f"{code:<4}".encode())

    def _leave_when_told_by_launcher(self, signals: int) -> None:
        while True:
            if os.read(signals, 1)[0] == signal.SIGTERM:
                time.sleep(LAUNCHER_SECONDS)
                if self.stop_level == RUN:
                    os._exit(128 + signal.SIGTERM)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Only a flag: no I/O and no collective belongs into a handler.
        now = time.monotonic()
        if number == signal.SIGINT and self._signalled and now - self._first_signal > KEY_BOUNCE_SECONDS:
            if self._screen_taken:
                os.write(1, LEAVE.encode())
            os._exit(EXIT_ABORTED)
        self._first_signal = self._first_signal or now
        self._signalled = max(self._signalled, STOP_AT_EPOCH_END if number == signal.SIGINT else STOP_NOW)


class ExitProgram(Exception):
    """End the program with an exit code and a one-line message that says what to do."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
