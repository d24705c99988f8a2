"""A reward of one's own: the page's example is paid alike in the rollout and in hindsight; the rest is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from envs.feature_errors import FeatureError
from tests.envs.markets import env_of
from tests.program import ROOT
from tests.training.rollouts import calm_and_wild, policy_for
from tests.training.test_hindsight import rewarded_and_grown
from training import rewards
from training.rewards import Decision, RewardFunction, check_reward, own_reward, reward
from training.rollout import collect


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "_registered", [])


@pytest.fixture
def example() -> RewardFunction:
    """The function of docs/own_reward.md, as a start finds it."""
    text = (ROOT / "docs" / "own_reward.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, "own_reward.py", "exec"), {"__name__": "training.own_reward"})  # the page is ours
    found = own_reward()
    assert found is not None and found.__name__ == "growth_less_risk"
    return found


def test_there_is_none_at_first() -> None:
    assert own_reward() is None


def test_the_example_is_paid_in_the_rollout_and_in_hindsight_alike(example: RewardFunction) -> None:
    env = env_of(calm_and_wild())
    policy = policy_for(env)
    generator = torch.Generator().manual_seed(7)
    rollout = collect(env, policy, generator, 16, hindsight=True, own_reward=example)
    paid, valued, flat = rewarded_and_grown(rollout)
    assert flat.float().mean() > 0.1
    torch.testing.assert_close(valued[flat], paid[flat], rtol=1e-4, atol=1e-4)
    assert (valued - paid).abs().max() < 0.1 * paid.abs().max()  # but for the drift of what is held


def test_it_pays_what_it_says_and_money_stays_money(example: RewardFunction) -> None:
    plain, own = env_of(calm_and_wild()), env_of(calm_and_wild())
    policy = policy_for(plain)
    usual = collect(plain, policy, torch.Generator().manual_seed(7), 16, hindsight=True)
    other = collect(own, policy, torch.Generator().manual_seed(7), 16, hindsight=True, own_reward=example)
    assert torch.equal(usual.actions, other.actions) and torch.equal(usual.accounts, other.accounts)
    volatility = plain.volatility[:, None]
    targets = torch.tensor([-1.0, 0.0, 1.0, 0.0])
    assert usual.hindsight is not None and other.hindsight is not None
    held, chosen = targets[usual.hindsight.held], targets[usual.actions]
    expected = example(Decision(usual.rewards * volatility, held, chosen, volatility)) / volatility
    torch.testing.assert_close(other.rewards, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(usual.hindsight.ends, other.hindsight.ends)
    for name in ("rewards", "traded", "costs"):
        assert torch.equal(plain.episode_statistics()[name], own.episode_statistics()[name])


def mean_of_all(decision: Decision) -> Tensor:
    return decision.growth - decision.growth.mean()


def random(decision: Decision) -> Tensor:
    return decision.growth + torch.randn_like(decision.growth)


def of_another_shape(decision: Decision) -> Tensor:
    return decision.growth.sum()


def in_place(decision: Decision) -> Tensor:
    return decision.growth.mul_(2.0)


def infinite(decision: Decision) -> Tensor:
    return decision.growth.log()


def broken(decision: Decision) -> Tensor:
    raise KeyError("nothing of that name")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (mean_of_all, "must be elementwise"),
        (random, "must be elementwise"),
        (of_another_shape, "must return one value for each decision"),
        (in_place, "changes its decision in place"),
        (infinite, "must be finite"),
        (broken, "reward broken failed: "),
    ],
)
def test_what_hindsight_could_not_value_is_refused(function: RewardFunction, words: str) -> None:
    with pytest.raises(FeatureError, match=words) as refused:
        check_reward(function)
    assert "\n" not in str(refused.value)
    if function is not broken:
        assert "tests/training/test_own_reward.py:" in str(refused.value)


def test_accounts_over_groups_have_none(example: RewardFunction) -> None:
    with pytest.raises(FeatureError, match="is for accounts of one symbol: train with --account single"):
        own_reward(is_of_groups=True)


def test_there_can_be_only_one() -> None:
    reward(mean_of_all)
    with pytest.raises(ValueError, match="mean_of_all is the reward already"):
        reward(random)
