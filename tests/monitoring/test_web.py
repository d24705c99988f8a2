"""The page over real sockets: what it shows, whom it refuses, and what a bad client cannot do."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from monitoring import web
from monitoring.attach import Attached
from monitoring.metrics_file import append_metrics
from monitoring.web import PageServer, Website
from tests.monitoring.published_training import exam, hold_exams, publish
from tests.monitoring.test_dashboard import row

TOKEN = "correct-horse-battery"
EVIL = '<script>alert("x")</script>'


class Site:
    """A page that is served, and what its server said."""

    def __init__(self, folder: Path, port: int, said: list[str]) -> None:
        self.folder, self.port, self.said = folder, port, said

    def get(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        return self.ask(f"{method} {path} HTTP/1.1", {"Host": f"127.0.0.1:{self.port}"} | headers)

    def ask(self, line: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        with closing(self.connect()) as connection:
            connection.sendall(f"{line}\r\n{fields}\r\n".encode())
            answer = b""
            while part := connection.recv(65_536):
                answer += part
        head, _, body = answer.decode().partition("\r\n\r\n")
        first, *rest = head.split("\r\n")
        status = re.match(
            r"(?:HTTP/\S+ )?(\d+)", first
        )  # to a request of no version, an answer without a head
        return int(status[1]) if status else 0, dict(row.split(": ", 1) for row in rest if ": " in row), body

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def site(folder: Path, token: str = "") -> Iterator[Site]:
    said: list[str] = []
    attached = Attached(folder / "logs", folder / "checkpoints")
    with PageServer(Website(attached.read), "127.0.0.1", 0, token, said.append) as server:
        yield Site(folder, server.server_port, said)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training with two exams, a report, and lines."""
    publish(tmp_path, lines=("Saved checkpoints/run1_epoch25.pt",))
    hold_exams(tmp_path, exam(25, decision="promoted"), exam(50))
    report = tmp_path / "reports" / "run1_epoch25" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<h1>A report</h1>")
    return tmp_path


class Whole(html.parser.HTMLParser):
    """Checks that every element is closed, and collects what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "action") or name.startswith("on")
        ]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_page_says_what_matters_and_loads_nothing(training: Path) -> None:
    with site(training) as served:
        status, headers, body = served.get()
    assert status == 200 and headers["Cache-Control"] == "no-store"
    for text in (
        "<h1>No edge</h1>",
        "Its mean day is between -0.21% and +0.35%, not surely above 0",
        "Policy +2.1%, buy and hold +8.7%, Sharpe 1.9 [-0.2, 3.1]",
        "run1_epoch25.pt since 2026-11-25 10:25 UTC",
        "run 1 of 2, epoch 3 of 200",
        "Reward in training, bp per bar",
        "Return on held-out days, by exam",
        "binance: newest bar 60 min old, 26 symbols",
        "no metric is outside its range",
        "Saved checkpoints/run1_epoch25.pt",
        '<a href="reports/run1_epoch25">run1_epoch25</a>',
    ):
        assert text in body, text
    found = Whole()
    found.feed(body)
    assert found.open == [] and found.loads == [] and found.tags.count("script") == 1
    assert "https://" not in body and "http://" not in body
    assert "default-src 'none'; script-src 'sha256-" in headers["Content-Security-Policy"]


def test_the_record_is_said_and_drawn_once_there_is_one(training: Path) -> None:
    for run, earned in ((2, 1.0), (3, -0.5)):
        figures = {
            "record/return_percent": earned,
            "record/buy_and_hold_percent": 2.0,
            "record/days": 9.0 * run,
        }
        append_metrics(training / "logs", row(run, run=run, transitions=10**9 * run, **figures))
    with site(training) as served:
        _, _, body = served.get()
    assert "Record: champions -0.5% on 27 days that came after them, buy and hold +2.0%" in body
    assert (
        "Record, percent on days that came later" in body and "<span>run 2</span><span>run 3</span>" in body
    )


def test_the_script_is_the_one_that_the_policy_allows(training: Path) -> None:
    import hashlib

    with site(training) as served:
        _, headers, body = served.get()
    (script,) = re.findall(r"<script>(.*?)</script>", body, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in headers["Content-Security-Policy"]


def test_html_in_a_symbol_a_file_name_or_a_line_is_text(training: Path) -> None:
    publish(
        training,
        lines=(f"dropped, too few bars: {EVIL}",),
        symbols={EVIL: 3},
        newest_ns={EVIL: time.time_ns()},
        device=EVIL,
        host=EVIL,
        phase=EVIL,
        stopping=EVIL,
    )
    hold_exams(
        training,
        exam(25, checkpoint=EVIL, decision="promoted", verdict_reason=EVIL),
        exam(26, checkpoint=EVIL),
    )
    other = training / "reports" / '"><img src=x onerror=alert(1)>'
    other.mkdir()
    (other / "report.html").write_text("x")
    with site(training) as served:
        _, _, body = served.get()
        link = re.findall(r'href="(reports/[^"]*img[^"]*)"', body)
        assert served.get("/" + link[0])[2] == "x"
        assert json.loads(served.get("/status.json")[2])["device"] == EVIL
    found = Whole()
    found.feed(body)
    assert found.loads == [] and found.tags.count("script") == 1 and "img" not in found.tags
    assert body.count("&lt;script&gt;") >= 6


def test_before_anything_is_published_it_says_so(tmp_path: Path) -> None:
    with site(tmp_path) as served:
        status, _, body = served.get()
        assert status == 503 and "no training has run with this log_dir" in body
        publish(tmp_path)
        assert served.get()[0] == 200


# --- who is let in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        "Basic !",
        "\xe9" * 9,
    ],
)
def test_without_the_token_nothing_is_shown(training: Path, authorization: str) -> None:
    with site(training, TOKEN) as served:
        for path in ("/", "/status.json", "/reports/run1_epoch25", "/nothing"):
            status, headers, body = served.get(path, Authorization=authorization)
            assert status == 401 and body == "The token is missing or wrong.\n"
            assert headers["WWW-Authenticate"].startswith("Basic ")


def test_with_the_token_a_browser_and_a_program_are_let_in(
    training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = web.hmac.compare_digest
    monkeypatch.setattr(web.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    as_browser = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    with site(training, TOKEN) as served:
        assert served.get(Authorization=f"Basic {as_browser}", Host="elsewhere.example")[0] == 200
        assert served.get(Authorization=f"Bearer {TOKEN}")[0] == 200
        assert served.get(Authorization="Bearer wrong")[0] == 401
    assert compared == [(TOKEN.encode(),) * 2] * 2 + [(b"wrong", TOKEN.encode())]  # in constant time


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8080", 200),
        ("[::1]:1", 200),
        ("evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_another_name_that_leads_here_is_refused(training: Path, host: str, status: int) -> None:
    with site(training) as served:
        assert served.get(Host=host)[0] == status


# --- bad clients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/reports/../logs/train.log",
        "/reports/..%2flogs%2ftrain.log",
        "/reports/%2e%2e/%2e%2e/secret",
        "/reports/run1_epoch25/../../secret",
        "/reports/run1_epoch25/report.html",
        "/reports/",
        "/reports/link",
        "/reports/run1_epoch25%00",
        "//etc/passwd",
        "/page.html",
        "/logs/metrics.jsonl",
        "http://127.0.0.1/secret",
    ],
)
def test_no_path_leads_out(training: Path, path: str) -> None:
    (training / "secret").write_text("secret")
    (training / "elsewhere").mkdir()
    (training / "elsewhere" / "report.html").write_text("secret")
    (training / "reports" / "link").symlink_to(training / "elsewhere")
    with site(training) as served:
        assert "link" not in served.get()[2]
        status, _, body = served.get(path)
    assert status == 404 and "secret" not in body


def test_a_report_is_shown_where_it_can_reach_nothing(training: Path) -> None:
    with site(training) as served:
        served.get()
        status, headers, body = served.get("/reports/run1_epoch25")
    assert (status, body) == (200, "<h1>A report</h1>")
    assert headers["Content-Security-Policy"].endswith("sandbox allow-scripts")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("POST / HTTP/1.1", 501),
        ("DELETE /reports/run1_epoch25 HTTP/1.1", 501),
        ("GET / HTTP/9.9", 505),
        ("GET", 400),
        ("GET /" + "a" * 70_000 + " HTTP/1.1", 414),
    ],
)
def test_it_is_read_only_and_refuses_nonsense(training: Path, line: str, status: int) -> None:
    with site(training) as served:
        assert served.ask(line, {"Host": "localhost"})[0] == status
        assert served.get("/", method="HEAD")[::2] == (200, "")
        assert served.get()[0] == 200
    assert served.said == []


def test_slow_readers_and_silent_ones_keep_nobody_out(
    training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_CONNECTIONS", 4)
    with site(training) as served:
        silent = [served.connect() for _ in range(8)]
        for connection in silent[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(3):
            began = time.monotonic()
            assert served.get()[0] == 200
            assert time.monotonic() - began < 4  # less than a silent one may take
        assert silent[0].recv(1) == b""  # the oldest gave way
        assert threading.active_count() < 20
        for connection in silent:
            connection.close()


def test_a_thousand_requests_at_once_make_one_page(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    render = web.page.render_page
    monkeypatch.setattr(web, "ANSWERS_PER_SECOND", 1e6)
    monkeypatch.setattr(web, "MOST_CONNECTIONS", 500)
    monkeypatch.setattr(web, "FRESH_SECONDS", 3600.0)
    monkeypatch.setattr(web.page, "render_page", lambda *state: made.append(1) or render(*state))
    with site(training) as served, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: served.get()[0], range(1_000)))
    assert answers == [200] * 1_000 and len(made) == 1 and served.said == []


def test_answers_are_limited_in_number(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ANSWERS_PER_SECOND", 50.0)
    monkeypatch.setattr(web, "BURST", 5.0)
    with site(training) as served, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        assert set(pool.map(lambda _: served.get()[0], range(45))) == {200}
        assert time.monotonic() - began >= 0.75


def test_a_port_that_is_taken_is_an_error_of_the_system(training: Path) -> None:
    with site(training) as served, pytest.raises(OSError, match="in use"):
        PageServer(Website(lambda: None), "127.0.0.1", served.port, "", print)  # type: ignore[arg-type,return-value]


@pytest.mark.skipif(os.name == "nt", reason="IPv6 of POSIX")
def test_it_can_be_served_over_ipv6(training: Path) -> None:
    attached = Attached(training / "logs", training / "checkpoints")
    try:
        server = PageServer(Website(attached.read), "::1", 0, "", print)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, socket.create_connection(("::1", server.server_port), timeout=30) as connection:
        connection.sendall(b"GET /status.json HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 200 OK")
