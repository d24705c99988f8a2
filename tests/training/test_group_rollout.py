"""Rollouts of accounts over groups: every choice is valued as the plain ledger does, and a training resumes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from data_sources.simulated import simulated_bars
from envs.group_env import GroupEnv
from envs.market import Market
from models.policy import Policy
from models.transformer import TransformerConfig
from runtime.control import ExitProgram
from tests.envs.group_reference import Meeting, ReferenceGroup, within_caps
from tests.envs.markets import HORIZON, NEVER, market_of
from tests.envs.test_group_env import CAPS, awkward_bars, group_env
from tests.training.rollouts import ALONE, SETTINGS
from training.checkpoint import Checkpoint, newest
from training.environments import play_segment
from training.group_rollout import value_every_choice
from training.memory import MemoryNeeds, MemoryPlan
from training.progress import TrainingProgress
from training.rollout import Rollout
from training.trainer import Trainer


def policy_for(env: GroupEnv) -> Policy:
    torch.manual_seed(0)
    length = env.config.context_bars + env.config.horizon + 1
    config = TransformerConfig(env.market.num_features, 32, 2, 4, length)
    policy = Policy(config, env.num_account_features, len(env.config.positions))
    for layer in (policy.head.logits, policy.head.value):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return policy


def rollout_of(env: GroupEnv, **how: Any) -> Rollout:
    generator = torch.Generator().manual_seed(7)
    return play_segment(env, policy_for(env), generator, 16, **how)


def meetings_of(
    env: GroupEnv, t: int, row: int, scale: float
) -> tuple[dict[str, Meeting], dict[str, Meeting]]:
    """Return what a group meets at the fill of decision t and at the next one."""
    fills = {name: values[t, row].tolist() for name, values in env.segment.fills.items()}
    here, there = {}, {}
    for g in range(env.group.size):
        own = {name: values[g] for name, values in fills.items()}

        def cost(
            order: float, rate: float = own["cost_rate"], impact: float = own["impact"] * scale
        ) -> float:
            return rate + min(abs(order) * impact, own["impact_limit"])  # noqa: B023 - the same for all

        here[str(g)] = Meeting(own["price"], cost, own["is_filled"], own["borrow"])
        there[str(g)] = Meeting(own["next_price"], 0.0, funding=own["funding"], margin=own["margin"])
    return here, there


def test_every_choice_is_valued_as_the_plain_ledger_does() -> None:
    env = group_env(market_of(*awkward_bars()), volume_slippage=0.01, ruin_fraction=1e-6)
    env.begin_segment()
    generator = torch.Generator().manual_seed(3)
    actions = torch.randint(0, 3, (HORIZON, env.config.num_envs), generator=generator)
    played = env.play(lambda _, action: (action,), actions)
    growth, ends = value_every_choice(env, played, slice(0, env.num_groups))
    assert not ends.any()
    positions, size, compared = env.config.positions, CAPS.size, 0

    def grown(t: int, row: int, held: list[int], chosen: list[int]) -> float:
        scale = float(played.log_equity[t, row].exp())
        here, there = meetings_of(env, t, row, scale)
        before, after = (
            within_caps(
                {str(g): positions[choice] * CAPS.share for g, choice in enumerate(choices)},
                CAPS.gross,
                CAPS.net,
            )
            for choices in (held, chosen)
        )
        account = ReferenceGroup(0.0, cash=1 - sum(before.values()), weights=dict(before))
        account.units = {name: weight / here[name].price for name, weight in before.items()}
        return account.fill(after, here, there)

    for t in range(0, HORIZON, 3):
        for row in range(env.num_groups):
            held, chosen = played.held[t, row].tolist(), played.chosen[t, row].tolist()
            slot = (t + row) % size
            for j in range(3):
                for k in range(3):
                    values = []
                    for own_held, own_chosen in ((j, k), (1, 1)):  # and without the slot
                        ours = [own_held if g == slot else index for g, index in enumerate(held)]
                        theirs = [own_chosen if g == slot else index for g, index in enumerate(chosen)]
                        values.append(grown(t, row, ours, theirs))
                    found = float(growth[row * size + slot, t, j, k])
                    assert math.isclose(found, values[0] - values[1], abs_tol=1e-10), (t, row, j, k)
                    compared += values[0] != values[1]
    assert compared > 100


def test_rollout_and_update_see_the_same_and_rewards_are_the_groups() -> None:
    env = group_env(market_of(*awkward_bars()))
    policy = policy_for(env)
    rollout = rollout_of(env, hindsight=True)
    with torch.no_grad():
        logits, values = policy(rollout.bars, rollout.accounts)
    assert_close(torch.log_softmax(logits, -1), rollout.log_policy, rtol=0, atol=1e-5)
    assert_close(values, rollout.values, rtol=0, atol=1e-5)
    assert rollout.hindsight is not None
    held = rollout.hindsight.held[..., None, None]
    at_held = rollout.hindsight.log_policy.gather(-2, held.expand(-1, -1, 1, 3)).squeeze(-2)
    assert_close(at_held, rollout.log_policy, rtol=0, atol=1e-5)
    by_group = rollout.rewards.unflatten(0, (-1, CAPS.size))
    assert bool((by_group == by_group[:, :1]).all()) and bool(by_group.any())
    assert 0 < int(rollout.valid.sum()) < rollout.valid.numel()
    again = rollout_of(group_env(market_of(*awkward_bars())), hindsight=True)
    assert torch.equal(again.hindsight.growth, rollout.hindsight.growth)


def small_trainer(saved: Checkpoint | None = None, **changes: Any) -> Trainer:
    bars = simulated_bars(5, 600, 0, 1_767_225_600 * 10**9)
    market = Market.from_bars(bars, device="cpu", holdout_start_ns=NEVER, context_bars=8, horizon=8)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_bars": 8, "envs_per_gpu": 12}
    groups = {"account": "group", "group_size": 3, "batch_size": 6 * 8}
    settings = replace(SETTINGS, **(sizes | groups | changes))
    needs = MemoryNeeds.of(settings, market.num_bytes, world_size=1, precision="fp32")
    progress = TrainingProgress.of(saved) if saved else TrainingProgress()
    return Trainer(market, settings, ALONE, MemoryPlan(needs, None, 2), progress, saved)


@pytest.mark.parametrize("advantages", ["hindsight", "gae"])
def test_a_training_resumes_to_the_bit(tmp_path: Path, advantages: str) -> None:
    def epoch(trainer: Trainer) -> dict[str, Any]:
        losses = trainer.update(trainer.collect())
        assert losses is not None
        figures = trainer.metrics(losses)
        return {name: value for name, value in figures.items() if not name.startswith("perf/")}

    unbroken = small_trainer(advantages=advantages)
    first = epoch(unbroken)
    assert 0 < first["rollout/gross_exposure"] <= 1 and 0 <= first["rollout/net_exposure"] < 1e-3
    assert sum(first[f"rollout/in_position_{p}"] for p in ("-1", "0", "1")) == pytest.approx(1)
    saved = unbroken.checkpoint("", {}, {})
    saved = replace(saved, path=tmp_path / saved.name)
    saved.save(keep=16)
    found, _ = newest(tmp_path)
    resumed = small_trainer(found, advantages=advantages)
    assert epoch(resumed) == epoch(unbroken)
    for name, weights in unbroken.policy.state_dict().items():
        assert torch.equal(weights, resumed.policy.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"envs_per_gpu": 10}, "envs_per_gpu=10 must be whole groups of 3, as account=group: use 9"),
        ({"net_exposure": 2.0}, "net_exposure=2.0 must be at most gross_exposure=1"),
        (
            {"reward": "less market", "net_exposure": 0.5},
            "reward=less market must be log equity with account=group, whose net_exposure caps",
        ),
        ({"group_size": 65, "envs_per_gpu": 65}, "group_size=65 must be at most 64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **{"account": "group", "group_size": 3, "envs_per_gpu": 12} | changes)


def test_a_market_of_too_few_symbols_is_one_line() -> None:
    with pytest.raises(
        ExitProgram, match="a group of 6 symbols must fit into a market, stocks or coins: the larg"
    ):
        small_trainer(group_size=6)


def test_a_checkpoint_refuses_other_accounts() -> None:
    trainer = small_trainer()
    saved = trainer.checkpoint("", {}, {})
    assert not saved.mismatch(trainer.settings)
    single = saved.mismatch(replace(trainer.settings, account="single"))
    assert single.startswith("account: an account per symbol, but ") and "groups of 3" in single
    assert "groups of 4" in saved.mismatch(replace(trainer.settings, group_size=4))
    assert "net_exposure=0.5" in saved.mismatch(replace(trainer.settings, net_exposure=0.5))
    older = {name: value for name, value in saved.config.items() if name not in ("account", "group_size")}
    older = replace(saved, config=older)
    assert "groups of 3" in older.mismatch(trainer.settings)
