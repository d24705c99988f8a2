"""The HTTP session that yfinance is given: every request of its passes here and is seen, bounded and counted.

yfinance swallows, retries and replaces errors on its way up; what happened on the wire is only known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data_sources.errors import SourceUnavailable
from data_sources.vendors.http import RetryPolicy, prepare, retry_after_seconds

CHART_PATH = "/v8/finance/chart/"
COOKIE_HOST = "fc.yahoo.com"
SIDE_SECONDS = 5.0  # for cookie, crumb and consent: the chart answers without them, too
MAX_ANSWER_BYTES = 32 << 20  # a week of minutes is about 0.2 MB
# Without curl_cffi yfinance, too, shows this browser (yfinance 1.7.0, _http.py).
BROWSER = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/131.0.0.0 Safari/537.36"
)


class Watch:
    """What became of the last chart request, and the bounds that hold for all of them.

    ``status``, ``failure`` and ``retry_after`` are those of the last chart request since ``forget``.
    """

    def __init__(self, base_url: str | None, policy: RetryPolicy, deadline: float) -> None:
        self.policy = policy
        self.requests = 0
        self.num_bytes = 0
        self.status: int | None = None
        self.failure: OSError | None = None
        self.retry_after: float | None = None
        self.is_late = False
        self._base_url = base_url
        self._deadline = deadline  # monotonic
        self._silent_hosts: dict[str, OSError] = {}
        self._side_answers: dict[tuple[str, str, str], Any] = {}

    def forget(self) -> None:
        """Begin a new question."""
        self.status = self.failure = self.retry_after = None

    def forget_session(self) -> None:
        """Begin with a new session: no cookie, no crumb."""
        self._side_answers.clear()

    def send(
        self, send: Callable[..., Any], has_cookies: bool, method: str, url: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Send one request by ``send``, to ``base_url`` if there is one.

        yfinance asks for cookie and crumb again before every chart, unless it could store a cookie of
        yahoo.com and was given a crumb. Within a session the first answer serves again, and so does a
        refusal: a crumb that is limited would be limited more.

        Raises:
            SourceUnavailable: the time for the whole source is over; passes through yfinance, which
                swallows none but OSError.
            OSError: whatever curl_cffi or requests raise.
        """
        if time.monotonic() > self._deadline:
            self.is_late = True
            raise SourceUnavailable("Yahoo was too slow: the time for this refresh is over")
        parts = urlsplit(url)
        host, is_chart = parts.netloc, parts.path.startswith(CHART_PATH)
        if not is_chart and host in self._silent_hosts:
            raise self._silent_hosts[host]  # wait for it once, not before every chart
        side = (method, host, parts.path)
        if side in self._side_answers and (has_cookies or host != COOKIE_HOST):
            return self._side_answers[side]
        seconds = self.policy.total_seconds if is_chart else min(SIDE_SECONDS, self.policy.total_seconds)
        connect = min(self.policy.connect_seconds, seconds / 2)
        kwargs["timeout"] = (connect, seconds - connect)
        self.requests += 1
        try:
            response = send(method, self._rewritten(url), *args, **kwargs)
        except OSError as error:  # the base of both libraries' exceptions
            if is_chart:
                self.status, self.failure = None, error
            else:
                self._silent_hosts[host] = error
            raise
        self.num_bytes += len(response.content)
        if not is_chart and (host == COOKIE_HOST or response.status_code >= 400):
            self._side_answers[side] = response
        if is_chart:
            self.status, self.failure = response.status_code, None
            self.retry_after = retry_after_seconds(response.headers)
        return response

    def _rewritten(self, url: str) -> str:
        if self._base_url is None:
            return url
        base, parts = urlsplit(self._base_url), urlsplit(url)
        path = base.path.rstrip("/") + parts.path
        return urlunsplit((base.scheme, base.netloc, path, parts.query, ""))


def new_session(watch: Watch) -> Any:
    """Return a session of the kind that yfinance accepts, each request of which goes through ``watch``.

    It is curl_cffi's, which looks like Chrome down to TLS, or plain requests where that is not installed:
    Yahoo limits those sooner.
    """
    base: Any
    try:
        from curl_cffi import requests as curl
    except ImportError:
        import requests

        base = requests.Session
        arguments = {}
    else:
        base = curl.Session
        arguments = {"impersonate": "chrome"}

    class WatchedSession(base):
        # yfinance's libraries call this with method and url by keyword or place.
        def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            response = watch.send(super().request, len(self.cookies) > 0, method, url, *args, **kwargs)
            if not arguments:
                self.cookies.update(response.cookies)  # DeadlineAdapter's answers hide them from requests
            return response

    watch.forget_session()
    session = WatchedSession(**arguments)
    if not arguments:
        prepare(session, watch.policy, MAX_ANSWER_BYTES)
        session.headers.update({"User-Agent": BROWSER, "Accept-Language": "en-US,en;q=0.5"})
    return session
