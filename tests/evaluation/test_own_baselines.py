"""A baseline of one's own walks the exam like any other, sees nothing ahead, and stands in the verdict."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from envs.feature_errors import FeatureError
from envs.market import Market
from evaluation import baselines
from evaluation.baselines import BaselineFunction, Past, baseline, own_actions
from evaluation.measures import measure
from evaluation.verdict import verdict
from tests.envs.markets import market_of, walk
from tests.evaluation.test_exam import exam
from tests.program import ROOT

MARKET = market_of(walk("AAA", 300), walk("BBB", 260, seed=1))
POSITIONS = (-1.0, 0.0, 1.0)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_registered", {})


def example() -> None:
    """Run the page's code, as a start does."""
    text = (ROOT / "docs" / "own_baseline.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(
        compile(code, "own_baselines.py", "exec"), {"__name__": "evaluation.own_baselines"}
    )  # the page is ours


def test_the_example_walks_the_exam_and_stands_in_the_verdict() -> None:
    example()
    walks = exam()
    assert list(walks) == ["policy", "buy and hold", "always flat", "momentum", "fade the hour"]
    for own, hold in zip(walks["fade the hour"], walks["buy and hold"], strict=True):
        assert np.array_equal(own.time, hold.time) and {-1.0, 0.0, 1.0} >= set(own.position.round())
        assert own.traded.sum() > 1 and own.costs.sum() > 0
    pooled = {name: measure(own) for name, own in walks.items()}
    pooled["fade the hour"] = pooled["policy"]
    others = {name: measures for name, measures in pooled.items() if name != "policy"}
    assert "fade the hour" in verdict(pooled["policy"], others, 1).reason


def test_its_positions_are_what_it_wants_rounded_to_the_trainings() -> None:
    def wanted(past: Past) -> Tensor:
        steps = torch.arange(len(past.close), dtype=torch.float64)
        return torch.where(steps < 3, torch.tensor([0.4, -0.8, torch.nan])[steps.long().clamp(max=2)], 7.0)

    actions = own_actions(wanted, MARKET, ["BBB"], POSITIONS)
    assert actions[300:304].tolist() == [1, 0, 1, 2] and actions[-1] == 2
    assert actions[:300].tolist() == [1] * 300  # not asked for: cash


def test_prices_before_a_break_are_another_symbols() -> None:
    seen: list[int] = []

    def lengths(past: Past) -> Tensor:
        seen.append(len(past.close))
        return torch.zeros_like(past.close)

    broken: Market = market_of(walk("AAA", 300))
    broken = broken.__class__(**{**vars(broken), "breaks": torch.tensor([100])})
    own_actions(lengths, broken, ["AAA"], POSITIONS)
    assert {100, 200} <= set(seen) and max(seen) == 200


def looks_ahead(past: Past) -> Tensor:
    return torch.roll(past.close, -1) - past.close


def knows_the_last(past: Past) -> Tensor:
    return torch.full_like(past.close, float(past.close[-1] > past.close[0]))


def too_short(past: Past) -> Tensor:
    return past.close[1:]


def broken(past: Past) -> Tensor:
    raise KeyError("nothing of that name")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (looks_ahead, "looks_ahead looks ahead, or depends on more than its past"),
        (knows_the_last, "knows_the_last looks ahead"),
        (too_short, r"must return a position for every bar, a tensor of shape \(300,\), was \(299,\)"),
        (broken, "baseline broken failed: .*KeyError"),
    ],
)
def test_what_is_no_rule_is_one_line(function: BaselineFunction, words: str) -> None:
    with pytest.raises(FeatureError, match=words) as refused:
        own_actions(function, MARKET, ["AAA"], POSITIONS)
    assert "\n" not in str(refused.value)


def test_two_of_a_name_are_refused() -> None:
    baseline(broken)
    with pytest.raises(ValueError, match="broken is already registered"):
        baseline(broken)
