"""HTTP manners that the adapters share: a total time per request, a host that gives up in time."""

from __future__ import annotations

import io
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from data_sources.errors import BadAnswer, DataError, RateLimited, Refused, SourceUnavailable

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for a host, in seconds, and how often to try."""

    connect_seconds: float = 5.0
    read_seconds: float = 30.0  # the longest silence within an answer
    total_seconds: float = 120.0  # one whole request, however steadily it drips
    backoff_seconds: float = 1.0  # before the second attempt; doubles from there
    longest_wait_seconds: float = 120.0  # the longest Retry-After that is waited out
    attempts: int = 3
    failures_in_a_row: int = 6  # requests given up one after another before the host counts as down


class DeadlineAdapter(HTTPAdapter):
    """Reads every body whole, within a total time and a size.

    The timeouts of requests bound each silence only: a server that sends one byte a second holds a
    caller for ever. This adapter also serves python-binance, whose client owns its session.
    """

    def __init__(self, total_seconds: float, max_bytes: int) -> None:
        super().__init__(pool_maxsize=8)
        self._total_seconds = total_seconds
        self._max_bytes = max_bytes

    def send(  # type: ignore[no-untyped-def]
        self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None
    ) -> requests.Response:
        """Send, and return a response whose body is here already.

        Raises:
            requests.RequestException: as requests does, and when the body is late, cut or too large.
        """
        deadline = time.monotonic() + self._total_seconds
        response = super().send(request, True, timeout, verify, cert, proxies)
        body = io.BytesIO()
        try:
            while chunk := response.raw.read1(65536, decode_content=True):
                body.write(chunk)
                if body.tell() > self._max_bytes:
                    raise requests.exceptions.ChunkedEncodingError(f"body is over {self._max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise requests.exceptions.ReadTimeout(
                        f"body not complete after {self._total_seconds:g} seconds"
                    )
        except (HTTPError, OSError) as error:
            response.close()
            if isinstance(error, requests.RequestException):
                raise
            raise requests.exceptions.ChunkedEncodingError(str(error) or type(error).__name__) from error
        response.raw.release_conn()
        body.seek(0)
        response.raw = body
        return response


def prepare(session: requests.Session, policy: RetryPolicy, max_bytes: int) -> requests.Session:
    """Mount the deadline on a session."""
    adapter = DeadlineAdapter(policy.total_seconds, max_bytes)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After; None where it is absent, a date or nonsense."""
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def short(error: Exception) -> str:
    """Say a transport error in one short line, without the address that requests puts into it."""
    cause = error.args[0] if error.args else error
    text = f"{type(error).__name__}: {getattr(cause, 'reason', None) or cause}"
    return " ".join(text.split())[:160]


class FinalAnswer(BadAnswer):
    """An answer that asking again would not change, such as an unknown symbol."""


class Banned(RateLimited):
    """The vendor shut this address out for a while: whatever is sent now makes it longer."""


class Host:
    """One host of a source: retries, waits that every thread shares, and giving up on the host.

    A host that refuses, bans, or fails many requests in a row is down for the rest of the refresh,
    so that a dead host costs seconds, not a timeout per file. A wait asked for by the vendor outlives
    the refresh.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.stop = threading.Event()
        self.down: DataError | None = None
        self.requests = 0
        self._lock = threading.Lock()
        self._failures = 0
        self._not_before = 0.0  # monotonic

    def begin_refresh(self) -> None:
        """Forget earlier failures, but not a wait that the vendor asked for."""
        self.stop.clear()
        self.requests, self._failures, self.down = 0, 0, None

    def pause(self, seconds: float) -> None:
        """Let no thread ask for this long."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def ask(self, once: Callable[[], Answer]) -> Answer:
        """Call ``once`` until it returns, within policy.

        Raises:
            Refused, Banned: at once; the host is down from here on.
            RateLimited: the wait is too long, or did not help; the host is down from here on.
            SourceUnavailable, BadAnswer: the last attempt's error.
        """
        error: DataError | None = None
        for attempt in range(self.policy.attempts):
            if attempt and not isinstance(error, RateLimited):
                self.stop.wait(self.policy.backoff_seconds * 2 ** (attempt - 1))
            self._wait_for_turn()
            try:
                answer = once()
            except Refused as refusal:
                self.down = refusal
                raise
            except Banned as ban:
                self.down = ban
                self.pause(ban.retry_after or 7200.0)
                raise
            except RateLimited as limit:
                error = limit
                wait = limit.retry_after if limit.retry_after is not None else 10.0 * 2**attempt
                self.pause(wait)
                if wait > self.policy.longest_wait_seconds:
                    break
            except FinalAnswer:
                self._failures = 0
                raise
            except (SourceUnavailable, BadAnswer) as failure:
                error = failure
            else:
                self._failures = 0
                return answer
        assert error is not None
        with self._lock:
            self._failures += 1
            if isinstance(error, RateLimited) or self._failures >= self.policy.failures_in_a_row:
                self.down = error
        raise error

    def _wait_for_turn(self) -> None:
        while True:
            if self.stop.is_set():
                raise SourceUnavailable("stopped before the request")
            if self.down is not None:
                raise self.down
            wait = self._not_before - time.monotonic()
            if wait > self.policy.longest_wait_seconds:
                self.down = RateLimited(f"asked to wait {wait:.0f} more seconds", wait)
                raise self.down
            if wait <= 0:
                with self._lock:
                    self.requests += 1
                return
            self.stop.wait(wait)
