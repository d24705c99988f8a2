import datetime
import threading
import tracemalloc
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pytest
from bar_tables import DAY_NS, flat, ns, walk, with_values

from data_sources.bars import COLUMNS, MINUTE_NS
from data_sources.errors import BadAnswer, LakeError, MissingCredentials, RateLimited, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.progress import NullProgress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest, Source
from data_sources.splits import Split, SplitLedger
from data_sources.vendors import SOURCES

START, NOW = ns("2026-11-16 00:00"), ns("2026-11-21 00:00")  # Monday to Friday
MONDAY_OPEN = ns("2026-11-16 14:30")


class Warnings(NullProgress):
    def __init__(self):
        self.texts = []

    def warn(self, source, message):
        self.texts.append((source, message))


class Impatient(NullProgress):
    def advance(self, source, units=1, num_bytes=0):
        raise KeyboardInterrupt


@pytest.fixture
def lake(tmp_path):
    return Lake(tmp_path / "lake")


SYMBOLS = {"stocks": ("AAPL",), "binance_pairs": ("BTCUSDT",), "polygon_crypto": ("X:BTC-USD",)}


def request_for(*sources, symbols=(), **more):
    span = {"start_ns": START, "end_ns": NOW, "min_bars": 10}
    return DataRequest(sources, SYMBOLS | dict(symbols), **span | more)


def put(lake, source, dataset, bars, *, unit="u", now_ns=NOW, start_ns=START, end_ns=NOW):
    symbols = sorted(set(bars["symbol"].to_pylist()))
    span = {"start_ns": start_ns, "end_ns": end_ns, "symbols": symbols, "now_ns": now_ns}
    return lake.write(source, dataset, unit, bars, key=unit, version="", **span)


def put_polygon(lake, bars, **more):
    return put(lake, "polygon", "us_stocks_sip", bars, **more)


def session(symbol, day, **more):
    """390 bars of the regular session of November ``day``, 2026 (09:30 New York is 14:30 UTC)."""
    return walk(symbol, ns(f"2026-11-{day} 14:30"), 390, seed=day, **more)


class Fake(Source):
    def __init__(self, name, refresh):
        self.name, self.label, self.refresh = name, SOURCES[name].label, refresh


def fakes(**refreshes):
    return {name: Fake(name, refresh) for name, refresh in refreshes.items()}


def writes(source, dataset, bars):
    return lambda job: put(job.lake, source, dataset, bars) and None


def raises(error):
    def refresh(job):
        raise error

    return refresh


# ---------------------------------------------------------------------------------------- refresh


def test_a_source_without_key_is_skipped_in_the_words_of_the_documents_by_the_real_source(lake, monkeypatch):
    monkeypatch.delenv("POLYGON_S3_ACCESS_KEY", raising=False)
    monkeypatch.delenv("POLYGON_S3_SECRET_KEY", raising=False)
    warnings = Warnings()
    report = refresh(lake, request_for("polygon"), NOW, warnings)["polygon"]
    assert report.status == "skipped"
    assert report.message == "Polygon skipped: POLYGON_S3_ACCESS_KEY is not set, see .env.example"
    assert warnings.texts == [("polygon", report.message)]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SourceUnavailable("api.binance.com does not answer"), "api.binance.com does not answer"),
        (RateLimited("asks to wait 60 s", 60.0), "asks to wait 60 s"),
        (BadAnswer("html where json was expected"), "html where json was expected"),
        (LakeError("cannot write x: No space left on device"), "cannot write x: No space left on device"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (ModuleNotFoundError("No module named 'binance'"), "ModuleNotFoundError: No module named 'binance'"),
        (KeyError("data\nof two lines"), "KeyError: 'data\\nof two lines'"),
    ],
)
def test_a_failed_source_reports_why_and_what_is_kept_and_the_others_still_arrive(lake, error, text):
    put(lake, "binance", "BTCUSDT", walk("BTCUSDT", START, 1440))
    sources = fakes(
        binance=raises(error),
        yahoo=writes("yahoo", "AAPL", session("AAPL", 16)),
        polygon=raises(MissingCredentials("POLYGON_S3_ACCESS_KEY is not set, see .env.example")),
    )
    warnings = Warnings()
    reports = refresh(lake, request_for("polygon", "binance", "yahoo"), NOW, warnings, sources=sources)
    assert {source: report.status for source, report in reports.items()} == {
        "polygon": "skipped",
        "binance": "failed",
        "yahoo": "ok",
    }
    failed = reports["binance"]
    assert failed.message == f"Binance failed: {text}; 1,440 bars up to 2026-11-21 00:00 UTC are kept"
    assert (failed.rows, failed.newest_ns) == (1440, NOW)
    assert reports["yahoo"].message == "Yahoo ok: 390 bars up to 2026-11-21 00:00 UTC are kept"
    assert [source for source, _ in warnings.texts] == ["polygon", "binance"]
    assert len(load(lake, request_for("binance", "yahoo")).bars) == 2


def test_a_failing_source_with_nothing_in_the_lake_is_reported_as_that(lake):
    sources = fakes(yahoo=raises(BadAnswer("no")))
    report = refresh(lake, request_for("yahoo"), NOW, NullProgress(), sources=sources)["yahoo"]
    assert report.message == "Yahoo failed: no; nothing is kept of it yet"
    assert (report.rows, report.newest_ns) == (0, None)


def test_a_lake_that_stays_locked_skips_every_source_and_ends_nothing(lake):
    put(lake, "yahoo", "AAPL", session("AAPL", 16))
    never = raises(AssertionError("must not be called"))
    sources, request = fakes(yahoo=never, binance=never), request_for("yahoo", "binance")
    with Lake(lake.root).writing():
        reports = refresh(lake, request, NOW, NullProgress(), sources=sources, wait_seconds=0.3)
    assert all("skipped" in report.message for report in reports.values())
    assert all("is written by process" in report.message for report in reports.values())
    assert reports["yahoo"].rows == 390


def test_another_refresh_is_waited_for_and_a_stop_request_ends_the_wait(lake):
    put(lake, "yahoo", "AAPL", session("AAPL", 16))
    calls = []
    sources = fakes(yahoo=lambda job: calls.append(job.now_ns))
    other = ExitStack()
    other.enter_context(Lake(lake.root).writing())
    with other, pytest.raises(KeyboardInterrupt):
        refresh(lake, request_for("yahoo"), NOW, Impatient(), sources=sources)
    other.enter_context(Lake(lake.root).writing())
    timer = threading.Timer(0.5, other.close)
    timer.start()
    report = refresh(lake, request_for("yahoo"), NOW, NullProgress(), sources=sources)["yahoo"]
    timer.join()
    assert (report.status, calls) == ("ok", [NOW])


def test_a_lake_that_cannot_be_made_fails_every_source_and_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    reports = refresh(Lake(tmp_path / "file"), request_for("yahoo", "simulated"), NOW, NullProgress())
    assert reports["yahoo"].status == "failed"
    assert reports["yahoo"].message.startswith(f"Yahoo failed: cannot write to {tmp_path / 'file'}")
    assert reports["simulated"].status == "ok"


def test_an_interrupt_leaves_the_refresh_and_frees_the_lock(lake):
    with pytest.raises(KeyboardInterrupt):
        sources = fakes(yahoo=raises(KeyboardInterrupt()))
        refresh(lake, request_for("yahoo"), NOW, NullProgress(), sources=sources)
    with Lake(lake.root).writing():
        pass


def test_sources_get_the_request_the_time_and_the_split_ledger(lake):
    def update(job):
        assert (job.lake, job.request.symbols["stocks"], job.now_ns) == (lake, ("AAPL",), NOW)
        job.splits.update("AAPL", [Split(datetime.date(2026, 11, 18), 4.0)])

    reports = refresh(lake, request_for("yahoo"), NOW, NullProgress(), sources=fakes(yahoo=update))
    assert reports["yahoo"].status == "ok"
    assert SplitLedger(lake.root).splits("AAPL") == [Split(datetime.date(2026, 11, 18), 4.0)]


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ValueError, match="bloomberg is not"):
        request_for("yahoo", "bloomberg")


# ------------------------------------------------------------------------------------------- load


def test_an_empty_lake_gives_no_bars_and_a_reason_for_every_symbol(lake):
    data = load(lake, request_for("polygon", "binance", "yahoo"))
    assert data.bars == []
    assert data.dropped == {"AAPL": "no bars", "BTCUSDT": "no bars", "X:BTC-USD": "no bars"}
    assert [(row.symbol, row.num_bars, row.first_ns, row.dropped) for row in data.rows] == [
        ("AAPL", 0, None, "no bars"),
        ("BTCUSDT", 0, None, "no bars"),
        ("X:BTC-USD", 0, None, "no bars"),
    ]


def test_a_symbol_with_too_few_bars_is_dropped_with_the_figures(lake):
    put(lake, "binance", "BTCUSDT", walk("BTCUSDT", START, 1999))
    request = request_for("binance", min_bars=2000)
    data = load(lake, request)
    assert data.bars == []
    assert data.dropped == {"BTCUSDT": "1,999 bars, fewer than 2,000"}
    put(lake, "binance", "BTCUSDT", walk("BTCUSDT", START, 2000))
    assert len(load(lake, request).bars[0]) == 2000


def test_polygon_wins_on_its_days_and_yahoo_fills_the_others(lake):
    put_polygon(lake, pa.concat_tables([session("AAPL", 16), session("AAPL", 18)]))
    yahoo = pa.concat_tables([session("AAPL", day, price=100.01) for day in (16, 17, 18, 19)])
    put(lake, "yahoo", "AAPL", yahoo)
    data = load(lake, request_for("polygon", "yahoo"))
    (bars,) = data.bars
    expected = pa.concat_tables(
        [
            session("AAPL", 16),
            session("AAPL", 17, price=100.01),
            session("AAPL", 18),
            session("AAPL", 19, price=100.01),
        ]
    )
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(bars, name), expected[name].to_numpy())
    row = data.rows[0]
    assert [(stretch.source, stretch.num_bars) for stretch in row.stretches] == [
        ("polygon", 390), ("yahoo", 390), ("polygon", 390), ("yahoo", 390),
    ]  # fmt: skip
    assert row.sources == ("polygon", "yahoo")
    assert (row.num_gaps, row.coverage, row.flags, row.dropped) == (0, 1.0, (), "")
    assert load(lake, request_for("polygon")).rows[0].num_bars == 780


def test_yahoo_fills_minutes_that_polygon_lacks_on_a_day(lake):
    put_polygon(lake, pa.concat_tables([session("AAPL", 16), session("AAPL", 17).slice(0, 195)]))
    both = [session("AAPL", 16, price=100.01), session("AAPL", 17, price=100.01)]
    put(lake, "yahoo", "AAPL", pa.concat_tables(both))
    row = load(lake, request_for("polygon", "yahoo")).rows[0]
    assert [(stretch.source, stretch.num_bars) for stretch in row.stretches] == [
        ("polygon", 585),
        ("yahoo", 195),
    ]
    assert row.flags == ("Yahoo fills in for Polygon on days with few bars: 1",)
    assert [(extent.source, extent.num_bars) for extent in row.by_source] == [
        ("polygon", 585),
        ("yahoo", 780),
    ]
    assert row.difference == pytest.approx(1e-4, rel=0.01)
    quiet = with_values(both[1], slice(330, 390), volume=0.0)  # no trade at Yahoo, too
    put(lake, "yahoo", "AAPL", pa.concat_tables([both[0], quiet]))
    put_polygon(lake, pa.concat_tables([session("AAPL", 16), session("AAPL", 17).slice(0, 330)]))
    assert load(lake, request_for("polygon", "yahoo")).rows[0].sources == ("polygon",)


def test_stocks_are_cut_to_the_regular_session_unless_extended_hours_are_wanted(lake):
    day = walk("AAPL", ns("2026-11-16 09:00"), 16 * 60)  # 04:00 to 20:00 in New York
    put_polygon(lake, day)
    (bars,) = load(lake, request_for("polygon")).bars
    assert (bars.open_time[0], bars.open_time[-1], len(bars)) == (MONDAY_OPEN, ns("2026-11-16 20:59"), 390)
    (bars,) = load(lake, request_for("polygon", extended_hours=True)).bars
    assert len(bars) == 960


def test_a_bar_on_a_day_when_the_calendar_says_closed_is_kept(lake):
    saturday = walk("AAPL", ns("2026-11-14 14:30"), 390)
    put_polygon(lake, saturday, start_ns=ns("2026-11-14 00:00"))
    assert len(load(lake, request_for("polygon", start_ns=ns("2026-11-14 00:00"))).bars[0]) == 390


def scaled(bars, factor):
    prices = {name: bars[name].to_numpy() * factor for name in COLUMNS[1:5]}
    return with_values(bars, slice(None), **prices)


def test_raw_polygon_and_adjusted_yahoo_meet_on_one_scale_after_a_split(lake):
    SplitLedger(lake.root).update("AAPL", [Split(datetime.date(2026, 11, 18), 10.0)])
    put_polygon(lake, scaled(session("AAPL", 16), 10.0))  # raw
    put(lake, "yahoo", "AAPL", session("AAPL", 17), unit="late", now_ns=NOW)  # adjusted by Yahoo
    before = ns("2026-11-16 23:00")
    early = scaled(session("AAPL", 16), 10.0)  # fetched before the split, so not adjusted
    put(lake, "yahoo", "AAPL", early, unit="early", now_ns=before, end_ns=before)
    put(lake, "yahoo", "AAPL", session("AAPL", 18), unit="new", now_ns=NOW)
    data = load(lake, request_for("polygon", "yahoo"))
    expected = pa.concat_tables([session("AAPL", day) for day in (16, 17, 18)])
    np.testing.assert_allclose(data.bars[0].close, expected["close"].to_numpy(), rtol=1e-12)
    assert (data.rows[0].num_splits, data.rows[0].flags) == (1, ())
    np.testing.assert_allclose(
        load(lake, request_for("yahoo")).bars[0].close, expected["close"].to_numpy(), rtol=1e-12
    )


def test_an_unreported_split_is_flagged_by_the_two_sources_and_by_the_jump(lake):
    monday, tuesday = (
        scaled(flat([100.0] * 390, MONDAY_OPEN, "AAPL"), 10),
        flat([100.0] * 390, MONDAY_OPEN + DAY_NS, "AAPL", 100.0),
    )
    put_polygon(lake, pa.concat_tables([monday, tuesday]))
    assert load(lake, request_for("polygon")).rows[0].flags == (
        "a split of about 10 on 2026-11-17 is not in the ledger",
    )
    put(lake, "yahoo", "AAPL", flat([100.0] * 390, MONDAY_OPEN, "AAPL"))
    flags = load(lake, request_for("polygon", "yahoo")).rows[0].flags
    assert "a split of about 10 on 2026-11-17 is not in the ledger" in flags
    lake.remove(lake.parts("polygon", "us_stocks_sip")["u"])
    put_polygon(lake, monday)  # the jump is not in sight
    flags = load(lake, request_for("polygon", "yahoo")).rows[0].flags
    assert "Polygon's prices are 10 times Yahoo's: a split is missing in the ledger" in flags


def test_a_ticker_of_another_company_and_a_redenominated_coin_are_flagged(lake):
    monday = session("AAPL", 16, price=12.3)
    price = 15.5 * monday["close"][-1].as_py()
    put_polygon(lake, pa.concat_tables([monday, session("AAPL", 17, price=price)]))
    old, new = walk("BTCUSDT", START, 1440, price=55.0), walk("BTCUSDT", START + 4 * DAY_NS, 900, price=0.055)
    put(lake, "binance", "BTCUSDT", pa.concat_tables([old, new]))
    data = load(lake, request_for("polygon", "binance"))
    assert [len(bars) for bars in data.bars] == [780, 2340]
    for row, text in zip(data.rows, ("rise 15.5-fold", "fall to 1/"), strict=False):
        (flag,) = (flag for flag in row.flags if flag.startswith("prices"))
        day = {"stock": "2026-11-17", "crypto": "2026-11-20"}[row.asset_class]
        assert text in flag and flag.endswith(f" at once on {day}: cut there, as if it were another symbol")


def test_sources_that_disagree_a_little_are_flagged_with_the_figure(lake):
    put_polygon(lake, session("AAPL", 16))
    put(lake, "yahoo", "AAPL", scaled(session("AAPL", 16), 1.005))
    assert load(lake, request_for("polygon", "yahoo")).rows[0].flags == (
        "Polygon and Yahoo differ by 0.50 % (median)",
    )


def test_gaps_are_counted_within_sessions_and_never_filled(lake):
    monday, tuesday = session("AAPL", 16), session("AAPL", 17)
    put_polygon(lake, pa.concat_tables([monday.slice(0, 100), monday.slice(105, 200), tuesday.slice(1)]))
    row = load(lake, request_for("polygon")).rows[0]
    # 5 minutes; and the last 85 of Monday with the first of Tuesday, which follow each other in session time
    assert (row.num_gaps, row.longest_gap_minutes, row.num_bars) == (2, 86, 689)
    assert row.coverage == pytest.approx(689 / 780)
    btc = walk("BTCUSDT", START, 1000)
    put(lake, "binance", "BTCUSDT", pa.concat_tables([btc.slice(0, 500), btc.slice(600)]))
    row = load(lake, request_for("binance")).rows[0]
    assert (row.num_gaps, row.longest_gap_minutes, row.num_bars, row.coverage) == (1, 100, 900, 0.9)


def test_rejected_rows_are_counted_per_symbol_and_unfinished_minutes_are_not(lake):
    btc = with_values(walk("BTCUSDT", START, 1440), [7, 8], close=np.nan)
    part = put(lake, "binance", "BTCUSDT", btc, now_ns=START + 1440 * MINUTE_NS)
    assert part.rejected == {"not_closed": 1, "not_finite": 2}
    assert load(lake, request_for("binance")).rows[0].rejected == {"not_finite": 2}
    both = pa.concat_tables([session("AAPL", 16), with_values(session("MSFT", 16), [3], low=-1.0)])
    put_polygon(lake, both)
    rows = load(lake, request_for("polygon", symbols={"stocks": ("MSFT", "AAPL")})).rows
    assert [(row.symbol, row.rejected) for row in rows[:2]] == [("AAPL", {}), ("MSFT", {"not_positive": 1})]


def test_an_hour_without_trade_or_change_is_flagged(lake):
    btc = flat([100.0] * 200, START, "BTCUSDT")
    put(lake, "binance", "BTCUSDT", with_values(btc, slice(50, 151), volume=0.0))
    assert load(lake, request_for("binance")).rows[0].flags == (
        "101 bars in a row at one price without volume",
    )


def test_the_interval_is_half_open_and_symbols_come_in_a_fixed_order(lake):
    for pair in ("ETHUSDT", "BTCUSDT"):
        put(lake, "binance", pair, walk(pair, START, 1440))
    put(lake, "polygon", "global_crypto", walk("X:BTC-USD", START, 1440))
    request = request_for(
        "binance", "polygon", symbols={"binance_pairs": ("ETHUSDT", "BTCUSDT"), "stocks": ()},
        start_ns=START + 10 * MINUTE_NS, end_ns=START + 110 * MINUTE_NS,
    )  # fmt: skip
    data = load(lake, request)
    assert [bars.symbol for bars in data.bars] == ["BTCUSDT", "ETHUSDT", "X:BTC-USD"]
    assert all(((bars.open_time - START) // MINUTE_NS).tolist() == list(range(10, 110)) for bars in data.bars)


def test_the_fingerprint_changes_with_bars_and_splits_and_with_nothing_else(lake):
    request = request_for("polygon", "yahoo")
    put_polygon(lake, session("AAPL", 16))
    first = load(lake, request).fingerprint
    assert load(Lake(lake.root), request).fingerprint == first
    SplitLedger(lake.root).update("AAPL", [Split(datetime.date(2020, 8, 31), 4.0)])
    second = load(lake, request).fingerprint
    put(lake, "yahoo", "AAPL", session("AAPL", 17))
    assert len({first, second, load(lake, request).fingerprint}) == 3


def test_the_simulated_market_needs_no_lake_and_is_the_same_all_day(tmp_path):
    lake = Lake(tmp_path / "never made")
    request = request_for("simulated", simulated_symbols=3, simulated_bars=500)
    refresh(lake, request, NOW, NullProgress())
    data = load(lake, request)
    later = load(
        lake, request_for("simulated", simulated_symbols=3, simulated_bars=500, end_ns=NOW + DAY_NS - 1)
    )
    assert [len(bars) for bars in data.bars] == [500, 500, 500]
    assert data.fingerprint == later.fingerprint
    assert all(np.array_equal(a.close, b.close) for a, b in zip(data.bars, later.bars, strict=True))
    assert [row.sources for row in data.rows] == [("simulated",)] * 3
    assert not lake.root.exists()
    assert (
        load(lake, request_for("simulated", simulated_symbols=3, simulated_bars=501)).fingerprint
        != data.fingerprint
    )


def test_loading_takes_little_memory_beside_the_bars_themselves(lake):
    pairs = [f"P{k}USDT" for k in range(8)]
    end = START + 40_000 * MINUTE_NS
    for pair in pairs:
        put(lake, "binance", pair, walk(pair, START, 40_000), now_ns=end + DAY_NS, end_ns=end)
    request = request_for("binance", symbols={"binance_pairs": pairs}, end_ns=end)
    load(lake, request)  # warms imports and caches
    pools = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        data = load(lake, request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(getattr(bars, name).nbytes for bars in data.bars for name in COLUMNS)
    assert size == 8 * 40_000 * 48
    assert peak < 1.5 * size
    assert pa.total_allocated_bytes() == pools  # the result keeps no Arrow buffer
