"""Reading while another process writes: no bar is missing because it moves from one part to another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bar_tables import DAY_NS, ns, read, walk

from data_sources.lake.lake import MOST_READINGS, Lake
from data_sources.lake.parts import Columns, Part

START, NOW = ns("2026-11-20 00:00"), ns("2026-11-23 00:00")
BARS = walk("BTCUSDT", START, 2 * 1440)
EVER = (0, 2**62)


def put(lake: Lake, unit: str, first_day: int, num_days: int) -> Part:
    """Put some of the days of BARS into a part."""
    return lake.write(
        "binance", "BTCUSDT", unit, BARS.slice(1440 * first_day, 1440 * num_days),
        key="key", version="", symbols=["BTCUSDT"], now_ns=NOW,
        start_ns=START + first_day * DAY_NS, end_ns=START + (first_day + num_days) * DAY_NS,
    )  # fmt: skip


def day_takes_its_bars(writer: Lake) -> None:
    """As a refresh does when a day's file is out: the day first, then what it leaves of the newest bars."""
    put(writer, "2026-11-20", 0, 1)
    put(writer, "recent", 1, 1)


def days_take_all_bars(writer: Lake) -> None:
    put(writer, "2026-11-20", 0, 1)
    put(writer, "2026-11-21", 1, 1)
    writer.remove(writer.parts("binance", "BTCUSDT")["recent"])


def read_beside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Lake, int], object]
) -> tuple[Lake, list[Any]]:
    """Return a reader of two days beside a writer, which changes them before each reading, and its readings."""
    reader, writer = Lake(folder), Lake(folder)
    put(writer, "recent", 0, 2)
    pieces, calls = reader._pieces, list[Any]()

    def pieces_after_change(*arguments: Any) -> dict[str, list[Columns]]:
        calls.append(arguments)
        change(writer, len(calls))
        return pieces(*arguments)

    monkeypatch.setattr(reader, "_pieces", pieces_after_change)
    return reader, calls


@pytest.mark.parametrize("change", [day_takes_its_bars, days_take_all_bars])
def test_bars_that_move_to_another_part_while_they_are_read_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Lake], None]
) -> None:
    reader, calls = read_beside(
        tmp_path, monkeypatch, lambda writer, reading: change(writer) if reading == 1 else None
    )
    assert read(reader, "binance", "BTCUSDT", None, *EVER).equals(BARS)
    assert len(calls) == 2
    assert read(reader, "binance", "BTCUSDT", None, *EVER).equals(BARS)
    assert len(calls) == 3  # nothing has changed


def test_a_lake_that_never_rests_is_read_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, calls = read_beside(
        tmp_path, monkeypatch, lambda writer, reading: put(writer, f"copy-{reading}", 0, 1)
    )
    assert read(reader, "binance", "BTCUSDT", None, *EVER).equals(BARS)
    assert len(calls) == MOST_READINGS
