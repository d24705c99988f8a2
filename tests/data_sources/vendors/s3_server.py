"""A real S3 service on loopback: moto over HTTP, behind a front that counts requests and breaks answers.

The front hands requests on as they are, Host and Authorization included, so that signatures still hold.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import http.client
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import boto3
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

BUCKET = "flatfiles"
STOCKS = "us_stocks_sip/minute_aggs_v1"
CRYPTO = "global_crypto/minute_aggs_v1"
HEADER = "ticker,volume,open,close,high,low,window_start,transactions"
WEB_PAGE = b"<html><head><title>Sign in</title></head><body><p>Welcome to the hotel</p></body></html>"


@dataclass
class Fault:
    """What to do to the requests whose path and query match ``path``, for ``count`` of them.

    ``status`` answers so instead of asking moto; ``page`` answers 200 with a web page; ``cut`` and ``reset``
    send half of the body under the full Content-Length and then close or reset; ``damage`` changes the body;
    ``chunked`` sends it without its length, as some proxies do; ``drip`` sends a byte every 50 ms; ``drop``
    closes without an answer; ``hang`` never answers (until the front is stopped).
    """

    kind: Literal["status", "page", "cut", "reset", "damage", "chunked", "drip", "drop", "hang"]
    path: str = "gz"
    count: float = float("inf")
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    damage: Callable[[bytes], bytes] = bytes


class S3Server:
    """The service. ``log`` holds (method, path and query, status) of every request that came to the front."""

    def __init__(self) -> None:
        self.moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.moto.start()
        self.moto_address = self.moto.get_host_and_port()
        self._owners: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                front._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._front = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._front.daemon_threads = True
        threading.Thread(target=self._front.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._front.server_address[1]}"

    def stop(self) -> None:
        self.stopping.set()
        self._front.shutdown()
        self._front.server_close()
        self.moto.stop()

    def empty(self) -> None:
        """Forget objects, users, faults and the log; make the empty bucket."""
        self.faults.clear()
        host, port = self.moto_address
        connection = http.client.HTTPConnection(host, port)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.close()
        self.owner("s3").create_bucket(Bucket=BUCKET)
        self.log.clear()
        self.most_at_once = 0

    def owner(self, service: str):
        """A client of moto itself, past the front."""
        if service not in self._owners:
            host, port = self.moto_address
            self._owners[service] = boto3.client(
                service,
                endpoint_url=f"http://{host}:{port}",
                region_name="us-east-1",
                aws_access_key_id="owner",
                aws_secret_access_key="owner",
            )
        return self._owners[service]

    def put(self, key: str, body: bytes) -> None:
        self.owner("s3").put_object(Bucket=BUCKET, Key=key, Body=body)

    def delete(self, key: str) -> None:
        self.owner("s3").delete_object(Bucket=BUCKET, Key=key)

    def new_user(self, denied: list[str]) -> tuple[str, str]:
        """Return (key id, secret) of a user who may list all and read all but ``denied``: a plan."""
        iam = self.owner("iam")
        iam.create_user(UserName="reader")
        statements = [
            {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
            *(
                {"Effect": "Deny", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/{key}"}
                for key in denied
            ),
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        iam.put_user_policy(UserName="reader", PolicyName="plan", PolicyDocument=policy)
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    @contextlib.contextmanager
    def signatures_checked(self) -> Iterator[None]:
        """From here on moto verifies SigV4 signatures and policies."""
        before = settings.INITIAL_NO_AUTH_ACTION_COUNT
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        ActionAuthenticatorMixin.request_count = 0
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = before

    def gets(self) -> list[str]:
        """Keys of the requested objects, in order, repeats included."""
        return [path.split(f"/{BUCKET}/")[1].split("?")[0] for _, path, _ in self.log if ".csv.gz" in path]

    def lists(self) -> list[str]:
        return [path for _, path, _ in self.log if "list-type=2" in path]

    def _fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.path, path):
                    fault.count -= 1
                    return fault
        return None

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        fault = self._fault_for(request.path)
        if fault and fault.kind == "hang":
            request.close_connection = True
            self.stopping.wait()
            return
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if fault is None or fault.kind in ("cut", "reset", "damage", "chunked", "drip"):
                status, headers, body = self._asked_of_moto(request)
            else:
                status, headers, body = self._made_up(fault)
        finally:
            with self._lock:  # before the last byte goes out, upon which the client may send its next
                self._at_once -= 1
        with self._lock:
            self.log.append((request.command, request.path, status))
        self._send(request, fault, status, headers, body)

    def _asked_of_moto(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.moto_address, timeout=30)
        try:
            length = int(request.headers.get("Content-Length") or 0)
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.rfile.read(length) if length else None)
            answer = connection.getresponse()
            body = answer.read()
            dropped = ("connection", "content-length", "transfer-encoding", "date", "server")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
            return answer.status, headers, body
        finally:
            connection.close()

    def _made_up(self, fault: Fault) -> tuple[int, dict[str, str], bytes]:
        if fault.kind == "page":
            return 200, {"Content-Type": "text/html"}, WEB_PAGE
        return fault.status, fault.headers, b""

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        fault: Fault | None,
        status: int,
        headers: dict[str, str],
        body: bytes,
    ) -> None:
        request.close_connection = fault is not None
        if fault and fault.kind == "drop":
            return
        if fault and fault.kind == "damage":
            body = fault.damage(body)
        with contextlib.suppress(ConnectionError):  # the client may have gone
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name, value)
            if fault and fault.kind == "chunked":
                request.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            else:
                request.send_header("Content-Length", str(len(body)))
            if (
                request.close_connection
            ):  # announced, else the client may send its next request while we close
                request.send_header("Connection", "close")
            request.end_headers()
            if fault and fault.kind == "drip":
                for byte in body:
                    request.wfile.write(bytes([byte]))
                    if self.stopping.wait(0.05):
                        return
                return
            half = fault is not None and fault.kind in ("cut", "reset")
            request.wfile.write(body[: len(body) // 2] if half else body)
            request.wfile.flush()
            if fault and fault.kind == "reset":
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.connection.close()


def key_of(day: dt.date, data_type: str = STOCKS) -> str:
    return f"{data_type}/{day:%Y/%m}/{day:%Y-%m-%d}.csv.gz"


def day_file(lines: list[str], header: str = HEADER) -> bytes:
    return gzip.compress("\n".join([header, *lines, ""]).encode(), 1, mtime=0)
