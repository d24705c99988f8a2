"""What a record says of champions: together proven, or one of them no longer the champion."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation import record
from evaluation.exam import POLICY
from evaluation.record_summary import daily_returns_of
from evaluation.title import BY_EXAM, BY_RECORD, NOT_PROVEN, Title, claim_of, judge, title_of
from monitoring.exams import describe_champion


def scored(champion: str, *daily: float, first: str = "2026-01-01") -> dict[str, Any]:
    days = np.datetime64(first) + np.arange(len(daily))
    growth = {str(day): 1 + earned for day, earned in zip(days, daily, strict=True)}
    return {"kind": "scored", "champion": champion, "days": {POLICY: growth}}


def days_of(mean: float, number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.01, number)


def test_days_of_all_champions_are_pooled_and_parts_of_a_day_multiply() -> None:
    lines = [scored("a", 0.01, 0.02), {"kind": "missed"}, scored("b", 0.5, 0.03, first="2026-01-02")]
    np.testing.assert_allclose(daily_returns_of(lines), [0.01, 1.02 * 1.5 - 1, 0.03])
    np.testing.assert_allclose(daily_returns_of(lines, "b"), [0.5, 0.03])


def test_champions_are_proven_together_over_runs() -> None:
    good = [
        scored("a", *days_of(0.006, 30)),
        scored("b", *days_of(0.006, 30, 1), first="2026-01-31"),
        scored("b", *days_of(0.006, 20, 2), first="2026-03-02"),
    ]
    assert judge("b", good) == Title(True, "")
    assert not judge("a", good[:1]).is_proven  # certainty grows with age
    worthless = [scored("a", *days_of(0.0, 80))]
    assert judge("a", worthless) == Title(False, "")


def test_a_champion_loses_its_title_by_its_own_days_alone() -> None:
    lines = [scored("a", *days_of(-0.01, 40)), scored("b", *days_of(0.0, 40), first="2026-02-10")]
    total = np.prod(1 + days_of(-0.01, 40)) - 1
    assert judge("a", lines).loss == f"a lost the title, with {total:+.2%} on 40 days of the record"
    assert judge("b", lines).loss == "" == judge("c", lines).loss


def test_an_edited_record_proves_nothing_and_takes_no_title(tmp_path: Any) -> None:
    record.read(tmp_path).append([scored("a", *days_of(-0.01, 40))], {})
    assert title_of("a", tmp_path).loss
    path = tmp_path / record.NAME
    path.write_bytes(path.read_bytes().replace(b"2026-01-03", b"2026-01-93"))
    assert title_of("a", tmp_path) == Title(False, "")


def test_claims() -> None:
    assert claim_of(True, Title(False, "")) == BY_EXAM
    assert claim_of(False, Title(True, "")) == BY_RECORD
    assert claim_of(False, Title(False, "")) == NOT_PROVEN


def test_people_are_told_who_is_the_champion_and_what_is_claimed_of_it() -> None:
    won = {"checkpoint": "a.pt", "decision": "promoted", "time": "2026-11-29T09:00:00+00:00"}
    told = describe_champion([won, {"decision": "refused", "claim": NOT_PROVEN}])
    assert told.startswith("a.pt since ") and told.endswith(f", {NOT_PROVEN}")
    assert (
        describe_champion([won, {"decision": "refused", "dethroned": "a.pt"}]) == "none, a.pt lost the title"
    )
