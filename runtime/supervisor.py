"""Own the training from outside: launch it, pass on the wish to stop, start it again when it dies.

``python -m runtime.supervisor [command] [--flag value ...]`` is what the start scripts become. ``train``
(the default) is supervised; any other command, and ``--help``, just runs as one process.

    Ctrl+C             finish the epoch, save, exit 0; again, over a second later: end at once, exit 130
    SIGTERM, SIGHUP    save at the next safe point, exit 0 (SIGHUP is left alone under nohup)
    crash, hang        sweep, and start again from the newest checkpoint, later each time; after five crashes
                       without a finished epoch in between: give up, exit 1
    exit 0 2 3 4 75    the workers' final word, passed on

Environment: NPROC (ranks on this machine; default one per GPU), NNODES, NODE_RANK and RDZV_ENDPOINT (many
machines), LAUNCHER (torchrun or direct), START_SECONDS and HANG_SECONDS (how long training may show no sign
of life before and after its first one). Standard library only, a dozen megabytes, no thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from runtime.control import (
    CONTROL_DIR,
    EXIT_ABORTED,
    EXIT_OK,
    EXIT_SETTING,
    FINAL_CODES,
    KEY_BOUNCE_SECONDS,
    LEAVE,
    STOP_AT_EPOCH_END,
    STOP_NOW,
    SupervisorControl,
)
from runtime.launch import Launch, program_environment
from runtime.processes import WINDOWS, Processes

SCRIPT = Path(__file__).resolve().parent.parent / "continuous_training.py"
EXIT_GAVE_UP = 1
POLL_SECONDS = 0.1
LONGEST_LOOK_SECONDS = 1.0  # between two looks; if more has passed, this process did not run either


def say(line: str) -> None:
    """Tell the user one line. A terminal or a ``| tee`` that is gone never ends the training."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Limits:
    """How patient the supervisor is."""

    start_seconds: float = 900.0  # to the first sign of life: imports, rendezvous, a slow data source
    hang_seconds: float = 600.0  # between signs of life
    crashes: int = 5  # without a finished epoch in between
    first_delay_seconds: float = 1.0  # doubles with each crash
    longest_delay_seconds: float = 15.0

    def delay_seconds(self, crashes: int) -> float:
        """Return how long to wait before the start that follows the given number of crashes in a row."""
        return min(self.longest_delay_seconds, self.first_delay_seconds * 2 ** (crashes - 1))


class StopWish:
    """What the user wants, as told by signals. The handler only keeps notes; the supervisor acts on them."""

    def __init__(self) -> None:
        self.level = 0
        self.aborted = False
        self.signal_name = ""
        self._first = 0.0

    def listen(self) -> None:
        """Take over the stopping signals of this platform."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                continue
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.level and now - self._first > KEY_BOUNCE_SECONDS:
            self.aborted = True
        if not self.level:
            self._first = now
        level = STOP_AT_EPOCH_END if number == signal.SIGINT else STOP_NOW
        if level > self.level:
            self.level = level
            self.signal_name = signal.Signals(number).name


class GroupDiedError(Exception):
    """The workers crashed or hang; the text tells how."""


class Supervisor:
    """One start of the program: the check, then groups of workers until one leaves for good."""

    def __init__(
        self,
        launch: Launch,
        limits: Limits,
        stop: StopWish,
        control: SupervisorControl,
        worker: Sequence[str],
        errors: HeldErrors | None = None,
    ) -> None:
        """``worker`` is the command line after python: the script, its command, and the user's flags.

        ``errors``: what the workers write to standard error, held while their dashboard has the terminal.
        """
        self._launch = launch
        self._limits = limits
        self._stop = stop
        self._control = control
        self._errors = errors
        self._script, _, *self._flags = worker
        self._worker = worker
        self._processes = Processes(run_id=control.folder.name)
        self._obeyed = 0
        self._environment = program_environment(launch)
        self._environment[CONTROL_DIR] = str(control.folder)

    def run(self) -> int:
        """Check the settings in one process, train until it ends for good, and leave no process behind.

        Returns:
            The exit code of the program.
        """
        try:
            refusal = self._refused()
            code = self._train() if refusal is None else refusal
        finally:
            stuck = self._processes.sweep()
            self._restore_terminal()
            if stuck:
                say(f"These processes of the training do not die, look at the GPU driver: {stuck}")
        return code

    def _restore_terminal(self) -> None:
        """Give the terminal back where a dashboard died with it, and show what it would have hidden."""
        if self._control.screen_is_left() and sys.stdout.isatty():
            with contextlib.suppress(OSError, ValueError):
                print(LEAVE, end="", flush=True)
        if self._errors is not None:
            self._errors.show()

    def _refused(self) -> int | None:
        """Let one process read the settings, so that a mistake is told once and not by every rank."""
        self._processes.start(
            [sys.executable, self._script, "preflight", *self._flags], program_environment(self._launch)
        )
        while (code := self._processes.exit_codes()[0]) is None:
            if self._stop.level:
                say("Stopped before the training began.")
                return EXIT_OK
            time.sleep(POLL_SECONDS / 2)
        self._processes.sweep()
        if code < 0:
            say(f"The check of the settings was ended: {_told(code)}.")
            return EXIT_GAVE_UP
        return code or None

    def _train(self) -> int:
        if self._launch.world_size > 1:
            say(f"Starting {self._launch.world_size} ranks.")
        crashes = 0
        while True:
            progress, heartbeat = self._control.progress(), self._control.heartbeat()
            self._control.forget_exit_code()
            for command, additions in self._launch.commands(self._worker):
                errors = self._errors.file if self._errors else None
                self._processes.start(command, self._environment | additions, errors)
            try:
                return self._watch()
            except GroupDiedError as death:
                stuck = self._processes.sweep()
                self._restore_terminal()
                crashes = 1 if self._control.progress() != progress else crashes + 1
                if self._stop.level and self._control.heartbeat() == heartbeat:
                    say("Stopped before the training went on.")
                    return EXIT_OK
                if self._stop.level:
                    say(f"Training died while it stopped: {death}. The newest checkpoint on disk is whole.")
                    return EXIT_GAVE_UP
                if stuck or crashes >= self._limits.crashes:
                    why = (
                        f"processes {stuck} do not die"
                        if stuck
                        else f"{crashes} crashes without a finished epoch"
                    )
                    say(f"Giving up: {why}. The last: {death}. The newest checkpoint on disk is whole.")
                    return EXIT_GAVE_UP
                delay = self._limits.delay_seconds(crashes)
                if self._launch.num_nodes > 1:  # whoever is back sooner meets the others' old group
                    delay = self._limits.longest_delay_seconds
                say(f"Training died: {death}. It goes on from the newest checkpoint in {delay:.0f} s.")
            if not self._wait(delay):
                say("Stopped. The newest checkpoint on disk is the state of the training.")
                return EXIT_ABORTED if self._stop.aborted else EXIT_OK

    def _watch(self) -> int:
        """Wait for the group's end.

        Raises:
            GroupDiedError: it crashed, or shows no sign of life for too long.
        """
        beat = self._control.heartbeat()
        silence, limit = 0.0, self._limits.start_seconds
        looked = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            # While the whole machine was frozen (a snapshot, a paused container) nobody could show life.
            silence += min(time.monotonic() - looked, LONGEST_LOOK_SECONDS)
            looked = time.monotonic()
            if self._stop.aborted:
                self._processes.sweep()
                self._restore_terminal()
                say("Aborted. The newest checkpoint on disk is whole.")
                return EXIT_ABORTED
            self._pass_on_stop()
            if self._errors is not None and not self._control.screen_is_taken():
                self._errors.show()
            codes = self._processes.exit_codes()
            if any(codes) or None not in codes:
                return self._verdict(codes)
            newest = self._control.heartbeat()
            if newest != beat:
                beat, silence, limit = newest, 0.0, self._limits.hang_seconds
            elif silence > limit:
                raise GroupDiedError(f"no sign of life for {limit:.0f} s")

    def _verdict(self, codes: Sequence[int | None]) -> int:
        meant = self._control.exit_code()
        if meant in FINAL_CODES:
            return meant
        first_bad = next((code for code in codes if code), EXIT_OK)
        if first_bad in FINAL_CODES:
            return first_bad
        raise GroupDiedError(_told(first_bad))

    def _pass_on_stop(self) -> None:
        if self._stop.level > self._obeyed:
            self._obeyed = self._stop.level
            self._control.command(self._obeyed)
            if self._obeyed == STOP_AT_EPOCH_END:
                say("\nStopping after this epoch, with checkpoint and summary. Ctrl+C again ends at once.")
            else:
                say(f"\n{self._stop.signal_name}: saving at the next safe point, then exit.")

    def _wait(self, seconds: float) -> bool:
        """Wait; False when a stop was asked for meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop.level:
            time.sleep(POLL_SECONDS / 2)
        return not self._stop.level


def main(arguments: Sequence[str], *, script: Path = SCRIPT, limits: Limits | None = None) -> int:
    """Run one command of the program and return its exit code."""
    if "--help" in arguments or (arguments and arguments[0] != "train" and not arguments[0].startswith("-")):
        return _run_alone([sys.executable, str(script), *arguments])
    stop = StopWish()
    stop.listen()
    flags = arguments[1:] if arguments[:1] == ["train"] else arguments
    try:
        launch = Launch.from_environment(os.environ)
        limits = limits or Limits(
            start_seconds=_seconds(os.environ, "START_SECONDS", Limits.start_seconds),
            hang_seconds=_seconds(os.environ, "HANG_SECONDS", Limits.hang_seconds),
        )
    except ValueError as error:
        say(str(error))
        return EXIT_SETTING
    try:
        with SupervisorControl() as control, contextlib.ExitStack() as on_leaving:
            errors = on_leaving.enter_context(HeldErrors(control.folder)) if are_wanted() else None
            worker = [str(script), "train", *flags]
            return Supervisor(launch, limits, stop, control, worker, errors).run()
    except OSError as error:
        say(f"The training cannot be started or watched: {error}")
        return EXIT_GAVE_UP


def _run_alone(command: list[str]) -> int:
    if not WINDOWS:  # where exec would not replace the process
        os.execv(command[0], command)
    return subprocess.call(command)


def _told(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number <= 0:
        return (
            "the workers ended without a word" if code == EXIT_OK else f"a worker ended with exit code {code}"
        )
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"a worker ended with exit code {code}"
    hint = " (from outside, or the system was out of memory)" if name == "SIGKILL" else ""
    return f"a worker was ended by {name}{hint}"


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{name} must be a number of seconds above 0, was {text!r}")
    return seconds


MOST_SHOWN = 200_000  # bytes at a time, the newest


class HeldErrors:
    """A file that stands in for the terminal, and what was not yet shown of it. A context manager.

    Args:
        folder: where the file lies; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "errors"
        self.file: BinaryIO = path.open("ab")  # what workers get as their standard error
        self._reader = path.open("rb")

    def __enter__(self) -> HeldErrors:
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.file.close()
        self._reader.close()

    def show(self) -> None:
        """Write what has come since the last time to the terminal; nobody else may have it now."""
        if text := self._reader.read():
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(text[-MOST_SHOWN:])
                sys.stderr.flush()


def are_wanted() -> bool:
    """Tell whether a dashboard may come between: both outputs are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
