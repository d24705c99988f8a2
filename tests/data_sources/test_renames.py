"""Renamed symbols: one series of both names, each on its side of the day, and nothing of another symbol's."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources import renames
from data_sources.bars import DAY_NS, MINUTE_NS
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.splits import Split, SplitLedger
from tests.data_sources.bar_tables import flat, job_for, ns
from tests.data_sources.vendors.binance_harness import POLICY
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.polygon_harness import DAYS, END_NS, START_NS, closes, put_days, refresh
from tests.data_sources.vendors.s3_server import S3Server

FORM = "setting,old,new,first_day,ratio,source\n"
META_DAY = ns("2022-06-09 04:00")  # midnight in New York


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    (tmp_path / "lake").mkdir()
    return Lake(tmp_path / "lake")


def own_table(lake: Lake, *lines: str) -> None:
    (lake.root / "renames.csv").write_text(FORM + "\n".join(lines) + "\n")


def put(lake: Lake, day: str, prices: dict[str, float], source: str = "polygon") -> None:
    """Put a session's first hour of flat prices, of several stocks, into one part."""
    for symbol, price in prices.items():
        start_ns = ns(f"{day} 15:00")
        dataset = "us_stocks_sip" if source == "polygon" else symbol
        span = {"start_ns": ns(f"{day} 04:00"), "end_ns": ns(f"{day} 04:00") + DAY_NS}
        table = flat(np.full(60, price), start_ns, symbol)
        origin = {"key": day, "version": symbol, "symbols": [symbol], "now_ns": start_ns + 9 * DAY_NS}
        lake.write(source, dataset, f"{day}-{symbol}", table, **origin, **span)


def bars_of(lake: Lake, symbol: str, first: str, last: str, **more: Any) -> Any:
    request = DataRequest(
        ("polygon", "yahoo"), {"stocks": (symbol,)}, ns(first), ns(last) + DAY_NS, min_bars=10, **more
    )
    data = load(lake, request)
    return (data.bars[0] if data.bars else None), data.rows[0]


def daily(bars: Any) -> dict[str, float]:
    days = bars.open_time.astype("datetime64[ns]").astype("datetime64[D]").astype(str)
    return dict(zip(days.tolist(), bars.close.tolist(), strict=True))


def names_of(lake: Lake, symbol: str) -> list[tuple[str, str]]:
    found = renames.stretches(renames.read(lake.root), "stocks", symbol)
    return [
        (s.name, str(np.datetime64(min(s.end_ns, ns("2100-01-01")), "ns").astype("M8[D]"))) for s in found
    ]


def test_the_names_of_a_symbol_are_followed_back_and_no_further(lake: Lake) -> None:
    assert names_of(lake, "AAPL") == [("AAPL", "2100-01-01")]
    assert names_of(lake, "META") == [("FB", "2022-06-09"), ("META", "2100-01-01")]
    assert names_of(lake, "FB") == [("FB", "2022-06-09")]
    assert names_of(lake, "FI") == [("FISV", "2023-06-07"), ("FI", "2025-11-11")]
    assert names_of(lake, "FISV") == [("FISV", "2023-06-07"), ("FI", "2025-11-11"), ("FISV", "2100-01-01")]


def test_the_user_adds_renames_and_corrects_them(lake: Lake) -> None:
    own_table(lake, "stocks,OLD,NEW,2026-01-05,,mine", "stocks,FB,META,2022-06-09,2,")
    assert names_of(lake, "NEW") == [("OLD", "2026-01-05"), ("NEW", "2100-01-01")]
    assert renames.stretches(renames.read(lake.root), "stocks", "META")[0].ratio == 2
    for line in (
        "stocks,A,B,yesterday,1,",
        "stocks,A,B,2026-01-05,0,",
        "stocks,A,A,2026-01-05,1,",
        "stocks,A",
    ):
        own_table(lake, "stocks,OLD,NEW,2026-01-05,1,mine", line)
        with pytest.raises(
            LakeError, match=r"renames\.csv, line 3: expected a rename such as stocks,FB,META"
        ):
            renames.read(lake.root)


def test_a_table_of_a_spreadsheet_is_read_or_refused_in_one_line(lake: Lake) -> None:
    own_table(lake, "stocks,OLD,NEW,2026-01-05,1,Börse")
    path = lake.root / renames.FILE_NAME
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert names_of(lake, "NEW") == [("OLD", "2026-01-05"), ("NEW", "2100-01-01")]
    path.write_text(text, encoding="cp1252")
    with pytest.raises(LakeError, match=r"renames\.csv must be text in UTF-8: save it as CSV UTF-8"):
        renames.read(lake.root)
    path.write_text(text + "x" * 200_000)
    with pytest.raises(LakeError, match=r"renames\.csv is no table of renames: field larger"):
        renames.read(lake.root)


def test_a_renamed_stock_is_one_series_without_the_other_companies_of_its_names(lake: Lake) -> None:
    put(lake, "2022-06-06", {"FB": 194.0, "META": 9.0})  # META was a fund's before
    put(lake, "2022-06-08", {"FB": 196.0, "META": 9.5})
    put(lake, "2022-06-09", {"META": 184.0})
    put(lake, "2022-06-10", {"META": 175.0, "FB": 24.0})  # and FB another one's afterwards
    bars, row = bars_of(lake, "META", "2022-06-01", "2022-06-20")
    whole = {"2022-06-06": 194.0, "2022-06-08": 196.0, "2022-06-09": 184.0, "2022-06-10": 175.0}
    assert daily(bars) == whole and bars.symbol == "META"
    assert "bars of FB until 2022-06-09 are joined to it" in row.flags

    bars, row = bars_of(lake, "FB", "2022-06-01", "2022-06-20")
    assert daily(bars) == {"2022-06-10": 24.0}
    assert "FB before 2022-06-09 is another symbol, and left out" in row.flags
    bars, row = bars_of(lake, "FB", "2022-06-01", "2022-06-08")
    assert daily(bars) == {"2022-06-06": 194.0, "2022-06-08": 196.0}
    bars, row = bars_of(lake, "META", "2022-06-09", "2022-06-20")
    assert len(daily(bars)) == 2 and not any("joined" in flag for flag in row.flags)
    bars, row = bars_of(lake, "FB", "2022-06-09", "2022-06-09")
    assert bars is None and row.dropped == "no bars, FB is META since 2022-06-09"


def test_a_name_that_is_taken_over_is_one_symbol_whichever_source_has_which_half(lake: Lake) -> None:
    put(lake, "2022-06-06", {"FB": 194.0})
    put(lake, "2022-06-10", {"FB": 24.0}, source="yahoo")
    bars, row = bars_of(lake, "FB", "2022-06-01", "2022-06-20")
    assert daily(bars) == {"2022-06-10": 24.0}
    assert "FB before 2022-06-09 is another symbol, and left out" in row.flags


def test_splits_under_either_name_are_applied_once(lake: Lake) -> None:
    own_table(lake, "stocks,OLD,NEW,2026-01-07,1,")
    for day, prices in (
        ("2026-01-05", {"OLD": 80.0}),
        ("2026-01-06", {"OLD": 40.0}),
        ("2026-01-07", {"NEW": 41.0}),
    ):
        put(lake, day, prices)
    put(lake, "2026-01-08", {"NEW": 10.25, "OLD": 3.0})
    ledger = SplitLedger(lake.root)
    first, second = Split(dt.date(2026, 1, 6), 2.0), Split(dt.date(2026, 1, 8), 4.0)
    ledger.update("OLD", [first, Split(dt.date(2026, 1, 8), 5.0)])  # the latter is another company's
    ledger.update("NEW", [second])
    for _ in range(2):
        bars, _ = bars_of(lake, "NEW", "2026-01-01", "2026-01-20")
        assert daily(bars) == {
            "2026-01-05": 10.0, "2026-01-06": 10.0, "2026-01-07": 10.25, "2026-01-08": 10.25,
        }  # fmt: skip
        ledger.update("NEW", [first])  # as of a vendor that lists all under the new name


def test_a_rename_of_the_users_own_changes_the_fingerprint(lake: Lake) -> None:
    put(lake, "2026-01-05", {"OLD": 80.0})
    request = DataRequest(("polygon",), {"stocks": ("NEW",)}, ns("2026-01-01"), ns("2026-02-01"), min_bars=10)
    before = load(lake, request)
    own_table(lake, "stocks,OLD,NEW,2026-01-07,1,")
    after = load(lake, request)
    assert not before.bars and len(after.bars[0]) == 60
    assert before.fingerprint != after.fingerprint


def test_polygon_is_asked_for_the_old_name_on_its_days_alone(
    server: S3Server, source: Any, lake: Lake
) -> None:
    put_days(server, ["AAPL", "OLD", "NEW"])
    own_table(lake, f"stocks,OLD,NEW,{DAYS[2]},1,")
    assert refresh(source, lake, ["AAPL", "NEW"]).warnings == []
    parts = lake.parts("polygon", "us_stocks_sip")
    assert [("OLD" in parts[day.isoformat()].symbols) for day in DAYS] == [True, True, False, False, False]
    server.log.clear()
    refresh(source, lake, ["AAPL", "NEW"])
    assert server.gets() == []
    request = DataRequest(
        ("polygon",), {"stocks": ("NEW",)}, START_NS, END_NS, min_bars=1, extended_hours=True
    )
    (bars,) = load(lake, request).bars
    split = len(closes(lake, "OLD"))
    assert bars.close.tolist() == closes(lake, "OLD") + closes(lake, "NEW")[split:]


def test_binance_closes_one_pair_and_opens_another_at_another_ratio(lake: Lake) -> None:
    from data_sources.vendors.binance_refresh import Binance

    start_ns, off_ns, on_ns, now_ns = map(
        ns, ("2026-11-18 00:00", "2026-11-20 03:00", "2026-11-22 10:00", "2026-11-24 12:00")
    )
    own_table(lake, "binance_pairs,OLDUSDT,NEWUSDT,2026-11-22,4,")
    with BinanceServer(now_ns, ("OLDUSDT", "NEWUSDT")) as server:
        server.delisted_ns["OLDUSDT"], server.listed_ns["NEWUSDT"] = off_ns, on_ns
        symbols = {"binance_pairs": ("NEWUSDT",)}
        with job_for(lake, symbols, start_ns, now_ns, now_ns) as job:
            Binance(server.url, server.url, policy=POLICY).refresh(job)
        old, new = (server.truth(pair, start_ns, now_ns - MINUTE_NS) for pair in ("OLDUSDT", "NEWUSDT"))
    (bars,) = load(lake, DataRequest(("binance",), symbols, start_ns, now_ns, min_bars=1)).bars
    assert bars.open_time.tolist() == [*old[0].tolist(), *new[0].tolist()]
    np.testing.assert_allclose(bars.close, [*(old[1][:, 3] / 4), *new[1][:, 3]])
    np.testing.assert_allclose(bars.volume, [*(old[1][:, 4] * 4), *new[1][:, 4]])
