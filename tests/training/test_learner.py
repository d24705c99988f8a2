"""The update: the same whatever the micro-batch and the number of ranks, and unharmed by a NaN."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.rollouts import SETTINGS, made_up_rollout, small_learner, small_policy
from training.learner import RETURN_LIMIT
from training.losses import advantages_and_returns

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_micro_batch_size_does_not_change_the_update(micro: int) -> None:
    results = []
    for size in (micro, 8):
        policy = small_policy()
        learner = small_learner(policy, minibatch=8, micro=size)
        for group in learner.optimizer.param_groups:
            # Adam's usual 1e-8 blows the rounding of a gradient near 0 up to a whole step.
            group["eps"] = 1e-4
        learner.update(made_up_rollout(policy, 16), run_fraction=0.0)
        results.append(policy.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hindsight", [True, False])
def test_an_update_changes_every_weight(hindsight: bool) -> None:
    policy = small_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    small_learner(policy).update(made_up_rollout(policy, 16, hindsight=hindsight), run_fraction=0.0)
    unchanged = [name for name, value in policy.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_choices_are_weighed_against_each_other_by_their_advantage() -> None:
    # Where one choice earned more than the others from every position, the update makes it likelier.
    policy = small_policy()
    rollout = made_up_rollout(policy, 16)
    assert rollout.hindsight is not None
    rollout.hindsight.growth[:] = torch.tensor([0.0, 0.0, 1.0])
    rollout.hindsight.values[:] = 0.0
    learner = small_learner(policy, passes=4)
    learner.update(rollout, run_fraction=0.0)
    with torch.no_grad():
        change = torch.log_softmax(policy(rollout.bars, rollout.accounts)[0], -1) - rollout.log_policy
    assert (change[..., 2] > 0).float().mean() > 0.95
    assert (change[..., :2].sum(-1) < 0).float().mean() > 0.95


@pytest.mark.parametrize("hindsight", [True, False])
def test_wild_minutes_count_less_by_the_root_of_their_volatility(hindsight: bool) -> None:
    learner = small_learner(small_policy())
    rollout = made_up_rollout(learner.policy, num_segments=8, hindsight=hindsight)
    rollout.valid[:] = True
    uneven = torch.linspace(0.25, 4.0, rollout.valid.numel()).view_as(rollout.rewards)
    plain, even, divided = (
        learner._targets(replace(rollout, volatility=volatility))[0]
        for volatility in (None, torch.full_like(uneven, 0.5), uneven)
    )
    assert torch.equal(divided.returns, plain.returns)
    torch.testing.assert_close(even.advantages, plain.advantages)
    if hindsight:
        expected = plain.advantages / uneven.sqrt()[..., None]
        expected /= expected.square().mean().sqrt()
    else:
        columns = rollout.rewards, rollout.values, rollout.next_value, rollout.terminated
        raw = advantages_and_returns(*columns, SETTINGS.gamma, SETTINGS.gae_lambda)[0] / uneven.sqrt()
        expected = ((raw - raw.mean()) / raw.std(correction=0))[..., None].expand_as(plain.advantages)
    torch.testing.assert_close(divided.advantages, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hindsight", [True, False])
def test_the_critics_targets_are_limited_where_they_are_beyond(hindsight: bool) -> None:
    policy = small_policy()
    learner, rollout = small_learner(policy), made_up_rollout(policy, 16, hindsight=hindsight)
    usual, _ = learner._targets(rollout)
    earned = rollout.hindsight.growth if rollout.hindsight else rollout.rewards
    earned[:2] *= 100.0  # two segments of a slip
    targets, _ = learner._targets(rollout)
    assert usual.returns.abs().max() < 10
    assert targets.returns[:2].abs().max() == RETURN_LIMIT
    assert torch.equal(targets.returns[2:], usual.returns[2:])


def test_rollout_and_update_agree_at_the_first_minibatch() -> None:
    policy = small_policy()
    statistics = small_learner(policy).update(made_up_rollout(policy, 16), run_fraction=0.0)
    assert float(statistics["ppo/first_kl"]) < 1e-9
    assert float(statistics["ppo/approx_kl"]) > 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_in_fewer_bits_rollout_and_update_agree_too(precision: str) -> None:
    policy = small_policy(precision)
    statistics = small_learner(policy).update(made_up_rollout(policy, 8), run_fraction=0.0)
    assert float(statistics["ppo/first_kl"]) < 1e-4
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_the_rest_goes_on() -> None:
    policy = small_policy()
    rollout = made_up_rollout(policy, 8)
    rollout.bars[3] = float("nan")  # spoils the one minibatch that it is in, in each of two passes
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    learner = small_learner(policy)
    statistics = learner.update(rollout, run_fraction=0.0)
    assert float(statistics["ppo/skipped_steps"]) == 2
    assert math.isfinite(float(statistics["ppo/grad_norm"]))
    assert all(torch.isfinite(value).all() for value in policy.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    steps = {float(state["step"]) for state in learner.optimizer.state.values()}
    assert steps == {2.0}  # the optimizer's own count ignores skipped steps


def test_the_learning_rate_warms_up_and_follows_each_run_down() -> None:
    learner = small_learner(small_policy())
    assert learner.learning_rate(0.0) == pytest.approx(1e-3)
    assert learner.learning_rate(0.5) == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert learner.learning_rate(1.0) == pytest.approx(1e-4)


def test_state_goes_on_where_it_was_and_settings_win_over_the_file() -> None:
    unbroken, broken = small_policy(), small_policy()
    first = small_learner(unbroken)
    second = small_learner(broken)
    for learner, policy in ((first, unbroken), (second, broken)):
        learner.update(made_up_rollout(policy, 8), run_fraction=0.0)
    resumed = small_learner(small_policy())
    resumed.policy.load_state_dict(second.policy.state_dict())
    resumed.load_state_dict(second.state_dict())
    resumed.generator.set_state(second.generator.get_state())
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.5
    resumed.load_state_dict(second.state_dict())
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.01
    rollout = made_up_rollout(unbroken, 8, seed=5)
    for learner in (first, resumed):
        learner.update(rollout, run_fraction=0.5)
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name


def test_every_micro_batch_of_the_update_is_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    beats: list[None] = []
    monkeypatch.setattr("training.learner.heartbeat", lambda: beats.append(None))
    learner = small_learner(policy, minibatch=8, micro=2, passes=3)
    learner.update(made_up_rollout(policy, 16), 0.0)
    assert len(beats) == 3 * 16 / 2


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_stopped_update_goes_on_at_the_very_step(steps: int) -> None:
    """Of 8 steps in 2 passes, so that the second shuffle comes before or after the stop."""
    unbroken, first, second = (small_learner(small_policy(), minibatch=2) for _ in range(3))
    rollout = made_up_rollout(unbroken.policy, 8)
    expected = unbroken.update(rollout, run_fraction=0.5)
    asked = iter(range(9))
    assert first.update(rollout, 0.5, stop_now=lambda: next(asked) == steps) is None
    assert first.optimizer_steps == steps and first.stopped_at is not None
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state_dict(first.state_dict())
    figures = second.update(rollout, 0.5, resume_from=first.stopped_at)
    assert second.stopped_at is None and expected is not None and figures is not None
    assert {name: float(value) for name, value in figures.items()} == {
        name: float(value) for name, value in expected.items()
    }
    assert torch.equal(second.generator.get_state(), unbroken.generator.get_state())
    for name, value in unbroken.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name


def ranks(tmp_path: Path, number: int, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.pt"
    script = str(ROOT / "tests/training/ranks_update.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    subprocess.run([*launcher, script, str(out), *arguments], check=True, cwd=ROOT, timeout=600)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "",
        "sharded muon 3",  # of two layers: one rank has no matrix of its own, and rows do not divide evenly
        *(
            pytest.param(how, marks=pytest.mark.drill)
            for how in ("compiled", "sharded", "sharded compiled", "muon", "muon 3", "sharded muon compiled")
        ),
    ],
)
def test_ranks_with_a_part_of_the_segments_equal_one_rank_with_all(tmp_path: Path, how: str) -> None:
    number = 3 if "3" in how else 2
    result = ranks(tmp_path, number, *how.split())
    assert all(len(set(sums)) == 1 for sums in result["same"])
    policy, segments = small_policy(), 4 * number
    optimizer = "muon" if "muon" in how else "adamw"
    learner = small_learner(
        policy, minibatch=segments, micro=3, passes=3, forecast_coef=0.5, optimizer=optimizer
    )
    statistics = learner.update(made_up_rollout(policy, segments, has_forecasts=True), run_fraction=0.25)
    for name, value in (policy.state_dict() | learner.state_dict()["forecaster"]).items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=2e-6)
    for name, figure in statistics.items():
        if name.startswith("forecast/"):  # a mean of what each rank's own decisions give
            continue
        assert result["figures"][name] == pytest.approx(float(figure), rel=1e-3, abs=1e-6), name
    # One checkpoint for both ways: whichever resumes it learns the same.
    for name, value in result["after"][0].items():
        torch.testing.assert_close(result["after"][1][name], value, rtol=1e-4, atol=2e-6)
        assert not torch.equal(value, result["weights"][name])
    num_weights = policy.num_parameters()
    assert (result["held"] < 0.6 * num_weights) == ("sharded" in how)
    num_moments = sum(m.numel() for state in learner.optimizer.state.values() for m in state.values())
    assert (result["moments"] < 0.75 * num_moments) == ("sharded" in how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["", *(pytest.param(how, marks=pytest.mark.drill) for how in ("sharded", "muon", "sharded muon"))]
)
def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path: Path, how: str) -> None:
    result = ranks(tmp_path, 2, "poison", *how.split())
    assert all(first == second for first, second in result["same"])
    assert result["figures"]["ppo/skipped_steps"] == 3
    for name, value in small_policy().state_dict().items():
        assert torch.equal(result["weights"][name], value), name
