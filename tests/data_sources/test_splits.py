import dataclasses
import datetime
import json

import numpy as np
import pytest
from bar_tables import DAY_NS, ns, walk

from data_sources.bars import COLUMNS, MINUTE_NS, Bars
from data_sources.calendar import expected_minutes, in_regular_session, new_york_midnight_ns, new_york_time
from data_sources.errors import LakeError
from data_sources.splits import Split, SplitLedger, suspect_splits

DATE = datetime.date(2026, 11, 18)
OPEN = ns("2026-11-17 14:30")  # 09:30 in New York


def two_sessions(ratio, *, symbol="AAA", volume_ratio=None):
    """390 bars of the 17th at 100 x ratio, 390 of the 18th at 100, volume moving the other way."""
    columns = {name: [] for name in COLUMNS}
    for day, (price, volume) in enumerate(((ratio, 1.0), (1.0, volume_ratio or ratio))):
        bars = walk(symbol, OPEN + day * DAY_NS, 390, seed=7)
        price = price * 100 / bars["close"][-1].as_py() if day == 0 else price  # ends where the next begins
        for name in COLUMNS:
            scale = {"open_time": 1, "volume": volume}.get(name, price)
            columns[name].append(bars[name].to_numpy() * scale)
    return Bars(symbol, "stock", *(np.concatenate(columns[name]) for name in COLUMNS))


def test_prices_before_the_execution_date_are_divided_and_volumes_multiplied(tmp_path):
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, 10.0)])
    raw = two_sessions(10.0)
    adjusted = ledger.adjust(raw)
    for name in ("open", "high", "low", "close"):
        np.testing.assert_allclose(getattr(adjusted, name)[:390], getattr(raw, name)[:390] / 10, rtol=1e-15)
        np.testing.assert_array_equal(getattr(adjusted, name)[390:], getattr(raw, name)[390:])
    np.testing.assert_allclose(adjusted.volume[:390], raw.volume[:390] * 10)
    assert abs(np.log(adjusted.close[390] / adjusted.close[389])) < 0.1


def test_splits_multiply_and_reverse_splits_raise_old_prices(tmp_path):
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, 4.0), Split(datetime.date(2026, 11, 19), 0.1)])
    raw = two_sessions(4.0)
    adjusted = ledger.adjust(raw)
    np.testing.assert_allclose(adjusted.close, np.repeat([1 / 0.4, 10], 390) * raw.close)


def test_the_first_bar_after_midnight_in_new_york_is_already_new(tmp_path):
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, 2.0)])
    time = np.array([ns("2026-11-18 04:59"), ns("2026-11-18 05:00")])
    flat = np.full(2, 10.0)
    assert ledger.adjust(Bars("AAA", "stock", time, flat, flat, flat, flat, flat)).close.tolist() == [
        5.0,
        10.0,
    ]


def test_prices_that_a_vendor_adjusts_are_changed_only_by_splits_after_their_fetch(tmp_path):
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, 10.0)])
    raw = two_sessions(10.0)
    fetched = np.where(np.arange(780) < 100, new_york_midnight_ns(DATE) - 1, new_york_midnight_ns(DATE))
    adjusted = ledger.adjust(raw, fetched_ns=fetched)
    np.testing.assert_allclose(raw.close / adjusted.close, np.where(np.arange(780) < 100, 10.0, 1.0))


def test_a_split_that_is_still_to_come_changes_nothing(tmp_path):
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, 10.0)])
    raw = two_sessions(1.0)
    assert ledger.adjust(raw, until_ns=new_york_midnight_ns(DATE) - 1) is raw
    assert ledger.adjust(raw, until_ns=new_york_midnight_ns(DATE)) is not raw


@pytest.mark.parametrize(
    ("ratio", "clean"),
    [
        (10.0, True),
        (1.5, True),
        (0.125, True),
        (0.033333, True),
        (50.0, True),
        (1.973, False),
        (1.0231, False),
    ],
)
def test_an_odd_ratio_counts_only_if_the_prices_jumped_by_it(tmp_path, ratio, clean):
    assert Split(DATE, ratio).is_clean == clean
    ledger = SplitLedger(tmp_path)
    ledger.update("AAA", [Split(DATE, ratio)])
    quiet = two_sessions(1.0)
    assert (ledger.adjust(quiet) is quiet) == (not clean)
    if ratio == 1.973:
        jumped = two_sessions(ratio)
        assert ledger.adjust(jumped).close[0] == pytest.approx(jumped.close[0] / ratio)


def test_the_ledger_outlives_the_process_and_an_empty_answer_removes_nothing(tmp_path):
    SplitLedger(tmp_path).update("NVDA", [Split(datetime.date(2024, 6, 10), 10.0)])
    SplitLedger(tmp_path).update("NVDA", [])
    SplitLedger(tmp_path).update("NVDA", [Split(datetime.date(2021, 7, 20), 4.0)])
    assert SplitLedger(tmp_path).splits("NVDA") == [
        Split(datetime.date(2021, 7, 20), 4.0),
        Split(datetime.date(2024, 6, 10), 10.0),
    ]
    assert SplitLedger(tmp_path).splits("AAPL") == []
    assert json.loads((tmp_path / "splits.json").read_text())["splits"]["NVDA"]["2024-06-10"] == 10.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"splits": 3}', '{"splits": {"A": {"yesterday": 2}}}',
                                  '{"splits": {"A": {"2024-06-10": -2}}}'])  # fmt: skip
def test_a_damaged_ledger_is_set_aside_and_starts_empty(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    ledger = SplitLedger(tmp_path)
    assert ledger.splits("A") == []
    assert (tmp_path / "splits.json.corrupt").read_text() == text
    ledger.update("A", [Split(DATE, 2.0)])
    assert SplitLedger(tmp_path).splits("A") == [Split(DATE, 2.0)]


def test_a_ledger_that_cannot_be_written_is_a_lake_error_and_unchanged(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LakeError):
        SplitLedger(tmp_path / "file")
    ledger = SplitLedger(tmp_path / "folder")
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(LakeError, match="cannot write"):
        ledger.update("A", [Split(DATE, 2.0)])
    assert ledger.splits("A") == []


@pytest.mark.parametrize("ratio", [0.0, -2.0, float("nan"), float("inf")])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="finite and above zero"):
        Split(DATE, ratio)


WHOLE = (2, 3, 6, 7, 9, 10, 12, 30, 40, 50, 75, 100, 200)


@pytest.mark.parametrize(
    "ratio", [*map(float, WHOLE), *(1 / n for n in WHOLE), 1.5, 2.5, 1.25, 4 / 3, 2 / 3, 0.8]
)
def test_a_missing_split_is_flagged_with_its_ratio_and_first_new_bar(ratio):
    found = suspect_splits(two_sessions(ratio))
    assert [(jump.symbol, jump.open_time) for jump in found] == [("AAA", OPEN + DAY_NS)]
    assert found[0].ratio == pytest.approx(ratio)


@pytest.mark.parametrize("ratio", [7.0, 1 / 30])
def test_an_unlisted_split_is_flagged_also_where_the_volume_stays(ratio):
    assert suspect_splits(two_sessions(ratio, volume_ratio=1.0))[0].ratio == pytest.approx(ratio)


def sessions(nights):
    """Sessions of 390 bars that open by the ``nights`` (logs) over the close before; volume moves against them."""
    columns = {name: [] for name in COLUMNS}
    close = 100.0
    for day, night in enumerate([0.0, *nights]):
        bars = walk("AAA", OPEN + day * DAY_NS, 390, seed=day)
        scale = close * np.exp(night) / bars["open"][0].as_py()
        for name in COLUMNS:
            factor = {"open_time": 1, "volume": 100 / scale}.get(name, scale)
            columns[name].append(bars[name].to_numpy() * factor)
        close = columns["close"][-1][-1]
    return Bars("AAA", "stock", *(np.concatenate(columns[name]) for name in COLUMNS))


@pytest.mark.parametrize("ratio", [1.25, 4 / 3, 1.6, 2.0, 1 / 8, 2 / 3, 0.8])
@pytest.mark.parametrize("usual", [0.012, 0.001])
def test_the_nights_own_move_hides_no_split_unless_it_is_unusual(ratio, usual):
    nights = np.where(np.arange(9) % 2, usual, -usual)
    nights[4] = 0.03 - np.log(ratio)
    found = suspect_splits(sessions(nights))
    # 1.25 less three per cent may be 6:5 as well.
    assert [jump.ratio for jump in found] == ([pytest.approx(ratio, rel=0.05)] if usual == 0.012 else [])


def test_moves_that_are_not_splits_are_not_flagged():
    assert suspect_splits(two_sessions(1.0)) == []
    assert suspect_splits(two_sessions(1.7)) == []  # no ratio of small numbers
    assert suspect_splits(two_sessions(1.5, volume_ratio=6.0)) == []  # news: four times the usual money
    assert suspect_splits(two_sessions(0.5, volume_ratio=4.0)) == []  # news: more shares, not fewer
    far = two_sessions(7.0)
    times = far.open_time + np.where(np.arange(780) < 390, 0, 30 * DAY_NS)
    assert suspect_splits(dataclasses.replace(far, open_time=times)) == []  # a month later
    wild = two_sessions(1.5)
    lows = np.where(np.arange(780) == 500, wild.low * 0.6, wild.low)
    assert suspect_splits(dataclasses.replace(wild, low=lows)) == []  # news: a session of ten times the range
    assert suspect_splits(two_sessions(10.0, volume_ratio=0.2)) == []  # volume fell, too
    nothing = np.empty(0)
    assert suspect_splits(Bars("A", "stock", np.empty(0, np.int64), *[nothing] * 5)) == []


@pytest.mark.parametrize(
    ("day", "first", "last"),
    [
        ("2026-03-06", "14:30", "20:59"),  # Friday before the clocks go forward
        ("2026-03-09", "13:30", "19:59"),
        ("2026-10-30", "13:30", "19:59"),  # Friday before they go back
        ("2026-11-02", "14:30", "20:59"),
    ],
)
def test_the_regular_session_follows_new_yorks_clock_over_daylight_saving(day, first, last):
    minutes = ns(f"{day} 00:00") + np.arange(1440) * MINUTE_NS
    kept = minutes[in_regular_session(minutes)]
    assert (kept[0], kept[-1], len(kept)) == (ns(f"{day} {first}"), ns(f"{day} {last}"), 390)
    assert np.unique(new_york_time(kept) // DAY_NS).tolist() == [ns(f"{day} 00:00") // DAY_NS]


def test_the_calendar_has_half_days_and_closures_and_returns_none_beyond_its_end():
    minutes = expected_minutes(ns("2024-11-23 00:00"), ns("2026-11-23 00:00"))
    assert len(minutes) == 193_710
    assert in_regular_session(minutes).all()
    half = expected_minutes(ns("2025-07-03 00:00"), ns("2025-07-06 00:00"))
    assert (len(half), half[-1]) == (210, ns("2025-07-03 16:59"))
    assert len(expected_minutes(ns("2025-01-09 00:00"), ns("2025-01-10 00:00"))) == 0
    assert expected_minutes(ns("2026-11-20 00:00"), ns("2190-01-01 00:00")) is None
