"""``top:N``: the members of each month, by nothing that is known only later, and no day downloaded twice."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
from bar_tables import DAY_NS, job_for, ns, walk

from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.universe import members, plain_names, top_of
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.polygon import US_STOCKS
from data_sources.vendors.polygon_days import read_day
from data_sources.vendors.polygon_refresh import Polygon
from tests.data_sources.vendors.polygon_harness import rows
from tests.data_sources.vendors.s3_server import CRYPTO, S3Server, day_file, key_of

MONTHS = {9: (14, 15), 10: (1, 2, 30), 11: (2, 3, 20)}
DAYS = [dt.date(2026, month, day) for month, days in MONTHS.items() for day in days]
START, NOW = ns("2026-10-01 00:00"), ns("2026-11-22 00:00")
# What each symbol trades in September, October and November; DEAD is gone after 2 October.
VOLUMES = {
    "DEAD": (9000, 9000, 0),
    "AAA": (500, 8000, 100),
    "BBB": (400, 300, 99000),
    "CCC": (300, 290, 50),
    "DDD": (1, 1, 1),
}


def day_of(day: dt.date) -> bytes:
    lines = []
    for ticker, volumes in VOLUMES.items():
        volume = volumes[day.month - 9]
        if volume and not (ticker == "DEAD" and day > dt.date(2026, 10, 2)):
            lines += rows(ticker, day, volume=str(volume))
    return day_file(lines)


@pytest.fixture
def server(running_server: S3Server) -> S3Server:
    running_server.empty()
    for day in DAYS:
        running_server.put(key_of(day), day_of(day))
    return running_server


def refresh(server: S3Server, lake: Lake, *stocks: str, crypto: tuple[str, ...] = ()) -> list[str]:
    """Refresh and return the downloaded days."""
    server.log.clear()
    source = Polygon("key", "secret", server.endpoint, RetryPolicy(read_seconds=5, attempts=2))
    with job_for(lake, {"stocks": stocks, "polygon_crypto": crypto}, START, NOW, NOW) as job:
        source.refresh(job)
    return sorted(key[-17:-7] for key in server.gets())


def loaded_months(lake: Lake, *stocks: str) -> dict[str, list[int]]:
    """Return the months in which each symbol has bars."""
    request = DataRequest(("polygon",), {"stocks": stocks}, START, NOW, min_bars=10)
    months = {}
    for bars in load(lake, request).bars:
        times = bars.open_time.astype("datetime64[ns]").astype("datetime64[M]").astype(int) % 12 + 1
        months[bars.symbol] = sorted(set(times.tolist()))
    return months


def test_the_largest_of_the_days_before_a_month_are_its_members_delisted_or_not(
    server: S3Server, lake: Lake
) -> None:
    assert refresh(server, lake, "top:1") == [str(day) for day in DAYS]  # with September, to know October's
    # BBB trades most of all, but only in November; DEAD was the largest as known in October
    assert loaded_months(lake, "top:1") == {"AAA": [11], "DEAD": [10]}
    assert loaded_months(lake, "top:1", "CCC") == {"AAA": [11], "DEAD": [10], "CCC": [10, 11]}


def test_a_rule_with_other_members_downloads_no_day_twice(server: S3Server, lake: Lake) -> None:
    refresh(server, lake, "top:1", "DDD")
    assert refresh(server, lake, "top:1", "DDD") == []
    server.put(key_of(dt.date(2026, 11, 21)), day_of(dt.date(2026, 11, 21)))
    assert refresh(server, lake, "top:1", "DDD") == ["2026-11-21"]
    assert refresh(server, lake, "DDD") == []
    assert refresh(server, lake, "AAA") == []  # among the three largest of every day
    assert refresh(server, lake, "top:2") == [str(day) for day in (*DAYS, dt.date(2026, 11, 21))]
    assert refresh(server, lake, "top:1") == []


def test_a_republished_day_keeps_what_the_rule_and_the_names_had(server: S3Server, lake: Lake) -> None:
    refresh(server, lake, "top:1", "DDD")
    before = lake.parts("polygon", "us_stocks_sip")["2026-11-20"]
    server.put(key_of(DAYS[-1]), day_file([line for ticker in VOLUMES for line in rows(ticker, DAYS[-1])]))
    assert refresh(server, lake, "AAA") == ["2026-11-20"]  # by name only
    after = lake.parts("polygon", "us_stocks_sip")["2026-11-20"]
    assert set(before.symbols) <= set(after.symbols)
    assert len(after.dollar_volume) == 3


def test_a_day_is_ranked_by_volume_times_median_close_and_one_bad_print_changes_nothing() -> None:
    day = DAYS[-1]
    lines = rows("AAA", day, volume="1000") + rows("BBB", day, volume="900") + rows("CCC", day, volume="10")
    fields = lines[-1].split(",")
    lines[-1] = ",".join([*fields[:2], "9e9", "9e9", "9e9", "9e9", *fields[6:]])
    lines += ["NEG,-5,1,1,1,1,1,1", "EMPTY,,1,1,1,1,1,1"]
    span = US_STOCKS.interval(day)
    table, dollars = read_day(day_file(lines), "key", ["CCC"], *span, num_largest=2)
    assert list(dollars) == ["AAA", "BBB"]
    closes = [float(line.split(",")[3]) for line in rows("AAA", day)]
    assert dollars["AAA"] == pytest.approx(1000 * len(closes) * np.median(closes), abs=1)
    assert set(table["symbol"].to_pylist()) == {"AAA", "BBB", "CCC"}


def test_of_crypto_only_pairs_against_the_dollar_are_chosen(server: S3Server, lake: Lake) -> None:
    for day in DAYS:
        pairs = (("X:ETH-BTC", "9000"), ("X:BTC-USD", "500"), ("X:OLD-EUR", "8000"), ("X:ETH-USD", "400"))
        body = day_file([line for pair, volume in pairs for line in rows(pair, day, volume=volume)])
        server.put(key_of(day, CRYPTO), body)
    refresh(server, lake, crypto=("top:1",))
    request = DataRequest(("polygon",), {"polygon_crypto": ("top:1",)}, START, NOW, min_bars=10)
    assert [bars.symbol for bars in load(lake, request).bars] == ["X:BTC-USD"]


def test_months_that_touch_are_one_interval_and_equal_ones_go_by_name(lake: Lake) -> None:
    for day in ("2026-09-20", "2026-10-20"):
        start = ns(f"{day} 00:00")
        lake.write(
            "polygon", "d", day, walk("AAA", start, 5), key="", version="", start_ns=start, end_ns=start + DAY_NS,
            symbols=["AAA", "top:3"], now_ns=NOW, dollar_volume={"BBB": 5, "AAA": 5, "CCC": 1},
        )  # fmt: skip
    found = members(lake, "polygon", "d", 2, START, NOW)
    assert found == {name: [(START, ns("2026-12-01 00:00"))] for name in ("AAA", "BBB")}
    assert members(lake, "polygon", "d", 2, ns("2026-12-01 00:00"), ns("2026-12-05 00:00")) == {}


@pytest.mark.parametrize("rule", ["top:", "top:0", "top:many", "top:-3", "top:1000000"])
def test_a_malformed_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="such as top:500"):
        top_of(["AAPL", rule])
    with pytest.raises(ValueError, match="such as top:500"):
        DataRequest(("polygon",), {"stocks": (rule,)}, START, NOW)


def test_names_and_rules_are_distinguished() -> None:
    assert plain_names(["AAPL", "top:5", "AAPL", "top:7"]) == ("AAPL",)
    assert top_of(["AAPL", "top:5", "top:7"]) == 7
    with pytest.raises(ValueError, match="binance_pairs must be names"):
        DataRequest(("binance",), {"binance_pairs": ("top:5",)}, START, NOW)
