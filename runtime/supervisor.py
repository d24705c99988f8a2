"""Supervise training: launch it, forward stop requests, restart it after a crash or hang.

The start scripts become ``python -m runtime.supervisor [command] [--flag value ...]``. It supervises ``train``
(the default); any other command, ``--help`` and ``--version`` just run as one process.

    Ctrl+C             finish the epoch, save, exit 0; again, over a second later: abort, exit 130
    SIGTERM, SIGHUP    save at the next safe point, exit 0 (SIGHUP stays ignored under nohup)
    crash, hang        sweep, and restart from the newest checkpoint, after a delay that grows; after five
                       crashes without a finished epoch in between: give up, exit 1
    exit 0 2 3 4 75    final, passed on

Environment: NPROC (ranks on this machine; default one per GPU), NNODES, NODE_RANK and RDZV_ENDPOINT (many
machines), LAUNCHER (torchrun or direct), START_SECONDS and HANG_SECONDS (how long training may run without a
heartbeat before and after its first one); NOTIFY_SOCKET and WATCHDOG_USEC under systemd. Standard library only,
a dozen megabytes, no thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from runtime import surroundings
from runtime.companion import Companion
from runtime.control import (
    ABORT,
    CHECK_FIRST,
    CONTROL_DIR,
    ERRORS,
    EXIT_ABORTED,
    EXIT_OK,
    EXIT_SETTING,
    FINAL_CODES,
    LEAVE,
    STOP_AT_EPOCH_END,
    StopRequest,
    SupervisorControl,
)
from runtime.launch import Launch, clean_environment
from runtime.processes import WINDOWS, Processes
from runtime.service_manager import ServiceManager
from runtime.train_log import append_line

SCRIPT = Path(__file__).resolve().parent.parent / "continuous_training.py"
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
EXIT_GAVE_UP = 1
POLL_SECONDS = 0.1
MAX_POLL_SECONDS = 1.0  # counted per poll; if more has passed, this process did not run either
MAX_SHOWN_BYTES = 200_000  # of held errors, the newest


@dataclass(frozen=True)
class Limits:
    """When training counts as hung, and how often and how soon it is restarted."""

    start_seconds: float = 900.0  # to the first heartbeat: imports, rendezvous, a slow data source
    hang_seconds: float = 600.0  # between heartbeats
    crashes: int = 5  # without a finished epoch in between
    first_delay_seconds: float = 1.0  # doubles with each crash
    longest_delay_seconds: float = 15.0

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Limits:
        """Read START_SECONDS and HANG_SECONDS.

        Raises:
            ValueError: one of them is no number of seconds.
        """
        return Limits(
            start_seconds=_seconds(environment, "START_SECONDS", Limits.start_seconds),
            hang_seconds=_seconds(environment, "HANG_SECONDS", Limits.hang_seconds),
        )

    def delay_seconds(self, crashes: int) -> float:
        """Return the delay of the restart after this many crashes in a row."""
        return min(self.longest_delay_seconds, self.first_delay_seconds * 2 ** (crashes - 1))


class WorkerErrors:
    """The workers' standard error, held in a file while their dashboard has the terminal. A context manager.

    Args:
        folder: holds the file; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ERRORS
        self.file: BinaryIO = path.open("ab")
        self._reader = path.open("rb")

    def __enter__(self) -> WorkerErrors:
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.file.close()
        self._reader.close()

    def show(self) -> None:
        """Write what is new to the terminal; call it while no dashboard has that."""
        if text := self._reader.read():
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(text[-MAX_SHOWN_BYTES:])
                sys.stderr.flush()


class GroupDiedError(Exception):
    """The workers crashed or hang; the text says how."""


class Supervisor:
    """One start of the program: the preflight, then groups of workers until one exits with a final code."""

    def __init__(
        self,
        launch: Launch,
        limits: Limits,
        stop: StopRequest,
        control: SupervisorControl,
        worker: Sequence[str],
        errors: WorkerErrors | None = None,
        manager: ServiceManager | None = None,
    ) -> None:
        """``worker`` is the command line after python: the script, its command, and the user's flags."""
        self._launch = launch
        self._limits = limits
        self._stop = stop
        self._control = control
        self._errors = errors
        self._manager = manager or ServiceManager({})
        self._script, _, *self._flags = worker
        self._worker = worker
        self._processes = Processes(run_id=control.folder.name)
        self._forwarded = 0  # the stop level that the workers know of
        self._preflight_trains = False
        self._environment = clean_environment() | {CONTROL_DIR: str(control.folder)}
        companion = [sys.executable, self._script, "companion", *self._flags]
        self._companion = Companion(companion, self._environment, errors.file if errors else None)

    def run(self) -> int:
        """Train until a final exit code, which is returned, and leave no process behind."""
        try:
            code = self._preflight()
            if code is None:
                with self._companion:
                    if self._control.wants_companion():
                        self._companion.start()
                    code = self._train()
                    if code not in (EXIT_OK, EXIT_ABORTED, EXIT_GAVE_UP):
                        self._companion.send(
                            "gave_up", f"It ended with exit code {code}; train.log says why."
                        )
        finally:
            stuck = self._processes.sweep()
            self._restore_terminal()
            if stuck:
                self._say(f"Could not kill processes {stuck}; check the GPU driver.")
        return code

    def _preflight(self) -> int | None:
        """Validate settings and devices in one process, so an error is printed once and not per rank.

        That process trains on if it is the only one: it has loaded what takes seconds to load.
        """
        environment = self._environment | {CHECK_FIRST: "1"}
        self._processes.start([sys.executable, "-u", *self._worker], environment)
        while (code := self._processes.exit_codes()[0]) is None and not self._control.preflight_goes_on():
            if self._stop.level:
                self._say("Stopped before training started.")
                return EXIT_OK
            self._manager.ping()
            time.sleep(POLL_SECONDS / 2)
        self._preflight_trains = self._control.preflight_goes_on()
        if self._preflight_trains:
            return None
        self._processes.sweep()
        assert code is not None
        if code < 0:
            self._say(f"The check of the settings failed: {_describe_exit(code)}.")
            return EXIT_GAVE_UP
        self._launch = replace(self._launch, num_ranks=self._control.num_ranks())
        return code or None

    def _train(self) -> int:
        if self._launch.world_size > 1:
            self._say(f"Starting {self._launch.world_size} ranks.")
        crashes = restarts = 0
        while True:
            self._manager.report_status("starting")
            progress, heartbeat = self._control.progress(), self._control.heartbeat()
            if not self._preflight_trains:
                self._start_workers()
            self._preflight_trains = False
            try:
                return self._watch()
            except GroupDiedError as error:
                stuck = self._processes.sweep()
                self._restore_terminal()
                crashes = 1 if self._control.progress() != progress else crashes + 1
                if self._stop.level and self._control.heartbeat() == heartbeat:
                    self._say("Stopped before training resumed.")
                    return EXIT_OK
                if self._stop.level:
                    line = f"Training died while stopping: {error}. The newest checkpoint on disk is intact."
                    self._say(line)
                    self._companion.send("gave_up", line)
                    return EXIT_GAVE_UP
                if stuck or crashes >= self._limits.crashes:
                    reason = f"{crashes} crashes without a finished epoch"
                    if stuck:
                        reason = f"could not kill processes {stuck}"
                    line = f"Giving up: {reason}. The last: {error}. The newest checkpoint on disk is intact."
                    self._say(line)
                    self._companion.send("gave_up", line)
                    return EXIT_GAVE_UP
                delay = self._limits.delay_seconds(crashes)
                if self._launch.num_nodes > 1:  # a machine that is back sooner meets the others' old group
                    delay = self._limits.longest_delay_seconds
                line = f"Training died: {error}. Restarting from the newest checkpoint in {delay:.0f} s."
                self._manager.report_status(line)
                self._say(line)
                restarts += 1
                self._control.report_restarts(restarts)
                self._companion.send("restarted", line, restarts)
            if not self._wait(delay):
                self._say("Stopped. The next start resumes from the newest checkpoint on disk.")
                return EXIT_ABORTED if self._stop.level == ABORT else EXIT_OK

    def _start_workers(self) -> None:
        self._control.clear_exit_code()
        for command, additions in self._launch.commands(self._worker):
            errors = self._errors.file if self._errors else None
            self._processes.start(command, self._environment | additions, errors)

    def _watch(self) -> int:
        """Wait until the group ends, and return its exit code.

        Raises:
            GroupDiedError: it crashed, or recorded no heartbeat for too long.
        """
        heartbeat = self._control.heartbeat()
        silence, limit, has_started = 0.0, self._limits.start_seconds, False
        polled = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            self._manager.ping()
            # While the whole machine is frozen (a snapshot, a paused container) no heartbeat is possible.
            silence += min(time.monotonic() - polled, MAX_POLL_SECONDS)
            polled = time.monotonic()
            if self._stop.level == ABORT:
                self._processes.sweep()
                self._restore_terminal()
                self._say("Aborted. The newest checkpoint on disk is intact.")
                return EXIT_ABORTED
            self._forward_stop()
            self._companion.keep_alive()
            if self._errors is not None and not self._control.is_screen_taken():
                self._errors.show()
            codes = self._processes.exit_codes()
            if any(codes) or None not in codes:
                return self._final_code(codes)
            newest = self._control.heartbeat()
            if newest != heartbeat:
                if not has_started and not self._forwarded:
                    self._manager.report_ready("training")
                has_started = True
                heartbeat, silence, limit = newest, 0.0, self._limits.hang_seconds
            elif silence > limit:
                raise GroupDiedError(f"no heartbeat for {limit:.0f} s")

    def _forward_stop(self) -> None:
        level = self._stop.level
        if not self._forwarded < level < ABORT:
            return
        self._forwarded = level
        self._control.request_stop(level)
        self._manager.report_stopping()
        if level == STOP_AT_EPOCH_END:
            self._say("\nStopping after this epoch, with checkpoint and summary. Ctrl+C again ends at once.")
        else:
            self._say(f"\n{self._stop.signal_name}: saving at the next safe point, then exit.")

    def _final_code(self, codes: Sequence[int | None]) -> int:
        """Return the exit code that the workers reported, or the first bad one.

        Raises:
            GroupDiedError: it is not final.
        """
        reported = self._control.exit_code()
        if reported in FINAL_CODES:
            return reported
        first_bad = next((code for code in codes if code), EXIT_OK)
        if first_bad in FINAL_CODES:
            return first_bad
        raise GroupDiedError(_describe_exit(first_bad))

    def _wait(self, seconds: float) -> bool:
        """Wait; return False as soon as a stop is requested."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop.level:
            self._manager.ping()
            time.sleep(POLL_SECONDS / 2)
        return not self._stop.level

    def _say(self, line: str) -> None:
        say(line)
        append_line(self._control.log_dir(), line, logging.WARNING)

    def _restore_terminal(self) -> None:
        """Leave the alternate screen of a dead dashboard, and show the errors that it would have hidden."""
        if self._control.reset_screen() and sys.stdout.isatty():
            with contextlib.suppress(OSError, ValueError):
                print(LEAVE, end="", flush=True)
        if self._errors is not None:
            self._errors.show()


def main(arguments: Sequence[str], *, script: Path = SCRIPT, limits: Limits | None = None) -> int:
    """Run one command of the program and return its exit code."""
    is_command = bool(arguments) and arguments[0] != "train" and not arguments[0].startswith("-")
    if is_command or "--help" in arguments or arguments[:1] == ["--version"]:
        return _run_alone([sys.executable, str(script), *arguments])
    stop, manager = StopRequest(), ServiceManager(os.environ)
    stop.listen(*STOP_SIGNALS)
    flags = arguments[1:] if arguments[:1] == ["train"] else arguments
    try:
        launch = Launch.from_environment(os.environ)
        limits = limits or Limits.from_environment(os.environ)
    except ValueError as error:
        say(str(error))
        return EXIT_SETTING
    try:
        with SupervisorControl() as control, contextlib.ExitStack() as on_exit:
            errors = on_exit.enter_context(WorkerErrors(control.folder)) if is_interactive() else None
            worker = [str(script), "train", *flags]
            return Supervisor(launch, limits, stop, control, worker, errors, manager).run()
    except OSError as error:
        say(f"Cannot start or supervise training: {error}")
        return EXIT_GAVE_UP


def is_interactive() -> bool:
    """Return whether both outputs are a terminal, so that workers may show a dashboard."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def say(line: str) -> None:
    """Print one line to the user. A terminal or a ``| tee`` that is gone never ends the training."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _run_alone(command: list[str]) -> int:
    if not WINDOWS:  # where exec would not replace the process
        os.execve(command[0], command, clean_environment())
    return subprocess.call(command, env=clean_environment())


def _describe_exit(code: int) -> str:
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return f"a worker exited with code {code}"
    hint = " (from outside, or the system ran out of memory)" if name == "SIGKILL" else ""
    return f"a worker was killed by {name}{hint}"


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise ValueError(f"{name} must be a number of seconds above 0, was {text!r}")


if __name__ == "__main__":
    surroundings.guard_streams()
    sys.exit(main(sys.argv[1:]))
