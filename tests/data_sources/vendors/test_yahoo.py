"""Yahoo with the real yfinance, against a loopback server of ours."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import pytest

from data_sources.splits import Split
from data_sources.vendors.yahoo_refresh import Yahoo
from data_sources.vendors.yahoo_weeks import weeks
from tests.data_sources.vendors.loopback import Fault, ns
from tests.data_sources.vendors.yahoo_harness import (
    CLOSED,
    DAY_NS,
    EVENING,
    HTML,
    MINUTES,
    NOW,
    STOCKS,
    Harness,
)
from tests.data_sources.vendors.yahoo_server import MINUTE_NS


def test_a_first_refresh_brings_every_closed_minute_that_yahoo_still_has(harness: Harness) -> None:
    requests = harness.refresh()
    for stock in STOCKS:
        harness.assert_holds(stock)
    # Per stock: its time zone, its splits, and the four weeks that 29 days reach back to plus the running one.
    assert len(requests) == 3 * (1 + 1 + 5)
    assert harness.notes.warnings == []
    assert (harness.notes.total, harness.notes.units) == (3, 3)
    assert harness.notes.num_bytes > 100_000
    parts = harness.lake.parts("yahoo", "AAPL")
    assert list(parts) == ["2026-02-16", "2026-02-23", "2026-03-02", "2026-03-09", "2026-03-16"]
    assert parts["2026-03-16"].end_ns == CLOSED
    assert parts["2026-03-16"].fetched_ns == NOW


def test_each_request_stays_within_what_yahoo_allows(harness: Harness) -> None:
    harness.refresh("AAPL")
    for request in harness.charts(MINUTES):
        fields = dict(pair.split("=") for pair in request.split("?")[1].split("&"))
        assert int(fields["period2"]) - int(fields["period1"]) <= 7 * 86_400
        assert int(fields["period1"]) >= NOW // 10**9 - 30 * 86_400


def test_a_refresh_while_the_market_trades_asks_once_per_stock(harness: Harness) -> None:
    harness.refresh()
    requests = harness.refresh(at=NOW + 10 * 60 * 10**9)
    assert len(requests) == len(STOCKS)
    for stock in STOCKS:
        harness.assert_holds(stock, end_ns=CLOSED + 10 * MINUTE_NS)


def test_a_refresh_sends_no_request_while_the_market_is_closed(harness: Harness) -> None:
    assert harness.refresh(at=EVENING)
    harness.refresh(at=EVENING + 11 * 60 * MINUTE_NS)
    assert harness.server.requests == []
    assert harness.notes.warnings == []
    assert len(harness.refresh(at=ns("2026-03-18T13:40"))) == len(STOCKS)  # ten minutes into the next session


def test_bars_outlive_yahoos_thirty_days(harness: Harness) -> None:
    harness.refresh("AAPL", at=EVENING)
    later = EVENING + 21 * DAY_NS
    harness.refresh("AAPL", at=later)
    harness.refresh("AAPL", at=later + 21 * DAY_NS)
    harness.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=later + 21 * DAY_NS)


def test_a_new_stock_costs_its_own_requests_only(harness: Harness) -> None:
    harness.refresh("AAPL", "MSFT", at=EVENING)
    requests = harness.refresh("AAPL", "MSFT", "NVDA")
    assert requests
    assert all("/NVDA?" in request for request in requests)
    harness.assert_holds("NVDA", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)


def test_the_running_minute_and_the_live_row_are_not_kept(harness: Harness) -> None:
    # 17:59 closed four seconds ago and may still change.
    harness.refresh("AAPL", at=ns("2026-03-17T18:00:04"))
    assert max(harness.minutes("AAPL")) == ns("2026-03-17T17:58")
    assert not any("misaligned" in warning for warning in harness.notes.warnings)


def test_minutes_without_a_trade_are_absent_and_no_reason_to_ask_again(harness: Harness) -> None:
    harness.server.halts = [(ns("2026-03-10T15:00"), ns("2026-03-10T15:10"))]
    harness.refresh("AAPL", at=EVENING)
    assert not harness.minutes("AAPL") & set(range(*harness.server.halts[0], MINUTE_NS))
    assert harness.refresh("AAPL") == []


def test_a_dotted_class_share_is_requested_with_a_dash(harness: Harness) -> None:
    harness.server.stocks = ("BRK-B",)
    harness.refresh("BRK.B")
    assert len(harness.minutes("BRK.B")) > 7_000


# ------------------------------------------------------------------------ splits


def test_splits_since_the_lakes_start_reach_the_ledger(harness: Harness) -> None:
    harness.server.splits = {"AAPL": [(date(2024, 6, 10), 4.0)], "NVDA": [(date(2026, 3, 10), 2.0)]}
    harness.refresh()
    assert harness.ledger.splits("AAPL") == [Split(date(2024, 6, 10), 4.0)]
    assert harness.ledger.splits("NVDA") == [Split(date(2026, 3, 10), 2.0)]
    assert harness.ledger.splits("MSFT") == []
    for stock in STOCKS:
        harness.assert_holds(stock)


def test_weeks_that_were_kept_before_a_split_are_on_the_new_scale_after_it(harness: Harness) -> None:
    harness.server.splits = {"AAPL": [(date(2026, 3, 25), 4.0)]}
    harness.refresh("AAPL", at=EVENING)
    assert harness.ledger.splits("AAPL") == []
    harness.refresh("AAPL", at=ns("2026-03-25T18:00:30"))
    assert harness.ledger.splits("AAPL") == [Split(date(2026, 3, 25), 4.0)]
    # Weeks out of Yahoo's reach, kept bars in fetched weeks, and new ones: one scale.
    harness.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=ns("2026-03-25T18:00"))
    harness.refresh("AAPL", at=ns("2026-03-27T01:00"))
    harness.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=ns("2026-03-27T00:00"))
    assert harness.refresh("AAPL", at=ns("2026-03-27T02:00")) == []


def test_older_splits_are_fetched_once_a_day(harness: Harness) -> None:
    def daily() -> int:
        return len(harness.charts("interval=1d&includePrePost"))

    harness.refresh("AAPL", at=EVENING)
    assert daily() == 1
    harness.refresh("AAPL", at=EVENING + 60 * MINUTE_NS)
    assert daily() == 0
    harness.refresh("AAPL", at=EVENING + DAY_NS)
    assert daily() == 1


def test_a_lost_ledger_is_filled_again(harness: Harness) -> None:
    harness.server.splits = {"AAPL": [(date(2024, 6, 10), 4.0)]}
    harness.refresh("AAPL", at=EVENING)
    (harness.folder / "splits.json").write_text("{")
    harness.refresh("AAPL")
    assert harness.ledger.splits("AAPL") == [Split(date(2024, 6, 10), 4.0)]


# ------------------------------------------------------------ yfinance's surroundings


def test_cookie_and_crumb_are_fetched_once_and_shown(harness: Harness) -> None:
    harness.refresh()
    others = [request for request in harness.server.requests if "/chart/" not in request]
    assert others == ["/", "/v1/test/getcrumb"]
    assert all("crumb=cr.Umb" in request for request in harness.charts())


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be taken for one" * 99])
def test_damaged_sqlite_caches_of_yfinance_do_no_harm(harness: Harness, content: bytes) -> None:
    folder = harness.folder / ".yfinance"
    folder.mkdir(parents=True)
    for name in ("tkr-tz.db", "cookies.db"):
        (folder / name).write_bytes(content)
    harness.refresh()
    for stock in STOCKS:
        harness.assert_holds(stock)
    assert harness.notes.warnings == []


def test_time_zones_are_remembered_beside_the_bars(harness: Harness, tmp_path: Path) -> None:
    harness.refresh("AAPL")
    assert (harness.folder / ".yfinance" / "tkr-tz.db").exists()
    assert len(harness.charts("range=1d")) == 1
    harness.refresh("AAPL", at=NOW + 20 * 60 * 10**9)
    assert len(harness.charts("range=1d")) == 0
    # Of the same process: yfinance's state is global.
    other = Harness(harness.server, tmp_path / "other lake")
    other.refresh("AAPL")
    assert (other.folder / ".yfinance" / "tkr-tz.db").exists()
    assert not (Path(other.folder) / "yahoo" / ".yfinance").exists()


def test_it_works_without_curl_cffi(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curl_cffi", None)
    harness.server.faults = [Fault("/MSFT.*1m", "drip")]
    harness.refresh()
    harness.assert_holds("AAPL")
    harness.assert_holds("NVDA")
    assert [warning[:24] for warning in harness.notes.warnings] == ["MSFT: Yahoo does not ans"]


def test_nothing_is_printed(harness: Harness, capfd: pytest.CaptureFixture[str]) -> None:
    harness.server.faults = [Fault("getcrumb", "hang"), Fault("/MSFT", "body", 502, body=HTML)]
    harness.server.wants_crumb = False
    harness.refresh()
    assert capfd.readouterr() == ("", "")


def test_the_environment_names_another_host(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAHOO_BASE_URL", harness.server.url + "/")
    harness.refresh_at(NOW, "AAPL", days=5, yahoo=Yahoo.from_environment())
    assert list(harness.lake.parts("yahoo", "AAPL")) == ["2026-03-09", "2026-03-16"]


def test_weeks_begin_on_mondays_in_new_york_whatever_the_clocks_do() -> None:
    found = list(weeks(ns("2026-03-05T12:00"), ns("2026-03-16T12:00")))
    assert [week.name for week in found] == ["2026-03-02", "2026-03-09", "2026-03-16"]
    assert [week.start_ns for week in found] == [
        ns("2026-03-02T05:00"),
        ns("2026-03-09T04:00"),
        ns("2026-03-16T04:00"),
    ]
    assert all(week.end_ns - week.start_ns == 5 * DAY_NS for week in found)
