"""The companion as a process: it serves the page, sends messages of what it finds and hears, and ends."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import commands.companion
from commands.check.watchers import check_watchers
from commands.cli import flags_of
from continuous_training import Settings
from monitoring import attach
from monitoring.events import TITLES
from runtime.companion import FAREWELL, Companion
from tests.monitoring.published_training import exam, hold_exams, publish
from tests.monitoring.test_notify import OK, SECRET, Hook, hook, says
from tests.program import ALONE, PATIENCE, ROOT, environment
from tests.runtime.test_supervisor import wait_for
from training import validation
from training.setting_types import recorded


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def companion(folder: Path, target: Hook, port: int) -> Iterator[Companion]:
    flags = ["--log-dir", str(folder / "logs"), "--checkpoint-dir", str(folder / "checkpoints")]
    words = [sys.executable, *ALONE, "companion", *flags, "--web-port", str(port)]
    with (folder / "errors").open("wb") as errors:
        child = Companion(words, environment(NOTIFY_URLS=target.url.reveal(), PYTHONPATH=str(ROOT)), errors)
        os.chdir(ROOT)
        with child:
            child.start()
            yield child
    assert (folder / "errors").read_bytes() == b""


def page(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_it_serves_sends_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path)
    hold_exams(tmp_path, exam(25))
    with hook(OK) as target, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with companion(tmp_path, target, port) as child:
            log = tmp_path / "logs" / "train.log"
            wait_for(lambda: "no page at 127.0.0.1" in log.read_text())
            taken.close()  # what had the port has ended
            wait_for(lambda: "<h1>No edge</h1>" in page(port))
            assert child._process is not None
            process = psutil.Process(child._process.pid)
            assert not any("torch" in Path(file.path).name for file in process.memory_maps())
            hold_exams(tmp_path, exam(25), exam(50, decision="promoted"))
            wait_for(lambda: target.requests)
            child.send("restarted", "Training died: a worker was killed by SIGKILL.", 3)
            wait_for(lambda: len(target.requests) == 2)
            assert SECRET not in " ".join(process.cmdline())
            child.send("gave_up", "Giving up.")
    assert [(body["event"], body["count"]) for body in target.bodies()] == [
        ("champion", 1),
        ("restarted", 3),
        ("gave_up", 1),
    ]
    assert SECRET not in log.read_text() and f"The page: http://127.0.0.1:{port}/" in log.read_text()


@pytest.mark.drill
def test_everything_that_the_page_lists_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a death of the owner and the test message, which have tests of their own."""
    monkeypatch.setattr(attach, "DISK_SECONDS", 0.0)
    monkeypatch.setattr(commands.companion, "lower_priority", lambda niceness: None)
    publish(tmp_path)
    hold_exams(tmp_path, exam(25))
    settings = Settings(log_dir=str(tmp_path / "logs"), checkpoint_dir=str(tmp_path / "checkpoints"))
    found = {"verdict": "edge", "verdict_reason": "surely above 0"}
    three_days_old = {"binance": time.time_ns() - 3 * 86_400 * 10**9}

    def fill_the_disk() -> None:
        with (tmp_path / "checkpoints" / "run1_epoch50.pt").open("wb") as file:
            file.truncate(2**42)  # sparse: 4 TB, of which two more do not fit

    steps = {
        "champion": lambda: hold_exams(tmp_path, exam(25), exam(50, decision="promoted")),
        "edge_found": lambda: hold_exams(tmp_path, exam(25), exam(50), exam(75, **found)),
        "edge_lost": lambda: hold_exams(tmp_path, exam(25), exam(50), exam(75, **found), exam(100)),
        "source_dead": lambda: publish(tmp_path, newest_ns=three_days_old, days_late={"binance": 3.0}),
        "disk_short": fill_the_disk,
        "rollback": lambda: publish(tmp_path, rollbacks=1),
        "run_complete": lambda: publish(tmp_path, run=2, epoch=0),
    }
    reader, writer = os.pipe()
    with hook(OK) as target, os.fdopen(reader) as words, os.fdopen(writer, "w", buffering=1) as owner:
        environment = {"NOTIFY_URLS": target.url.reveal()}
        watching = threading.Thread(target=commands.companion.run, args=(settings, environment, words))
        watching.start()
        for number, kind in enumerate(
            ("restarted", "gave_up"), 1
        ):  # the second one is sent after a first look
            owner.write(json.dumps({"event": kind, "text": "a worker died", "count": 2}) + "\n")
            wait_for(lambda number=number: len(target.requests) == number)
        for number, (kind, happen) in enumerate(steps.items(), 3):
            happen()
            wait_for(lambda number=number: len(target.requests) == number)
            assert target.bodies()[-1]["event"] == kind
        owner.write(json.dumps({"event": FAREWELL}) + "\n")
        owner.close()
        watching.join(PATIENCE)
    assert {body["event"] for body in target.bodies()} == TITLES.keys() - {"killed", "test"}


def test_an_owner_that_is_killed_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(commands.companion, "lower_priority", lowered.append)
    publish(tmp_path)
    settings = Settings(log_dir=str(tmp_path / "logs"), checkpoint_dir=str(tmp_path / "checkpoints"))
    with hook(OK) as target:
        commands.companion.run(settings, {"NOTIFY_URLS": target.url.reveal()}, ['{"cut'])
    (body,) = target.bodies()
    assert body["event"] == "killed" and "Nothing restarts it" in body["message"]
    assert lowered == [10]


@pytest.mark.parametrize(
    ("changes", "environment", "wrong"),
    [
        ({"web_host": "0.0.0.0"}, {}, ""),
        ({"web_port": 8080}, {}, ""),
        ({"web_port": 8080, "web_host": "0.0.0.0"}, {"WEB_TOKEN": "x" * 16}, ""),
        (
            {"web_port": 8080, "web_host": "0.0.0.0"},
            {},
            "must have 16 characters or more; make one with python",
        ),
        ({"web_port": 8080, "web_host": "::"}, {"WEB_TOKEN": SECRET[:15]}, "of under 16 characters"),
        ({"web_port": 8080}, {"WEB_TOKEN": SECRET[:15]}, "of under 16 characters"),
        ({}, {"NOTIFY_URLS": f"https://h.example/{SECRET} ftp//{SECRET}"}, "has ..., which must be a URL"),
    ],
)
def test_who_may_read_and_what_is_told_is_checked_before_a_start(
    changes: dict[str, Any], environment: dict[str, str], wrong: str
) -> None:
    settings = Settings(**changes)
    if not wrong:
        return validation.check_watchers(settings, environment)
    with pytest.raises(ValueError, match=re.escape(wrong)) as error:
        validation.check_watchers(settings, environment)
    assert SECRET[:15] not in str(error.value)
    return None


def test_check_says_what_is_watched_and_sends_a_test(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        hook(OK) as target,
        hook(says("HTTP/1.1 404 no\r\n\r\n")) as wrong,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        settings = Settings(notify=(target.url.reveal(), wrong.url.reveal()), web_port=taken.getsockname()[1])
        lines = [(line.level, line.text) for line in check_watchers(settings, {}, sends_test=True)]
        asked = [line.text for line in check_watchers(settings, {}, sends_test=False)]
    assert [body["event"] for body in target.bodies()] == ["test"]
    assert [level for level, _ in lines] == ["warning", "OK", "warning"]
    assert "cannot be used now: Address already in use; choose another --web-port" in lines[0][1]
    assert lines[1][1] == f"http://127.0.0.1:{target.port}/... took the test message"
    assert lines[2][1] == f"not sent to http://127.0.0.1:{wrong.port}/...: it answers HTTP 404"
    assert "go to http" in asked[1] and SECRET not in str([lines, asked, settings, capsys.readouterr()])
    assert [line.level for line in check_watchers(Settings(), {}, sends_test=True)] == ["warning"]


def test_settings_show_no_secret_and_pass_none_on(tmp_path: Path) -> None:
    url = f"https://user:{SECRET}@host.example/{SECRET}"
    settings = Settings(notify=[url], checkpoint_dir=str(tmp_path))
    with pytest.raises(ValueError, match="must be a URL") as error:
        Settings(notify=(f"{SECRET} {SECRET}",))
    with pytest.raises(ValueError, match="a tuple of URLs") as other:
        Settings(notify=url)  # type: ignore[arg-type]
    shown = f"{settings} {settings!r} {error.value} {other.value} {flags_of(settings)} {recorded(settings)}"
    assert SECRET not in shown and "https://host.example/..." in shown
    assert settings.notify[0].reveal() == url
