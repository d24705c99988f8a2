"""Binance with the real python-binance and requests, against a loopback server of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_sources.errors import LakeError, RateLimited, Refused, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.lake.quality import SCHEMA
from data_sources.vendors import binance_pair
from data_sources.vendors.binance_pair import NOT_IN_ARCHIVE
from data_sources.vendors.binance_refresh import Binance
from data_sources.vendors.binance_rest import Rest
from data_sources.vendors.http import PROBE_POLICY
from tests.data_sources.bar_tables import job_for
from tests.data_sources.vendors.binance_harness import CLOSED, DAY_NS, NOW, POLICY, START, Harness
from tests.data_sources.vendors.binance_server import MINUTE_NS, BinanceServer, bars_of
from tests.data_sources.vendors.loopback import Fault, ns


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with BinanceServer(NOW) as server:
        yield Harness(server, tmp_path / "lake")


def day_names(first: int, last: int) -> set[str]:
    return {f"2026-11-{day:02d}" for day in range(first, last + 1)}


# ------------------------------------------------------------------ a normal refresh


def test_a_first_refresh_brings_every_closed_bar_and_never_the_forming_one(harness: Harness) -> None:
    harness.refresh("BTCUSDT", "ETHUSDT")
    for pair in ("BTCUSDT", "ETHUSDT"):
        harness.assert_complete(pair)
        assert harness.units(pair) == {"2026-10", "recent"} | day_names(1, 22)
    assert harness.notes.warnings == []
    assert harness.notes.units == harness.notes.total
    assert harness.notes.num_bytes > 1_000_000
    assert "2 of 2 pairs up to date" in harness.notes.summary


def test_a_part_names_its_file_and_its_sha256(harness: Harness) -> None:
    harness.refresh()
    part = harness.lake.parts("binance", "BTCUSDT")["2026-10"]
    assert part.key == "data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2026-10.zip"
    assert len(part.version) == 64
    assert (part.start_ns, part.end_ns, part.rows) == (
        ns("2026-10-01T00:00"),
        ns("2026-11-01T00:00"),
        31 * 1440,
    )


def test_a_refresh_without_news_asks_for_nothing_within_the_minute_and_one_page_after_it(
    harness: Harness,
) -> None:
    harness.refresh("BTCUSDT", "ETHUSDT")
    fingerprint = harness.lake.fingerprint()
    assert harness.refresh("BTCUSDT", "ETHUSDT") == []
    assert harness.lake.fingerprint() == fingerprint
    harness.binance = harness.new_client()  # a restarted daemon knows as much
    requests = harness.refresh("BTCUSDT", "ETHUSDT", seconds_later=60)
    assert len(requests) == 2
    assert all("/klines?" in path for path in requests)
    harness.assert_complete(end_ns=CLOSED + MINUTE_NS)


def test_days_replace_recent_bars_and_a_month_replaces_its_days(harness: Harness) -> None:
    harness.refresh()
    harness.refresh(seconds_later=2 * 86400)
    assert harness.units() == {"2026-10", "recent"} | day_names(1, 24)
    assert harness.lake.parts("binance", "BTCUSDT")["recent"].start_ns == ns("2026-11-25T00:00")
    harness.assert_complete(end_ns=CLOSED + 2 * DAY_NS)
    harness.server.now_ns = ns("2026-12-09T12:00:30")
    harness.refresh()
    assert {"2026-10", "2026-11", "2026-12-01", "recent"} <= harness.units()
    assert not any(unit.startswith("2026-11-") for unit in harness.units())
    harness.assert_complete(end_ns=ns("2026-12-09T12:00"))


def test_a_new_pair_fetches_its_own_past_and_nothing_else(harness: Harness) -> None:
    harness.refresh("BTCUSDT")
    requests = harness.refresh("BTCUSDT", "ETHUSDT")
    assert requests
    assert all("ETHUSDT" in path for path in requests)


def test_an_earlier_start_fetches_only_the_earlier_months(harness: Harness) -> None:
    harness.refresh()
    requests = harness.refresh(start_ns=ns("2026-09-20T00:00"))
    assert [path.rsplit("/", 1)[1] for path in requests] == [
        "BTCUSDT-1m-2026-09.zip.CHECKSUM",
        "BTCUSDT-1m-2026-09.zip",
    ]


def test_a_window_that_ended_long_ago_needs_no_recent_bars(harness: Harness) -> None:
    now_ns = harness.server.now_ns
    harness.refresh_until(ns("2026-10-25T00:00"), start_ns=START, now_ns=now_ns)
    assert harness.units() == {"2026-10"}


# ------------------------------------------------------------------ listing, delisting, outages


def test_months_before_a_listing_are_remembered_as_empty(harness: Harness) -> None:
    harness.server.listed_ns["BTCUSDT"] = ns("2026-10-12T10:00")
    start_ns = ns("2026-03-05T00:00")
    requests = harness.refresh(start_ns=start_ns)
    # October, and September's 404.
    assert sum("monthly" in path and "CHECKSUM" in path for path in requests) == 2
    parts = harness.lake.parts("binance", "BTCUSDT")
    assert [
        (parts[f"2026-{month:02d}"].rows, parts[f"2026-{month:02d}"].version) for month in range(3, 10)
    ] == [(0, "")] * 7
    harness.assert_complete(start_ns=start_ns)
    assert len(harness.refresh(start_ns=start_ns, seconds_later=60)) == 1
    assert harness.notes.warnings == []


def test_a_listing_is_found_without_rest_too(harness: Harness) -> None:
    harness.server.listed_ns["BTCUSDT"] = ns("2026-09-12T10:00")
    harness.server.faults = [Fault("/api/", status=503, body=b"{}")]
    start_ns = ns("2026-07-05T00:00")
    harness.refresh(start_ns=start_ns)
    assert {"2026-07", "2026-08", "2026-09", "2026-10", "2026-11-23"} <= harness.units()
    with pytest.raises(SourceUnavailable):  # nothing new without REST
        harness.refresh(start_ns=start_ns, seconds_later=60)
    assert not any("monthly" in path for path in harness.server.requests)


def test_a_delisted_pair_keeps_its_bars_and_costs_one_page(harness: Harness) -> None:
    harness.server.delisted_ns["BTCUSDT"] = ns("2026-09-10T03:00")
    start_ns = ns("2026-08-20T00:00")
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns)
    harness.binance = harness.new_client()
    assert len(harness.refresh(start_ns=start_ns, seconds_later=60)) == 1
    harness.assert_complete(start_ns=start_ns)


def test_an_outage_stays_a_gap_and_is_requested_once(harness: Harness) -> None:
    harness.server.outages = [
        (ns("2026-10-21T03:00"), ns("2026-10-21T05:30")),
        (ns("2026-11-20T03:00"), ns("2026-11-20T03:01")),
    ]
    harness.refresh()
    harness.assert_complete()
    assert len(harness.refresh(seconds_later=60)) == 1


def test_an_unknown_pair_fails_alone_and_names_its_successor(harness: Harness) -> None:
    harness.refresh("MATICUSDT", "BTCUSDT", "../etc")
    harness.assert_complete()
    assert sorted(harness.notes.warnings) == [
        "'../etc' is not a Binance pair; pairs look like BTCUSDT",
        "MATICUSDT: Binance does not know this pair; MATICUSDT is POLUSDT since 2024-09-13",
    ]


# ------------------------------------------------------------------ hosts that refuse, limit or fail


def test_a_blocked_country_still_gets_the_archive_and_the_advice(harness: Harness) -> None:
    harness.server.faults = [Fault("/api/", status=451, body=b'{"code":0,"msg":"restricted location"}')]
    requests = harness.refresh()
    assert sum(path.startswith("/api") for path in requests) == 1
    assert "BINANCE_API_URL=https://data-api.binance.vision" in harness.notes.warnings[-1]
    harness.assert_complete(end_ns=ns("2026-11-24T00:00"))  # by yesterday's file, out two hours ago
    harness.server.faults = []
    harness.refresh(seconds_later=60)
    harness.assert_complete(end_ns=CLOSED + MINUTE_NS)


def test_a_blocked_country_without_news_in_the_archive_is_an_error(harness: Harness) -> None:
    harness.server.faults = [Fault("/api/", status=451, body=b'{"code":0,"msg":"restricted location"}')]
    harness.refresh()
    with pytest.raises(Refused, match=r"data-api\.binance\.vision"):
        harness.refresh(seconds_later=3600)
    harness.assert_complete(end_ns=ns("2026-11-24T00:00"))


@pytest.mark.parametrize(
    "status", [404, 503, *(pytest.param(s, marks=pytest.mark.drill) for s in (403, 451, 500))]
)
def test_rest_carries_on_without_the_archive(harness: Harness, status: int) -> None:
    harness.server.faults = [Fault("/data/", status=status, body=b"<html>")]
    harness.refresh()
    harness.assert_complete()
    harness.server.faults = []
    harness.refresh(seconds_later=86400)
    assert "2026-11-23" in harness.units()
    harness.assert_complete(end_ns=CLOSED + DAY_NS)


@pytest.mark.parametrize("is_later", [False, True])
def test_a_month_that_the_archive_lacks_before_all_others_is_not_one_before_the_listing(
    harness: Harness, is_later: bool
) -> None:
    harness.server.faults = [Fault("2026-09", status=404)]
    if is_later:
        harness.refresh()
    start_ns = ns("2026-09-24T00:00")
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns)
    assert len(harness.refresh(start_ns=start_ns, seconds_later=60)) == 1


def test_a_pair_that_only_rest_has_loses_no_bar_and_gets_them_all_in_time(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binance_pair, "REST_PAGES", 60)
    harness.server.faults = [Fault("/data/", status=404)]
    start_ns = ns("2026-09-20T00:00")
    harness.refresh(start_ns=start_ns)
    first_ns = int(harness.minutes(start_ns=start_ns)[0])
    assert start_ns < first_ns < ns("2026-10-20T00:00")
    harness.refresh(start_ns=start_ns, seconds_later=60)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + MINUTE_NS)


def test_months_that_a_former_version_took_for_ones_before_the_listing_are_asked_for_again(
    harness: Harness,
) -> None:
    harness.refresh()
    start_ns = ns("2026-09-24T00:00")
    span = {"start_ns": ns("2026-09-01T00:00"), "end_ns": ns("2026-10-01T00:00")}
    harness.lake.write(
        "binance", "BTCUSDT", "2026-09", SCHEMA.empty_table(),
        key=NOT_IN_ARCHIVE, version="", symbols=["BTCUSDT"], now_ns=NOW, **span,
    )  # fmt: skip
    harness.refresh(start_ns=start_ns, seconds_later=60)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + MINUTE_NS)


def test_two_dead_hosts_are_an_error_that_costs_no_bar_and_few_requests(harness: Harness) -> None:
    harness.refresh("BTCUSDT", "ETHUSDT")
    harness.server.faults = [Fault(".", status=503, body=b"null")]
    with pytest.raises(SourceUnavailable):
        harness.refresh("BTCUSDT", "ETHUSDT", seconds_later=3 * 86400)
    assert len(harness.server.requests) < 40
    harness.assert_complete()
    harness.server.faults = []
    harness.refresh("BTCUSDT", "ETHUSDT")
    harness.assert_complete(end_ns=CLOSED + 3 * DAY_NS)


def test_nothing_listens(tmp_path: Path) -> None:
    binance = Binance("http://127.0.0.1:9", "http://127.0.0.1:9", policy=POLICY)
    symbols = {"binance_pairs": ["BTCUSDT"]}
    with job_for(Lake(tmp_path), symbols, START, NOW, NOW) as job, pytest.raises(SourceUnavailable):
        binance.refresh(job)


def test_retry_after_is_honoured(harness: Harness) -> None:
    # The server bans a client that asks before the second is over.
    harness.server.faults = [
        Fault("/api/", status=429, headers={"Retry-After": "1"}, body=b'{"code":-1003}', count=1)
    ]
    harness.refresh(start_ns=ns("2026-11-20T00:00"))
    harness.assert_complete(start_ns=ns("2026-11-20T00:00"))
    assert harness.notes.warnings == []


def test_a_ban_stops_rest_at_once_and_outlives_the_refresh(harness: Harness) -> None:
    ban = Fault("/api/", status=418, headers={"Retry-After": "3600"}, body=b'{"code":-1003,"msg":"banned"}')
    harness.server.faults = [ban]
    requests = harness.refresh()
    assert sum(path.startswith("/api") for path in requests) == 1
    harness.binance = harness.new_client()  # as every refresh of the program begins
    with pytest.raises(RateLimited):
        harness.refresh(seconds_later=60)
    with pytest.raises(RateLimited, match="more seconds to wait"):
        harness.new_client(PROBE_POLICY).probe_api("BTCUSDT", NOW)
    assert not any(path.startswith("/api") for path in harness.server.requests)
    harness.assert_complete(end_ns=ns("2026-11-24T00:00"))


def test_most_of_the_weight_used_makes_it_wait_for_the_next_minute(harness: Harness) -> None:
    harness.server.weight = 4800
    rest = Rest(harness.server.url, POLICY)
    assert len(rest.page("BTCUSDT", START, CLOSED)) == 1000
    with pytest.raises(RateLimited, match="wait"):  # longer than POLICY's two seconds
        rest.page("BTCUSDT", START, CLOSED)
    assert len(harness.server.requests) == 1


# ------------------------------------------------------------------ the lake's side


def test_a_lake_that_another_writes_to_is_an_error_before_any_request(harness: Harness) -> None:
    with Lake(harness.lake.root).writing(), pytest.raises(LakeError):
        harness.refresh()
    assert harness.server.requests == []


def test_addresses_come_from_the_environment(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINANCE_API_URL", harness.server.url + "/")
    monkeypatch.setenv("BINANCE_ARCHIVE_URL", harness.server.url + "/")
    start_ns = ns("2026-11-22T00:00")
    harness.binance = Binance.from_environment()
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns)


def test_the_server_of_these_tests_gives_valid_bars() -> None:
    open_, high, low, close, volume = bars_of("BTCUSDT", np.arange(29_000_000, 29_010_000)).T
    assert (low <= np.minimum(open_, close)).all()
    assert (high >= np.maximum(open_, close)).all()
    assert (volume >= 0).all()
