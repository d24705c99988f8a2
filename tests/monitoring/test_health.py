"""The rules of health at every threshold, with metrics that are missing or broken, and in the docs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from monitoring import health
from monitoring.health import LONG, Watch, findings

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
HEALTHY: dict[str, Any] = {
    "run": 1,
    "epoch": 7,
    "transitions": 458_752,
    "rollout/reward_bps": 0.3,
    "rollout/episodes": 40,
    "rollout/ruined_episodes": 1,
    "rollout/in_position_-1": 0.4,
    "rollout/in_position_0": 0.2,
    "rollout/in_position_1": 0.4,
    "loss/policy": -0.004,
    "loss/value": 0.3,
    "loss/entropy": 0.7,
    "ppo/approx_kl": 0.01,
    "ppo/first_kl": -1e-9,
    "ppo/clip_fraction": 0.1,
    "ppo/explained_variance": 0.05,
    "ppo/grad_norm": 0.4,
    "ppo/skipped_steps": 0.0,
    "perf/transitions_per_second": 10_000.0,
    "gpu/temperature_celsius": 61.0,
    "plasticity/dormant_units": 0.02,
    "plasticity/effective_rank": 14.0,
}
# (metric, last healthy value, first unhealthy one, the finding's metric)
THRESHOLDS = [
    ("ppo/approx_kl", 0.1, 0.101, "ppo/approx_kl"),
    ("ppo/first_kl", 1e-3, 1.1e-3, "ppo/first_kl"),
    ("ppo/clip_fraction", 0.5, 0.51, "ppo/clip_fraction"),
    ("ppo/skipped_steps", 0.0, 1.0, "ppo/skipped_steps"),
    ("loss/value", 10.0, 10.1, "loss/value"),
    ("rollout/ruined_episodes", 2, 3, "rollout/ruined_episodes"),
    ("gpu/temperature_celsius", 85.0, 86.0, "gpu/temperature_celsius"),
    ("plasticity/dormant_units", 0.25, 0.26, "plasticity/dormant_units"),
    ("plasticity/effective_rank", 2.0, 1.9, "plasticity/effective_rank"),
    ("ppo/grad_norm", 8.0, 8.1, "ppo/grad_norm"),
    ("perf/transitions_per_second", 5_000.0, 4_999.0, "perf/transitions_per_second"),
]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in HEALTHY.items() if key != name}


def after_healthy_epochs(**changes: Any) -> list[dict[str, Any]]:
    return [*[HEALTHY] * LONG, HEALTHY | changes]


def names(recent: list[dict[str, Any]]) -> list[str]:
    return [finding.metric for finding in findings(recent)]


def test_a_healthy_training_has_no_findings() -> None:
    assert findings([]) == []
    assert names([HEALTHY]) == []
    assert names([HEALTHY] * 60) == []


@pytest.mark.parametrize(("metric", "well", "ill", "name"), THRESHOLDS)
def test_a_finding_begins_just_past_its_threshold(metric: str, well: float, ill: float, name: str) -> None:
    assert names(after_healthy_epochs(**{metric: well})) == []
    (finding,) = findings(after_healthy_epochs(**{metric: ill}))
    assert finding.metric == name
    assert finding.what and finding.remedy and str(finding).isascii() and "\n" not in str(finding)


@pytest.mark.parametrize("name", ["ppo/explained_variance", "rollout/in_position_0"])
def test_a_lasting_value_needs_ten_epochs_in_a_row(name: str) -> None:
    ill = {"ppo/explained_variance": -0.2, "rollout/in_position_0": 1.0}[name]
    bad = HEALTHY | {name: ill}
    assert names([HEALTHY, *[bad] * (LONG - 1)]) == []
    assert len(names([HEALTHY, *[bad] * LONG])) == 1
    assert names([*[bad] * (LONG - 1), HEALTHY, bad]) == []


def test_an_exam_is_compared_with_what_training_earned_at_full_costs_up_to_it() -> None:
    trained = HEALTHY | {"rollout/reward_bps": 0.468, "rollout/cost_scale": 1.0}

    def found(high: float | None = 0.223, num_before: int = LONG, **changes: float) -> list[health.Finding]:
        examined = trained | {"exam/net_bps": -0.058, "exam/net_bps_high": high} | changes
        return findings([*[trained | changes] * num_before, examined, *[trained | changes] * 9])

    (finding,) = found()
    assert finding.metric == "exam/net_bps_high"
    assert finding.what == "training earns +0.468 bp a bar, its exam -0.058 and surely no more than +0.223"
    assert found(high=0.4681) == found(high=None) == found(high=math.nan) == []
    assert found(**{"rollout/cost_scale": 0.9}) == []  # cheaper than the exam
    assert (
        found(**{"exam/net_bps": 0.222}) != [] and found(high=0.4, **{"exam/net_bps": 0.3}) == []
    )  # not twice
    assert found(high=-0.5, **{"rollout/reward_bps": -0.1}) == []  # nothing was learnt, not even by heart
    assert found(num_before=health.NEEDED_FOR_USUAL - 2) == []
    assert found(num_before=health.NEEDED_FOR_USUAL - 1) != []


def test_a_policy_that_stays_flat_may_be_right() -> None:
    def remedy(position: str) -> str:
        (finding,) = findings([HEALTHY | {f"rollout/in_position_{position}": 1.0}] * LONG)
        assert f"position {position} only" in finding.what
        return finding.remedy

    assert "no edge" in remedy("0") and "no edge" in remedy("0.0")
    assert "no edge" not in remedy("-1")


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, -math.inf, "text", True])
@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_a_broken_metric_breaks_no_rule_but_that_of_the_losses(name: str, broken: Any) -> None:
    found = names([*[HEALTHY] * LONG, HEALTHY | {name: broken}])
    assert found == ([name] if name in ("loss/policy", "loss/value") else [])


@pytest.mark.parametrize("broken", [None, math.nan])
def test_broken_metrics_do_not_define_what_is_usual(broken: Any) -> None:
    before = HEALTHY | {"ppo/grad_norm": broken, "perf/transitions_per_second": broken}
    assert names([*[before] * LONG, HEALTHY | {"ppo/grad_norm": 1e9}]) == []


def test_missing_metrics_break_no_rule() -> None:
    assert names([{}] * LONG) == []
    assert names([HEALTHY] * LONG + [{}]) == []


def test_the_most_severe_is_first() -> None:
    found = names(after_healthy_epochs(**{"perf/transitions_per_second": 1.0, "loss/policy": math.nan}))
    assert found == ["loss/policy", "perf/transitions_per_second"]


def test_a_finding_is_reported_once_and_again_after_a_long_absence() -> None:
    watch = Watch()
    ill = findings(after_healthy_epochs(**{"ppo/approx_kl": 0.5}))
    other = findings(after_healthy_epochs(**{"ppo/approx_kl": 0.6, "ppo/skipped_steps": 2.0}))
    assert watch.new([]) == []
    assert watch.new(ill) == ill
    assert watch.new(ill) == []
    assert [finding.metric for finding in watch.new(other)] == ["ppo/skipped_steps"]
    for _ in range(LONG - 1):
        assert watch.new([]) == []
    assert watch.new(ill) == []  # not absent for long enough
    for _ in range(LONG):
        assert watch.new([]) == []
    assert watch.new(ill) == ill


def test_a_large_loss_names_the_symbol_that_causes_it() -> None:
    outlier = {"loss/outlying_symbol": "SSSUSDT", "loss/outlier_ratio": 900.0}
    (finding,) = findings(after_healthy_epochs(**{"loss/value": 50.0} | outlier))
    assert str(finding) == (
        "large value loss, 50 is above 10, and the critic's error in SSSUSDT is 900 times that of the others: "
        "look at the bars of SSSUSDT with the command data, and leave it out if they are bad"
    )
    (finding,) = findings(after_healthy_epochs(**{"loss/value": 1.5} | outlier))
    assert finding.metric == "loss/outlier_ratio" and "SSSUSDT is 900 times" in finding.what
    # A policy that is nearly always flat: the one symbol it traded stands out from errors of nearly 0.
    assert names(after_healthy_epochs(**{"loss/value": 0.02} | outlier)) == []
    usual = outlier | {"loss/outlier_ratio": 9.0}
    assert names(after_healthy_epochs(**usual)) == []
    (finding,) = findings(after_healthy_epochs(**{"loss/value": 50.0} | usual))
    assert "SSSUSDT" not in str(finding) and finding.remedy == "lower learning_rate"


@pytest.mark.parametrize("broken", [math.inf, None])
def test_a_loss_that_is_not_finite_names_the_symbol(broken: float | None) -> None:
    row = {"loss/value": math.nan, "loss/outlying_symbol": "SSSUSDT", "loss/outlier_ratio": broken}
    (finding,) = findings(after_healthy_epochs(**row))
    assert finding.what == "loss/value is not finite, first of all for SSSUSDT"


def test_the_docs_state_the_same_thresholds() -> None:
    rows = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) >= 3:
            rows |= {name: " ".join(cells[1:]) for name in cells[0].replace("`", "").split(", ")}
    documented = {
        "ppo/approx_kl": f"above {health.HIGHEST_KL:g}",
        "ppo/first_kl": f"above {health.HIGHEST_FIRST_KL:g}",
        "ppo/clip_fraction": f"above {health.HIGHEST_CLIP_FRACTION:g}",
        "ppo/explained_variance": f"below {health.LOWEST_EXPLAINED_VARIANCE:g} for {LONG} epochs",
        "loss/value": f"above {health.HIGHEST_VALUE_LOSS:g}",
        "loss/outlier_ratio": f"above {health.HIGHEST_OUTLIER_RATIO:g}",
        "rollout/in_position_X": f"1 for {LONG} epochs",
        "rollout/ruined_episodes": f"above {health.HIGHEST_RUINED_SHARE:.0%}",
        "exam/net_bps_high": f"in the last {LONG} epochs",
        "ppo/grad_norm": f"{health.GRADIENT_JUMP:g} times",
        "perf/transitions_per_second": f"below {health.SLOW:.0%}",
        "gpu/temperature_celsius": f"above {health.HOTTEST_CELSIUS:.0f}",
        "plasticity/dormant_units": f"above {health.HIGHEST_DORMANT_SHARE:g}",
        "plasticity/effective_rank": f"below {health.LOWEST_EFFECTIVE_RANK:g}",
        "ppo/skipped_steps": "any",
    }
    for metric, words in documented.items():
        assert words in rows[metric], metric
    # The rule of finite losses is explained above the table; that of the value loss has two rows.
    assert len(documented) == len(health.RULES)
    assert f"from {health.NAMED_OUTLIER_RATIO:g} on" in rows["loss/outlier_ratio"]
    assert f"a value loss above {health.LEAST_NOTED_LOSS:g}" in rows["loss/outlier_ratio"]


def test_what_is_measured_now_and_then_lasts_until_it_is_measured_again() -> None:
    name = "plasticity/dormant_units"
    bad, unmeasured, good = HEALTHY | {name: 0.9}, without(name), HEALTHY
    assert names([HEALTHY, bad]) == [name]
    assert names([HEALTHY, bad, *[unmeasured] * 9]) == [name]
    assert names([HEALTHY, bad, *[unmeasured] * 9, good]) == []
    watch, recent, reported = Watch(), [HEALTHY], []
    for row in [bad, *[unmeasured] * 9] * 3:
        recent.append(row)
        reported += watch.new(findings(recent))
    assert len(reported) == 1
