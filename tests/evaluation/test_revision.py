"""Which bars an exam scored, and which days a later one scores on others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS, Bars
from evaluation.revision import Revision, revision_of
from tests.envs.markets import MONDAY, market_of, walk

DAYS = ("2020-01-01", "2020-01-02", "2020-01-03", "2020-01-04")
START = MONDAY + 90 * MINUTE_NS  # not at a midnight
END = MONDAY + 4 * DAY_NS
PAIRS = walk("AAA", 4 * 1440 - 1), walk("BBB", 4 * 1440 - 1, seed=1)


def changed(bars: Bars, bar: int, **columns: float) -> Bars:
    """Return bars of which one has other values."""
    values = {name: getattr(bars, name).copy() for name in columns}
    for name, value in columns.items():
        values[name][bar] = value
    return replace(bars, **values)


def of(*bars: Bars, start_ns: int = START, end_ns: int = END) -> Revision:
    return revision_of(market_of(*bars), start_ns, end_ns)


def lines(*revisions: Revision) -> list[dict[str, Any]]:
    return [{"bars": revision.days} for revision in revisions]


def test_the_same_bars_are_the_same_revision_wherever_the_exam_begins_on_the_first_day() -> None:
    first, again = of(*PAIRS), of(*PAIRS, start_ns=START + 300 * MINUTE_NS)
    assert tuple(first.days) == DAYS and len(first.digest) == 16
    assert all(text.endswith("-2") for text in first.days.values())
    assert again.days == first.days and again.digest != first.digest
    assert of(*PAIRS) == first
    assert again.days_changed_since(lines(first)) == []


def test_another_funding_is_another_revision_of_its_day() -> None:
    rates = np.zeros(len(PAIRS[0]))
    rates[2 * 1440 + 60] = 1e-4
    first = of(PAIRS[0].with_funding(rates), PAIRS[1])
    late = of(PAIRS[0].with_funding(2 * rates), PAIRS[1])
    assert late.days_changed_since(lines(first)) == ["2020-01-03"]


@pytest.mark.parametrize("name", ["open", "close", "volume"])
def test_one_value_of_one_bar_changes_its_day_alone(name: str) -> None:
    first = of(*PAIRS)
    bar = 2 * 1440 + 17
    values = {name: 1.01 * getattr(PAIRS[1], name)[bar]}
    values["high"] = max(PAIRS[1].high[bar], *values.values()) if name != "volume" else PAIRS[1].high[bar]
    later = of(PAIRS[0], changed(PAIRS[1], bar, **values))
    assert later.digest != first.digest
    assert later.days_changed_since(lines(first)) == ["2020-01-03"]
    # The newest earlier exam of the day counts.
    assert later.days_changed_since(lines(first, later)) == []
    assert first.days_changed_since(lines(first, later)) == ["2020-01-03"]


def test_a_day_that_grows_an_added_symbol_and_lines_without_digests_are_no_revision() -> None:
    first = of(*PAIRS)
    morning = tuple(bars.between(0, END - DAY_NS // 2) for bars in PAIRS)
    assert tuple(of(*morning, end_ns=END - DAY_NS // 2).days) == DAYS[:3]
    assert first.days_changed_since(lines(of(*morning, end_ns=END - DAY_NS // 2))) == []
    assert of(*PAIRS, walk("CCC", 4 * 1440 - 1, seed=2)).days_changed_since(lines(first)) == []
    assert first.days_changed_since([{"run": 1, "epoch": 2, "data": "d"}]) == []
    # A minute that came late is one.
    late = replace(PAIRS[0], **{name: np.delete(getattr(PAIRS[0], name), 70) for name in COLUMNS})
    assert first.days_changed_since(lines(of(late, PAIRS[1]))) == ["2020-01-01"]
