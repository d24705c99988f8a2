"""How the supervisor and its workers communicate: ten small files in one folder, no sockets, no signals.

* ``stop``: one byte, supervisor to workers: 0 run, 1 stop at the end of the epoch, 2 at the next safe point
* ``heartbeat``: touched by workers while they make progress, by each at most once a second
* ``progress``: touched when an epoch is finished
* ``screen``: one byte, 1 while a worker's dashboard has the terminal; if it dies, the supervisor restores that
* ``exit_code``: the workers' exit code as text; torchrun does not pass it on reliably
* ``ranks``: how many of them this machine gets, as text, from the preflight, which asks torch for the GPUs
* ``log_dir``: where train.log is, as text, from the preflight
* ``companion``: one byte, 1 where the preflight asks for a companion (companion.py)
* ``goes_on``: one byte, 1 where the preflight has passed and its process trains, as the only one
* ``restarts``: how many there were, and when the supervisor began, in seconds of the system's clock

All exist, with content, before a worker starts, and are overwritten in place: that works on a full disk, where
a new file would not. The environment variable CONTROL_DIR names the folder. Standard library only.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from types import FrameType

from runtime.processes import die_with_parent, hold_folder

CONTROL_DIR = "CONTROL_DIR"
FOLDER_PREFIX = "continuous_training_"

# The terminal's alternate screen: a dashboard enters it, and the supervisor leaves it when a rank died there.
ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
LEAVE = "\x1b[?25h\x1b[?1049l"

# Stop levels, in order of urgency.
RUN = 0
STOP_AT_EPOCH_END = 1
STOP_NOW = 2  # at the next safe point
ABORT = 3  # without saving; never sent to workers

EXIT_OK = 0
EXIT_CRASH = 1  # the supervisor restarts the training
EXIT_SETTING = 2
EXIT_NO_DATA = 3
EXIT_DOES_NOT_FIT = 4
EXIT_LOCKED = 75
EXIT_ABORTED = 130
# A restart would not help.
FINAL_CODES = frozenset({EXIT_OK, EXIT_SETTING, EXIT_NO_DATA, EXIT_DOES_NOT_FIT, EXIT_LOCKED})

# The supervisor needs a tenth of it to forward a SIGTERM.
LAUNCHER_SECONDS = 1.0
# A second Ctrl+C within it counts as the first: a bouncing key, or a launcher that repeats it.
KEY_BOUNCE_SECONDS = 1.0

_STOP, _HEARTBEAT, _PROGRESS, _SCREEN = "stop", "heartbeat", "progress", "screen"
_EXIT_CODE = "exit_code"
_NO_CODE = b"none"
_RANKS = "ranks"
_LOG_DIR, _LONGEST_PATH = "log_dir", 4096
_RESTARTS = "restarts"
_COMPANION = "companion"
_GOES_ON = "goes_on"
ERRORS = "errors"  # the workers' standard error, where the supervisor holds it for a dashboard
CHECK_FIRST = "CHECK_FIRST"  # in the environment of the process that is to run the preflight before it trains


class ExitProgram(Exception):
    """End the program with an exit code and a one-line message that says what to do."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """The stop that signals request: set by their handler, polled by the program.

    The first Ctrl+C requests STOP_AT_EPOCH_END, another one ABORT; every other signal STOP_NOW.

    Args:
        on_abort: called from the handler, for a program that may be too busy to poll.
    """

    def __init__(self, on_abort: Callable[[], None] = lambda: None) -> None:
        self.level = RUN
        self.signal_name = ""  # of the signal that raised the level
        self._first = 0.0
        self._on_abort = on_abort

    def listen(self, *signals: str) -> None:
        """Handle these signals, except those that this platform lacks, and SIGHUP under nohup."""
        for name in signals:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # No I/O and no collective: they do not belong in a handler.
        now = time.monotonic()
        level = STOP_AT_EPOCH_END if number == signal.SIGINT else STOP_NOW
        if number == signal.SIGINT and self.level and now - self._first > KEY_BOUNCE_SECONDS:
            level = ABORT
        self._first = self._first or now
        if level > self.level:
            self.level = level
            self.signal_name = signal.Signals(number).name
        if level == ABORT:
            self._on_abort()


class SupervisorControl:
    """The supervisor's side. A context manager: creates the folder, holds it, and removes it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._held = hold_folder(self.folder)
        for name in (_STOP, _HEARTBEAT, _PROGRESS, _SCREEN, _COMPANION, _GOES_ON):
            (self.folder / name).write_bytes(b"0")
        (self.folder / _EXIT_CODE).write_bytes(_NO_CODE)
        (self.folder / _RANKS).write_bytes(b"1")
        (self.folder / _LOG_DIR).write_bytes(b" " * _LONGEST_PATH)
        self._began = int(time.time())
        (self.folder / _RESTARTS).write_bytes(self._restarts(0))

    def __enter__(self) -> SupervisorControl:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)

    def request_stop(self, level: int) -> None:
        """Ask the workers to stop: STOP_AT_EPOCH_END or STOP_NOW."""
        _overwrite(self.folder / _STOP, b"%d" % level)

    def clear_exit_code(self) -> None:
        """Forget the exit code of the last group before a new one starts."""
        _overwrite(self.folder / _EXIT_CODE, _NO_CODE)

    def exit_code(self) -> int | None:
        """Return the exit code that the workers reported, if any."""
        text = (self.folder / _EXIT_CODE).read_bytes().strip()
        return int(text) if text.isdigit() else None

    def num_ranks(self) -> int:
        """Return the number of ranks on this machine that the preflight has planned."""
        return int((self.folder / _RANKS).read_bytes())

    def log_dir(self) -> Path | None:
        """Return where train.log is, once the preflight has read the settings."""
        return log_dir_of(self.folder)

    def wants_companion(self) -> bool:
        """Return whether the preflight asks for a companion."""
        return (self.folder / _COMPANION).read_bytes() == b"1"

    def preflight_goes_on(self) -> bool:
        """Return whether the preflight has passed, and its process trains now."""
        return (self.folder / _GOES_ON).read_bytes() == b"1"

    def report_restarts(self, number: int) -> None:
        """Report to the workers how often they were restarted."""
        _overwrite(self.folder / _RESTARTS, self._restarts(number))

    def _restarts(self, number: int) -> bytes:
        return f"{number:<8}{self._began:<12}".encode()

    def is_screen_taken(self) -> bool:
        """Return whether a worker's dashboard has the terminal."""
        return (self.folder / _SCREEN).read_bytes() == b"1"

    def reset_screen(self) -> bool:
        """Return, once, whether a worker that is dead now had the terminal."""
        was_taken = self.is_screen_taken()
        _overwrite(self.folder / _SCREEN, b"0")
        return was_taken

    def heartbeat(self) -> int:
        """Return a number that changes with every heartbeat. Not a time of day: clocks may jump."""
        return (self.folder / _HEARTBEAT).stat().st_mtime_ns

    def progress(self) -> int:
        """Return a number that changes with every finished epoch."""
        return (self.folder / _PROGRESS).stat().st_mtime_ns


def log_dir_of(folder: Path) -> Path | None:
    """Return the log_dir of the training of a control folder; None before its preflight has read the settings."""
    text = os.fsdecode((folder / _LOG_DIR).read_bytes()).strip()
    return Path(text) if text else None


def seconds_since(folder: Path) -> tuple[float, float]:
    """Return the seconds since the newest heartbeat, and since the newest start of the workers (or their end).

    Args:
        folder: a supervisor's control folder, for programs beside it: by the system's clock, as they look once.
    """
    beat, start = ((folder / name).stat().st_mtime for name in (_HEARTBEAT, _EXIT_CODE))
    return time.time() - beat, time.time() - start


class Control:
    """A worker's side; works without a supervisor too (``python continuous_training.py``, bare torchrun).

    Create it first, before torch is imported: from then on the worker dies with its launcher, and a SIGTERM
    during start-up ends it at once. Call ``listen`` once the process group exists.
    """

    def __init__(self) -> None:
        global _heartbeat_file
        name = os.environ.get(CONTROL_DIR)
        self.folder: Path | None = Path(name) if name else None
        self.has_progressed = False  # an epoch was finished since the start
        self._screen_taken = False
        self._stop = StopRequest(on_abort=self._abort)
        _heartbeat_file = self.folder / _HEARTBEAT if self.folder else None
        if self.folder is not None:
            die_with_parent(self.folder)
            # Inherited as ignored from the supervisor. torchrun ends the other ranks of a broken group with
            # SIGTERM; one that ignores it while it waits for its peers delays the restart by 30 s.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def listen(self) -> None:
        """Handle signals as stop requests, unless a supervisor does. Call after init_process_group."""
        if self.folder is None:
            self._stop.listen("SIGINT", "SIGTERM")
            return
        if sys.platform == "win32":
            return
        # A worker's SIGTERM is either meant for the whole service (systemd), and then the supervisor gets it
        # too and sets the stop byte, or comes from torchrun, which ends the ranks whose peer died. A thread
        # distinguishes them: the main thread may be stuck in a collective, and torchrun would wait 30 s.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._exit_on_launchers_sigterm, args=(reader,), daemon=True).start()

    @property
    def stop_level(self) -> int:
        """The stop level of this rank: RUN, STOP_AT_EPOCH_END or STOP_NOW. Act on the ranks' maximum."""
        requested = RUN
        if self.folder is not None:
            requested = int((self.folder / _STOP).read_bytes() or b"0")
        return max(self._stop.level, requested)

    def restarts(self) -> tuple[int, float]:
        """Return how often the supervisor restarted the training, and since when it runs, in seconds of the clock.

        Without a supervisor the training has just begun.
        """
        if self.folder is None:
            return 0, time.time()
        number, began = (self.folder / _RESTARTS).read_bytes().split()
        return int(number), float(began)

    def report_epoch(self) -> None:
        """Report a finished epoch; the supervisor then counts crashes from zero."""
        self.has_progressed = True
        if self.folder is not None:
            os.utime(self.folder / _PROGRESS)

    def report_screen(self, taken: bool) -> None:
        """Report that the dashboard takes the terminal, or has restored it."""
        self._screen_taken = taken
        if self.folder is not None:
            _overwrite(self.folder / _SCREEN, b"1" if taken else b"0")

    def report_exit_code(self, code: int) -> None:
        """Report the exit code to the supervisor, just before exiting with it."""
        if self.folder is not None:
            _overwrite(self.folder / _EXIT_CODE, f"{code:<4}".encode())

    def _exit_on_launchers_sigterm(self, signals: int) -> None:
        while True:
            if os.read(signals, 1)[0] == signal.SIGTERM:
                time.sleep(LAUNCHER_SECONDS)
                if self.stop_level == RUN:
                    os._exit(128 + signal.SIGTERM)

    def _abort(self) -> None:
        if self._screen_taken:
            os.write(1, LEAVE.encode())
        os._exit(EXIT_ABORTED)


_heartbeat_file: Path | None = None  # of the Control that this process made last
_last_heartbeat = -math.inf


def report_plan(num_ranks: int, log_dir: Path, wants_companion: bool = False) -> None:
    """Report to the supervisor, if there is one, how many ranks this machine gets, and where train.log is."""
    if folder := os.environ.get(CONTROL_DIR):
        _overwrite(Path(folder) / _RANKS, b"%d" % num_ranks)
        _overwrite(Path(folder) / _LOG_DIR, os.fsencode(log_dir.absolute())[:_LONGEST_PATH])
        _overwrite(Path(folder) / _COMPANION, b"1" if wants_companion else b"0")


def report_goes_on() -> None:
    """Report to the supervisor that the preflight has passed and its process is the only worker now."""
    if folder := os.environ.get(CONTROL_DIR):
        with contextlib.suppress(FileNotFoundError):  # no dashboard
            held = os.open(Path(folder) / ERRORS, os.O_WRONLY | os.O_APPEND)
            os.dup2(held, 2)
            os.close(held)
        _overwrite(Path(folder) / _GOES_ON, b"1")


def preflight_goes_on() -> bool:
    """Return whether this process has reported that."""
    folder = os.environ.get(CONTROL_DIR)
    return folder is not None and (Path(folder) / _GOES_ON).read_bytes() == b"1"


def heartbeat() -> None:
    """Record a heartbeat, at most once a second.

    Does nothing without a supervisor, and in a process that made no Control, such as a background refresh.
    """
    global _last_heartbeat
    if _heartbeat_file is not None and time.monotonic() - _last_heartbeat >= 1.0:
        os.utime(_heartbeat_file)
        _last_heartbeat = time.monotonic()


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


def heartbeat_while_others_work(max_seconds: float) -> contextlib.AbstractContextManager[None]:
    """Record heartbeats while this rank, with its part done, waits for those of others; not for longer than that.

    Not where all ranks are on this machine: there, they record them.
    """
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return contextlib.nullcontext() if is_alone else heartbeat_thread(max_seconds)


def _overwrite(path: Path, content: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(content)
