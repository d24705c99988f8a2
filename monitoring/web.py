"""The page over HTTP: read-only, few connections at a time, few answers a second, no file but those it lists.

It runs in a process of its own (commands/companion.py) at a low priority. What keeps it harmless: one page, made
every three seconds at most, however many ask; a connection that is slow gives way to the next; a report is looked
up among those that exist, so that no path is ever made from a request.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import unquote, urlsplit

from monitoring import page, summary
from monitoring.attach import NothingPublished
from monitoring.state import DashboardState

MOST_CONNECTIONS = 32  # at a time; the oldest gives way to a further one
ANSWERS_PER_SECOND = 10.0  # further requests wait in the system's queue
BURST = 50.0
IDLE_SECONDS = 5.0
FRESH_SECONDS = 3.0
MOST_REPORTS = 30
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# A report has a script of its own, which sorts tables; it gets no origin, so it cannot read the page.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "sandbox allow-scripts"
)


class Website:
    """What is served: the page, ``status.json``, and the reports, as bytes that are a few seconds old at most."""

    def __init__(self, read: Callable[[], DashboardState]) -> None:
        """``read`` returns the training's state, or raises NothingPublished."""
        self._read = read
        self._lock = threading.Lock()
        self._made = float("-inf")
        self._page = self._status = b""
        self._reports: dict[str, Path] = {}

    def page(self) -> bytes:
        """Return the page.

        Raises:
            NothingPublished: there is no training to show yet.
        """
        self._refresh()
        return self._page

    def status(self) -> bytes:
        """Return ``status.json``.

        Raises:
            NothingPublished: there is no training to show yet.
        """
        self._refresh()
        return self._status

    def report(self, name: str) -> bytes | None:
        """Return a report by the name of its folder, None if there is none."""
        with self._lock:
            path = self._reports.get(name)
        try:
            return path.read_bytes() if path else None
        except OSError:  # it was removed meanwhile
            return None

    def _refresh(self) -> None:
        with self._lock:
            if time.monotonic() - self._made < FRESH_SECONDS:
                return
            state = self._read()
            self._reports = find_reports(Path(state.report_dir)) if state.report_dir else {}
            self._page = page.render_page(state, list(self._reports))
            self._status = json.dumps(summary.as_json(state), indent=1).encode()
            self._made = time.monotonic()


def find_reports(folder: Path) -> dict[str, Path]:
    """Return the reports within a folder by the name of their own, the newest first; no links to elsewhere."""
    try:
        root = folder.resolve()
        found = [path for path in root.glob("*/report.html") if path.resolve() == path and path.is_file()]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return {}
    return {path.parent.name: path for path in found[:MOST_REPORTS]}


class PageServer(ThreadingMixIn, HTTPServer):
    """Serves a Website from daemon threads. A context manager.

    Args:
        website: what is served.
        host: an address of this machine.
        port: 0 takes any free one.
        token: who lacks it is refused; "": everybody on this machine is let in, if the browser asked for a name
            of this machine (another site's name that leads here is a trick to read the page).
        report: called with a line for each fault of the server itself.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
    """

    daemon_threads = True
    request_queue_size = 32
    # On Windows, reuse would let two programs listen on one port.
    allow_reuse_address = sys.platform != "win32"

    def __init__(
        self, website: Website, host: str, port: int, token: str, report: Callable[[str], None]
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.website, self.token = website, token
        self._report = report
        self._connections: dict[Any, None] = {}  # open ones, the oldest first
        self._guard = threading.Lock()
        self._allowance, self._counted = BURST, time.monotonic()
        super().__init__((host, port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.2,), name="page", daemon=True)

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def server_bind(self) -> None:
        """Take the port, without HTTPServer's look-up of this machine's full name, which may take seconds."""
        super(HTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept the next connection, when it is time."""
        now = time.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._counted) * ANSWERS_PER_SECOND) - 1.0
        self._counted = now
        if self._allowance < 0:
            time.sleep(-self._allowance / ANSWERS_PER_SECOND)
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own; where there are too many, the oldest connection ends."""
        with self._guard:
            self._connections[request] = None
            oldest = next(iter(self._connections)) if len(self._connections) > MOST_CONNECTIONS else None
            if oldest is not None:
                del self._connections[oldest]
                _hang_up(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._guard:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up; report what else went wrong."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self._report(f"the page failed: {type(error).__name__}: {error}")

    def admits(self, headers: Message) -> bool:
        """Whether a request has the token, compared in constant time, or needs none."""
        if not self.token:
            return _host_name(headers.get("Host", "")) in (*LOCAL_NAMES, self.server_name)
        return hmac.compare_digest(_token_of(headers.get("Authorization", "")), self.token.encode())


class _Handler(BaseHTTPRequestHandler):
    """One request per connection."""

    server: PageServer
    server_version, sys_version = "continuous-training", ""
    timeout = IDLE_SECONDS
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        """Answer with the page, status.json, or a report."""
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        """Answer as a GET without its content."""
        self._answer(has_body=False)

    def log_message(self, *_: object) -> None:
        """Stay silent: standard error belongs to the training."""

    def _answer(self, has_body: bool) -> None:
        status, kind, policy, body = self._find()
        self.send_response(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="Continuous Training: any name, the token"')
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def _find(self) -> tuple[HTTPStatus, str, str, bytes]:
        html, text = "text/html; charset=utf-8", "text/plain; charset=utf-8"
        website, nothing = self.server.website, "default-src 'none'"
        if not self.server.admits(self.headers):
            if self.server.token:
                return HTTPStatus.UNAUTHORIZED, text, nothing, b"The token is missing or wrong.\n"
            hint = b"Ask for 127.0.0.1 or localhost; for other names set web_host and WEB_TOKEN.\n"
            return HTTPStatus.FORBIDDEN, text, nothing, hint
        path = unquote(urlsplit(self.path).path)
        try:
            if path == "/":
                return HTTPStatus.OK, html, page.POLICY, website.page()
            if path == "/status.json":
                return HTTPStatus.OK, "application/json", nothing, website.status()
        except NothingPublished as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, text, nothing, f"{error}\n".encode()
        if path.startswith("/reports/") and (body := website.report(path.removeprefix("/reports/"))):
            return HTTPStatus.OK, html, REPORT_POLICY, body
        return HTTPStatus.NOT_FOUND, text, nothing, b"There is no such page.\n"


def _token_of(authorization: str) -> bytes:
    """Return the token of a header: ``Bearer TOKEN``, or ``Basic`` with it as the password."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _host_name(header: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended by itself
        return
