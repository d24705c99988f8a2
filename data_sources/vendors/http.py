"""HTTP policy shared by the vendors: deadlines, retries, when to give up a host, and what a status means."""

from __future__ import annotations

import io
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from requests.utils import get_auth_from_url
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

    @property
    def timeout(self) -> tuple[float, float]:
        """The timeout of one request, as ``requests`` takes it."""
        return self.connect_seconds, self.read_seconds


# For a probe: a person waits for the answer.
PROBE_POLICY = RetryPolicy(read_seconds=10, total_seconds=15, attempts=1, longest_wait_seconds=0)
# Until when, monotonic, vendors want no request from this process, by the name of the host.
_WAITS: dict[str, float] = {}


class FinalAnswer(BadAnswer):
    """An answer that asking again would not change, such as an unknown symbol."""


class Banned(RateLimited):
    """The vendor has locked this address out for a while; every further request prolongs it."""


def error_of(
    status: int, host: str, *, fix: str, details: str = "", headers: Mapping[str, str] | None = None
) -> DataError:
    """Return our error for an HTTP status that is not a success.

    Args:
        status: of HTTP, or Yahoo's 999 for a rate limit.
        host: the host's name, with which the message begins.
        fix: what a user can do about a refusal.
        details: the vendor's own code or words.
        headers: for Retry-After.
    """
    answer = f"HTTP {status} {details}".rstrip()
    if status in (401, 403, 451):
        return Refused(f"{host} refuses access ({answer}): {fix}")
    if status in (418, 429, 999):
        seconds = _retry_after(headers or {})
        wait = "" if seconds is None else f"; retry in {seconds:g} s"
        if status == 418:
            return Banned(f"{host} banned this address for too many requests ({answer}){wait}", seconds)
        return RateLimited(f"{host} rate limit ({answer}){wait}", seconds)
    text = f"{host} answered {answer}"
    if status >= 500:
        return SourceUnavailable(text)
    return FinalAnswer(text) if status >= 400 else BadAnswer(text)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After; None where it is absent, a date or nonsense."""
    try:
        seconds = float(headers.get("Retry-After") or headers.get("retry-after") or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def unreachable(host: str, error: BaseException) -> SourceUnavailable:
    """Return our error for a request that got no answer."""
    return SourceUnavailable(f"{host} does not answer: {short(error)}")


def short(error: BaseException) -> str:
    """Return an error as one short line, without the addresses that HTTP libraries put into it."""
    cause = error.args[0] if error.args else error
    text = " ".join(str(getattr(cause, "reason", None) or cause).split())
    text = re.split(r"See http|https?://", text)[0].rstrip(" .,;:(")[:120]
    if "SOCKS" in text:
        text += ": a SOCKS proxy is set in the environment, which needs python -m pip install PySocks"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def require_address(variable: str, value: str, example: str) -> None:
    """Check an address of the environment.

    Raises:
        DataError: it is none; without its text, which may hold a password.
    """
    address = urlsplit(value)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc:
        raise DataError(f"{variable} must look like {example}, see .env.example")


class DeadlineAdapter(HTTPAdapter):
    """Reads every body whole, within a total time and a size.

    The timeouts of requests bound each silence only: a server that sends one byte a second blocks a
    caller for ever. This adapter also serves python-binance, whose client owns its session.
    """

    def __init__(self, total_seconds: float, max_bytes: int) -> None:
        super().__init__(pool_maxsize=8)
        self._total_seconds = total_seconds
        self._max_bytes = max_bytes

    def send(  # type: ignore[no-untyped-def]
        self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None
    ) -> requests.Response:
        """Send, and return a response whose body has arrived.

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


class _AddressAuth(AuthBase):
    """Credentials of the address itself. A session that has an ``auth`` does not look into netrc."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        credentials = get_auth_from_url(request.url or "")
        return HTTPBasicAuth(*credentials)(request) if any(credentials) else request


def prepare(session: requests.Session, policy: RetryPolicy, max_bytes: int) -> requests.Session:
    """Mount the deadline on a session, and keep ``~/.netrc`` out; proxies and certificates stay the system's."""
    session.auth = _AddressAuth()
    adapter = DeadlineAdapter(policy.total_seconds, max_bytes)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


class Host:
    """One host of a vendor: retries, waits that all threads share, and when to give it up.

    A host that bans, limits for too long, or fails many times in a row is ``down`` for the rest of the
    refresh, and so is one that refuses, unless its refusals are of single files (``refuses_files``). So a
    dead host costs seconds, not a timeout per file. A wait that the vendor asked for outlives the refresh: paper
    trading begins another one every minute, and asking earlier ends in a ban, or prolongs it.
    """

    def __init__(self, policy: RetryPolicy, name: str, *, refuses_files: bool = False) -> None:
        """All hosts of one name share the waits that the vendor asked for."""
        self.policy = policy
        self.stop = threading.Event()
        self.down: DataError | None = None
        self.requests = 0
        self.failures = 0  # in a row
        self._refuses_files = refuses_files
        self._lock = threading.Lock()
        self._name = name

    def begin_refresh(self) -> None:
        """Forget earlier failures, but not a wait that the vendor asked for."""
        self.stop.clear()
        self.requests, self.failures, self.down = 0, 0, None

    def pause(self, seconds: float) -> None:
        """Let no thread send a request for so long."""
        with self._lock:
            _WAITS[self._name] = max(self._not_before, time.monotonic() + seconds)

    @property
    def _not_before(self) -> float:
        return _WAITS.get(self._name, 0.0)

    def ask(self, once: Callable[[], Answer]) -> Answer:
        """Call ``once`` as ``retry`` does, and note how it ended."""
        try:
            answer = self.retry(once)
        except FinalAnswer:
            self.note(None)
            raise
        except (SourceUnavailable, BadAnswer) as error:
            self.note(error)
            raise
        self.note(None)
        return answer

    def note(self, error: DataError | None) -> None:
        """Count failures in a row; a None ends the row."""
        with self._lock:
            self.failures = 0 if error is None else self.failures + 1
            if self.down is None and self.failures >= self.policy.failures_in_a_row:
                self.down = error

    def retry(self, once: Callable[[], Answer], attempts: int | None = None) -> Answer:
        """Call ``once`` until it returns, as often and as long as the policy has it.

        Raises:
            Refused, Banned: at once.
            RateLimited: the wait is too long, or did not help.
            SourceUnavailable, BadAnswer: the last attempt's error; FinalAnswer at once.
        """
        error: DataError | None = None
        for attempt in range(attempts or self.policy.attempts):
            if attempt and not isinstance(error, RateLimited):
                self.stop.wait(self.policy.backoff_seconds * 2 ** (attempt - 1))
            self._wait_for_turn()
            try:
                return once()
            except Refused as refusal:
                if not self._refuses_files:
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
                raise
            except (SourceUnavailable, BadAnswer) as failure:
                error = failure
        assert error is not None
        if isinstance(error, RateLimited):
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
                self.down = RateLimited(f"rate limit; {wait:.0f} more seconds to wait", wait)
                raise self.down
            if wait <= 0:
                with self._lock:
                    self.requests += 1
                return
            self.stop.wait(wait)
