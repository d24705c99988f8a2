"""USD-M perpetuals, with the real python-binance against a loopback server that speaks /fapi and futures/um."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from data_sources.errors import RateLimited
from data_sources.vendors.binance_product import USD_M
from data_sources.vendors.binance_refresh import Binance
from data_sources.vendors.binance_rest import Rest
from tests.data_sources.bar_tables import read
from tests.data_sources.vendors.binance_harness import DAY_NS, POLICY, Harness
from tests.data_sources.vendors.binance_server import HEADER, MINUTE_NS, BinanceServer
from tests.data_sources.vendors.loopback import Fault, ns

PERPETUALS = ("BTCUSDT.P", "ETHUSDT.P")
NOW, CLOSED = ns("2026-11-04T12:00:30"), ns("2026-11-04T12:00")  # October's files are out since the 2nd
DAYS = ns("2026-11-01T00:00")
RESTRICTED = b'{"code":0,"msg":"Service unavailable from a restricted location"}'


@pytest.fixture
def server() -> Iterator[BinanceServer]:
    with BinanceServer(NOW, ("BTCUSDT", *PERPETUALS)) as server:
        server.listed_ns = dict.fromkeys(server.pairs, ns("2026-10-29T00:00"))
        yield server


@pytest.fixture
def harness(server: BinanceServer, tmp_path: Path) -> Harness:
    return Harness(server, tmp_path / "lake", USD_M)


def limits(requests: list[str]) -> list[int]:
    """The limits of the pages among requests, on which their weight depends."""
    return [int(parse_qs(urlsplit(path).query)["limit"][0]) for path in requests if "/klines?" in path]


def test_spot_and_perpetual_of_a_pair_stand_beside_each_other(harness: Harness, tmp_path: Path) -> None:
    spot = Harness(harness.server, tmp_path / "lake")
    spot.refresh("BTCUSDT", start_ns=DAYS)
    harness.refresh(*PERPETUALS, start_ns=ns("2026-10-30T00:00"))
    for pair in PERPETUALS:
        harness.assert_complete(pair, start_ns=ns("2026-10-30T00:00"), end_ns=CLOSED)
        assert {"2026-10", "2026-11-02", "recent"} <= harness.units(pair)
    spot.assert_complete("BTCUSDT", start_ns=DAYS, end_ns=CLOSED)
    assert not np.array_equal(harness.server.truth("BTCUSDT", DAYS, CLOSED)[1],
                              harness.server.truth("BTCUSDT.P", DAYS, CLOSED)[1])  # fmt: skip
    assert harness.notes.warnings == []
    assert harness.notes.units == harness.notes.total
    assert harness.notes.summary.startswith("2 of 2 perpetuals up to date")
    part = harness.lake.parts("binance_futures", "BTCUSDT.P")["2026-10"]
    assert part.key == "data/futures/um/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2026-10.zip"
    assert len(part.version) == 64
    assert harness.lake.parts("binance_futures", "BTCUSDT.P")["recent"].key == "fapi/v1/klines"


def test_no_news_costs_a_page_of_the_least_weight(harness: Harness) -> None:
    harness.refresh(*PERPETUALS, start_ns=DAYS)
    assert harness.refresh(*PERPETUALS, start_ns=DAYS) == []
    requests = harness.refresh(*PERPETUALS, start_ns=DAYS, seconds_later=3600)
    assert [path.split("?")[0] for path in sorted(requests)] == ["/fapi/v1/fundingRate"] * 2 + [
        "/fapi/v1/klines"
    ] * 2
    assert max(limits(requests)) < 100
    harness.assert_complete(start_ns=DAYS, end_ns=CLOSED + 60 * MINUTE_NS)


def test_header_rows_in_a_file_are_no_rows(harness: Harness) -> None:
    header = HEADER.strip().split(",")
    shouted = [name.upper() for name in header]
    start_ns = ns("2026-11-01T00:00")
    harness.server.faults = [
        Fault("2026-11-02", "rows", rows=lambda rows: [header, *rows[:700], header, shouted, *rows[700:]])
    ]
    requests = harness.refresh(start_ns=start_ns)
    part = harness.lake.parts("binance_futures", "BTCUSDT.P")["2026-11-02"]
    assert (part.rows, part.rejected) == (1440, {})
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED)
    assert limits(requests) == [1, 1000, 1000, 160]  # the first bar and the last 36 hours: nothing was mended


def test_a_blocked_api_leaves_the_archive_and_a_blocked_archive_the_api(harness: Harness) -> None:
    start_ns = DAYS
    harness.server.faults = [Fault("/fapi/", status=451, body=RESTRICTED)]
    requests = harness.refresh(start_ns=start_ns)
    assert sum(path.startswith("/fapi") for path in requests) == 1
    assert harness.notes.warnings[-1] == (
        "skipping Binance futures REST: Binance futures refuses access (HTTP 451): not served here, or set "
        "BINANCE_FUTURES_API_URL to a proxy; its archive has all but the newest days"
    )
    harness.assert_complete(start_ns=start_ns, end_ns=ns("2026-11-04T00:00"))
    harness.server.faults = [Fault("/data/", status=451, body=b"<html>")]
    harness.refresh(start_ns=start_ns, seconds_later=2 * 86400)
    assert "Binance futures archive refuses access (HTTP 451)" in harness.notes.warnings[-1]
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + 2 * DAY_NS)


def test_a_ban_and_a_limit_are_those_of_this_host(harness: Harness, waits: dict[str, float]) -> None:
    harness.server.faults = [
        Fault("/fapi/", status=418, headers={"Retry-After": "3600"}, body=b'{"code":-1003,"msg":"banned"}')
    ]
    assert sum(path.startswith("/fapi") for path in harness.refresh(start_ns=DAYS)) == 1
    assert "Binance futures banned this address" in harness.notes.warnings[-1]
    harness.server.faults, harness.server.banned_until = [], 0.0
    waits.clear()
    harness.server.weight = 1920  # of 2,400; a third of spot's limit
    rest = Rest(harness.server.url + "/fapi", replace(POLICY, longest_wait_seconds=0.5), USD_M)
    assert len(rest.page("BTCUSDT.P", DAYS, CLOSED)) == 1000
    with pytest.raises(RateLimited, match="wait"):
        rest.page("BTCUSDT.P", DAYS, CLOSED)


def test_what_is_no_perpetual_there_is_answered_with_the_one_that_is(harness: Harness) -> None:
    harness.server.pairs += ("1000CATUSDT.P",)
    advice = {"BTCUSD.P": "it has BTCUSDT.P", "CATUSDT.P": "it has 1000CATUSDT.P"}
    advice["QQQQUSDT.P"] = "take it out of binance_perpetuals"
    harness.refresh("BTCUSDT.P", *advice, "BTCUSDT", start_ns=ns("2026-11-03T00:00"))
    assert sorted(harness.notes.warnings) == sorted(
        [
            "'BTCUSDT' is not a Binance perpetual; perpetuals look like BTCUSDT.P",
            *(f"{name}: Binance does not know this perpetual; {text}" for name, text in advice.items()),
        ]
    )
    harness.assert_complete(start_ns=ns("2026-11-03T00:00"), end_ns=CLOSED)


def test_addresses_come_from_the_environment(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINANCE_FUTURES_API_URL", harness.server.url + "/fapi/")
    monkeypatch.setenv("BINANCE_ARCHIVE_URL", harness.server.url)
    start_ns = ns("2026-11-02T00:00")
    harness.binance = Binance.from_environment(USD_M, POLICY)
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED)
    assert read(harness.lake, "binance", "BTCUSDT.P", None, DAYS, NOW).num_rows == 0
