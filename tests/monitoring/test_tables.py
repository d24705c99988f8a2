"""Tables fit the terminal by leaving columns out; symbols and numbers stay whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring import console
from monitoring.console import Console
from monitoring.tables import fit, lay_out

COLUMNS = ["symbol", "bars", "first", "gaps", "verdict"]
ROWS = [
    ["BTCUSDT", "1,051,200", "2024-11-28", "0", "ok"],
    ["X:DOGE-USD", "3", "2026-11-27", "0", "too few bars"],
]


def test_columns_are_left_out_in_their_order_and_those_that_say_nothing_first() -> None:
    spare = ("first", "gaps", "bars")
    assert fit(COLUMNS, ROWS, 80, spare) == (COLUMNS, ROWS)
    assert fit(COLUMNS, ROWS, 50, spare)[0] == ["symbol", "bars", "first", "verdict"]
    assert fit(COLUMNS, ROWS, 40, spare)[0] == ["symbol", "bars", "verdict"]
    assert fit(COLUMNS, ROWS, 5, spare) == (["symbol", "verdict"], [[row[0], row[-1]] for row in ROWS])


def test_numbers_are_aligned_right_and_words_left() -> None:
    assert lay_out(COLUMNS[:2] + COLUMNS[4:], [[*row[:2], row[4]] for row in ROWS]) == [
        "symbol           bars  verdict",
        "BTCUSDT     1,051,200  ok",
        "X:DOGE-USD          3  too few bars",
    ]


@given(
    st.lists(st.lists(st.text("aB7,.%", max_size=12), min_size=4, max_size=4), min_size=1, max_size=5),
    st.integers(1, 60),
)
def test_what_is_left_is_whole_and_fits_if_it_can(rows: list[list[str]], width: int) -> None:
    names = ["one", "two", "three", "four"]
    columns, cells = fit(names, rows, width, ("two", "three"))
    assert columns[0] == "one" and columns[-1] == "four"
    for row, shown in zip(rows, cells, strict=True):
        assert shown == [row[names.index(name)] for name in columns]
    lines = lay_out(columns, cells)
    assert max(map(len, lines)) <= width or columns == ["one", "four"]


@pytest.mark.parametrize("width", [100, 80, 60, 20])
def test_on_a_terminal_no_cell_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(console, "_is_terminal", lambda stream: True)
    monkeypatch.setattr("sys.stdout", stream)
    for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Console(tmp_path) as shown:
        shown.table("title", COLUMNS, ROWS, ("first", "gaps", "bars"), "1 ok; 1 too few bars: X:DOGE-USD")
    stream.flush()
    text = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "X:DOGE-USD" in text and "too few bars" in " ".join(text.split()) and "\u2026" not in text
    assert ("1,051,200" in text) == (width > 30)
