import numpy as np
import pyarrow as pa
import pytest
from bar_tables import DAY_NS, flat, ns, table, walk, with_values
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sources.bars import COLUMNS, MINUTE_NS, Bars
from data_sources.errors import BadAnswer
from data_sources.lake.quality import SCHEMA, bad_ticks, clean

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


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("factor", [10.0, 0.1, 1.4, 0.7])
def test_a_spike_that_reverts_within_three_bars_is_dropped_in_both_directions(length, factor):
    bars = walk("AAA", START, 300)
    rows = np.arange(100, 100 + length)
    prices = {name: bars[name].to_numpy()[rows] * factor for name in COLUMNS[1:5]}
    cleaned = clean(with_values(bars, rows, **prices), now_ns=NOW)
    assert cleaned.rejected == {"bad_tick": length}
    assert cleaned.table.equals(pa.concat_tables([bars.slice(0, 100), bars.slice(100 + length)]))


def marked(prices, opens=None):
    prices = np.asarray(prices, float)
    opens = prices if opens is None else np.asarray(opens, float)
    return bad_ticks(START + np.arange(len(prices)) * MINUTE_NS, opens, prices).tolist()


@pytest.mark.parametrize(
    "prices",
    [
        [100] * 10 + [150] * 10,  # a jump that stays, such as a split or news
        [100] * 10 + [10] * 10,
        [100] * 10 + [150] * 4 + [100] * 10,  # four bars: trade at that level was real
        [100] * 10 + [115] + [100] * 10,  # under 20 %
        [100] * 10 + [150, 125] + [125] * 10,  # comes back half the way only
        [150] + [100] * 10,  # nothing before it to compare with
        [100] * 10 + [150],  # nothing after it
        [100, 150],
        [100],
        [],
    ],
)
def test_moves_without_proof_of_an_error_are_kept(prices):
    assert not any(marked(prices))


def test_a_bad_tick_back_to_the_old_level_after_a_real_jump_takes_only_itself():
    assert np.flatnonzero(marked([100] * 10 + [150, 150, 100] + [150] * 10)).tolist() == [12]


def test_an_open_alone_off_the_level_is_a_bad_tick_since_orders_fill_there():
    assert np.flatnonzero(marked([100] * 9, [100] * 4 + [300] + [100] * 4)).tolist() == [4]


def test_a_day_whose_every_minute_is_wild_raises_the_threshold_above_twenty_percent():
    wild = 100 * np.exp(np.tile([0.0, 0.05], 50))  # sigma of about 7 %
    wild[50] *= np.exp(0.3)
    assert not any(marked(wild))
    calm = 100 * np.exp(np.tile([0.0, 0.0005], 50))
    calm[50] *= np.exp(0.3)
    assert np.flatnonzero(marked(calm)).tolist() == [50]


def test_a_neighbouring_symbols_price_is_never_taken_for_a_jump():
    bars = pa.concat_tables(
        [flat([1.0] * 3, START, "A"), flat([900.0], START, "B"), flat([1.0] * 3, START, "C")]
    )
    assert clean(bars, now_ns=NOW).rejected == {}


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
