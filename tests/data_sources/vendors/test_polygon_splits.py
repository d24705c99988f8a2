"""Massive's list of splits against a loopback server: pages, faults, and what reaches the ledger."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from bar_tables import ns

from data_sources.errors import BadAnswer, DataError, RateLimited, Refused, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.progress import NullProgress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.splits import Split, SplitLedger
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.polygon_splits import PolygonSplits

KEY = "hidden-key"
START, NOW = ns("2024-11-24 00:00"), ns("2026-11-24 12:00")
QUICK = RetryPolicy(
    connect_seconds=2,
    read_seconds=0.5,
    total_seconds=1,
    backoff_seconds=0.01,
    longest_wait_seconds=1,
    attempts=2,
)


def entry(ticker: str, day: str, split_from: float = 1, split_to: float = 10) -> dict[str, Any]:
    return {
        "ticker": ticker, "execution_date": day, "split_from": split_from, "split_to": split_to,
        "adjustment_type": "forward_split", "id": "E1",
    }  # fmt: skip


class Server:
    """Answers pages of two entries; ``answers`` come first, as (status, headers, body)."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.queries: list[dict[str, list[str]]] = []
        self.hangs = threading.Event()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.hangs.is_set():
                    server.released.wait()
                    return
                status, headers, body = server.answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, path: str, authorization: str) -> tuple[int, dict[str, str], bytes]:
        query = parse_qs(urlsplit(path).query)
        self.queries.append(query)
        if self.answers:
            return self.answers.pop(0)
        if authorization != f"Bearer {KEY}":
            return 401, {}, b'{"status":"ERROR"}'
        first = int(query.get("cursor", ["0"])[0])
        page: dict[str, Any] = {"status": "OK", "results": self.entries[first : first + 2]}
        if first + 2 < len(self.entries):
            page["next_url"] = f"https://elsewhere.example/stocks/v1/splits?cursor={first + 2}"
        return 200, {}, json.dumps(page).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.released.set()
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def ledger(tmp_path: Path) -> SplitLedger:
    return SplitLedger(tmp_path)


def source(server: Server, key: str = KEY) -> PolygonSplits:
    return PolygonSplits(key, server.url, QUICK)


def test_every_page_is_read_and_only_our_stocks_reach_the_ledger(server: Server, ledger: SplitLedger) -> None:
    server.entries = [
        entry("AAPL", "2026-11-10"), entry("ZZZ", "2026-11-10"), entry("NFLX", "2025-11-17"),
        entry("XYZ", "2026-01-05", 30, 1), entry("AAPL", "2025-03-03", 1, 1.5),
    ]  # fmt: skip
    assert source(server).update(ledger, ["AAPL", "NFLX", "XYZ"], START, NOW) == (4, 0)
    assert ledger.splits("AAPL") == [
        Split(datetime.date(2025, 3, 3), 1.5), Split(datetime.date(2026, 11, 10), 10.0),
    ]  # fmt: skip
    assert ledger.splits("XYZ")[0].ratio == pytest.approx(1 / 30)
    assert ledger.splits("ZZZ") == []
    assert len(server.queries) == 3
    assert server.queries[0]["ticker.any_of"] == ["AAPL,NFLX,XYZ"]
    assert server.queries[0]["execution_date.gte"] == ["2024-11-24"]
    assert server.queries[0]["execution_date.lte"] == ["2026-11-24"]
    assert source(server).update(ledger, ["AAPL", "NFLX", "XYZ"], START, NOW) == (0, 0)


def test_without_a_list_of_stocks_the_whole_market_is_learned(server: Server, ledger: SplitLedger) -> None:
    server.entries = [entry("AAPL", "2026-11-10"), entry("ZZZ", "2026-11-10")]
    assert source(server).update(ledger, None, START, NOW) == (2, 0)
    assert "ticker.any_of" not in server.queries[0]


def test_one_split_that_two_vendors_date_differently_counts_once(server: Server, ledger: SplitLedger) -> None:
    ledger.update("AAPL", [Split(datetime.date(2026, 11, 9), 10.0)])  # Yahoo's
    server.entries = [entry("AAPL", "2026-11-10"), entry("AAPL", "2026-11-11", 1, 2)]
    assert source(server).update(ledger, ["AAPL"], START, NOW) == (1, 0)
    assert [split.ratio for split in ledger.splits("AAPL")] == [10.0, 2.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"ticker": "AAPL"},
        entry("AAPL", "soon"),
        entry("AAPL", "2026-11-10", 0),
        entry("AAPL", "2026-11-10", 1, -2),
        None,
    ],
)
def test_an_unreadable_entry_costs_itself_only(server: Server, ledger: SplitLedger, bad: Any) -> None:
    server.entries = [bad, entry("AAPL", "2026-11-12")]
    assert source(server).update(ledger, ["AAPL"], START, NOW) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((401, {}, b"{}"), Refused),
        ((403, {}, b"{}"), Refused),
        ((429, {"Retry-After": "3600"}, b""), RateLimited),
        ((500, {}, b""), SourceUnavailable),
        ((200, {}, b"<html>sign in</html>"), BadAnswer),
        ((200, {}, b'{"status":"OK"}'), BadAnswer),
        ((200, {}, b'{"results": {"a": 1}}'), BadAnswer),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), BadAnswer),
        ((404, {}, b'{"status":"NOT_FOUND"}'), BadAnswer),
    ],
)
def test_a_bad_answer_is_one_line_without_the_key_and_heals(
    server: Server,
    ledger: SplitLedger,
    waits: dict[str, float],
    answer: tuple[int, dict[str, str], bytes],
    error: type[DataError],
) -> None:
    server.entries = [entry("AAPL", "2026-11-10")]
    server.answers = [answer] * 2
    with pytest.raises(error) as raised:
        source(server).update(ledger, ["AAPL"], START, NOW)
    assert "\n" not in str(raised.value)
    assert KEY not in str(raised.value)
    server.answers.clear()
    if error is RateLimited:  # a wait outlives the client
        with pytest.raises(RateLimited, match="more seconds to wait"):
            source(server).update(ledger, ["AAPL"], START, NOW)
        waits.clear()
    assert source(server).update(ledger, ["AAPL"], START, NOW) == (1, 0)


def test_one_bad_answer_is_requested_again_and_a_short_wait_is_waited_out(
    server: Server, ledger: SplitLedger
) -> None:
    server.entries = [entry("AAPL", "2026-11-10")]
    for answer in ((500, {}, b""), (429, {"Retry-After": "0"}, b"")):
        server.answers = [answer]
        source(server).update(ledger, ["AAPL"], START, NOW)
    assert len(ledger.splits("AAPL")) == 1


def test_a_server_that_hangs_or_is_not_there_is_given_up(server: Server, ledger: SplitLedger) -> None:
    server.hangs.set()
    for url in (server.url, "http://127.0.0.1:1"):
        with pytest.raises(SourceUnavailable, match="does not answer"):
            PolygonSplits(KEY, url, QUICK).update(ledger, ["AAPL"], START, NOW)


def test_the_key_is_optional_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYGON_API_KEY", raising=False)
    assert PolygonSplits.from_environment() is None
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_API_URL", "")
    made = PolygonSplits.from_environment()
    assert made is not None
    assert made.url == "https://api.massive.com"
    assert KEY not in repr(made)
    for name, value in (("POLYGON_API_URL", "api.massive.com"), ("POLYGON_API_KEY", "two words")):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=name):
            patch.setenv(name, value)
            PolygonSplits.from_environment()


def test_a_refresh_fetches_splits_and_an_error_there_is_only_a_warning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warnings(NullProgress):
        texts: list[str] = []  # noqa: RUF012

        def warn(self, source: str, message: str) -> None:
            self.texts.append(message)

    server.entries = [entry("AAPL", "2026-11-10"), None]
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_API_URL", server.url)
    monkeypatch.delenv("POLYGON_S3_ACCESS_KEY", raising=False)
    lake = Lake(tmp_path / "lake")
    request = DataRequest(("polygon",), {"stocks": ("AAPL",)}, START, NOW)
    warnings = Warnings()
    refresh(lake, request, NOW, warnings)
    assert SplitLedger(lake.root).splits("AAPL") == [Split(datetime.date(2026, 11, 10), 10.0)]
    assert warnings.texts[0] == "splits: 1 unreadable entries"
    monkeypatch.setenv("POLYGON_API_KEY", "wrong")
    refresh(lake, request, NOW, warnings)
    assert "refuses access (HTTP 401): check POLYGON_API_KEY" in warnings.texts[2]
    assert "POLYGON_S3_ACCESS_KEY is not set" in warnings.texts[-1]
