"""Yahoo's adapter with yfinance as it is, against a loopback server of our own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from data_sources.splits import Split
from data_sources.vendors.yahoo_refresh import Yahoo
from data_sources.vendors.yahoo_weeks import weeks
from tests.data_sources.vendors.loopback import Fault, ns
from tests.data_sources.vendors.yahoo_desk import CLOSED, DAY_NS, EVENING, HTML, MINUTES, NOW, STOCKS, Desk
from tests.data_sources.vendors.yahoo_server import MINUTE_NS, YahooServer


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with YahooServer(NOW, STOCKS) as server:
        yield Desk(server, tmp_path / "lake")


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
