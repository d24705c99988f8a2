"""The command ``companion``: the process beside a training that serves its page, sends messages and telemetry.

It reads what the training publishes (monitoring/attach.py), and hears from its owner (runtime/companion.py). Torch
is not loaded, and its priority is low: training notices nothing of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from commands.cli import environment_of_child
from commands.version import ROOT, program_version
from monitoring.attach import Attached, NothingPublished
from monitoring.events import TITLES, Event, Watcher
from monitoring.notify import Messenger
from monitoring.telemetry import Sender
from runtime.background_process import lower_priority
from runtime.companion import CLOSE_SECONDS, FAREWELL, Companion
from runtime.train_log import append_line
from training.setting_types import recorded
from training.urls import find_targets

if TYPE_CHECKING:
    from continuous_training import Settings

POLL_SECONDS = 3.0
NICENESS = 10  # training goes first; at 19 a message would wait for minutes where it takes every core
KILLED = "It ended without a word: killed, perhaps for memory, or the machine went down. Nothing restarts it."


def run(settings: Settings, environment: Mapping[str, str], words: Iterable[str]) -> None:
    """Serve the page and send messages until ``words``, lines of JSON from the owner, end."""
    lower_priority(NICENESS)
    log_dir = Path(settings.log_dir)

    def report(line: str) -> None:
        append_line(log_dir, line, logging.WARNING)

    heard: queue.Queue[Event | None] = queue.Queue()
    threading.Thread(target=_listen, args=(words, heard), name="owner", daemon=True).start()
    attached = Attached(log_dir, Path(settings.checkpoint_dir))
    messenger = Messenger(find_targets(settings.notify, environment), socket.gethostname(), report)
    watcher: Watcher | None = None
    senders = _senders(settings, log_dir, report)
    page = _Page(settings, environment.get("WEB_TOKEN", ""), report)
    with ExitStack() as on_exit:
        deadline = math.inf  # of what is under way
        on_exit.callback(lambda: messenger.close(max(1.0, deadline - time.monotonic())))
        is_over = False
        while not is_over:
            if settings.web_port is not None:
                page.try_to_serve(on_exit)
            try:
                event = heard.get(timeout=POLL_SECONDS)
                if event is not None:
                    messenger.send(event)
                is_over = event is None
            except queue.Empty:
                messenger.tick()
            watcher = _look(attached, watcher, messenger, senders)
        deadline = time.monotonic() + CLOSE_SECONDS - POLL_SECONDS
        for sender in senders:  # each in its own thread: the slowest counts
            sender.finish()
        for sender in senders:
            sender.join(deadline - time.monotonic())


def _senders(settings: Settings, log_dir: Path, report: Callable[[str], None]) -> list[Sender]:
    """Start a sender for each tracker."""
    name = f"{socket.gethostname()} {Path(settings.checkpoint_dir).name}"
    config = recorded(settings) | {"version": program_version()} if settings.telemetry else {}
    return [Sender(sink, log_dir, name, config, report) for sink in settings.telemetry]


def _look(
    attached: Attached, watcher: Watcher | None, messenger: Messenger, senders: Iterable[Sender]
) -> Watcher | None:
    """Send what has happened in the training since the last look."""
    try:
        state = attached.read()
    except NothingPublished:
        return watcher
    for sender in senders:
        sender.offer(state.history)
    if watcher is None:
        return Watcher(state)
    for event in watcher.new(state):
        messenger.send(event)
    return watcher


def _listen(words: Iterable[str], heard: queue.Queue[Event | None]) -> None:
    """Put the owner's events into a queue, and None at the end; without a farewell the owner was killed."""
    for line in words:
        try:
            word = json.loads(line)
            if word["event"] == FAREWELL:
                break
            if word["event"] in TITLES:
                heard.put(Event(word["event"], str(word["text"]), int(word["count"])))
        except (ValueError, KeyError, TypeError):  # cut, as the pipe was full
            continue
    else:
        heard.put(Event("killed", KILLED))
    heard.put(None)


class _Page:
    """The server of the page, once its port is free."""

    def __init__(self, settings: Settings, token: str, report: Callable[[str], None]) -> None:
        self._settings, self._token, self._report = settings, token, report
        self._is_serving = self._has_failed = False

    def try_to_serve(self, on_exit: ExitStack) -> None:
        """Serve the page if it is not served yet; a port that is taken is tried again."""
        if self._is_serving:
            return
        from monitoring.web import PageServer, Website  # jinja2, which a training without a page does without

        settings = self._settings
        attached = Attached(Path(settings.log_dir), Path(settings.checkpoint_dir))
        assert settings.web_port is not None
        try:
            server = PageServer(
                Website(attached.read), numeric_host(settings), settings.web_port, self._token, self._report
            )
        except OSError as error:
            if not self._has_failed:
                self._report(
                    f"no page at {settings.web_host}:{settings.web_port}: {error.strerror}; it is tried again "
                    "every few seconds, or choose another --web-port"
                )
            self._has_failed = True
            return
        self._is_serving = True
        on_exit.enter_context(server)
        append_line(Path(settings.log_dir), f"The page: {address_of(settings)}")


def numeric_host(settings: Settings) -> str:
    """Return the address that the page is served at, without a look-up."""
    return "127.0.0.1" if settings.web_host == "localhost" else settings.web_host


def address_of(settings: Settings) -> str:
    """Return the address of the page."""
    host = f"[{settings.web_host}]" if ":" in settings.web_host else settings.web_host
    return f"http://{host}:{settings.web_port}/"


def is_wanted(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether there is anything for a companion to do."""
    has_targets = bool(settings.telemetry or find_targets(settings.notify, environment))
    return has_targets or settings.web_port is not None


@contextmanager
def beside(settings: Settings) -> Iterator[None]:
    """Keep a companion beside a training that no supervisor started."""
    if not is_wanted(settings, os.environ):
        yield
        return
    arguments = sys.argv[1:]
    flags = arguments[1:] if arguments[:1] == ["train"] else arguments
    command = [sys.executable, str(ROOT / "continuous_training.py"), "companion", *flags]
    with Companion(command, environment_of_child()) as companion:
        companion.start()
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            companion.send("gave_up", (str(error).splitlines() or [type(error).__name__])[0])
            raise
