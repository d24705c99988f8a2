"""Names of folders in the lake: one for each symbol on every file system, and those of former versions."""

import pytest
from bar_tables import DAY_NS, ns, read, walk

from data_sources.lake.lake import Lake

START, NOW = ns("2026-11-20 00:00"), ns("2026-11-23 00:00")
UNIT = "2026-11-20"
EVER = (0, 2**62)


@pytest.fixture
def lake(tmp_path):
    return Lake(tmp_path / "lake")


def put(lake, bars, dataset):
    span = {"start_ns": START, "end_ns": START + DAY_NS, "symbols": [dataset]}
    return lake.write("binance", dataset, UNIT, bars, key="key", version="1", now_ns=NOW, **span)


NAMES = (
    "AAPL",
    "aapl",
    "Aapl",
    "CON",
    "con",
    "AUX.A",
    "NUL",
    "COM1",
    "LPT9.X",
    "PRN",
    "BRK.",
    "..",
    ".",
    "X:BTC-USD",
)


def test_every_symbol_has_a_folder_that_every_file_system_takes_and_none_is_shared(lake):
    for number, name in enumerate(NAMES):
        put(lake, walk(name, START, 10, seed=number), name)
    folders = [path.name for path in (lake.root / "binance").iterdir()]
    assert len({name.casefold() for name in folders}) == len(NAMES)
    reserved = {"con", "prn", "aux", "nul", "com1", "lpt9"}
    for name in folders:
        assert name.split(".")[0].casefold() not in reserved and not set(name) & set('<>:"/\\|?* ')
        assert not name.startswith(".") and not name.endswith(".")
    again = Lake(lake.root)
    assert again.datasets("binance") == sorted(NAMES)
    for number, name in enumerate(NAMES):
        assert read(again, "binance", name, None, *EVER).equals(walk(name, START, 10, seed=number))


def test_names_of_any_length_stay_apart(lake):
    names = [f"{'行情' * 60}{ending}" for ending in ("", "A", "_a")]
    for number, name in enumerate(names):
        put(lake, walk(name, START, 10, seed=number), name)
    again = Lake(lake.root)
    assert len(again.datasets("binance")) == len(names) == len(list(again.all_parts()))
    for number, name in enumerate(names):
        assert again.parts("binance", name)[UNIT].dataset == name
        assert read(again, "binance", name, None, *EVER).equals(walk(name, START, 10, seed=number))


def test_a_dataset_under_its_former_name_is_still_read(lake):
    bars = walk("CON", START, 10)
    part = put(lake, bars, "CON")
    (lake.root / "binance" / "%43ON").rename(lake.root / "binance" / "CON")
    again = Lake(lake.root)
    assert again.parts("binance", "CON") == {UNIT: part}
    assert read(again, "binance", "CON", None, *EVER).equals(bars)
