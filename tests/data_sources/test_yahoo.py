"""Yahoo's adapter with yfinance as it is, against a loopback server of our own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources import yahoo
from data_sources.bars import COLUMNS, Bars
from data_sources.errors import DataError, RateLimited, Refused, SourceUnavailable
from data_sources.lake import Lake
from data_sources.splits import Split, SplitLedger
from data_sources.web import Patience
from data_sources.yahoo import Yahoo
from data_sources.yahoo_weeks import weeks
from tests.data_sources.loopback import Fault, Notes, ns
from tests.data_sources.yahoo_server import MINUTE_NS, Rows, YahooServer

NOW = ns("2026-03-17T18:00:30")  # a Tuesday, 14:00 in New York; the clocks changed on 8 March
CLOSED = ns("2026-03-17T18:00")
EVENING = ns("2026-03-18T01:00")  # 21:00 in New York, all bars of the day have settled
DAY_NS = 1440 * MINUTE_NS
REACH = NOW - 29 * DAY_NS
STOCKS = ("AAPL", "MSFT", "NVDA")
PATIENCE = Patience(
    connect_seconds=0.3, total_seconds=0.8, backoff_seconds=0.01, attempts=2, failures_in_a_row=3
)
HTML = b"<!DOCTYPE html><html><body>Oh dear</body></html>"
MINUTES = "interval=1m"


class Desk:
    """A server, a lake and an adapter, and what one wants to know of them."""

    def __init__(self, server: YahooServer, folder: Path) -> None:
        self.server, self.folder, self.notes = server, folder, Notes()
        self.lake = Lake(folder)

    @property
    def ledger(self) -> SplitLedger:
        return SplitLedger(self.folder)

    def refresh(self, *stocks: str, at: int | None = None) -> list[str]:
        """Refresh, at another time if one is given, and return the chart requests that it took."""
        self.server.now_ns = now_ns = at or self.server.now_ns
        self.server.requests.clear()
        self.notes = Notes()
        Yahoo(self.server.url, patience=PATIENCE).refresh(
            self.lake, stocks or STOCKS, now_ns - 730 * DAY_NS, now_ns, now_ns, self.notes, self.ledger
        )
        return self.charts()

    def charts(self, path: str = "/chart/") -> list[str]:
        return [request for request in self.server.requests if "/chart/" in request and path in request]

    def columns(self, stock: str) -> dict[str, np.ndarray]:
        return self.lake.columns("yahoo", stock, [stock], 0, 2**62).get(stock, {})

    def minutes(self, stock: str) -> set[int]:
        return set(self.columns(stock).get("open_time", np.empty(0)).tolist())

    def assert_holds(self, stock: str, start_ns: int = REACH, end_ns: int = CLOSED) -> None:
        """Every bar of the span with its values, adjusted by the ledger, and none else after ``start_ns``."""
        columns = self.columns(stock)
        bars = Bars(stock, "stock", *(columns[name] for name in COLUMNS))
        bars = self.ledger.adjust(bars, fetched_ns=columns["fetched_ns"]).between(start_ns, 2**62)
        times, values = self.server.truth(stock, start_ns, end_ns)
        np.testing.assert_array_equal(bars.open_time, times)
        held = np.column_stack([getattr(bars, name) for name in COLUMNS[1:]])
        np.testing.assert_allclose(held, values, rtol=1e-12)


@pytest.fixture
def server() -> Iterator[YahooServer]:
    with YahooServer(NOW, STOCKS) as server:
        yield server


@pytest.fixture
def desk(server: YahooServer, tmp_path: Path) -> Desk:
    return Desk(server, tmp_path / "lake")


def test_a_first_refresh_brings_every_closed_minute_that_yahoo_still_has(desk: Desk) -> None:
    requests = desk.refresh()
    for stock in STOCKS:
        desk.assert_holds(stock)
    # Per stock: its time zone, its splits, and the four weeks that 29 days reach back to plus the running one.
    assert len(requests) == 3 * (1 + 1 + 5)
    assert desk.notes.warnings == []
    assert (desk.notes.total, desk.notes.units) == (3, 3)
    assert desk.notes.num_bytes > 100_000
    parts = desk.lake.parts("yahoo", "AAPL")
    assert list(parts) == ["2026-02-16", "2026-02-23", "2026-03-02", "2026-03-09", "2026-03-16"]
    assert parts["2026-03-16"].end_ns == CLOSED
    assert parts["2026-03-16"].fetched_ns == NOW


def test_each_request_stays_within_what_yahoo_allows(desk: Desk) -> None:
    desk.refresh("AAPL")
    for request in desk.charts(MINUTES):
        fields = dict(pair.split("=") for pair in request.split("?")[1].split("&"))
        assert int(fields["period2"]) - int(fields["period1"]) <= 7 * 86_400
        assert int(fields["period1"]) >= NOW // 10**9 - 30 * 86_400


def test_a_refresh_while_the_market_trades_asks_once_per_stock(desk: Desk) -> None:
    desk.refresh()
    requests = desk.refresh(at=NOW + 10 * 60 * 10**9)
    assert len(requests) == len(STOCKS)
    for stock in STOCKS:
        desk.assert_holds(stock, end_ns=CLOSED + 10 * MINUTE_NS)


def test_a_refresh_asks_nothing_at_all_while_the_market_is_closed(desk: Desk) -> None:
    assert desk.refresh(at=EVENING)
    desk.refresh(at=EVENING + 11 * 60 * MINUTE_NS)
    assert desk.server.requests == []
    assert desk.notes.warnings == []
    assert len(desk.refresh(at=ns("2026-03-18T13:40"))) == len(STOCKS)  # ten minutes into the next session


def test_bars_outlive_yahoos_thirty_days(desk: Desk) -> None:
    desk.refresh("AAPL", at=EVENING)
    later = EVENING + 21 * DAY_NS
    desk.refresh("AAPL", at=later)
    desk.refresh("AAPL", at=later + 21 * DAY_NS)
    desk.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=later + 21 * DAY_NS)


def test_a_new_stock_costs_its_own_requests_only(desk: Desk) -> None:
    desk.refresh("AAPL", "MSFT", at=EVENING)
    requests = desk.refresh("AAPL", "MSFT", "NVDA")
    assert requests
    assert all("/NVDA?" in request for request in requests)
    desk.assert_holds("NVDA", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)


def test_the_running_minute_and_the_live_row_are_not_kept(desk: Desk) -> None:
    desk.refresh("AAPL", at=ns("2026-03-17T18:00:04"))  # 17:59 closed four seconds ago and may still change
    assert max(desk.minutes("AAPL")) == ns("2026-03-17T17:58")
    assert not any("misaligned" in warning for warning in desk.notes.warnings)


def test_minutes_without_a_trade_are_absent_and_no_reason_to_ask_again(desk: Desk) -> None:
    desk.server.halts = [(ns("2026-03-10T15:00"), ns("2026-03-10T15:10"))]
    desk.refresh("AAPL", at=EVENING)
    assert not desk.minutes("AAPL") & set(range(*desk.server.halts[0], MINUTE_NS))
    assert desk.refresh("AAPL") == []


def test_a_dotted_class_share_is_asked_for_with_a_dash(desk: Desk) -> None:
    desk.server.stocks = ("BRK-B",)
    desk.refresh("BRK.B")
    assert len(desk.minutes("BRK.B")) > 7_000


# ------------------------------------------------------------------------- faults


def test_a_failed_answer_is_not_replayed_from_yfinances_cache(desk: Desk) -> None:
    desk.server.faults = [Fault(MINUTES, "body", 502, body=HTML, count=2)]  # yfinance itself tries each twice
    desk.refresh()
    for stock in STOCKS:
        desk.assert_holds(stock)
    assert desk.notes.warnings == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/MSFT", "body", 200, body=HTML),
        Fault("/MSFT.*1m", "body", 200, body=b""),
        Fault("/MSFT.*1m", "body", 200, body=b'{"chart": {"result": [{"meta": 7}], "error": null}}'),
        Fault("/MSFT.*1m", "body", 200, body=b"[1, 2]"),
        Fault("/MSFT", "body", 502, body=HTML),
        Fault("/MSFT", "body", 503, body=b'{"finance": {"error": {"code": "busy", "description": "x"}}}'),
        Fault("/MSFT.*1m", "truncate"),
        Fault("/MSFT", "reset"),
        Fault("/MSFT.*1m", "drip"),
        Fault("/MSFT", "hang"),
        Fault("/MSFT.*1m", "rows", rows=lambda rows: rows | {"open": ["x"] * len(rows["open"])}),
        Fault("/MSFT.*1m", "rows", rows=lambda rows: rows | {"close": []}),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.body[:8]!r}",
)
def test_one_stocks_failure_is_one_warning_and_heals(desk: Desk, fault: Fault) -> None:
    desk.server.faults = [fault]
    desk.refresh()
    desk.assert_holds("AAPL")
    desk.assert_holds("NVDA")
    assert [warning[:5] for warning in desk.notes.warnings] == ["MSFT:"]
    desk.server.faults = []
    desk.refresh()
    desk.assert_holds("MSFT")
    assert desk.notes.warnings == []


def test_an_unknown_stock_is_said_once_and_costs_few_requests(desk: Desk) -> None:
    desk.refresh("AAPL", "ZZZZ", "MSFT")
    assert desk.notes.warnings == ["ZZZZ: Yahoo does not know this symbol (HTTP 404)"]
    assert len(desk.charts("/ZZZZ")) <= 2
    desk.assert_holds("MSFT")


def test_only_unknown_stocks_are_an_error(desk: Desk) -> None:
    with pytest.raises(DataError, match="does not know this symbol"):
        desk.refresh("ZZZZ", "YYYY")


def test_a_window_that_should_have_bars_and_has_none_is_a_warning_and_asked_for_again(desk: Desk) -> None:
    empty = Fault("/MSFT.*1m", "rows", rows=lambda rows: {name: [] for name in rows}, count=2)
    desk.server.faults = [empty]
    desk.refresh(at=EVENING)
    assert desk.notes.warnings == [
        "MSFT: no bars came for the week of 2026-02-16, 2026-02-23, although there was trade"
    ]
    assert len(desk.refresh()) == 2
    desk.assert_holds("MSFT", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)
    assert desk.refresh() == []


def test_a_week_that_stays_short_is_not_asked_for_at_every_refresh(desk: Desk) -> None:
    desk.server.faults = [
        Fault("/MSFT.*period1=1772.*1m", "rows", rows=lambda rows: {n: v[:900] for n, v in rows.items()})
    ]
    asked = [len(desk.refresh("MSFT", at=EVENING + i * 60 * MINUTE_NS)) for i in range(5)]
    assert asked[1:] == [1, 1, 0, 0]
    desk.server.faults = []
    desk.refresh("MSFT", at=EVENING + 47 * 60 * MINUTE_NS)
    desk.assert_holds("MSFT", start_ns=EVENING - 27 * DAY_NS, end_ns=desk.server.now_ns)


def test_a_rate_limit_stops_the_source_and_keeps_what_came(desk: Desk) -> None:
    desk.server.faults = [
        Fault("/(MSFT|NVDA)", "status", 429, {"Retry-After": "7"}, b"Too Many Requests"),
    ]
    with pytest.raises(RateLimited, match="come back in 7 seconds") as caught:
        desk.refresh()
    assert caught.value.retry_after == 7
    assert not desk.charts("/NVDA")
    desk.assert_holds("AAPL")
    desk.server.faults = []
    assert not any("/NVDA" in r and "2026" in r for r in desk.refresh())
    for stock in STOCKS:
        desk.assert_holds(stock)


def test_a_limited_crumb_alone_stops_nothing_and_is_not_begged_for(desk: Desk) -> None:
    desk.server.wants_crumb = False
    desk.server.faults = [Fault("getcrumb", "status", 429, body=b"Too Many Requests")]
    desk.refresh()
    desk.assert_holds("NVDA")
    assert sum("getcrumb" in request for request in desk.server.requests) <= 2


def test_a_refusal_is_said_as_one(desk: Desk) -> None:
    desk.server.faults = [Fault("/chart/", "body", 403, body=HTML)]
    with pytest.raises(Refused, match="HTTP 403"):
        desk.refresh()


def test_a_host_that_is_not_there_is_given_up_early(desk: Desk) -> None:
    stocks = [f"S{number}" for number in range(22)]
    with YahooServer(NOW) as gone:
        pass
    desk.server.url, url = gone.url, desk.server.url
    with pytest.raises(SourceUnavailable, match="3 stocks in a row"):
        desk.refresh(*stocks)
    desk.server.url = url
    desk.refresh()
    desk.assert_holds("AAPL")


def test_a_host_that_hangs_is_given_up_early(desk: Desk) -> None:
    desk.server.faults = [Fault("", "hang")]
    with pytest.raises(SourceUnavailable, match="3 stocks in a row"):
        desk.refresh(*(f"S{number}" for number in range(22)))
    assert len(desk.server.requests) <= 10


def test_a_slow_source_has_a_deadline_and_keeps_what_came(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.refresh("AAPL", at=EVENING)
    monkeypatch.setattr(yahoo, "MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr(yahoo, "SECONDS_PER_STOCK", 0.0)
    with pytest.raises(SourceUnavailable, match="too slow"):
        desk.refresh()
    desk.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)


def test_yahoos_own_words_reach_the_user(desk: Desk) -> None:
    desk.server.now_ns += 3 * DAY_NS  # a host whose clock is ahead: the oldest week is too old for it
    ahead = desk.server.now_ns
    now = NOW
    Yahoo(desk.server.url, patience=PATIENCE).refresh(
        desk.lake, ["AAPL"], now - 60 * DAY_NS, now, now, desk.notes, desk.ledger
    )
    assert desk.server.now_ns == ahead
    [warning] = desk.notes.warnings
    assert "The requested range must be within the last 30 days." in warning
    desk.assert_holds("AAPL", start_ns=ns("2026-02-23T00:00"))


def test_another_symbols_answer_is_not_kept(desk: Desk) -> None:
    meta = YahooServer._meta

    def mixed_up(self: YahooServer, symbol: str, *rest: Any) -> dict[str, Any]:
        return meta(self, "NVDA" if symbol == "MSFT" else symbol, *rest)

    desk.server._meta = mixed_up.__get__(desk.server)  # type: ignore[method-assign]
    desk.refresh()
    assert desk.minutes("MSFT") == set()
    assert desk.notes.warnings == ["MSFT: asked Yahoo for MSFT, came NVDA"]


def spoilt(every: int, spoil: Callable[[float], Any], *fields: str) -> Callable[[Rows], Rows]:
    """Spoil every n-th row in these fields, not the first: nothing before it could prove it wrong."""

    def change(rows: Rows) -> Rows:
        changed = dict(rows)
        for name in fields:
            column = list(rows[name])
            places = slice(every // 2, None, every)
            column[places] = [None if value is None else spoil(value) for value in column[places]]
            changed[name] = column
        return changed

    return change


def reordered(order: Callable[[int], list[int]]) -> Callable[[Rows], Rows]:
    return lambda rows: {name: [v[i] for i in order(len(v))] for name, v in rows.items()}


PRICES = ("open", "high", "low", "close")


@pytest.mark.parametrize("is_filled", [False, True], ids=["new lake", "filled lake"])
@pytest.mark.parametrize(
    "rows",
    [
        spoilt(20, lambda value: None, "close"),
        spoilt(20, lambda value: None, *PRICES, "volume"),
        spoilt(50, lambda value: -value, "low"),
        spoilt(50, lambda value: 0.0, "open"),
        spoilt(97, lambda value: value * 10, *PRICES),
        spoilt(50, lambda value: value / 2, "high"),
        spoilt(50, lambda value: -5, "volume"),
        spoilt(1, lambda value: value + 17, "timestamp"),
        spoilt(1, lambda value: value + 40 * 86_400, "timestamp"),
        reordered(lambda n: [*range(n), *range(0, n, 9)]),
        reordered(lambda n: list(reversed(range(n)))),
        reordered(lambda n: sorted(range(n), key=lambda i: i * 7919 % 1009)),
        reordered(lambda n: list(range(n // 2))),
        reordered(lambda n: [i for i in range(n) if i % 5]),
    ],
    ids=(
        "null nulls negative zero spike ohlc volume misaligned future duplicate reversed shuffled half thinned"
    ).split(),
)
def test_spoilt_rows_cost_no_kept_bar_and_heal(
    desk: Desk, rows: Callable[[Rows], Rows], is_filled: bool
) -> None:
    if is_filled:
        desk.refresh("AAPL", at=EVENING - 2 * DAY_NS)
    before = desk.minutes("AAPL")
    desk.server.faults = [Fault(MINUTES, "rows", rows=rows)]
    desk.refresh("AAPL", at=EVENING)
    held = desk.columns("AAPL")
    if held:
        # What is held is right, bar by bar, even while the vendor is not.
        times, values = desk.server.truth("AAPL", int(held["open_time"][0]), EVENING)
        places = np.searchsorted(times, held["open_time"])
        assert (times[places] == held["open_time"]).all()
        np.testing.assert_array_equal(held["close"], values[places, 3])
    assert before <= desk.minutes("AAPL")
    desk.server.faults = []
    desk.refresh("AAPL", at=EVENING + 30 * MINUTE_NS)
    desk.assert_holds("AAPL", start_ns=EVENING - 28 * DAY_NS, end_ns=EVENING)
    assert desk.notes.warnings == []


# ------------------------------------------------------------------------ splits


def test_splits_since_the_lakes_start_reach_the_ledger(desk: Desk) -> None:
    desk.server.splits = {"AAPL": [(date(2024, 6, 10), 4.0)], "NVDA": [(date(2026, 3, 10), 2.0)]}
    desk.refresh()
    assert desk.ledger.splits("AAPL") == [Split(date(2024, 6, 10), 4.0)]
    assert desk.ledger.splits("NVDA") == [Split(date(2026, 3, 10), 2.0)]
    assert desk.ledger.splits("MSFT") == []
    for stock in STOCKS:
        desk.assert_holds(stock)


def test_weeks_that_were_kept_before_a_split_are_on_the_new_scale_after_it(desk: Desk) -> None:
    desk.server.splits = {"AAPL": [(date(2026, 3, 25), 4.0)]}
    desk.refresh("AAPL", at=EVENING)
    assert desk.ledger.splits("AAPL") == []
    desk.refresh("AAPL", at=ns("2026-03-25T18:00:30"))
    assert desk.ledger.splits("AAPL") == [Split(date(2026, 3, 25), 4.0)]
    # Weeks out of Yahoo's reach, kept bars in asked weeks, and fresh ones: one scale.
    desk.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=ns("2026-03-25T18:00"))
    desk.refresh("AAPL", at=ns("2026-03-27T01:00"))
    desk.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=ns("2026-03-27T00:00"))
    assert desk.refresh("AAPL", at=ns("2026-03-27T02:00")) == []


def test_older_splits_are_asked_for_once_a_day(desk: Desk) -> None:
    def daily() -> int:
        return len(desk.charts("interval=1d&includePrePost"))

    desk.refresh("AAPL", at=EVENING)
    assert daily() == 1
    desk.refresh("AAPL", at=EVENING + 60 * MINUTE_NS)
    assert daily() == 0
    desk.refresh("AAPL", at=EVENING + DAY_NS)
    assert daily() == 1


def test_a_lost_ledger_is_filled_again(desk: Desk) -> None:
    desk.server.splits = {"AAPL": [(date(2024, 6, 10), 4.0)]}
    desk.refresh("AAPL", at=EVENING)
    (desk.folder / "splits.json").write_text("{")
    desk.refresh("AAPL")
    assert desk.ledger.splits("AAPL") == [Split(date(2024, 6, 10), 4.0)]


# ------------------------------------------------------------ yfinance's surroundings


def test_cookie_and_crumb_are_fetched_once_and_shown(desk: Desk) -> None:
    desk.refresh()
    others = [request for request in desk.server.requests if "/chart/" not in request]
    assert others == ["/", "/v1/test/getcrumb"]
    assert all("crumb=cr.Umb" in request for request in desk.charts())


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be taken for one" * 99])
def test_damaged_sqlite_caches_of_yfinance_do_no_harm(desk: Desk, content: bytes) -> None:
    folder = desk.folder / ".yfinance"
    folder.mkdir(parents=True)
    for name in ("tkr-tz.db", "cookies.db"):
        (folder / name).write_bytes(content)
    desk.refresh()
    for stock in STOCKS:
        desk.assert_holds(stock)
    assert desk.notes.warnings == []


def test_time_zones_are_remembered_beside_the_bars(desk: Desk, tmp_path: Path) -> None:
    desk.refresh("AAPL")
    assert (desk.folder / ".yfinance" / "tkr-tz.db").exists()
    assert len(desk.charts("range=1d")) == 1
    desk.refresh("AAPL", at=NOW + 20 * 60 * 10**9)
    assert len(desk.charts("range=1d")) == 0
    other = Desk(desk.server, tmp_path / "other lake")  # of the same process: yfinance's state is global
    other.refresh("AAPL")
    assert (other.folder / ".yfinance" / "tkr-tz.db").exists()
    assert not (Path(other.folder) / "yahoo" / ".yfinance").exists()


def test_it_works_without_curl_cffi(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curl_cffi", None)
    desk.server.faults = [Fault("/MSFT.*1m", "drip")]
    desk.refresh()
    desk.assert_holds("AAPL")
    desk.assert_holds("NVDA")
    assert [warning[:24] for warning in desk.notes.warnings] == ["MSFT: Yahoo does not ans"]


def test_nothing_is_printed(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    desk.server.faults = [Fault("getcrumb", "hang"), Fault("/MSFT", "body", 502, body=HTML)]
    desk.server.wants_crumb = False
    desk.refresh()
    assert capfd.readouterr() == ("", "")


def test_the_environment_names_another_host(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAHOO_BASE_URL", desk.server.url + "/")
    Yahoo.from_environment().refresh(desk.lake, ["AAPL"], NOW - 5 * DAY_NS, NOW, NOW, desk.notes, desk.ledger)
    assert list(desk.lake.parts("yahoo", "AAPL")) == ["2026-03-09", "2026-03-16"]


def test_weeks_begin_on_mondays_in_new_york_whatever_the_clocks_do() -> None:
    found = list(weeks(ns("2026-03-05T12:00"), ns("2026-03-16T12:00")))
    assert [week.name for week in found] == ["2026-03-02", "2026-03-09", "2026-03-16"]
    assert [week.start_ns for week in found] == [
        ns("2026-03-02T05:00"),
        ns("2026-03-09T04:00"),
        ns("2026-03-16T04:00"),
    ]
    assert all(week.end_ns - week.start_ns == 5 * DAY_NS for week in found)
