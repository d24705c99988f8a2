import numpy as np
import pyarrow as pa
import pytest
from bar_tables import DAY_NS, ns, table, walk, with_values
from hypothesis import given, settings
from hypothesis import strategies as st

from continuous_training import Settings
from data_sources.bars import COLUMNS, MINUTE_NS, Bars
from data_sources.errors import BadAnswer
from data_sources.lake.quality import SCHEMA, bad_ticks, clean
from training.validation import check

START = ns("2026-11-20 14:30")
NOW = ns("2026-11-23 00:00")


def reasons_of(given_table, **more):
    return clean(given_table, now_ns=NOW, **more).rejected


def test_good_rows_pass_untouched_and_come_out_sorted_whatever_their_order():
    good = pa.concat_tables([walk("BBB", START, 500, seed=1), walk("AAA", START, 300, seed=2)])
    order = np.random.default_rng(3).permutation(good.num_rows)
    cleaned = clean(good.take(order), now_ns=NOW)
    assert cleaned.table.equals(good.sort_by([("symbol", "ascending"), ("open_time", "ascending")]))
    assert (cleaned.rejected, cleaned.repaired, cleaned.quarantined.num_rows) == ({}, {}, 0)
    assert cleaned.table.schema == SCHEMA


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not_finite", {"close": np.nan}),
        ("not_finite", {"open": np.inf}),
        ("not_finite", {"volume": np.inf}),
        ("not_positive", {"low": 0.0}),
        ("not_positive", {"low": -1.0}),
        ("negative_volume", {"volume": -1.0}),
        ("ohlc_broken", {"high": 90.0}),
        ("ohlc_broken", {"low": 110.0, "high": 111.0}),
        ("misaligned", {"open_time": START + 7 * MINUTE_NS + 17_000_000_000}),
        ("out_of_range", {"open_time": START // 1_000_000}),  # milliseconds
        ("out_of_range", {"open_time": ns("2002-12-31 23:59")}),
        ("future", {"open_time": NOW + MINUTE_NS}),
        ("future", {"open_time": NOW + 400 * DAY_NS}),
    ],
)
def test_a_broken_row_is_set_aside_with_its_reason_and_its_raw_values(reason, change):
    broken = with_values(walk("AAA", START, 50), [7], **change)
    cleaned = clean(broken, now_ns=NOW)
    assert cleaned.rejected == {reason: 1}
    assert cleaned.rejected_by_symbol == {"AAA": {reason: 1}}
    assert cleaned.table.num_rows == 49
    assert cleaned.quarantined["reason"].to_pylist() == [reason]
    for name, value in change.items():
        np.testing.assert_array_equal(cleaned.quarantined[name].to_numpy(), [value])


@pytest.mark.parametrize("day", ["2003-01-02", "2003-09-10", "2009-03-09", "2014-06-06"])
def test_bars_from_the_vendors_beginnings_on_are_kept_as_the_settings_allow(day):
    check(Settings(start_date=day))
    bars = walk("AAA", ns(f"{day} 14:30"), 390)
    assert (clean(bars, now_ns=NOW).table.equals(bars), reasons_of(bars)) == (True, {})


def test_a_minute_counts_as_closed_five_seconds_after_its_end():
    bars = walk("AAA", START, 10)
    last_close = START + 10 * MINUTE_NS
    assert clean(bars, now_ns=last_close + 5_000_000_000).rejected == {}
    early = clean(bars, now_ns=last_close + 4_999_999_999)
    assert early.rejected == {"not_closed": 1}
    assert early.table.num_rows == 9
    assert early.quarantined.num_rows == 0


def test_of_two_rows_for_a_minute_the_larger_volume_stays_and_equal_rows_are_merged():
    bars = walk("AAA", START, 20)
    rival = with_values(bars.slice(5, 1), [0], close=bars["open"][5].as_py(), volume=1e6)
    cleaned = clean(pa.concat_tables([rival, bars, bars.slice(10, 2)]), now_ns=NOW)
    assert cleaned.rejected == {"conflicting": 1, "duplicate": 2}
    assert cleaned.table["volume"][5].as_py() == 1e6
    assert cleaned.quarantined["close"].to_pylist() == [bars["close"][5].as_py()]


def test_a_broken_row_never_wins_over_a_good_one_of_the_same_minute():
    bars = walk("AAA", START, 20)
    broken = with_values(bars.slice(5, 1), [0], close=np.nan, volume=1e9)
    cleaned = clean(pa.concat_tables([bars, broken]), now_ns=NOW)
    assert cleaned.table.equals(bars)
    assert cleaned.rejected == {"not_finite": 1}


def test_missing_volume_becomes_zero_and_rounding_of_highs_is_clamped_both_counted():
    bars = with_values(walk("AAA", START, 20), [3], volume=np.nan)
    high = np.maximum(bars["open"][4].as_py(), bars["close"][4].as_py()) * (1 - 1e-8)
    cleaned = clean(with_values(bars, [4], high=high), now_ns=NOW)
    assert cleaned.repaired == {"volume_missing": 1, "ohlc_clamped": 1}
    assert cleaned.rejected == {}
    assert cleaned.table["volume"][3].as_py() == 0


def test_rows_that_were_not_requested_are_rejected():
    both = pa.concat_tables(
        [walk("AAA", START, 5), walk("BBB", START, 5), walk("AAA", START + 3 * DAY_NS, 5)]
    )
    cleaned = clean(
        both, now_ns=NOW + 9 * DAY_NS, symbols=("AAA",), start_ns=START, end_ns=START + 5 * MINUTE_NS
    )
    assert cleaned.rejected == {"outside_interval": 5, "wrong_symbol": 5}
    assert cleaned.table.equals(walk("AAA", START, 5))


def test_null_names_and_the_ticker_na_are_distinguished():
    rows = table([None, "", "NA", "NULL"], [START] * 4, *[[1.0] * 4] * 5)
    cleaned = clean(rows, now_ns=NOW)
    assert cleaned.table["symbol"].to_pylist() == ["NA", "NULL"]
    assert cleaned.rejected == {"no_symbol": 2}


def test_a_table_without_the_columns_of_bars_is_a_bad_answer():
    with pytest.raises(BadAnswer, match="volume missing"):
        clean(walk("AAA", START, 5).drop_columns(["volume"]), now_ns=NOW)


def test_integer_volumes_and_text_numbers_are_read_and_text_junk_is_set_aside():
    bars = walk("AAA", START, 3)
    text = pa.array(["100", "banana", "100"])
    table_of_text = bars
    for i, name in enumerate(("open", "high", "low", "close")):
        table_of_text = table_of_text.set_column(2 + i, name, text)
    cleaned = clean(table_of_text.set_column(6, "volume", pa.array([1, 2, 3])), now_ns=NOW)
    assert cleaned.table["close"].to_pylist() == [100.0, 100.0]
    assert cleaned.quarantined["open"].to_pylist() == ["banana"]


def test_an_empty_table_stays_an_empty_table():
    cleaned = clean(SCHEMA.empty_table(), now_ns=NOW)
    assert cleaned.table.equals(SCHEMA.empty_table())


@pytest.mark.parametrize(
    "change",
    [
        {"open": 1e300, "high": 1e300, "close": 1e300},
        {"low": 5e-324},
        {"volume": 1e30},
        {"low": 0.5},  # and a high of 100: a trade that the exchange busts
    ],
)
def test_an_absurd_price_is_no_bar(change):
    assert reasons_of(with_values(walk("AAA", START, 50), [7], **change)) == {"absurd": 1}


def test_a_part_keeps_rows_off_the_price_level_since_only_a_whole_series_shows_it():
    spiked = with_values(walk("AAA", START, 300), [100, 101], **dict.fromkeys(COLUMNS[1:5], 900.0))
    cleaned = clean(spiked, now_ns=NOW)
    assert (cleaned.table.equals(spiked), cleaned.rejected) == (True, {})


def marked(prices, opens=None, minutes=None):
    prices = np.asarray(prices, float)
    opens = prices if opens is None else np.asarray(opens, float)
    minutes = np.arange(len(prices)) if minutes is None else np.asarray(minutes)
    return np.flatnonzero(bad_ticks(START + minutes * MINUTE_NS, opens, prices)).tolist()


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("factor", [10.0, 0.1, 2.2, 0.45])
def test_a_print_off_the_level_is_marked_at_once_in_both_directions(length, factor):
    prices = [100] * 40 + [100 * factor] * length
    expected = list(range(40, 40 + length))
    assert marked(prices) == expected
    assert marked(prices + [100] * 40) == expected


@pytest.mark.parametrize(
    ("prices", "lost"),
    [
        ([100] * 10 + [40] * 20, [10, 11, 12]),  # a level that stays: the fourth row confirms it
        ([100] * 10 + [300] * 4 + [100] * 10, [10, 11, 12]),  # back to a level of the last 30 bars
        ([100] * 40 + [300] * 40 + [100] * 40, [40, 41, 42, 80, 81, 82]),
        ([100] * 10 + [300, 900, 30, 300, 30] + [100] * 9, [10, 11, 12, 13, 14]),  # rows that do not agree
        ([100] * 10 + [300, 300, 100, 300, 300] + [100] * 9, [10, 11, 13, 14]),
        ([100] * 10 + [150] * 3 + [55] + [199] * 9, []),
        ([150], []),
        ([], []),
    ],
)
def test_a_new_level_needs_three_rows_before_it_is_believed(prices, lost):
    assert marked(prices) == lost


def test_a_crash_that_trades_down_within_its_bars_is_all_bars():
    opens, closes = [100] * 10 + [100, 60, 20, 9, 30, 80], [100] * 10 + [60, 20, 9, 30, 80, 95]
    assert marked(closes, opens) == []


def test_an_open_alone_off_the_level_is_marked_since_orders_fill_there():
    assert marked([100] * 9, [100] * 4 + [300] + [100] * 4) == [4]


def test_after_an_hour_without_a_bar_any_price_is_a_bar():
    assert marked([100, 100, 300, 300], minutes=[0, 1, 60, 61]) == [2, 3]
    assert marked([100, 100, 300, 300], minutes=[0, 1, 62, 63]) == []
    assert marked([100, 300, 900, 300], minutes=[0, 20, 40, 61]) == [1, 2]  # over an hour since the last bar


def plain_bad_ticks(minutes, opens, closes):
    """The rule of bad_ticks, row by row."""
    marks, bars, waiting = [], [], []
    for minute, price, close in zip(minutes, opens, closes, strict=True):
        level = [value for bar in bars[-30:] for value in bar[1:]]
        is_off = level and minute - bars[-1][0] <= 60 and not min(level) / 2 <= price <= max(level) * 2
        if is_off and waiting and not min(waiting) / 2 <= price <= max(waiting) * 2:
            waiting = []
        if is_off and len(waiting) < 3:
            waiting.append(price)
            marks.append(True)
            continue
        waiting = []
        bars.append((minute, price, close))
        marks.append(False)
    return marks


moves = st.sampled_from([1.0] * 12 + [0.5, 2.0, 4.0, 0.25, 10.0, 0.1, 1.5])
rows_with_moves = st.lists(st.tuples(st.sampled_from([1] * 9 + [30, 61]), moves, moves), max_size=120)


@settings(max_examples=150, deadline=None)
@given(rows_with_moves, st.data())
def test_marks_follow_the_plain_rule_and_never_change_when_later_rows_arrive(rows, data):
    minutes = np.cumsum([row[0] for row in rows], dtype=np.int64)
    opens, closes = (64.0 * np.array([row[place] for row in rows]) for place in (1, 2))
    marks = bad_ticks(START + minutes * MINUTE_NS, opens, closes)
    assert marks.tolist() == plain_bad_ticks(minutes.tolist(), opens.tolist(), closes.tolist())
    cut = data.draw(st.integers(0, len(rows)))
    first = bad_ticks(START + minutes[:cut] * MINUTE_NS, opens[:cut], closes[:cut])
    assert first.tolist() == marks[:cut].tolist()


values = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -1.0, 1.0, 1.1, 100.0, np.nan, np.inf, 1e300, 5e-324])
)
moments = st.one_of(
    st.integers(0, 30).map(lambda k: START + k * MINUTE_NS),
    st.sampled_from([0, -1, START + 1, NOW, 2**62, START // 1000]),
)
rows_of_junk = st.lists(st.tuples(st.sampled_from(["A", "B", ""]), moments, *[values] * 5), max_size=40)


@settings(max_examples=150, deadline=None)
@given(rows_of_junk)
def test_every_row_is_accounted_for_and_those_that_stay_are_bars(rows):
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 7
    cleaned = clean(table(list(columns[0]), *columns[1:]), now_ns=NOW)
    assert cleaned.table.num_rows + sum(cleaned.rejected.values()) == len(rows)
    for symbol in set(cleaned.table["symbol"].to_pylist()):
        own = cleaned.table.filter(pa.compute.equal(cleaned.table["symbol"], symbol))
        Bars(symbol, "stock", *(own[name].to_numpy() for name in COLUMNS))
