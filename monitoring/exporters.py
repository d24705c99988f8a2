"""Where each epoch's figures go: ``metrics.jsonl``, TensorBoard's events beside it, and Prometheus if wanted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

Row = Mapping[str, Any]
NAME = "metrics.jsonl"
BYTES_PER_EPOCH = 4_096  # of metrics.jsonl, at most: how far back to read for so many epochs


class Telemetry:
    """Records figures. What cannot be written is a warning, once, and is tried again with the next epoch.

    Args:
        folder: ``log_dir``.
        prometheus_port: on 127.0.0.1; None: no endpoint. One that is taken is a warning.
        warn: told what went wrong, in one line.
    """

    def __init__(self, folder: Path, prometheus_port: int | None, warn: Callable[[str], None]) -> None:
        self._path = folder / NAME
        self._events = EventFile(folder)
        self._warn = warn
        self._failing: set[str] = set()
        self._endpoint: Endpoint | None = None
        if prometheus_port is not None:
            try:
                self._endpoint = Endpoint(prometheus_port)
            except OSError as error:
                warn(f"no Prometheus endpoint on port {prometheus_port}: {error.strerror}")

    def record(self, metrics: Row) -> None:
        """Keep one epoch's figures everywhere."""
        self._try("metrics.jsonl", lambda: self._append(metrics))
        self._try("TensorBoard's events", lambda: self._write_events(metrics))
        if self._endpoint is not None:
            self._endpoint.show(metrics)

    def close(self) -> None:
        """Close files and endpoint."""
        self._events.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _append(self, metrics: Row) -> None:
        # JSON has no word for what is not finite, and most readers refuse Python's.
        told = {name: value if _is_finite(value) else None for name, value in metrics.items()}
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **told}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped, allow_nan=False) + "\n")

    def _write_events(self, metrics: Row) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and _is_finite(v)}
        step = int(numbers.pop("transitions", 0))
        self._events.write(step, numbers)

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._failing:
                self._warn(f"{what} in {self._path.parent} cannot be written: {error.strerror or error}")
            self._failing.add(what)
        else:
            self._failing.discard(what)


def recorded(folder: Path, epochs: int, up_to_transitions: int) -> list[dict[str, Any]]:
    """Return the newest epochs in ``metrics.jsonl``, each once, up to where a start goes on.

    A file that another program has changed is no reason to stop: lines that are no epoch are left out.
    """
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), (folder / NAME).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - epochs * BYTES_PER_EPOCH))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("transitions"), int):
                    # What was recorded after the checkpoint that a later start went on from was taken back.
                    while found and found[-1]["transitions"] >= row["transitions"]:
                        found.pop()
                    found.append(row)
    return [row for row in found if row["transitions"] <= up_to_transitions][-epochs:]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


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


_numbers = count()  # files of one process in one second


class EventFile:
    """Scalars in a folder that TensorBoard reads. A file begins with the first figures.

    A start that goes on from a checkpoint, and a return to one, take back what was written of later steps:
    TensorBoard forgets every scalar from the new file's first step on, so that curves never run twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._last_step = -1

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one epoch's figures; they are in the file when this returns.

        Raises:
            OSError: the folder cannot be written; the next call begins a new file, for this one may be torn.
        """
        try:
            if self._file is None or step <= self._last_step:
                self.close()
                self._open(step)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._append(Event(step=step, summary=Summary(value=values)))
        except OSError:
            self.close()
            raise
        self._last_step = step

    def close(self) -> None:
        """Close the file, if one is open."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of what could not be written before, which was told
                file.close()

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (self._folder / name).open("xb")
        self._append(Event(step=step, file_version="brain.Event:2"))
        self._append(Event(step=step, session_log=SessionLog(status=SessionLog.START)))  # forgets later steps

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        assert self._file is not None
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()
