import numpy as np
import pytest
from bar_tables import ns, walk

from data_sources.bars import COLUMNS, MINUTE_NS, Bars

START = ns("2026-11-20 14:30")


def bars_of(given, symbol="AAA", asset_class="stock"):
    return Bars(symbol, asset_class, *(given[name].to_numpy() for name in COLUMNS))


def broken(name, place, value):
    columns = {name: walk("AAA", START, 10)[name].to_numpy().copy() for name in COLUMNS}
    columns[name][place] = value
    return columns


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("open_time", START + 1, "whole minutes"),
        ("open_time", START, "strictly ascending"),
        ("close", np.nan, "close finite and above zero"),
        ("open", 0.0, "open finite and above zero"),
        ("volume", -1.0, "volume finite and not negative"),
        ("volume", np.inf, "volume finite and not negative"),
        ("low", 1000.0, "low <= open and close"),
        ("high", 1.0, "high >= open and close"),
    ],
)
def test_a_broken_rule_is_named_with_the_symbol_and_the_place(name, value, rule):
    with pytest.raises(ValueError, match=f"AAA: .*{rule}.* is broken at bar"):
        Bars("AAA", "stock", **broken(name, 5, value))


def test_arrays_of_another_type_or_length_are_refused():
    columns = broken("open", 0, 100.0)
    with pytest.raises(ValueError, match="volume must be float64"):
        Bars("AAA", "stock", **columns | {"volume": columns["volume"].astype(np.float32)})
    with pytest.raises(ValueError, match=r"close must be float64 of shape \(10,\)"):
        Bars("AAA", "stock", **columns | {"close": columns["close"][:9]})


def test_between_takes_the_bars_that_open_in_the_half_open_interval():
    bars = bars_of(walk("AAA", START, 10))
    part = bars.between(START + 2 * MINUTE_NS, START + 5 * MINUTE_NS)
    assert ((part.open_time - START) // MINUTE_NS).tolist() == [2, 3, 4]
    assert np.shares_memory(part.close, bars.close)
    assert len(bars.between(0, START)) == 0
