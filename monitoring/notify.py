"""Messages to people: to plain JSON webhooks, and through the package apprise to whatever that knows.

Every target has a thread and a queue of its own, so that one that is slow or dead delays no other. A target's URL
has secrets in it: nothing but its scheme and, of a webhook, its host is ever shown.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from monitoring.events import Event
from training.urls import WEBHOOKS, Url

TRY_SECONDS = 15.0  # for one message to one target, however slowly that answers
PAUSES = (2.0, 10.0)  # seconds before the second and the third try
LONGEST_PAUSE = 30.0  # that a target may ask for
MOST_WAITING = 50  # messages for one target; the oldest are dropped
BURST, PERIOD_SECONDS = 3, 600.0  # messages of a kind within this time


class NotSent(Exception):
    """A message was not sent; the text names the target without its secrets, and the reason."""

    def __init__(self, target: str, reason: str, is_final: bool = False, pause: float = 0.0) -> None:
        super().__init__(f"{target}: {reason}")
        self.is_final = is_final  # trying again would not help
        self.pause = pause  # seconds that the target asks for


def send(url: Url, event: Event, host: str) -> None:
    """Send one message, and wait until it is accepted.

    Args:
        url: of the target.
        event: what happened.
        host: where, such as the name of this machine.

    Raises:
        NotSent: the target did not accept it.
    """
    text = event.text if event.count < 2 else f"{event.text} (number {event.count})"
    if url.scheme in WEBHOOKS:
        _post(url, {
            "event": event.kind,
            "title": event.title,
            "message": event.text,
            "count": event.count,
            "host": host,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            # What Slack and Mattermost, and Discord, show.
            "text": f"{event.title} ({host}): {text}",
            "content": f"{event.title} ({host}): {text}"[:2_000],
        })  # fmt: skip
    else:
        _send_by_apprise(url, f"{event.title} ({host})", text)


def _post(url: Url, content: dict[str, Any]) -> None:
    target, parts = str(url), urlsplit(url.reveal())
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": "application/json", "User-Agent": "continuous-training", "Connection": "close"}
    if parts.username is not None:
        headers["Authorization"] = _basic(parts.username, parts.password or "")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            str(parts.hostname), parts.port, timeout=TRY_SECONDS, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TRY_SECONDS)
    # A timeout counts from byte to byte: a target that sends one now and then would hold the thread for good.
    is_late = threading.Event()
    alarm = threading.Timer(TRY_SECONDS, lambda: _cut(connection, is_late))
    alarm.daemon = True
    alarm.start()
    try:
        connection.request("POST", path, json.dumps(content).encode(), headers)
        answer = connection.getresponse()
    # Not the errors' own texts, which may repeat the URL.
    except ssl.SSLError as error:
        raise NotSent(target, f"no trusted connection: {error.reason or 'its certificate'}") from None
    except OSError as error:
        if is_late.is_set() or isinstance(error, TimeoutError):
            raise NotSent(target, f"no answer within {TRY_SECONDS:.0f} s") from None
        raise NotSent(target, error.strerror or "it ended the connection without an answer") from None
    except (http.client.HTTPException, ValueError):
        raise NotSent(target, "it does not speak HTTP") from None
    finally:
        alarm.cancel()
        connection.close()
    if 200 <= answer.status < 300:
        return
    # Redirections are not followed: the message, or a secret, would go to where nobody sent it.
    is_final = answer.status < 500 and answer.status not in (408, 425, 429)
    pause = answer.headers.get("Retry-After", "")
    raise NotSent(
        target, f"it answers HTTP {answer.status}", is_final, float(pause) if pause.isdigit() else 0.0
    )


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


def _cut(connection: http.client.HTTPConnection, is_late: threading.Event) -> None:
    is_late.set()
    with contextlib.suppress(OSError, AttributeError):  # there is none yet, or it has just ended
        connection.sock.shutdown(socket.SHUT_RDWR)


def _send_by_apprise(url: Url, title: str, text: str) -> None:
    target = str(url)
    try:
        import apprise
    except ImportError:
        raise NotSent(target, url.find_fault(), is_final=True) from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # its lines have URLs
    sender = apprise.Apprise()
    if not sender.add(url.reveal()):
        raise NotSent(target, "apprise does not know such a URL", is_final=True)
    try:
        is_sent = sender.notify(body=text, title=title)
    except Exception as error:  # noqa: BLE001 - of any of its hundred services; the text may have the URL
        raise NotSent(target, type(error).__name__) from None
    if not is_sent:
        raise NotSent(target, "apprise could not deliver it")


class Limiter:
    """Lets through a few events of each kind in a period; the newest of those that it holds goes when one may."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: dict[str, deque[float]] = {}  # by kind, the newest times
        self._held: dict[str, tuple[Event, int]] = {}  # by kind: the newest, and how many

    def admit(self, event: Event) -> list[Event]:
        """Return the event if it may be sent now, else hold it."""
        number = self._held.get(event.kind, (event, 0))[1] + 1
        self._held[event.kind] = event, number
        return self.due()

    def due(self, all_of_them: bool = False) -> list[Event]:
        """Return what may be sent now of what is held; at the end all of it."""
        return [self._release(kind) for kind in list(self._held) if all_of_them or self._may(kind)]

    def _may(self, kind: str) -> bool:
        times = self._sent.setdefault(kind, deque(maxlen=BURST))
        return len(times) < BURST or self._clock() - times[0] >= PERIOD_SECONDS

    def _release(self, kind: str) -> Event:
        event, number = self._held.pop(kind)
        self._sent.setdefault(kind, deque(maxlen=BURST)).append(self._clock())
        if number == 1:
            return event
        return Event(kind, f"{event.text} ({number - 1} more before it, since the last message)", event.count)


class Messenger:
    """Sends events to all targets, limited in number, without ever making the caller wait. A context manager.

    Args:
        urls: of the targets.
        host: where the events happen.
        report: called with a line when a target fails, and when it works again.
    """

    def __init__(self, urls: Sequence[Url], host: str, report: Callable[[str], None]) -> None:
        self._limiter = Limiter()
        self._targets = [_Target(url, host, report) for url in urls]

    def __enter__(self) -> Messenger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0.0)

    def send(self, event: Event) -> None:
        """Send an event, now or when its kind is due again."""
        self._pass_on(self._limiter.admit(event))

    def tick(self) -> None:
        """Send what was held and is due; call it now and then."""
        self._pass_on(self._limiter.due())

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long; there are no second tries any more."""
        self._pass_on(self._limiter.due(all_of_them=True))
        end = time.monotonic() + seconds
        for target in self._targets:
            target.finish()
        for target in self._targets:
            target.thread.join(max(0.0, end - time.monotonic()))

    def _pass_on(self, events: Sequence[Event]) -> None:
        for event in events:
            for target in self._targets:
                target.put(event)


class _Target:
    """One target: its queue, and the thread that empties it."""

    def __init__(self, url: Url, host: str, report: Callable[[str], None]) -> None:
        self._url, self._host, self._report = url, host, report
        self._waiting: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._is_over = threading.Event()
        self._is_failing = False
        self.thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self.thread.start()

    def put(self, event: Event | None) -> None:
        while True:
            try:
                return self._waiting.put_nowait(event)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def finish(self) -> None:
        self._is_over.set()
        self.put(None)

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        for pause in (*PAUSES, None):
            try:
                send(self._url, event, self._host)
            except NotSent as error:
                if pause is not None and not error.is_final and not self._is_over.is_set():
                    self._is_over.wait(min(LONGEST_PAUSE, max(pause, error.pause)))
                    continue
                if not self._is_failing:
                    self._report(f"the message {event.title!r} was not sent to {error}")
                self._is_failing = True
            else:
                if self._is_failing:
                    self._report(f"messages to {self._url} arrive again")
                self._is_failing = False
            return
