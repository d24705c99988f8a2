"""A loopback HTTP server with faults on demand, and a Progress that records its calls."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers


def ns(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


@dataclass
class Fault:
    """What goes wrong with requests whose path and query match; ``rows`` changes the rows instead."""

    path: str
    kind: str = "status"  # status hang drip truncate reset corrupt body rows
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    count: int | None = None
    rows: Callable[[Any], Any] = lambda rows: rows


class Notes:
    """A Progress that records its calls."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.summary = ""
        self.total: int | None = None
        self.units = 0
        self.num_bytes = 0

    def start(self, source: str, what: str, total: int | None) -> None:
        self.total = total

    def advance(self, source: str, units: int = 1, num_bytes: int = 0) -> None:
        self.units += units
        self.num_bytes += num_bytes

    def finish(self, source: str, summary: str) -> None:
        self.summary = summary

    def warn(self, source: str, message: str) -> None:
        assert "\n" not in message
        assert "http://" not in message, "a whole address may carry a key or a crumb"
        self.warnings.append(message)


class LoopbackServer:
    """Answers with ``plain``, unless a fault changes it."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()

    def plain(self, handler: BaseHTTPRequestHandler, faults: list[Fault]) -> Answer:
        """Answer as the vendor does; ``faults`` are those that change rows."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                try:
                    server.answer(self)
                except ConnectionError:  # the client gave up
                    self.close_connection = True

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append(handler.path)
            found = [
                fault for fault in self.faults if fault.count != 0 and re.search(fault.path, handler.path)
            ]
            for fault in found:
                if fault.count is not None:
                    fault.count -= 1
        status, body, headers = self.plain(handler, [fault for fault in found if fault.kind == "rows"])
        handler.close_connection = False
        for fault in found:
            if fault.kind == "hang":
                time.sleep(1.2)
                handler.close_connection = True
                return
            if fault.kind in ("status", "body"):
                status, body, headers = fault.status, fault.body, headers | fault.headers
                self.answered_with(fault)
            if fault.kind == "corrupt":
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]
            if fault.kind in ("truncate", "reset", "drip"):
                self._break(handler, fault.kind, status, body, headers)
                return
        self._send_head(handler, status, len(body), headers)
        handler.wfile.write(body)

    def answered_with(self, fault: Fault) -> None:
        """Count a fault that was used for an answer."""

    def _send_head(
        self, handler: BaseHTTPRequestHandler, status: int, size: int, headers: dict[str, str]
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(size))
        handler.end_headers()

    def _break(
        self, handler: BaseHTTPRequestHandler, kind: str, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        handler.close_connection = True
        self._send_head(handler, status, len(body), headers)
        if kind == "drip":
            for offset in range(20):
                handler.wfile.write(body[offset : offset + 1])
                handler.wfile.flush()
                time.sleep(0.1)
            return
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        if kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
