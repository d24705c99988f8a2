"""Messages over real HTTP to targets that take them, are slow, dead, or lie; no secret of a URL comes out."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from monitoring import notify
from monitoring.events import Event
from monitoring.notify import Limiter, Messenger, NotSent, send
from training.urls import Url, find_targets

EVENT = Event("restarted", "Training died: a worker was killed by SIGKILL.", 3)
SECRET = "canaryCANARY0123"


@dataclass
class Hook:
    """A webhook on loopback; ``answer`` gets the connection and the request."""

    answer: Callable[[socket.socket], None]
    port: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def url(self) -> Url:
        return Url(f"http://user:{SECRET}@127.0.0.1:{self.port}/{SECRET}?token={SECRET}")

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.split("\r\n\r\n", 1)[1]) for request in self.requests]


@contextmanager
def hook(answer: Callable[[socket.socket], None]) -> Iterator[Hook]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = Hook(answer, server.getsockname()[1])
        threading.Thread(target=_serve, args=(server, found), daemon=True).start()
        yield found
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket, found: Hook) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection, found), daemon=True).start()


def _answer(connection: socket.socket, found: Hook) -> None:
    with connection:
        text = ""
        while "\r\n\r\n" not in text or len(text.split("\r\n\r\n", 1)[1]) < _length(text):
            part = connection.recv(65_536)
            if not part:
                return
            text += part.decode()
        found.requests.append(text)
        try:
            found.answer(connection)
        except OSError:
            return


def _length(text: str) -> int:
    head = text.lower().split("\r\n\r\n")[0]
    return int(head.split("content-length: ")[1].split("\r\n")[0])


def says(text: str) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(text.encode())


OK = says("HTTP/1.1 204 No Content\r\n\r\n")


def drips(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.02)


def test_a_message_says_what_happened_where_and_how_often() -> None:
    with hook(OK) as target:
        send(target.url, EVENT, "a-host")
    (body,) = target.bodies()
    assert target.requests[0].startswith(f"POST /{SECRET}?token={SECRET} HTTP/1.1\r\n")
    assert "Authorization: Basic " in target.requests[0]
    assert body["event"] == "restarted" and body["count"] == 3 and body["host"] == "a-host"
    assert body["text"] == body["content"] == f"Training was restarted (a-host): {EVENT.text} (number 3)"


@pytest.mark.parametrize(
    ("answer", "reason", "is_final"),
    [
        (says("HTTP/1.1 500 no\r\n\r\n"), "it answers HTTP 500", False),
        (says(f"HTTP/1.1 403 {SECRET}\r\n\r\n"), "it answers HTTP 403", True),
        (says("HTTP/1.1 429 no\r\nRetry-After: 7\r\n\r\n"), "it answers HTTP 429", False),
        (says("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"), "it answers HTTP 302", True),
        (says(f"{SECRET}\r\n\r\n"), "it does not speak HTTP", False),
        (says("HTTP/1.1 200 OK\r\n" + "X: 1\r\n" * 500), "it does not speak HTTP", False),
        (lambda connection: None, "it ended the connection without an answer", False),
        (lambda connection: time.sleep(5), "no answer within 0 s", False),
        (drips, "no answer within 0 s", False),
    ],
)
def test_a_target_that_is_slow_dead_or_lies(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], None], reason: str, is_final: bool
) -> None:
    monkeypatch.setattr(notify, "TRY_SECONDS", 0.3)
    with hook(answer) as target, pytest.raises(NotSent) as error:
        began = time.monotonic()
        send(target.url, EVENT, "a-host")
    assert time.monotonic() - began < 3
    assert str(error.value) == f"http://127.0.0.1:{target.port}/...: {reason}"
    assert error.value.is_final is is_final and error.value.pause == (7 if "429" in reason else 0)
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(NotSent, match="Connection refused"):
        send(Url(f"http://127.0.0.1:{port}/{SECRET}"), EVENT, "a-host")


def test_one_target_that_hangs_delays_no_other_and_the_rest_is_sent_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "TRY_SECONDS", 30.0)
    said: list[str] = []
    with hook(lambda connection: time.sleep(30)) as slow, hook(OK) as quick:
        messenger = Messenger([slow.url, quick.url], "a-host", said.append)
        began = time.monotonic()
        for number in range(8):
            messenger.send(Event("champion", f"number {number}"))
        assert time.monotonic() - began < 1
        messenger.close(1.0)
        texts = [body["message"] for body in quick.bodies()]
    assert texts == [
        "number 0",
        "number 1",
        "number 2",
        "number 7 (4 more before it, since the last message)",
    ]
    assert time.monotonic() - began < 10 and said == []


def test_a_failing_target_is_tried_three_times_and_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "PAUSES", (0.0, 0.0))
    said: list[str] = []
    answers = iter([*["HTTP/1.1 503 no\r\n\r\n"] * 6, "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 403 no\r\n\r\n"])
    with hook(lambda connection: connection.sendall(next(answers).encode())) as target:
        messenger = Messenger([target.url], "a-host", said.append)
        for kind in ("champion", "rollback", "edge_found", "edge_lost"):
            messenger.send(Event(kind, "text"))
        end = time.monotonic() + 20
        while len(target.requests) < 8 and time.monotonic() < end:
            time.sleep(0.01)
        messenger.close(5.0)
    kinds = [body["event"] for body in target.bodies()]
    assert kinds == ["champion"] * 3 + ["rollback"] * 3 + ["edge_found", "edge_lost"]
    place = f"http://127.0.0.1:{target.port}/..."
    assert said == [
        f"the message 'New champion' was not sent to {place}: it answers HTTP 503",
        f"messages to {place} arrive again",
        f"the message 'Edge lost' was not sent to {place}: it answers HTTP 403",
    ]


def test_few_messages_of_a_kind_and_those_held_are_counted() -> None:
    now = [0.0]
    limiter = Limiter(lambda: now[0])
    sent = [limiter.admit(Event("restarted", str(number))) for number in range(6)]
    assert [[event.text for event in events] for events in sent] == [["0"], ["1"], ["2"], [], [], []]
    assert limiter.admit(Event("champion", "another kind"))
    now[0] = notify.PERIOD_SECONDS
    assert [event.text for event in limiter.due()] == ["5 (2 more before it, since the last message)"]
    assert limiter.due() == [] and limiter.due(all_of_them=True) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"https://user:{SECRET}@host.example:8443/{SECRET}?x={SECRET}#{SECRET}",
            "https://host.example:8443/...",
        ),
        (f"discord://{SECRET}/{SECRET}", "discord://..."),
        (f"https://[{SECRET}", "https://..."),
        (f"{SECRET}", "..."),
        (f"{SECRET} ://", "..."),
    ],
)
def test_a_url_shows_no_secret(text: str, shown: str) -> None:
    url = Url(text)
    for form in (str(url), repr(url), f"{url}", f"{[url]}", f"{url!r}"):
        assert SECRET.lower() not in form.lower()
    assert str(url) == shown and url.reveal() == text
    assert SECRET not in url.find_fault()
    with pytest.raises(TypeError):
        json.dumps([url])


def test_targets_are_those_of_the_setting_and_of_the_environment_each_once() -> None:
    one, two = Url("https://one.example/x"), Url("https://two.example/x")
    assert find_targets((one,), {"NOTIFY_URLS": f"{two.reveal()}\n  {one.reveal()} "}) == [one, two]
    assert find_targets((), {}) == []


def test_what_apprise_knows_needs_apprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    url = Url(f"discord://{SECRET}/{SECRET}")
    assert "pip install apprise" in url.find_fault()
    monkeypatch.setitem(__import__("sys").modules, "apprise", None)
    with pytest.raises(NotSent, match="pip install apprise"):
        send(url, EVENT, "a-host")
