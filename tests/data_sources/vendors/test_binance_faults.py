"""Damaged answers and bad rows from Binance: kept bars stay, the rest heals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources.errors import BadAnswer, DataError
from data_sources.vendors.binance_archive import Archive, days, months
from tests.data_sources.vendors.binance_harness import CLOSED, NOW, POLICY, QUICK, START, Harness
from tests.data_sources.vendors.binance_server import HOUR_NS, MINUTE_NS, BinanceServer, zipped
from tests.data_sources.vendors.loopback import Fault, ns


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with BinanceServer(NOW) as server:
        yield Harness(server, tmp_path / "lake")


# ------------------------------------------------------------------ damaged answers

DAMAGE: dict[str, Fault] = {
    "truncated": Fault("", "truncate"),
    "reset": Fault("", "reset"),
    "dripping": Fault("", "drip"),
    "hanging": Fault("", "hang"),
    "corrupt": Fault("", "corrupt"),
    "empty": Fault("", "body", body=b""),
    "a web page": Fault("", "body", body=b"<html>log in</html>"),
    "null of a failing server": Fault("", "status", status=502, body=b"null"),
    "no list": Fault("", "body", body=b'{"a":1}'),
    "odd rows": Fault("", "body", body=b"[[1],2,null]"),
    "rows of another time": Fault("", "body", body=b'[[1,"1","1","1","1","1",2,"1",1,"1","1","0"]]'),
    "a bare number": Fault("", "body", body=b"17"),
    "brackets without end": Fault("", "body", body=b"[" * 100_000),
}


def damage(kind: str, path: str, count: int | None = None) -> list[Fault]:
    fault = DAMAGE[kind]
    return [Fault(path, fault.kind, fault.status, dict(fault.headers), fault.body, count)]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "corrupt"])
def test_a_damaged_page_costs_no_kept_bar_and_heals(harness: Harness, kind: str) -> None:
    start_ns = ns("2026-11-24T00:00")
    harness.refresh(start_ns=start_ns)
    harness.binance = harness.new_client(QUICK)
    harness.server.faults = damage(kind, "/api/")
    with pytest.raises(DataError):
        harness.refresh(start_ns=start_ns, seconds_later=3600)
    harness.assert_complete(start_ns=start_ns)
    harness.server.faults = []
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + HOUR_NS)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind not in ("hanging", "dripping")])
@pytest.mark.parametrize("which", [r"11-20\.zip$", r"11-20\.zip\.CHECKSUM$"])
def test_rest_replaces_a_damaged_file(harness: Harness, kind: str, which: str) -> None:
    start_ns = ns("2026-11-19T00:00")
    harness.server.faults = damage(kind, which)
    harness.refresh(start_ns=start_ns)
    assert "2026-11-20" not in harness.units()
    assert "2026-11-21" in harness.units()
    harness.assert_complete(start_ns=start_ns)


@pytest.mark.parametrize("kind", ["hanging", pytest.param("dripping", marks=pytest.mark.drill)])
def test_an_archive_that_stalls_is_given_up(harness: Harness, kind: str) -> None:
    start_ns = ns("2026-11-20T00:00")
    harness.binance = harness.new_client(QUICK)
    harness.server.faults = damage(kind, "/data/")
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns)


def test_one_damaged_download_is_simply_repeated(harness: Harness) -> None:
    harness.server.faults = damage("corrupt", r"2026-10\.zip$", count=1)
    harness.refresh()
    harness.assert_complete()
    assert "2026-10" in harness.units()
    assert harness.notes.warnings == []


def test_the_days_replace_a_month_with_a_false_checksum(harness: Harness) -> None:
    harness.server.faults = [Fault(r"2026-10\.zip\.CHECKSUM", "body", body=b"0" * 64 + b"  x.zip\n")]
    harness.refresh()
    assert {"2026-10-20", "2026-10-31"} <= harness.units()
    assert "sha256" in " ".join(harness.notes.warnings)
    harness.assert_complete()
    harness.server.faults = []
    harness.refresh(seconds_later=7 * 3600)
    assert "2026-10" in harness.units()
    harness.assert_complete(end_ns=CLOSED + 7 * HOUR_NS)


def test_a_file_of_another_pair_or_day_is_not_taken(harness: Harness) -> None:
    archive = Archive(harness.server.url, POLICY)
    (unit,) = days(ns("2026-11-20T00:00"), ns("2026-11-21T00:00"))
    for body in (
        zipped("ETHUSDT-1m-2026-11-20.csv", "1,1,1,1,1,1\n"),
        zipped("BTCUSDT-1m-2026-11-20.csv", ""),
    ):
        checksum = hashlib.sha256(body).hexdigest().encode() + b"  x\n"
        harness.server.faults = [
            Fault(r"20\.zip$", "body", body=body),
            Fault(r"20\.zip\.CHECKSUM$", "body", body=checksum),
        ]
        with pytest.raises(BadAnswer):
            archive.fetch("BTCUSDT", unit)


@pytest.mark.parametrize(
    ("day", "unit_ns", "header"),
    [
        ("2024-12-31", 1_000_000, ""),
        ("2025-01-01", 1_000, ""),
        ("2025-01-01", 1_000, "open_time,open,high,low,close,volume,close_time,q,n,tb,tq,ignore\n"),
    ],
)
def test_stamps_in_ms_and_us_and_headers_are_understood(
    harness: Harness, day: str, unit_ns: int, header: str
) -> None:
    (unit,) = days(ns(f"{day}T00:00"), ns(f"{day}T23:00"))
    row = f"{unit.start_ns // unit_ns},1.5,2.0,1.0,1.25,7,0,0,0,0,0,0\n"
    odd = f"{unit.start_ns // unit_ns + 60_000_000_000 // unit_ns},1.5,oops,1.0,,7\n"
    body = zipped(f"BTCUSDT-1m-{day}.csv", header + row + odd)
    harness.server.faults = [
        Fault(r"\.zip$", "body", body=body),
        Fault(r"CHECKSUM$", "body", body=hashlib.sha256(body).hexdigest().encode() + b"  x\n"),
    ]
    file = Archive(harness.server.url, POLICY).fetch("BTCUSDT", unit)
    assert file is not None
    first, second = file.content.to_pylist()
    assert first == {
        "symbol": "BTCUSDT", "open_time": unit.start_ns, "open": 1.5, "high": 2.0, "low": 1.0, "close": 1.25,
        "volume": 7.0, "trades": 0.0, "taker_buy_volume": 0.0,
    }  # fmt: skip
    assert second["open_time"] == unit.start_ns + MINUTE_NS
    assert np.isnan([second["high"], second["close"]]).all()
    assert (second["trades"], second["taker_buy_volume"]) == (None, None)


def test_months_are_out_on_the_first_monday_of_the_next() -> None:
    units = list(months(ns("2025-12-31T00:00"), ns("2026-03-01T00:00")))
    assert [unit.name for unit in units] == ["2025-12", "2026-01", "2026-02"]
    assert [unit.published_ns for unit in units] == [
        ns("2026-01-05T00:00"),
        ns("2026-02-02T00:00"),
        ns("2026-03-02T00:00"),
    ]


# ------------------------------------------------------------------ bad rows


def _spoil(
    places: slice, change: Callable[[list[Any]], None]
) -> Callable[[list[list[Any]]], list[list[Any]]]:
    def spoiled(rows: list[list[Any]]) -> list[list[Any]]:
        for row in rows[places]:
            change(row)
        return rows

    return spoiled


def _set(column: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda row: row.__setitem__(column, value)


def _shift(rows: list[list[Any]]) -> list[list[Any]]:
    return [[row[0] + 17_000, *row[1:]] for row in rows]


BAD_ROWS: dict[str, Callable[[list[list[Any]]], list[list[Any]]]] = {
    "nulls": _spoil(slice(3, 900, 7), _set(2, None)),
    "NaN": _spoil(slice(3, 900, 7), _set(4, "NaN")),
    "negative prices": _spoil(slice(3, 900, 7), _set(3, "-5")),
    "zero": _spoil(slice(3, 900, 7), _set(1, "0.00000000")),
    "words": _spoil(slice(3, 900, 7), _set(1, "many")),
    "stamps off the minute": _spoil(slice(3, 900, 7), lambda row: row.__setitem__(0, row[0] + 17_000)),
    "all stamps off the minute": _shift,
    "no volume": _spoil(slice(3, 900, 7), _set(5, None)),
    "twice": lambda rows: [row for row in rows for _ in (0, 1)],
    "newest first": lambda rows: rows[::-1],
    "missing": lambda rows: rows[::3],
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_in_pages_never_reach_the_bars_and_heal(harness: Harness, kind: str) -> None:
    start_ns = ns("2026-11-22T00:00")
    harness.refresh(start_ns=start_ns)
    harness.server.faults = [Fault("/api/", "rows", rows=BAD_ROWS[kind])]
    harness.refresh(start_ns=start_ns, seconds_later=6 * 3600)
    times = harness.minutes(start_ns=start_ns)
    truth, _ = harness.server.truth("BTCUSDT", start_ns, CLOSED + 6 * HOUR_NS)
    assert np.isin(times, truth).all()
    assert np.isin(truth[truth < CLOSED], times).all()  # kept bars stay
    harness.server.faults = []
    harness.refresh(start_ns=start_ns, seconds_later=60)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + 6 * HOUR_NS + MINUTE_NS)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rest_mends_what_is_bad_in_a_file(harness: Harness, kind: str) -> None:
    start_ns = ns("2026-11-19T00:00")
    harness.server.faults = [Fault(r"2026-11-20", "rows", rows=BAD_ROWS[kind])]
    harness.refresh(start_ns=start_ns)
    assert "2026-11-20" in harness.units()
    harness.assert_complete(start_ns=start_ns)
    assert len(harness.refresh(start_ns=start_ns, seconds_later=60)) == 1


def test_ambiguous_minutes_and_days_under_a_false_date_are_rejected(harness: Harness) -> None:
    start_ns = ns("2026-11-19T00:00")
    harness.server.faults = [
        Fault(
            "2026-11-20",
            "rows",
            rows=lambda rows: rows + [[*row[:4], row[4] + "1", "9e9"] for row in rows[:50]],
        ),
        Fault("2026-11-21", "rows", rows=lambda rows: [[row[0] + 86_400_000_000, *row[1:]] for row in rows]),
    ]
    harness.refresh(start_ns=start_ns)
    harness.assert_complete(start_ns=start_ns)
    assert "2026-11-21" not in harness.units()


def test_a_bar_that_a_new_file_lacks_is_kept(harness: Harness) -> None:
    harness.refresh()
    harness.server.now_ns = ns("2026-12-09T12:00:30")
    harness.server.faults = [
        Fault(r"2026-11\.zip", "rows", rows=lambda rows: rows[:20_000] + rows[25_000:]),
        Fault(f"startTime={ns('2026-11-14T21:20') // 10**6}", status=503, body=b"{}"),
    ]
    harness.refresh()
    assert {"2026-11", "kept-2026-11"} <= harness.units()
    assert "2026-11-05" not in harness.units()
    truth, _ = harness.server.truth("BTCUSDT", START, CLOSED)
    assert np.isin(truth, harness.minutes()).all()


def test_a_bar_stored_half_made_under_a_fast_clock_heals(harness: Harness) -> None:
    start_ns = ns("2026-11-23T00:00")
    fast_ns = harness.server.now_ns + 50 * 10**9
    harness.refresh_until(fast_ns, start_ns=start_ns, now_ns=fast_ns)
    assert harness.minutes(start_ns=start_ns)[-1] == CLOSED
    harness.refresh(start_ns=start_ns, seconds_later=120)
    harness.assert_complete(start_ns=start_ns, end_ns=CLOSED + 2 * MINUTE_NS)
