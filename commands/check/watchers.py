"""The page and the messages: whether the port is free, and whether every target takes a message."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from commands.check.report import Line
from commands.companion import address_of, numeric_host
from monitoring.events import Event
from monitoring.notify import NotSent, send
from training.urls import find_targets

if TYPE_CHECKING:
    from continuous_training import Settings

TEST = Event("test", "If you can read this, messages from this machine arrive.")


def check_watchers(settings: Settings, environment: Mapping[str, str], sends_test: bool) -> Iterator[Line]:
    """Report the address of the page, the trackers, and the targets of messages.

    Args:
        settings: each valid by itself.
        environment: keys and targets.
        sends_test: send a message to each target.
    """
    if settings.web_port is not None:
        yield _check_port(settings)
    for tracker in settings.telemetry:
        missing = importlib.util.find_spec(tracker) is None
        text = (
            f"{tracker} needs: .venv/bin/pip install {tracker}"
            if missing
            else f"{tracker} gets every epoch's figures"
        )
        yield Line.setting(text) if missing else Line("telemetry", "OK", text)
    targets = find_targets(settings.notify, environment)
    for target in targets:
        if not sends_test:
            yield Line("messages", "OK", f"go to {target}; --test-notify sends one")
            continue
        try:
            send(target, TEST, socket.gethostname())
            yield Line("messages", "OK", f"{target} took the test message")
        except NotSent as error:
            yield Line("messages", "warning", f"not sent to {error}")
    if sends_test and not targets:
        yield Line("messages", "warning", "there is no target: give --notify URL, or set NOTIFY_URLS in .env")


def _check_port(settings: Settings) -> Line:
    host = numeric_host(settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, settings.web_port))
    except OSError as error:
        reason = f"{settings.web_host}:{settings.web_port} cannot be used now: {error.strerror}"
        return Line(
            "page", "warning", f"{reason}; choose another --web-port, or training goes on without a page"
        )
    return Line("page", "OK", f"at {address_of(settings)} while training runs")
