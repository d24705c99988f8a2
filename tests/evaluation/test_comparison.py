"""Two checkpoints are compared on the same days, and told apart only where that is sure."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.comparison import Comparison, compare
from evaluation.csv_files import csv_files
from evaluation.exam import AGAINST, POLICY
from evaluation.measures import measure
from evaluation.page import render_page
from tests.evaluation.reports import Page, report_of
from tests.evaluation.walks import of_daily

DAYS = np.random.default_rng(3).normal(0.001, 0.01, 30)


def compared(difference: np.ndarray) -> Comparison:
    return compare([of_daily(*DAYS)], [of_daily(*(DAYS - difference))], "run 1, epoch 5")


def test_a_constant_lead_is_sure_however_wild_the_days() -> None:
    found = compared(np.full(30, 1e-4) + np.random.default_rng(0).normal(0, 1e-5, 30))
    assert str(found).startswith("Better: +1.0 bps a day [")
    assert found.days_ahead == 30 and found.certainty > 0.99
    assert found.correlation == pytest.approx(1.0, abs=1e-4)
    low, high = found.interval
    assert 0 < low < found.mean_difference < high
    swapped = compare([of_daily(*(DAYS - 1e-4))], [of_daily(*DAYS)], "A")
    assert str(swapped).startswith("Worse: -1.0 bps")


def test_luck_is_not_told_apart() -> None:
    found = compared(np.random.default_rng(1).normal(0, 0.01, 30))
    assert str(found).startswith("Not told apart: ") and found.interval[0] < 0 < found.interval[1]
    assert compared(np.zeros(30)).certainty == 0.5


def test_few_days_tell_nothing() -> None:
    found = compare([of_daily(0.1, 0.1)], [of_daily(0.0, 0.0)], "B")
    assert "2 days are too few to tell, 10 are needed" in str(found) and found.interval is None


def test_other_bars_are_refused() -> None:
    with pytest.raises(ValueError, match="B cannot be compared: it acts on other bars"):
        compare([of_daily(*DAYS)], [of_daily(*DAYS[1:])], "B")


def test_the_report_has_the_other_one_and_the_difference() -> None:
    own, other = [of_daily(*DAYS)], [of_daily(*(DAYS - 0.001))]
    plain = report_of(own).walks
    walks = {POLICY: own, AGAINST: other} | {name: walks for name, walks in plain.items() if name != POLICY}
    pooled = {name: measure(walk) for name, walk in walks.items()}
    report = report_of(own, walks=walks, pooled=pooled, comparison=compare(own, other, "run 1, epoch 5"))
    page = Page(render_page(report, dict.fromkeys(report.pictures(), ("", ""))))
    assert "Against run 1, epoch 5" in page.text and "30 of 30 days ahead" in page.text
    assert dict(csv_files(walks, report.tear))["returns.csv"].startswith(b"date,policy,the other checkpoint,")
    assert report.as_json()["comparison"]["verdict"].startswith("Better: +10.0 bps")
