"""Where each epoch's metrics go: ``metrics.jsonl``, TensorBoard events beside it, and Prometheus if wanted."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, BinaryIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from monitoring.metrics_file import append_metrics, is_finite

# Imported where they are used: tensorboard's writer imports boto3, too, which takes a second.
if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from tensorboard.compat.proto.event_pb2 import Event

log = logging.getLogger("continuous_training")

Row = Mapping[str, Any]


class Telemetry:
    """Records metrics. What cannot be written is one warning, and is tried again with the next epoch.

    Args:
        folder: ``log_dir``.
        prometheus_port: on 127.0.0.1; None: no endpoint. A port that is taken is a warning.
        settings: shown by TensorBoard; without secrets.
    """

    def __init__(
        self, folder: Path, prometheus_port: int | None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._events = EventFile(folder, settings)
        self._failing: set[str] = set()
        self._endpoint: Endpoint | None = None
        if prometheus_port is not None:
            try:
                self._endpoint = Endpoint(prometheus_port)
            except OSError as error:
                log.warning(f"no Prometheus endpoint on port {prometheus_port}: {error.strerror}")

    def record(self, metrics: Row) -> None:
        """Write one epoch's metrics to every exporter."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and is_finite(v)}
        step = int(numbers.pop("transitions", 0))
        self._try("metrics.jsonl", lambda: append_metrics(self._folder, metrics))
        self._try("TensorBoard's events", lambda: self._events.write(step, numbers))
        if self._endpoint is not None:
            self._endpoint.show(metrics)

    def close(self) -> None:
        """Close files and endpoint."""
        self._events.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _try(self, target: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if target not in self._failing:
                log.warning(f"{target} in {self._folder} cannot be written: {error.strerror or error}")
            self._failing.add(target)
        else:
            self._failing.discard(target)


# --- TensorBoard --------------------------------------------------------------------------------------------

_file_numbers = count()  # of one process within one second


class EventFile:
    """Scalars in a folder that TensorBoard reads; a file begins with the first figures.

    Not a SummaryWriter: on a full disk its writer thread dies with a traceback, and events wait in a queue.

    When training resumes from a checkpoint, steps after it are written again. The new file then begins with a
    session start, at which TensorBoard drops every scalar from that step on, so that no curve doubles back.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self._folder, self._settings = folder, settings
        self._file: BinaryIO | None = None
        self._last_step = -1

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one epoch's figures; they are in the file when this returns.

        Raises:
            OSError: the folder cannot be written; the next call begins a new file, for this one may be torn.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

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
            with contextlib.suppress(OSError):  # an unwritten rest, which was reported before
                file.close()

    def _open(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        from monitoring.tensorboard_head import head_of

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        now, number = f"{int(time.time()):010d}", f"{next(_file_numbers):06d}"
        parts = (now, socket.gethostname(), str(os.getpid()), number)
        self._file = (self._folder / f"events.out.tfevents.{'.'.join(parts)}").open("xb")
        self._append(Event(step=step, file_version="brain.Event:2"))
        self._append(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        if self._settings:
            for summary in head_of(self._settings, self._folder.name):
                self._append(Event(step=0, summary=summary))

    def _append(self, event: Event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        assert self._file is not None
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()


# --- Prometheus ---------------------------------------------------------------------------------------------

PREFIX = "continuous_training_"
POSITION = re.compile(r"(rollout/in_position)_(.+)")
OCCASIONAL = ("exam/", "record/", "plasticity/")  # not in every epoch: the newest ones stay
COUNTERS = {"transitions"}  # only grow; a return to a checkpoint looks like a restart


def metric_families(metrics: Row, recorded_at: float) -> list[Metric]:
    """Return metrics as Prometheus knows them; strings are left out, what is not finite is NaN.

    Args:
        metrics: one epoch's figures, by the names of docs/metrics.md.
        recorded_at: seconds since 1970.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for metric, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            continue
        position = POSITION.fullmatch(metric)
        stem = position[1] if position else metric
        name = PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", stem)
        if name not in families:
            kind = CounterMetricFamily if metric in COUNTERS else GaugeMetricFamily
            text = f"{stem}{'_X' if position else ''} of docs/metrics.md"
            families[name] = kind(name, text, labels=["position"] if position else [])
        number = float(value) if value is not None and math.isfinite(value) else math.nan
        families[name].add_metric([position[2]] if position else [], number)
    stamp = PREFIX + "last_epoch_timestamp_seconds"
    return [*families.values(), GaugeMetricFamily(stamp, "When these figures were recorded.", recorded_at)]


class Endpoint:
    """Serves ``/metrics`` on 127.0.0.1 from daemon threads. A context manager.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int) -> None:
        """Take the port; 0 takes any free one."""
        from prometheus_client import CollectorRegistry, make_wsgi_app

        self._families: list[Metric] = []
        self._kept: dict[str, Any] = {}
        registry = CollectorRegistry()
        registry.register(self)
        self._server = make_server("127.0.0.1", port, make_wsgi_app(registry), _Server, _Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def collect(self) -> Iterator[Metric]:
        """Yield what is served; prometheus_client calls it for every request."""
        yield from self._families

    def show(self, metrics: Row) -> None:
        """Serve these figures from now on, beside those of the newest exam."""
        self._kept |= {name: value for name, value in metrics.items() if name.startswith(OCCASIONAL)}
        self._families = metric_families({**self._kept, **metrics}, time.time())

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # On Windows, reuse would let two programs listen on one port.
    allow_reuse_address = sys.platform != "win32"

    def server_bind(self) -> None:
        # WSGIServer would look up this machine's full name, which takes seconds where no name server answers.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up before the answer."""


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # for a client that sends nothing

    def log_message(self, *_: object) -> None:
        """Stay silent: standard error belongs to the training."""
