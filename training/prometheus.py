"""The newest figures for Prometheus, over HTTP on this machine alone: text exposition format 0.0.4.

Format: github.com/prometheus/docs, docs/instrumenting/exposition_formats.md. Names are those of
docs/metrics.md with ``continuous_training_`` in front and underscores.
"""

from __future__ import annotations

import math
import re
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREFIX = "continuous_training_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
POSITION = re.compile(r"(rollout/in_position)_(.+)")
COUNTERS = {"transitions"}  # they only grow; a return to a checkpoint reads as a restart


def exposition(metrics: Mapping[str, Any], recorded_at: float) -> str:
    """Return metrics as Prometheus reads them; what is no number is left out, what is not finite is NaN.

    Args:
        metrics: one epoch's figures, by the names of docs/metrics.md.
        recorded_at: when they were recorded, seconds since 1970.
    """
    families: dict[str, list[str]] = {}
    helps: dict[str, str] = {}
    for metric, value in (*metrics.items(), ("last_epoch_timestamp_seconds", recorded_at)):
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            continue
        position = POSITION.fullmatch(metric)
        told = f"{position[1]}_X" if position else metric
        label = f'{{position="{position[2]}"}}' if position else ""
        stem = re.sub(r"[^a-zA-Z0-9_]", "_", position[1] if position else metric)
        name = PREFIX + stem + ("_total" if metric in COUNTERS else "")
        helps[name] = (
            "When these figures were recorded." if value is recorded_at else f"{told} of docs/metrics.md"
        )
        number = float(value) if value is not None and math.isfinite(value) else math.nan
        families.setdefault(name, []).append(f"{name}{label} {'NaN' if math.isnan(number) else repr(number)}")
    lines = []
    for name, samples in families.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {helps[name]}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"


class Endpoint:
    """Serves ``/metrics`` on 127.0.0.1 from a thread of its own. A context manager.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int) -> None:
        """Take the port; 0 takes any free one."""
        self._text = ""
        self._server = _Server(("127.0.0.1", port), _handler(lambda: self._text))
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Serve these figures from now on."""
        self._text = exposition(metrics, time.time())

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # On Windows, reuse would let two programs listen on one port.
    allow_reuse_address = sys.platform != "win32"

    def server_bind(self) -> None:
        # HTTPServer would look up this machine's full name, which takes seconds where no name server answers.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing to tell: somebody asked and went away before the answer."""


def _handler(text: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "continuous_training"
        sys_version = ""
        timeout = 10.0  # for a caller that says nothing

        def do_GET(self) -> None:
            found = self.path.split("?")[0] in ("/", "/metrics")
            body = (text() if found else "The figures are at /metrics\n").encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent: standard error belongs to the training."""

    return Handler
