"""Polygon against a real S3 service over HTTP (moto): the bars that arrive, and the requests made for them."""

from __future__ import annotations

import datetime as dt
import gzip
import re

import numpy as np
import pytest

from data_sources.errors import LakeError
from data_sources.vendors import polygon_days, polygon_refresh
from data_sources.vendors.polygon import GLOBAL_CRYPTO, US_STOCKS
from data_sources.vendors.polygon_days import read_day
from tests.data_sources.bar_tables import read
from tests.data_sources.vendors.polygon_harness import (
    DAYS,
    END_NS,
    NUM_BARS,
    START_NS,
    closes,
    expected_closes,
    held_days,
    price_of,
    put_days,
    refresh,
    rows,
    stamp_of,
    trades_of,
)
from tests.data_sources.vendors.s3_server import CRYPTO, HEADER, day_file, key_of


def test_all_bars_of_the_wanted_symbols_arrive_as_they_are_in_the_files(server, source, lake):
    put_days(server, ["AAPL", "MSFT", "OTHER"])
    put_days(server, ["X:BTC-USD"], data_type=CRYPTO)
    recorder = refresh(source, lake, ["AAPL", "MSFT"], ["X:BTC-USD"])
    table = read(lake, "polygon", "us_stocks_sip", ["MSFT"], START_NS, END_NS)
    first = price_of("MSFT", DAYS[0], 0)
    assert {name: table.column(name)[0].as_py() for name in table.column_names} == {
        "symbol": "MSFT",
        "open_time": stamp_of(DAYS[0], 0),
        "open": first,
        "high": round(first + 0.05, 2),
        "low": round(first - 0.05, 2),
        "close": round(first + 0.01, 2),
        "volume": 1200.0,
        "trades": trades_of("MSFT", 0),
    }
    assert table.column("trades").to_pylist() == [trades_of("MSFT", n) for n in range(NUM_BARS)] * 5
    assert closes(lake, "AAPL") == expected_closes("AAPL")
    assert closes(lake, "X:BTC-USD", "global_crypto") == expected_closes("X:BTC-USD")
    assert closes(lake, "OTHER") == []
    assert (recorder.total, recorder.units) == (10, 10)
    assert recorder.num_bytes > 0 and recorder.summary.startswith("10 day files")
    assert recorder.warnings == []


def test_a_refresh_without_news_lists_a_year_in_one_request_and_fetches_nothing(server, source, lake):
    put_days(server, ["AAPL"])
    put_days(server, ["X:BTC-USD"], data_type=CRYPTO)
    two_years_ns = END_NS - 730 * 86_400 * 10**9
    refresh(source, lake, ["AAPL"], ["X:BTC-USD"], two_years_ns)
    server.log.clear()
    recorder = refresh(source, lake, ["AAPL"], ["X:BTC-USD"], two_years_ns)
    assert server.gets() == []
    assert len(server.log) == len(server.lists()) == 6
    assert recorder.total == 0


def test_a_late_day_and_a_republished_day_are_the_only_ones_fetched(server, source, lake):
    put_days(server, ["AAPL"], DAYS[:3])
    refresh(source, lake, ["AAPL"])
    server.put(key_of(DAYS[1]), day_file(rows("AAPL", DAYS[1], volume="9999.5")))
    put_days(server, ["AAPL"], DAYS[3:4])
    server.log.clear()
    refresh(source, lake, ["AAPL"])
    assert sorted(server.gets()) == [key_of(DAYS[1]), key_of(DAYS[3])]
    volumes = read(lake, "polygon", "us_stocks_sip", ["AAPL"], *US_STOCKS.interval(DAYS[1])).column("volume")
    assert set(volumes.to_pylist()) == {9999.5}


def test_a_replacement_with_far_fewer_rows_is_kept_with_a_warning(server, source, lake):
    put_days(server, ["AAPL"])
    refresh(source, lake, ["AAPL"])
    server.put(key_of(DAYS[2]), day_file(rows("AAPL", DAYS[2], num_bars=NUM_BARS // 2)))
    (warning,) = refresh(source, lake, ["AAPL"]).warnings
    assert DAYS[2].isoformat() in warning and "15 rows" in warning and "had 30" in warning


def test_an_added_symbol_is_fetched_for_every_day_and_a_dropped_one_is_kept(server, source, lake):
    put_days(server, ["AAPL", "MSFT"])
    refresh(source, lake, ["AAPL"])
    server.log.clear()
    refresh(source, lake, ["MSFT"])
    assert len(server.gets()) == len(DAYS)
    assert closes(lake, "AAPL") == expected_closes("AAPL")
    assert closes(lake, "MSFT") == expected_closes("MSFT")
    server.log.clear()
    refresh(source, lake, ["AAPL"])
    assert server.gets() == []


def test_a_symbol_in_no_file_is_named_once_and_not_fetched_again(server, source, lake):
    put_days(server, ["AAPL"])
    assert any(
        "no bars of APPL in 5 day files" in line for line in refresh(source, lake, ["AAPL", "APPL"]).warnings
    )
    server.log.clear()
    refresh(source, lake, ["AAPL", "APPL"])
    assert server.gets() == []


def test_only_days_of_the_window_are_fetched(server, source, lake):
    put_days(server, ["AAPL"])
    refresh(source, lake, ["AAPL"], start_ns=US_STOCKS.interval(DAYS[3])[0])
    assert held_days(lake) == DAYS[3:]


def test_days_are_intervals_of_new_york_for_stocks_and_of_utc_for_crypto():
    spring_forward = dt.date(2026, 3, 8)
    start_ns, end_ns = US_STOCKS.interval(spring_forward)
    assert end_ns - start_ns == 23 * 3600 * 10**9
    assert US_STOCKS.day_of(start_ns) == spring_forward == US_STOCKS.day_of(end_ns - 1)
    start_ns, end_ns = GLOBAL_CRYPTO.interval(spring_forward)
    assert end_ns - start_ns == 24 * 3600 * 10**9 and start_ns % (24 * 3600 * 10**9) == 0


def test_more_keys_than_a_page_are_all_seen(server, source, lake, monkeypatch):
    put_days(server, ["AAPL"])
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    refresh(source, lake, ["AAPL"])
    assert held_days(lake) == DAYS
    assert len(server.lists()) == 3


@pytest.mark.parametrize("odd", ["NA", "NULL", "TRUE", "1E5", "NAN", "BRK.B", "BACpK"])
def test_tickers_that_look_like_something_else_stay_tickers(server, source, lake, odd):
    server.put(key_of(DAYS[0]), day_file(rows(odd, DAYS[0]) + rows("ZM", DAYS[0])))
    refresh(source, lake, [odd])
    assert closes(lake, odd) == expected_closes(odd, DAYS[:1])


@pytest.mark.parametrize("volume", ["48211", "9099.618093", "1E3"])
def test_whole_and_decimal_volumes_are_read_alike(server, source, lake, volume):
    server.put(
        key_of(DAYS[0]), day_file(rows("A", DAYS[0], volume="7") + rows("AAPL", DAYS[0], volume=volume))
    )
    refresh(source, lake, ["AAPL"])
    assert set(
        read(lake, "polygon", "us_stocks_sip", None, START_NS, END_NS).column("volume").to_pylist()
    ) == {float(volume)}


def test_columns_are_found_by_name_in_any_order_and_more_of_them(server, source, lake):
    price = price_of("AAPL", DAYS[0], 0)
    line = f"{stamp_of(DAYS[0], 0)},yes,{price - 1},{price + 1},{price},{price + 0.01:.2f},AAPL,5.5"
    server.put(key_of(DAYS[0]), day_file([line], "window_start,otc,low,high,open,close,ticker,volume"))
    refresh(source, lake, ["AAPL"])
    (bar,) = read(lake, "polygon", "us_stocks_sip", None, START_NS, END_NS).to_pylist()
    assert (bar["low"], bar["high"], bar["open"], bar["volume"]) == (price - 1, price + 1, price, 5.5)


def test_every_wanted_line_is_found_wherever_the_pieces_of_the_file_are_cut(monkeypatch):
    random = np.random.default_rng(3)
    known = ["A", "AA", "AAPL", "AAPLX", "NA", "X:BTC-USD", "X:BTC-USDT", "ZYXWVUTS", "ZYXWVUTSR", "V"]
    wanted = ["A", "AAPL", "X:BTC-USD", "ZYXWVUTS", "V"]
    start_ns, end_ns = US_STOCKS.interval(DAYS[0])
    for piece_bytes in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(polygon_days, "PIECE_BYTES", piece_bytes)
        tickers = random.choice(known, 300).tolist()
        stamps = [stamp_of(DAYS[0], minute) for minute in range(300)]
        lines = [f"{ticker},3,1,1,1,1,{stamp},1" for ticker, stamp in zip(tickers, stamps, strict=True)]
        text = "\n".join([HEADER, *lines])
        for body in (
            gzip.compress(text.encode()),  # no line end at the end
            gzip.compress(text.encode()[:5000]) + gzip.compress(text.encode()[5000:] + b"\n"),
            gzip.compress(text.replace("\n", "\r\n").encode()),
            gzip.compress(re.sub(r"(?m)^([A-Z:-]+),", r'"\1",', text).encode()),  # quoted
            gzip.compress(b"\xef\xbb\xbf" + text.encode()),  # byte order mark
        ):
            table, _ = read_day(body, "key", wanted, start_ns, end_ns)
            found = list(
                zip(*(table.column(name).to_pylist() for name in ("symbol", "open_time")), strict=True)
            )
            assert found == [pair for pair in zip(tickers, stamps, strict=True) if pair[0] in wanted]


def test_odd_numbers_of_trades_cost_themselves_alone(server, source, lake):
    lines = rows("AAPL", DAYS[0])
    for place, text in ((3, ""), (5, "7.0"), (8, "many"), (9, "0"), (12, "-2")):
        lines[place] = f"{lines[place].rpartition(',')[0]},{text}"
    server.put(key_of(DAYS[0]), day_file(lines))
    without = [line.rpartition(",")[0] for line in rows("AAPL", DAYS[1])]
    server.put(key_of(DAYS[1]), day_file(without, HEADER.rpartition(",")[0]))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    first, second = (lake.parts("polygon", "us_stocks_sip")[day.isoformat()] for day in DAYS[:2])
    expected = {"flow_negative": 1, "flow_not_finite": 1, "volume_without_trades": 1}
    assert (first.rows, first.rejected, first.flow_rejected) == (NUM_BARS, {}, {"AAPL": expected})
    assert (first.flow, second.rows, second.flow) == ({"trades": NUM_BARS - 4}, NUM_BARS, {})
    trades = read(lake, "polygon", "us_stocks_sip", ["AAPL"], START_NS, END_NS).column("trades").to_pylist()
    assert [place for place in range(NUM_BARS) if trades[place] is None] == [3, 8, 9, 12]
    assert trades[5] == 7.0


def test_an_empty_day_is_remembered_as_empty(server, source, lake):
    server.put(key_of(DAYS[0]), day_file([]))
    refresh(source, lake, ["AAPL"])
    assert lake.parts("polygon", "us_stocks_sip")[DAYS[0].isoformat()].rows == 0
    server.log.clear()
    refresh(source, lake, ["AAPL"])
    assert server.gets() == []


def test_at_most_four_objects_are_fetched_at_a_time(server, source, lake):
    put_days(server, ["AAPL"], [dt.date(2026, 11, day) for day in range(1, 21)])
    refresh(source, lake, ["AAPL"])
    assert 1 < server.most_at_once <= polygon_refresh.PARALLEL_GETS


def test_a_lake_that_cannot_be_written_stops_the_refresh_with_its_own_error(server, source, lake):
    put_days(server, ["AAPL"])
    (lake.root / "polygon").mkdir(parents=True)
    (lake.root / "polygon" / "us_stocks_sip").write_text("a file where a folder belongs")
    with pytest.raises(LakeError):
        refresh(source, lake, ["AAPL"])


def test_no_symbols_make_no_request(server, source, lake):
    refresh(source, lake, [])
    assert server.log == []
