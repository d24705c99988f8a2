"""Damaged answers, refusals and bad rows from Yahoo: kept bars stay, the rest heals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data_sources.errors import DataError, RateLimited, Refused, SourceUnavailable
from data_sources.lake.quality import bad_ticks
from data_sources.vendors import yahoo_refresh
from tests.data_sources.vendors.loopback import Fault, ns
from tests.data_sources.vendors.yahoo_harness import (
    DAY_NS,
    EVENING,
    HTML,
    MINUTES,
    NOW,
    STOCKS,
    Harness,
)
from tests.data_sources.vendors.yahoo_server import MINUTE_NS, Rows, YahooServer


def test_a_failed_answer_is_not_replayed_from_yfinances_cache(harness: Harness) -> None:
    # The library yfinance itself tries each twice.
    harness.server.faults = [Fault(MINUTES, "body", 502, body=HTML, count=2)]
    harness.refresh()
    for stock in STOCKS:
        harness.assert_holds(stock)
    assert harness.notes.warnings == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/MSFT", "body", 200, body=HTML),
        pytest.param(Fault("/MSFT.*1m", "body", 200, body=b""), marks=pytest.mark.drill),
        Fault("/MSFT.*1m", "body", 200, body=b'{"chart": {"result": [{"meta": 7}], "error": null}}'),
        pytest.param(Fault("/MSFT.*1m", "body", 200, body=b"[1, 2]"), marks=pytest.mark.drill),
        pytest.param(Fault("/MSFT", "body", 502, body=HTML), marks=pytest.mark.drill),
        Fault("/MSFT", "body", 503, body=b'{"finance": {"error": {"code": "busy", "description": "x"}}}'),
        pytest.param(Fault("/MSFT.*1m", "truncate"), marks=pytest.mark.drill),
        Fault("/MSFT", "reset"),
        Fault("/MSFT.*1m", "drip"),
        Fault("/MSFT", "hang"),
        Fault("/MSFT.*1m", "rows", rows=lambda rows: rows | {"open": ["x"] * len(rows["open"])}),
        pytest.param(
            Fault("/MSFT.*1m", "rows", rows=lambda rows: rows | {"close": []}), marks=pytest.mark.drill
        ),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.body[:8]!r}",
)
def test_one_stocks_failure_is_one_warning_and_heals(harness: Harness, fault: Fault) -> None:
    harness.server.faults = [fault]
    harness.refresh()
    harness.assert_holds("AAPL")
    harness.assert_holds("NVDA")
    assert [warning[:5] for warning in harness.notes.warnings] == ["MSFT:"]
    harness.server.faults = []
    harness.refresh()
    harness.assert_holds("MSFT")
    assert harness.notes.warnings == []


def test_an_unknown_stock_is_reported_once_and_costs_few_requests(harness: Harness) -> None:
    harness.refresh("AAPL", "ZZZZ", "MSFT")
    assert harness.notes.warnings == ["ZZZZ: Yahoo does not know this symbol (HTTP 404)"]
    assert len(harness.charts("/ZZZZ")) <= 2
    harness.assert_holds("MSFT")


def test_an_unknown_stock_is_answered_with_the_one_that_yahoo_has(harness: Harness) -> None:
    harness.server.stocks = (*harness.server.stocks, "BRK-B")
    harness.refresh("AAPL", "BRKB", "FB")
    assert harness.notes.warnings == [
        "BRKB: Yahoo does not know this symbol (HTTP 404); it has BRK.B",
        "FB: Yahoo does not know this symbol (HTTP 404); FB is META since 2022-06-09",
    ]


def test_a_stock_that_yahoo_no_longer_knows_is_told_from_one_that_never_existed(harness: Harness) -> None:
    harness.refresh("AAPL", "MSFT")
    harness.server.stocks = ("AAPL",)
    harness.refresh("AAPL", "MSFT", at=EVENING + 9 * DAY_NS)
    (warning,) = harness.notes.warnings
    assert warning.startswith("MSFT: Yahoo does not know this symbol (HTTP 404); it did until 20")


def test_only_unknown_stocks_are_an_error(harness: Harness) -> None:
    with pytest.raises(DataError, match="does not know this symbol"):
        harness.refresh("ZZZZ", "YYYY")


def test_a_week_without_its_bars_is_a_warning_and_fetched_again(harness: Harness) -> None:
    empty = Fault("/MSFT.*1m", "rows", rows=lambda rows: {name: [] for name in rows}, count=2)
    harness.server.faults = [empty]
    harness.refresh(at=EVENING)
    assert harness.notes.warnings == [
        "MSFT: no bars came for the week of 2026-02-16, 2026-02-23, although the market was open"
    ]
    assert len(harness.refresh()) == 2
    harness.assert_holds("MSFT", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)
    assert harness.refresh() == []


def test_a_week_that_stays_short_is_not_fetched_at_every_refresh(harness: Harness) -> None:
    harness.server.faults = [
        Fault("/MSFT.*period1=1772.*1m", "rows", rows=lambda rows: {n: v[:900] for n, v in rows.items()})
    ]
    asked = [len(harness.refresh("MSFT", at=EVENING + i * 60 * MINUTE_NS)) for i in range(5)]
    assert asked[1:] == [1, 1, 0, 0]
    harness.server.faults = []
    harness.refresh("MSFT", at=EVENING + 47 * 60 * MINUTE_NS)
    harness.assert_holds("MSFT", start_ns=EVENING - 27 * DAY_NS, end_ns=harness.server.now_ns)


def test_a_rate_limit_stops_the_source_and_keeps_what_came(harness: Harness, waits: dict[str, float]) -> None:
    harness.server.faults = [
        Fault("/(MSFT|NVDA)", "status", 429, {"Retry-After": "7"}, b"Too Many Requests"),
    ]
    with pytest.raises(RateLimited, match=r"rate limit .* retry in 7 s") as caught:
        harness.refresh()
    assert caught.value.retry_after == 7
    assert not harness.charts("/NVDA")
    harness.assert_holds("AAPL")
    harness.server.faults = []
    with pytest.raises(RateLimited, match="more seconds to wait"):  # another client, in the next minute
        harness.refresh()
    assert not harness.server.requests
    waits.clear()
    assert not any("/NVDA" in r and "2026" in r for r in harness.refresh())
    for stock in STOCKS:
        harness.assert_holds(stock)


def test_a_limited_crumb_alone_stops_nothing_and_is_not_requested_again(harness: Harness) -> None:
    harness.server.wants_crumb = False
    harness.server.faults = [Fault("getcrumb", "status", 429, body=b"Too Many Requests")]
    harness.refresh()
    harness.assert_holds("NVDA")
    assert sum("getcrumb" in request for request in harness.server.requests) <= 2


def test_a_refusal_is_reported_as_one(harness: Harness) -> None:
    harness.server.faults = [Fault("/chart/", "body", 403, body=HTML)]
    with pytest.raises(Refused, match="HTTP 403"):
        harness.refresh()


def test_a_host_that_is_not_there_is_given_up_early(harness: Harness) -> None:
    stocks = [f"S{number}" for number in range(22)]
    with YahooServer(NOW) as gone:
        pass
    harness.server.url, url = gone.url, harness.server.url
    with pytest.raises(SourceUnavailable, match="3 stocks in a row"):
        harness.refresh(*stocks)
    harness.server.url = url
    harness.refresh()
    harness.assert_holds("AAPL")


def test_a_host_that_hangs_is_given_up_early(harness: Harness) -> None:
    harness.server.faults = [Fault("", "hang")]
    with pytest.raises(SourceUnavailable, match="3 stocks in a row"):
        harness.refresh(*(f"S{number}" for number in range(22)))
    assert len(harness.server.requests) <= 10


def test_a_slow_source_has_a_deadline_and_keeps_what_came(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.refresh("AAPL", at=EVENING)
    monkeypatch.setattr(yahoo_refresh, "MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr(yahoo_refresh, "SECONDS_PER_STOCK", 0.0)
    with pytest.raises(SourceUnavailable, match="too slow"):
        harness.refresh()
    harness.assert_holds("AAPL", start_ns=EVENING - 29 * DAY_NS, end_ns=EVENING)


def test_yahoos_own_words_reach_the_user(harness: Harness) -> None:
    harness.server.now_ns += 3 * DAY_NS  # a host whose clock is ahead: the oldest week is too old for it
    ahead = harness.server.now_ns
    harness.refresh_at(NOW, "AAPL", days=60)
    assert harness.server.now_ns == ahead
    [warning] = harness.notes.warnings
    assert "The requested range must be within the last 30 days." in warning
    harness.assert_holds("AAPL", start_ns=ns("2026-02-23T00:00"))


def test_another_symbols_answer_is_not_kept(harness: Harness) -> None:
    meta = YahooServer._meta

    def mixed_up(self: YahooServer, symbol: str, *rest: Any) -> dict[str, Any]:
        return meta(self, "NVDA" if symbol == "MSFT" else symbol, *rest)

    harness.server._meta = mixed_up.__get__(harness.server)  # type: ignore[method-assign]
    harness.refresh()
    assert harness.minutes("MSFT") == set()
    assert harness.notes.warnings == ["MSFT: asked Yahoo for MSFT, got NVDA"]


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


def test_rows_off_the_level_stay_in_the_lake_and_are_no_bars(harness: Harness) -> None:
    harness.server.faults = [Fault(MINUTES, "rows", rows=spoilt(97, lambda value: value * 10, *PRICES))]
    harness.refresh("AAPL", at=EVENING)
    held = harness.columns("AAPL")
    times, values = harness.server.truth("AAPL", int(held["open_time"][0]), EVENING)
    is_right = held["close"] == values[np.searchsorted(times, held["open_time"]), 3]
    assert np.count_nonzero(~is_right) > 10
    marked = bad_ticks(held["open_time"], held["open"], held["close"])
    np.testing.assert_array_equal(marked, ~is_right)


@pytest.mark.parametrize("is_filled", [False, True], ids=["new lake", "filled lake"])
@pytest.mark.parametrize(
    "rows",
    [
        spoilt(20, lambda value: None, "close"),
        spoilt(20, lambda value: None, *PRICES, "volume"),
        spoilt(50, lambda value: -value, "low"),
        spoilt(50, lambda value: 0.0, "open"),
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
        "null nulls negative zero ohlc volume misaligned future duplicate reversed shuffled half thinned"
    ).split(),
)
def test_spoilt_rows_cost_no_kept_bar_and_heal(
    harness: Harness, rows: Callable[[Rows], Rows], is_filled: bool
) -> None:
    if is_filled:
        harness.refresh("AAPL", at=EVENING - 2 * DAY_NS)
    before = harness.minutes("AAPL")
    harness.server.faults = [Fault(MINUTES, "rows", rows=rows)]
    harness.refresh("AAPL", at=EVENING)
    held = harness.columns("AAPL")
    if held:
        # Every kept bar is right, even while the vendor is not.
        times, values = harness.server.truth("AAPL", int(held["open_time"][0]), EVENING)
        places = np.searchsorted(times, held["open_time"])
        assert (times[places] == held["open_time"]).all()
        np.testing.assert_array_equal(held["close"], values[places, 3])
    assert before <= harness.minutes("AAPL")
    harness.server.faults = []
    harness.refresh("AAPL", at=EVENING + 30 * MINUTE_NS)
    harness.assert_holds("AAPL", start_ns=EVENING - 28 * DAY_NS, end_ns=EVENING)
    assert harness.notes.warnings == []
