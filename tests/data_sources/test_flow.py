"""Order flow: checked apart from its bar, absent where it is not known, and carried from the lake to a feature."""

import datetime
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bar_tables import DAY_NS, as_format_1, ns, read, rewrite, walk, with_values

from data_sources import snapshot
from data_sources.bars import COLUMNS, FLOW_COLUMNS, MINUTE_NS, Bars, bars_of_frame
from data_sources.lake.lake import Lake
from data_sources.lake.parts import FORMAT, parse_part
from data_sources.lake.quality import FLOW_SCHEMA, SCHEMA, clean
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.splits import Split, SplitLedger
from envs.features import History
from envs.later_bars import replace_bars_after

START = ns("2026-11-20 00:00")
END = START + DAY_NS
NOW = ns("2026-11-23 00:00")
EVER = (0, 2**62)


def with_flow(bars: pa.Table, share: float = 0.4, *names: str) -> pa.Table:
    """Add flow to bars: a trade per unit of volume, and the part of it that takers bought."""
    volume = bars["volume"].to_numpy()
    flow = {"trades": np.ceil(volume), "taker_buy_volume": volume * share}
    for name in names or FLOW_COLUMNS:
        bars = bars.append_column(name, pa.array(flow[name]))
    return bars


def put(lake: Lake, bars: pa.Table, unit: str = "u", source: str = "binance", now_ns: int = NOW, **more):
    symbol = bars["symbol"][0].as_py()
    given = {"dataset": symbol, "key": unit, "version": "v", "start_ns": START, "end_ns": END} | more
    return lake.write(source, unit=unit, table=bars, symbols=[symbol], now_ns=now_ns, **given)


@pytest.fixture
def lake(tmp_path):
    return Lake(tmp_path / "lake")


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("flow_not_finite", {"trades": np.nan}),
        ("flow_not_finite", {"taker_buy_volume": np.inf}),
        ("flow_negative", {"trades": -1.0}),
        ("flow_negative", {"taker_buy_volume": -1e-3}),
        ("trades_not_whole", {"trades": 2.5}),
        ("trades_absurd", {"trades": 2e9}),
        ("trades_without_volume", {"volume": 0.0, "taker_buy_volume": 0.0}),
        ("volume_without_trades", {"trades": 0.0}),
        ("taker_above_volume", {"volume": 1.0, "taker_buy_volume": 1.001}),
        ("taker_above_volume", {"volume": 0.0, "trades": 0.0, "taker_buy_volume": 1e-9}),
    ],
)
def test_a_bar_stays_without_flow_that_cannot_be_its_own(reason, change):
    bars = walk("AAA", START, 50)
    broken = with_values(with_flow(bars), [7], **change)
    cleaned = clean(broken, now_ns=NOW)
    assert (cleaned.rejected, cleaned.flow_rejected) == ({}, {"AAA": {reason: 1}})
    assert cleaned.table.select(SCHEMA.names).equals(broken.select(SCHEMA.names))
    expected = with_flow(bars)
    for name in FLOW_COLUMNS:  # both are gone, of this bar alone
        values = cleaned.table[name].to_pylist()
        assert values[7] is None
        assert values[:7] + values[8:] == expected[name].to_pylist()[:7] + expected[name].to_pylist()[8:]
    assert cleaned.quarantined["reason"].to_pylist() == [reason]
    for name, value in change.items():
        np.testing.assert_array_equal(cleaned.quarantined[name].to_numpy(), [value])


def test_unknown_flow_stays_unknown_and_rounding_is_no_fault():
    bars = with_flow(with_values(walk("AAA", START, 50), [3], volume=0.0))
    volume = bars["volume"].to_numpy()
    taker = np.where(np.arange(50) == 9, volume + 5e-9, bars["taker_buy_volume"].to_numpy())
    taker = pa.array(taker, mask=np.arange(50) == 5)
    cleaned = clean(bars.set_column(8, "taker_buy_volume", taker), now_ns=NOW)
    assert (cleaned.flow_rejected, cleaned.repaired) == ({}, {"taker_clamped": 1})
    assert cleaned.table["taker_buy_volume"][5].as_py() is None and cleaned.table["trades"][5].as_py() > 0
    assert cleaned.table["taker_buy_volume"][9].as_py() == volume[9]
    assert cleaned.table["trades"][3].as_py() == cleaned.table["taker_buy_volume"][3].as_py() == 0


def test_equal_bars_with_different_flow_are_one_bar_without():
    bars = with_flow(walk("AAA", START, 20))
    rivals = pa.concat_tables([bars.slice(5, 1), with_flow(walk("AAA", START, 20), 0.1).slice(8, 1)])
    cleaned = clean(pa.concat_tables([bars, rivals]), now_ns=NOW)
    assert cleaned.rejected == {"duplicate": 2}
    assert cleaned.flow_rejected == {"AAA": {"flow_conflicting": 1}}
    assert cleaned.table["trades"].to_pylist()[5] == bars["trades"][5].as_py()
    assert [place for place, value in enumerate(cleaned.table["trades"].to_pylist()) if value is None] == [8]


def test_bars_refuse_flow_that_no_bar_has():
    def bars(**flow):
        flat = np.full(2, 10.0)
        return Bars("AAA", "crypto", np.array([0, 1]) * MINUTE_NS, flat, flat, flat, flat, flat, **flow)

    assert bars(trades=np.array([3, np.nan])).columns == (*COLUMNS, "trades")
    for name, values, rule in (
        ("trades", [1.5, 1], "AAA: trades whole is broken at bar 0 of 2"),
        ("trades", [1, 0], "AAA: trades 0 exactly where the volume is is broken at bar 1 of 2"),
        (
            "taker_buy_volume",
            [10, 10.1],
            "AAA: taker_buy_volume from 0 to the volume is broken at bar 1 of 2",
        ),
        ("taker_buy_volume", [-1, 0], "AAA: taker_buy_volume from 0 to the volume is broken at bar 0 of 2"),
        ("trades", [1.0], "AAA: trades must be float64 of shape (2,), was float64 of (1,)"),
    ):
        with pytest.raises(ValueError) as error:
            bars(**{name: np.array(values, np.float64)})
        assert str(error.value) == rule


# ------------------------------------------------------------------------------------------ the lake


def test_a_part_has_the_columns_that_its_answer_had_and_says_so(lake):
    whole, some, none = walk("AAA", START, 90), walk("AAA", START, 90), walk("AAA", START, 90)
    part = put(lake, with_flow(whole))
    assert (part.format, part.flow) == (FORMAT, {"trades": 90, "taker_buy_volume": 90})
    assert Lake(lake.root).parts("binance", "AAA") == {"u": part}
    assert read(lake, "binance", "AAA", None, *EVER).equals(with_flow(whole))
    part = put(lake, with_flow(some, 0.4, "trades"), version="w")
    assert part.flow == {"trades": 90}
    assert read(lake, "binance", "AAA", None, *EVER).column_names == [*SCHEMA.names, "trades"]
    unknown = [none[name] for name in SCHEMA.names] + [pa.nulls(90, pa.float64())] * 2
    part = put(lake, pa.table(unknown, schema=FLOW_SCHEMA), version="x")
    assert (part.flow, part.flow_content) == ({}, "")
    assert pq.read_schema(lake.root / "binance/AAA/u.parquet").names == SCHEMA.names
    assert lake.verify() == []


def test_lakes_without_flow_keep_their_fingerprints_and_flow_changes_them(lake):
    bars = walk("AAA", START, 1440)
    put(lake, bars, "2026-11-20", key="k", version="v1")
    assert lake.fingerprint() == "80a0d41e72a40318"  # by the last commit before there was flow
    content = lake.parts("binance", "AAA")["2026-11-20"].content
    part = put(lake, with_flow(bars), "2026-11-20", key="k", version="v1")
    assert part.content == content  # so that earlier versions of the program can verify it
    first = lake.fingerprint()
    put(lake, with_flow(bars, 0.3), "2026-11-20", key="k", version="v1")
    assert len({first, lake.fingerprint(), "80a0d41e72a40318"}) == 3


def test_parts_with_and_without_flow_are_one_series(lake):
    bars = walk("AAA", START, 100)
    put(lake, with_flow(bars.slice(0, 40)), "old")
    as_format_1(lake, "binance", "AAA")
    assert lake.parts("binance", "AAA")["old"].format == 1
    assert read(lake, "binance", "AAA", None, *EVER).equals(bars.slice(0, 40))
    put(lake, with_flow(bars.slice(30)), "new", now_ns=NOW + 1, start_ns=START + 30 * MINUTE_NS)
    found = lake.columns("binance", "AAA", None, *EVER)["AAA"]
    for name in FLOW_COLUMNS:
        assert np.isnan(found[name][:30]).all()
        np.testing.assert_array_equal(found[name][30:], with_flow(bars)[name].to_numpy()[30:])
    assert lake.verify() == []


def test_a_changed_flow_is_damage(lake):
    put(lake, with_flow(walk("AAA", START, 90)))
    part = lake.parts("binance", "AAA")["u"]
    path = lake.root / "binance/AAA/u.parquet"
    rewrite(path, with_values(parse_part(path), [4], trades=1.0), part)
    assert Lake(lake.root).verify() == ["binance/AAA/u"]


# ------------------------------------------------------------------------------------------ loading


def test_splits_scale_what_takers_bought_as_the_volume_and_no_number_of_trades(tmp_path):
    table = with_flow(walk("AAA", ns("2026-11-17 14:30"), 390))
    raw = Bars("AAA", "stock", **{name: table[name].to_numpy() for name in (*COLUMNS, *FLOW_COLUMNS)})
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(datetime.date(2026, 11, 18), 3.0)])
    adjusted = ledger.adjust(raw)
    np.testing.assert_array_equal(adjusted.taker_buy_volume, raw.taker_buy_volume * 3)
    np.testing.assert_array_equal(adjusted.volume, raw.volume * 3)
    np.testing.assert_array_equal(adjusted.trades, raw.trades)


def test_a_renamed_coin_at_another_ratio_keeps_its_flow(lake):
    lake.root.mkdir(parents=True)
    (lake.root / "renames.csv").write_text(
        "setting,old,new,first_day,ratio,source\nbinance_pairs,OLDUSDT,NEWUSDT,2026-11-21,4,\n"
    )
    old = with_flow(walk("OLDUSDT", START, 600))
    put(lake, old)
    put(lake, walk("NEWUSDT", START + DAY_NS + 6 * 60 * MINUTE_NS, 600), start_ns=END, end_ns=END + DAY_NS)
    request = DataRequest(("binance",), {"binance_pairs": ("NEWUSDT",)}, START, NOW, min_bars=1)
    data = load(lake, request)
    (bars,) = data.bars
    np.testing.assert_array_equal(bars.taker_buy_volume[:600], old["taker_buy_volume"].to_numpy() * 4)
    np.testing.assert_array_equal(bars.trades[:600], old["trades"].to_numpy())
    assert np.isnan(bars.trades[600:]).all() and len(bars) == 1200
    assert data.rows[0].flow == {"trades": 600, "taker_buy_volume": 600}


def test_of_two_sources_each_bar_has_the_flow_of_its_own(lake):
    bars = walk("AAPL", ns("2026-11-20 14:30"), 390)
    polygon = bars.filter(pa.array(np.arange(390) % 3 > 0))
    span = {"dataset": "us_stocks_sip", "start_ns": START, "end_ns": END}
    put(lake, with_flow(polygon, 0.4, "trades"), source="polygon", **span)
    put(lake, bars, source="yahoo", now_ns=NOW)
    request = DataRequest(("polygon", "yahoo"), {"stocks": ("AAPL",)}, START, NOW, min_bars=1)
    data = load(lake, request)
    expected = np.where(np.arange(390) % 3 > 0, np.ceil(bars["volume"].to_numpy()), np.nan)
    np.testing.assert_array_equal(data.bars[0].trades, expected)
    assert data.bars[0].taker_buy_volume is None
    assert {row.source: row.flow for row in data.rows[0].by_source} == {
        "polygon": {"trades": 260},
        "yahoo": {},
    }
    assert data.rows[0].flow == {"trades": 260}


def test_bad_ticks_and_cut_stretches_take_their_flow_along(lake):
    tick = dict.fromkeys(COLUMNS[1:5], 900.0)
    put(lake, with_flow(with_values(walk("AAAUSDT", START, 600), [300], **tick)))
    request = DataRequest(("binance",), {"binance_pairs": ("AAAUSDT",)}, START, NOW, min_bars=1)
    (bars,) = load(lake, request).bars
    flow = np.delete(with_flow(walk("AAAUSDT", START, 600))["trades"].to_numpy(), 300)
    np.testing.assert_array_equal(bars.trades, flow)
    np.testing.assert_array_equal(bars.between(START + 9 * MINUTE_NS, NOW).trades, flow[9:])


def test_a_snapshot_has_flow_only_where_there_is_some(lake):
    put(lake, with_flow(walk("AAAUSDT", START, 500), 0.4, "trades"))
    put(lake, walk("BBBUSDT", START, 400))
    put(lake, with_flow(walk("CCCUSDT", START, 300)))
    symbols = {"binance_pairs": ("AAAUSDT", "BBBUSDT", "CCCUSDT")}
    request = DataRequest(("binance",), symbols, START, NOW, min_bars=1)
    path = snapshot.provide(lake, request)
    loaded, copied = load(lake, request), snapshot.open_snapshot(path)
    assert copied.rows == loaded.rows
    for a, b in zip(loaded.bars, copied.bars, strict=True):
        assert a.columns == b.columns
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.columns)
    assert [len(bars.columns) for bars in copied.bars] == [7, 6, 8]
    assert path.stat().st_size < 8 * (7 * 500 + 6 * 400 + 8 * 300) + 200


# ------------------------------------------------------------------------------------------ features


def test_a_feature_sees_flow_with_a_mask_and_checks_replace_later_flow():
    table = with_flow(walk("AAA", START, 300))
    columns = {name: table[name].to_numpy().copy() for name in (*COLUMNS, *FLOW_COLUMNS)}
    columns["taker_buy_volume"][100:] = np.nan
    bars = Bars("AAA", "crypto", **columns)
    history = History(bars, torch.device("cpu"))
    assert history.has_trades.all() and history.has_taker_buy_volume.tolist() == [True] * 100 + [False] * 200
    assert history.taker_buy_volume[:100].tolist() == columns["taker_buy_volume"][:100].tolist()
    history = History(replace(bars, trades=None, taker_buy_volume=None), torch.device("cpu"))
    assert not history.has_trades.any() and history.trades.shape == (300,)
    changed = replace_bars_after(bars, 50, seed=1)
    np.testing.assert_array_equal(changed.trades[:51], bars.trades[:51])
    assert (changed.trades[51:300] != bars.trades[51:]).mean() > 0.9
    Bars("AAA", "crypto", **{name: getattr(changed, name) for name in changed.columns})  # they are valid


def test_frames_may_bring_flow():
    table = with_flow(walk("AAA", START, 5), 0.4, "trades")
    frame = table.to_pandas()
    frame.loc[2, "trades"] = None
    bars = bars_of_frame(frame, "AAA", "crypto")
    assert bars.taker_buy_volume is None and np.isnan(bars.trades[2])
    assert bars.trades[3] == table["trades"][3].as_py()
