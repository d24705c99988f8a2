"""The ledger of funding: what is kept of a vendor's rows, and what bars are charged where some are missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bar_tables import DAY_NS, ns, walk

from data_sources import snapshot
from data_sources.bars import COLUMNS, HOUR_NS, MINUTE_NS, Bars
from data_sources.errors import LakeError
from data_sources.funding import FundingLedger
from data_sources.lake.lake import Lake
from data_sources.load import fingerprint, load
from data_sources.renames import FOREVER_NS, Stretch
from data_sources.sources import DataRequest, Source, SymbolGroup
from data_sources.vendors import SOURCES
from envs.market import Market
from tests.envs.markets import CONTEXT, FREE, env_of
from tests.envs.test_funding import EQUITY, MONDAY, WEEK, a_week, bars_of_the_week

NOW = ns("2026-11-20 12:00")
EIGHT = 8 * HOUR_NS
SYMBOL = "BTCUSDT.P"


def hours(num_bars: int, start_ns: int = MONDAY) -> Bars:
    """Hourly bars of a perpetual future from ``start_ns`` on."""
    price = np.full(num_bars, 100.0)
    times = start_ns + HOUR_NS * np.arange(num_bars)
    return Bars(SYMBOL, "perpetual", times, price, price, price, price, price)


def at(*hours_after: float, rate: float = 1e-4) -> list[tuple[int, float]]:
    return [(MONDAY + int(hour * HOUR_NS), rate) for hour in hours_after]


def charged(bars: Bars) -> dict[int, float]:
    """The funding by hour after Monday's midnight."""
    assert bars.funding is not None
    places = np.flatnonzero(bars.funding)
    hour = (bars.open_time[places] - MONDAY) // HOUR_NS
    return dict(zip(hour.tolist(), bars.funding[places].round(9).tolist(), strict=True))


@pytest.fixture
def ledger(tmp_path):
    return FundingLedger(tmp_path)


def test_rows_are_kept_in_order_by_the_minute_and_equal_ones_once(ledger):
    late_by_milliseconds = [(time + 3_000_000, rate) for time, rate in at(16, 0, 8, 8, 0)]
    assert ledger.update(SYMBOL, late_by_milliseconds, NOW) == []
    times, rates = ledger.rates(SYMBOL)
    assert times.tolist() == [MONDAY, MONDAY + EIGHT, MONDAY + 2 * EIGHT] and rates.tolist() == [1e-4] * 3
    assert ledger.update(SYMBOL, [], NOW) == [] and len(ledger.rates(SYMBOL)[0]) == 3
    assert len(ledger.rates("ETHUSDT.P")[0]) == 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((MONDAY, float("nan")), "a funding rate of nan at 2026-01-05 00:00 cannot be, left out"),
        ((MONDAY, -0.051), "a funding rate of -0.051 at 2026-01-05 00:00 cannot be, left out"),
        ((NOW + 1, 1e-4), "funding at 2026-11-20 12:00 is still to come, left out"),
        ((-1, 1e-4), "funding at 1969-12-31 23:59 is still to come, left out"),
    ],
)
def test_a_row_that_cannot_be_costs_itself_only(ledger, row, expected):
    assert ledger.update(SYMBOL, [*at(8), row], NOW) == [f"{SYMBOL}: {expected}"]
    assert ledger.rates(SYMBOL)[0].tolist() == [MONDAY + EIGHT]


def test_of_two_rates_of_one_time_the_later_row_counts_with_a_warning(ledger):
    (warning,) = ledger.update(SYMBOL, [*at(8), *at(8, rate=3e-4)], NOW)
    assert (
        warning == f"{SYMBOL}: two funding rates at 2026-01-05 08:00, 0.0001 and 0.0003: the later row counts"
    )
    assert ledger.rates(SYMBOL)[1].tolist() == [3e-4]


def test_what_was_known_then(ledger):
    ledger.update(SYMBOL, at(0, 8), NOW)
    ledger.update(SYMBOL, at(0, 8, 16), NOW + DAY_NS)  # 16:00 came late
    ledger.update(SYMBOL, at(8, rate=2e-4), NOW + 2 * DAY_NS)  # and 8:00 was corrected
    assert ledger.rates(SYMBOL, NOW)[0].tolist() == [MONDAY]
    assert ledger.rates(SYMBOL, NOW + DAY_NS)[0].tolist() == [MONDAY, MONDAY + 2 * EIGHT]
    assert ledger.rates(SYMBOL)[1].tolist() == [1e-4, 2e-4, 1e-4]


def test_a_damaged_file_is_set_aside_and_one_that_cannot_be_read_is_an_error(ledger, tmp_path):
    ledger.update(SYMBOL, at(8), NOW)
    (path,) = (tmp_path / "funding").iterdir()
    for text in (
        "{",
        '{"rows": [[1, 2]]}',
        '{"rows": [[9223372036854775808, 0.0, 3]]}',
        '{"rows": [[1, NaN, 3]]}',
        '{"rows": [[1, 2.0, 3]]}',
        "\xff",
        "[]",
    ):
        path.write_bytes(text.encode("latin-1"))
        assert len(ledger.rates(SYMBOL)[0]) == 0
        assert path.with_name(path.name + ".corrupt").exists() and not path.exists()
    ledger.update(SYMBOL, at(8), NOW)
    assert json.loads(path.read_text())["rows"] == [[MONDAY + EIGHT, 1e-4, NOW]]
    path.unlink()
    path.mkdir()
    with pytest.raises(LakeError, match="cannot read"):
        ledger.rates(SYMBOL)


def test_a_change_of_the_interval_misses_nothing(ledger):
    ledger.update(SYMBOL, at(0, 8, 16, 24, 28, 32, 36, 44, 52), NOW)
    bars, flags = ledger.apply(hours(54))
    assert flags == [] and list(charged(bars)) == [8, 16, 24, 28, 32, 36, 44, 52]


def test_a_missing_row_is_charged_as_the_one_before_it_with_a_warning(ledger):
    ledger.update(SYMBOL, [*at(0, 8, rate=2e-4), *at(24, 28, 32, 40, 44)], NOW)
    bars, flags = ledger.apply(hours(47))
    assert charged(bars) == {
        8: 2e-4,
        16: 2e-4,
        24: 1e-4,
        28: 1e-4,
        32: 1e-4,
        36: 1e-4,
        40: 1e-4,
        44: 1e-4,
    }
    text = "the rate before it is charged, for a day at most"
    assert flags == [
        f"no funding is known of 2026-01-05 16:00: {text}",
        f"no funding is known of 2026-01-06 12:00: {text}",
    ]


def test_a_row_with_a_stamp_of_minutes_after_its_time_is_charged_once(ledger):
    ledger.update(SYMBOL, at(0, 8 + 2 / 60, 16, 24, 28, 32 + 5 / 60, 36, 36 + 1 / 60, 40, 48 + 2 / 60), NOW)
    bars, flags = ledger.apply(hours(50))
    assert list(charged(bars)) == [9, 16, 24, 28, 33, 36, 40, 49]  # the last at 4 hours, then 8, late
    assert flags == ["funding twice within half an hour, 1 times, first at 2026-01-06 12:01: charged once"]


def test_rows_that_are_late_are_charged_as_the_newest_for_a_day(ledger):
    ledger.update(SYMBOL, at(0, 8, 16), NOW)
    bars, flags = ledger.apply(hours(25))
    assert flags == [] and 24 in charged(bars)  # it may come any minute
    bars, flags = ledger.apply(hours(73))
    assert list(charged(bars)) == [8, 16, 24, 32, 40]
    assert flags == [
        "no funding is known of 2026-01-06 00:00 to 2026-01-08 00:00, 7 times: the rate before it is charged, "
        "for a day at most"
    ]


def test_a_ledger_that_begins_late_or_is_empty_is_reported(ledger):
    bars, flags = ledger.apply(hours(20))
    assert bars.funding is None and flags == ["no funding is known: none is charged"]
    ledger.update(SYMBOL, at(16, 24), NOW)
    bars, flags = ledger.apply(hours(30))
    assert list(charged(bars)) == [16, 24]
    assert flags == ["no funding is known before 2026-01-05 16:00: none is charged until then"]


def test_a_time_without_a_bar_is_charged_at_the_next_bar_and_the_first_bar_is_not_charged(ledger):
    ledger.update(SYMBOL, at(0, 8, 16), NOW)
    bars = hours(20)
    kept = (bars.open_time < MONDAY + 7 * HOUR_NS) | (bars.open_time >= MONDAY + 10 * HOUR_NS)
    bars, flags = ledger.apply(bars.select(kept))
    assert flags == [] and list(charged(bars)) == [10, 16]


@pytest.mark.parametrize("goes_on", [True, False])
def test_rows_between_a_settlement_and_a_contract_of_the_same_name_are_nobodys(ledger, goes_on):
    """LITUSDT was settled in 2025-01; its funding goes on until June, another coin has the name since December."""
    between = range(16, 2000, 8) if goes_on else ()
    ledger.update(SYMBOL, [*at(0, 8), *at(*between), *at(2400, 2404, 2408, rate=5e-4)], NOW)
    bars = hours(2410).select(np.isin(np.arange(2410), [*range(10), *range(2398, 2410)]))
    bars, flags = ledger.apply(bars)
    found = charged(bars)
    assert flags == []
    assert {hour: rate for hour, rate in found.items() if hour != 2398} == {
        8: 1e-4,
        2400: 5e-4,
        2404: 5e-4,
        2408: 5e-4,
    }
    assert found.get(2398, 0) == pytest.approx(
        3e-4 if goes_on else 0
    )  # a day's, since it may have been a halt


def test_former_names_have_their_rows_in_their_time(ledger):
    change = MONDAY + 12 * HOUR_NS
    ledger.update("OLDUSDT.P", at(8, 16, rate=3e-4), NOW)
    ledger.update(SYMBOL, at(8, 16), NOW)
    names = [Stretch("OLDUSDT.P", 0, change, 1.0), Stretch(SYMBOL, change, FOREVER_NS, 1.0)]
    bars, _ = ledger.apply(hours(20), names)
    assert charged(bars) == {8: 3e-4, 16: 1e-4}


def test_the_week_by_hand_from_the_ledger_to_the_account(ledger):
    _, funding, actions = a_week()
    times = MONDAY + HOUR_NS * np.flatnonzero(funding)
    ledger.update(SYMBOL, zip(times.tolist(), funding[funding != 0].tolist(), strict=True), NOW)
    given = bars_of_the_week()
    bare = Bars(SYMBOL, "perpetual", *(getattr(given, name) for name in COLUMNS))
    bars, flags = ledger.apply(bare)
    assert flags == ["no funding is known before 2026-01-05 00:00: none is charged until then"]  # the context
    np.testing.assert_array_equal(bars.funding, given.funding)
    shape = {"context_bars": CONTEXT, "horizon": WEEK}
    market = Market.from_bars([bars], device="cpu", holdout_start_ns=2**62, **shape)
    env = env_of(market, num_envs=1, horizon=WEEK, episode_bars=WEEK, **FREE)
    env.begin_segment()
    for action in actions:
        env.step(torch.tensor([action]))
    assert float(env.account.log_equity.exp()) == pytest.approx(EQUITY, abs=1e-9)


class Futures(Source):
    name, label = "futures", "Futures"
    groups = (SymbolGroup("perpetual", "future_pairs"),)


START = ns("2026-10-01 00:00")
END = START + 5_000 * MINUTE_NS


@pytest.fixture
def lake(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "futures", Futures())
    lake = Lake(tmp_path / "lake")
    span = {"start_ns": START, "end_ns": END, "now_ns": END + DAY_NS}
    for source, symbol in (("futures", SYMBOL), ("binance", "BTCUSDT")):
        bars = walk(symbol, START, 5_000)
        lake.write(source, symbol, "u", bars, key="u", version="0", symbols=[symbol], **span)
    return lake


def request_for(*sources: str) -> DataRequest:
    symbols = {"future_pairs": (SYMBOL,), "binance_pairs": ("BTCUSDT",)}
    return DataRequest(sources, symbols, START, END)


def test_bars_are_loaded_and_mapped_with_their_funding(lake):
    wanted = request_for("binance", "futures")
    rows = [(START + number * EIGHT, 1e-4 * number) for number in range(11)]
    FundingLedger(lake.root).update(SYMBOL, rows, NOW)
    loaded = load(lake, wanted)
    mapped = snapshot.open_snapshot(snapshot.provide(lake, wanted))
    for data in (loaded, mapped):
        spot, future = data.bars
        assert (spot.asset_class, future.asset_class) == ("crypto", "perpetual") and spot.funding is None
        assert np.flatnonzero(future.funding).tolist() == [480 * number for number in range(1, 11)]
        assert future.funding[480 * 7] == pytest.approx(7e-4)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(spot, name), getattr(future, name))
        assert [row.has_funding for row in data.rows] == [False, True] and not data.rows[1].flags
    assert loaded.fingerprint == mapped.fingerprint


def test_the_fingerprint_knows_the_funding_of_the_interval_and_of_perpetuals_alone(lake):
    spot, both = request_for("binance"), request_for("binance", "futures")
    before = fingerprint(lake, spot), fingerprint(lake, both)
    ledger = FundingLedger(lake.root)
    ledger.update(SYMBOL, [(END + EIGHT, 1e-4)], NOW)
    assert (fingerprint(lake, spot), fingerprint(lake, both)) == before
    ledger.update(SYMBOL, [(START + EIGHT, 1e-4)], NOW)
    assert fingerprint(lake, spot) == before[0] and fingerprint(lake, both) != before[1]
