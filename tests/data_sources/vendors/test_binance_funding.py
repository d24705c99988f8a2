"""Funding of USD-M perpetuals: from REST and the archive into the ledger, whatever is missing, late or doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources.funding import FundingLedger
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.vendors.binance_product import USD_M
from tests.data_sources.bar_tables import ns
from tests.data_sources.vendors.binance_harness import Harness
from tests.data_sources.vendors.binance_server import HOUR_NS, BinanceServer
from tests.data_sources.vendors.loopback import Fault

NOW, CLOSED = ns("2026-11-04T12:00:30"), ns("2026-11-04T12:00")  # October's files are out since the 2nd
START = ns("2026-10-30T00:00")
PERPETUAL = "BTCUSDT.P"
REST, FILES = "/fapi/v1/fundingRate", "/fundingRate/"
LONG = pytest.mark.drill
RESTRICTED = b'{"code":0,"msg":"restricted location"}'


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with BinanceServer(NOW, (PERPETUAL, "ETHUSDT.P")) as server:
        server.listed_ns = dict.fromkeys(server.pairs, ns("2026-10-29T00:00"))
        yield Harness(server, tmp_path / "lake", USD_M)


def held(harness: Harness, symbol: str = PERPETUAL) -> dict[int, float]:
    times, rates = FundingLedger(harness.lake.root).rates(symbol)
    return {time: rate for time, rate in zip(times.tolist(), rates.tolist(), strict=True) if time >= START}


def truth(harness: Harness, start_ns: int = START, end_ns: int = CLOSED) -> dict[int, float]:
    return {time: rate for time, rate, _ in harness.server.funding(PERPETUAL, start_ns, end_ns)}


def asked(requests: list[str]) -> tuple[int, int]:
    """How many requests of funding went to REST, and to the archive."""
    return sum(path.startswith(REST) for path in requests), sum(FILES in path for path in requests)


def refresh(harness: Harness, *faults: Fault, seconds_later: int = 0) -> tuple[int, int]:
    harness.server.faults = list(faults)
    return asked(harness.refresh(start_ns=START, seconds_later=seconds_later))


def bars_of(harness: Harness, start_ns: int = START) -> tuple[Any, Any]:
    request = DataRequest(
        ("binance_futures",), {"binance_perpetuals": (PERPETUAL,)}, start_ns, NOW, min_bars=10
    )
    data = load(harness.lake, request)
    return data.bars[0], data.rows[0]


def test_rows_come_from_one_request_and_stand_beside_the_bars(harness: Harness) -> None:
    harness.server.intervals[PERPETUAL] = [(ns("2026-11-02T00:00"), 4)]  # 8 hours until then
    assert refresh(harness) == (1, 0)
    assert held(harness) == truth(harness)
    assert len(truth(harness)) == 9 + 15
    assert harness.notes.warnings == []
    bars, row = bars_of(harness)
    assert row.flags == ()
    charged = np.flatnonzero(bars.funding)
    expected = {time: rate for time, rate in truth(harness).items() if rate and time > START}
    assert (
        dict(zip(bars.open_time[charged].tolist(), bars.funding[charged].tolist(), strict=True)) == expected
    )


def test_without_news_nothing_is_asked_and_then_only_the_last_day(harness: Harness) -> None:
    refresh(harness)
    assert refresh(harness) == (0, 0)
    assert refresh(harness, seconds_later=60) == (
        1,
        0,
    )  # the newest row is of 08:00, the next one may be there
    harness.server.now_ns = ns("2026-11-04T16:30:30")
    harness.refresh(start_ns=START)
    assert held(harness) == truth(harness, end_ns=ns("2026-11-04T16:30"))
    (path,) = [path for path in harness.server.requests if REST in path]
    assert f"startTime={ns('2026-11-03T08:00') // 10**6}" in path


def test_the_archive_stands_in_for_a_blocked_api_and_the_api_for_a_blocked_archive(harness: Harness) -> None:
    assert refresh(harness, Fault("/fapi/", status=451, body=RESTRICTED)) == (
        0,
        2,
    )  # October, with its checksum
    assert held(harness) == truth(harness, end_ns=ns("2026-11-01T00:00"))
    assert [
        warning for warning in harness.notes.warnings if "funding" in warning
    ] == []  # one line on the host
    assert (
        "late" not in str(bars_of(harness)[1].flags)
        and "no funding is known of" in bars_of(harness)[1].flags[0]
    )
    assert refresh(harness, Fault("/data/", status=451, body=b"<html>"), seconds_later=3600) == (1, 0)
    assert held(harness) == truth(harness)
    assert bars_of(harness)[1].flags == ()


def without(*hours: str) -> Any:
    stamps = {ns(hour) // HOUR_NS for hour in hours}

    def change(rows: list[Any]) -> list[Any]:
        return [row for row in rows if _stamp(row) // 3_600_000 not in stamps]

    return change


def _stamp(row: Any) -> int:
    return row["fundingTime"] if isinstance(row, dict) else row[0]


def test_a_missing_row_comes_from_the_other_host_and_a_late_one_with_the_next_refresh(
    harness: Harness,
) -> None:
    missing, late = "2026-10-31T08:00", "2026-11-04T08:00"
    assert refresh(harness, Fault(REST, "rows", rows=without(missing, late))) == (1, 2)
    expected = truth(harness)
    assert held(harness) == {time: rate for time, rate in expected.items() if time != ns(late)}
    assert "no funding is known of 2026-11-04 08:00" in bars_of(harness)[1].flags[0]
    assert refresh(harness, Fault(REST, "rows", rows=without(missing)), seconds_later=3600) == (1, 0)
    assert held(harness) == expected
    # A row that neither host has is charged as the one before it.
    harness.binance = harness.new_client()
    harness.server.faults = [Fault("undingRate", "rows", rows=without(missing))]
    assert asked(harness.refresh("ETHUSDT.P", start_ns=START)) == (1, 2)
    assert ns(missing) not in held(harness, "ETHUSDT.P")
    request = DataRequest(
        ("binance_futures",), {"binance_perpetuals": ("ETHUSDT.P",)}, START, NOW, min_bars=10
    )
    (bars,) = load(harness.lake, request).bars
    before = held(harness, "ETHUSDT.P")[ns("2026-10-31T00:00")]
    assert bars.funding[np.searchsorted(bars.open_time, ns(missing))] == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [row for row in rows for _ in (0, 1)][::-1], ""),
        (lambda rows: [*rows, dict(rows[5], fundingRate="0.00099")], "two funding rates at 2026-10-31 16:00"),
        (
            lambda rows: [*rows[:-1], dict(rows[-1], fundingRate="0.9")],
            "a funding rate of 0.9 at 2026-11-04 08:00",
        ),
        (
            lambda rows: [*rows[:-1], dict(rows[-1], fundingRate=None)],
            "a funding rate of nan at 2026-11-04 08:00",
        ),
        pytest.param(
            lambda rows: [*rows, {"fundingTime": "soon"}], "expected a funding rate with its time", marks=LONG
        ),
        (lambda rows: [*rows, dict(rows[0], fundingTime=1)], "funding rates outside of the requested span"),
        pytest.param(lambda rows: {"rows": rows}, "expected a list of funding rates", marks=LONG),
    ],
)
def test_a_bad_row_of_rest_is_one_line_and_the_rest_stays(harness: Harness, change: Any, words: str) -> None:
    refresh(harness, Fault(REST, "rows", rows=change))
    assert [words in warning for warning in harness.notes.warnings] == [True] * bool(words)
    assert all(warning.startswith("BTCUSDT.P: ") for warning in harness.notes.warnings)
    assert len(held(harness)) >= 6  # October's, if only from the archive
    harness.assert_complete(start_ns=START, end_ns=CLOSED)
    refresh(harness, seconds_later=3600)
    known, expected = held(harness), truth(harness)
    assert {time for time in known if known[time] != expected[time]} <= {ns("2026-10-31T16:00")}
    if "two" not in words:
        assert known == expected


@pytest.mark.parametrize(
    "kind", ["corrupt", "header within", *(pytest.param(k, marks=LONG) for k in ("words", "another month"))]
)
def test_a_damaged_month_is_one_line(harness: Harness, kind: str) -> None:
    changes = {
        "words": lambda rows: [*rows, ["soon", 8, "0.1"]],
        "another month": lambda rows: [*rows, [ns("2026-09-30T16:00") // 10**6, 8, "0.0001"]],
        "header within": lambda rows: [*rows[:3], ["calc_time", "funding_interval_hours", "rate"], *rows[3:]],
    }
    fault = Fault("fundingRate-2026-10.zip$", kind) if kind == "corrupt" else None
    fault = fault or Fault("fundingRate-2026-10.zip", "rows", rows=changes[kind])
    refresh(harness, Fault(REST, status=503, body=b"{}"), fault)
    october = truth(harness, end_ns=ns("2026-11-01T00:00"))
    if kind == "header within":
        assert held(harness) == october
    else:
        assert held(harness) == {}
        assert any("BTCUSDT-fundingRate-2026-10" in warning for warning in harness.notes.warnings)
    harness.assert_complete(start_ns=START, end_ns=CLOSED)


def test_a_listing_within_the_interval_asks_for_nothing_before_it(harness: Harness) -> None:
    harness.server.listed_ns[PERPETUAL] = ns("2026-10-31T10:07")
    assert refresh(harness) == (1, 0)
    assert min(held(harness)) == ns("2026-10-31T16:00")
    assert refresh(harness, seconds_later=60) == (1, 0)
    assert bars_of(harness)[1].flags == ()
