"""What was a bar when it was new stays one: loading after every refresh gives the beginning of the last result."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bar_tables import DAY_NS, ns, walk, with_values
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sources.bars import COLUMNS, MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.lake.parts import write_part
from data_sources.load import load
from data_sources.sources import DataRequest

OPEN = ns("2026-11-17 14:30")
ROWS = 3 * 390
SYMBOLS = {"stocks": ("AAA",), "polygon_crypto": ("X:BBB-USD",)}
REQUEST = DataRequest(("polygon", "yahoo"), SYMBOLS, OPEN - DAY_NS, OPEN + 4 * DAY_NS, min_bars=1)


def three_sessions(symbol):
    bars = walk(symbol, OPEN, ROWS, seed=3)
    days = np.arange(ROWS) // 390 * (DAY_NS - 390 * MINUTE_NS)
    return with_values(bars, slice(None), open_time=bars["open_time"].to_numpy() + days)


excursions = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.integers(1, 6), st.sampled_from([0.1, 0.4, 0.7, 1.4, 3.0, 10.0])),
    max_size=6,
)
holes = st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 300)), max_size=4)
cuts = st.lists(st.integers(1, ROWS - 1), min_size=1, max_size=2, unique=True).map(sorted)


@settings(max_examples=6, deadline=None)
@given(excursions, holes, cuts, st.booleans())
def test_bars_are_the_same_after_every_later_refresh(tmp_path_factory, excursions, holes, cuts, is_one_part):
    lake = Lake(tmp_path_factory.mktemp("lake"))
    is_there = np.ones(ROWS, bool)
    for first, length in holes:
        is_there[first : first + length] = False
    tables = {}
    for symbol in ("AAA", "X:BBB-USD"):
        tables[symbol] = three_sessions(symbol)
        for first, length, factor in excursions:
            for name in COLUMNS[1:5]:
                values = tables[symbol][name].to_numpy()[first : first + length] * factor
                tables[symbol] = with_values(tables[symbol], slice(first, first + length), **{name: values})
    stages, begin = [], 0
    for number, end in enumerate([*cuts, ROWS]):
        first = 0 if is_one_part else begin  # the part grows, or each refresh adds one
        times = tables["AAA"]["open_time"].to_numpy()
        more = {"key": "", "version": "", "now_ns": int(times[end - 1]) + 2 * MINUTE_NS}
        more |= {"start_ns": OPEN - DAY_NS, "end_ns": OPEN + 4 * DAY_NS}
        unit = "u" if is_one_part else f"u{number}"

        def write(source, dataset, table, unit=unit, more=more):
            lake.write(source, dataset, unit, table, symbols=table["symbol"].unique().to_pylist(), **more)

        rows = {symbol: table.slice(first, end - first) for symbol, table in tables.items()}
        write("polygon", "us_stocks_sip", rows["AAA"].filter(pa.array(is_there[first:end])))
        other = with_values(rows["AAA"], slice(None), volume=rows["AAA"]["volume"].to_numpy() + 1)
        write("yahoo", "AAA", other)
        write("polygon", "global_crypto", rows["X:BBB-USD"])
        stages.append(load(lake, REQUEST).bars)
        begin = end
    for stage in stages[:-1]:
        for early, late in zip(stage, stages[-1], strict=True):
            assert len(early) > 0
            for name in COLUMNS:
                np.testing.assert_array_equal(getattr(early, name), getattr(late, name)[: len(early)])


@pytest.mark.parametrize("reason", ["bad_tick", "out_of_range"])
def test_rows_that_an_earlier_version_set_aside_are_bars_again(tmp_path, reason):
    lake, bars = Lake(tmp_path), walk("BTCUSDT", OPEN, 300)
    dip = slice(100, 102)
    dipped = with_values(bars, dip, **{name: bars[name].to_numpy()[dip] * 0.7 for name in COLUMNS[1:5]})
    broken = with_values(bars.slice(200, 1), [0], close=np.nan)
    span = {"key": "", "version": "", "start_ns": OPEN, "end_ns": OPEN + DAY_NS, "symbols": ["BTCUSDT"]}
    # Written without the two rows, which are in quarantine beside a broken one, as that version did.
    without = pa.concat_tables([dipped.slice(0, 100), dipped.slice(102, 98), broken, dipped.slice(201)])
    part = lake.write("binance", "BTCUSDT", "u", without, now_ns=OPEN + DAY_NS, **span)
    assert part.rejected == {"not_finite": 1}
    quarantine = tmp_path / "binance" / "BTCUSDT" / "u.quarantine.parquet"
    aside = pq.read_table(quarantine)
    ticks = dipped.slice(100, 2).append_column("reason", pa.array([reason] * 2))
    pq.write_table(pa.concat_tables([aside, ticks.cast(aside.schema)]), quarantine)
    counts = {reason: 2, "not_finite": 1}
    with quarantine.with_name("u.parquet").open("wb") as file:
        table = pa.concat_tables([dipped.slice(0, 100), dipped.slice(102, 98), dipped.slice(201)])
        write_part(file, table, replace(part, rejected=counts, rejected_by_symbol={"BTCUSDT": counts}))
    request = DataRequest(("binance",), {"binance_pairs": ("BTCUSDT",)}, OPEN, OPEN + DAY_NS, min_bars=1)
    data = load(Lake(tmp_path), request)
    (loaded,) = data.bars
    expected = pa.concat_tables([dipped.slice(0, 200), dipped.slice(201)])
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(loaded, name), expected[name].to_numpy())
    assert data.rows[0].rejected["not_finite"] == 1
    assert "bad_tick" not in data.rows[0].rejected
    assert Lake(tmp_path).verify() == []
    quarantine.unlink()  # by hand
    assert len(load(Lake(tmp_path), request).bars[0]) == 297
