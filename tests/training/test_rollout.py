"""Rollouts: the trunk runs once, the policy that acts is the one that learns, and nothing looks ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from envs.trading_env import TradingEnv
from models.transformer import draw_depth
from tests.envs.markets import CONTEXT, HORIZON, config_of, env_of, market_of, moved, walk, without_syncs
from tests.training.reencoding import WindowLearner, collect_by_windows
from tests.training.rollouts import ALONE, SETTINGS, calm_and_wild, policy_for, rollout_of, small_learner
from training.compilation import compile_accounts, compile_hindsight, compile_objective
from training.distributed import Ranks
from training.losses import Objective
from training.rollout import REWARD_LIMIT, add_noise, collect


def symbols_of(env: TradingEnv) -> torch.Tensor:
    """Number of the symbol that each environment trades."""
    return torch.tensor([env.market.symbols.index(name) for name in env.state_dict()["symbols"]])


def places_of(env: TradingEnv) -> torch.Tensor:
    """Index of each environment's newest closed bar, in a market of one symbol."""
    return torch.searchsorted(env.market.open_time, env.state_dict()["open_time"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_update_sees_the_policy_that_acted(precision: str) -> None:
    # The first minibatch after a rollout has ratio 1: the same trunk over the same bars, one bar shorter.
    env = env_of(market_of(walk()))
    policy = policy_for(env, precision)
    rollout = rollout_of(env, policy)
    with torch.no_grad():
        logits, values = policy(rollout.bars, rollout.accounts)
    bound = 1e-5 if precision == "fp32" else 2e-2
    assert (torch.log_softmax(logits, -1) - rollout.log_policy).abs().max() < bound
    assert (values - rollout.values).abs().max() < bound * 5


def test_noise_is_drawn_for_every_segment_and_the_update_sees_it() -> None:
    env, generator = env_of(market_of(walk())), torch.Generator().manual_seed(7)
    policy = policy_for(env)
    for _ in range(2):
        rollout = collect(env, policy, generator, 16, feature_noise=0.5)
        with torch.no_grad():
            logits, _ = policy(rollout.bars, rollout.accounts)
        assert (torch.log_softmax(logits, -1) - rollout.log_policy).abs().max() < 1e-5
    bars = torch.zeros(2, 100, 40, 5)
    first, second = (add_noise(part, 0.5, generator) for part in bars)
    assert abs(float(bars.std()) - 0.5) < 0.01 and abs(float(bars.mean())) < 0.01
    assert abs(float((first * second).mean())) < 0.01
    state = generator.get_state()
    assert not add_noise(torch.zeros(3), 0.0, generator).any() and torch.equal(generator.get_state(), state)


def test_the_update_skips_the_blocks_that_the_rollout_skipped() -> None:
    env, generator = env_of(market_of(walk())), torch.Generator().manual_seed(7)
    learner = small_learner(policy := policy_for(env), minibatch=16)
    rollout = collect(env, policy, generator, 4, hindsight=True, stochastic_depth=0.5)
    assert rollout.depth is not None and len(rollout.depth.unique(dim=0)) > 1
    with torch.no_grad():
        for depth, is_same in ((rollout.depth, True), (None, False)):
            hidden = policy.hidden(rollout.bars, rollout.horizon, depth)
            logits, _ = policy.head.decide(policy.head.project(hidden), rollout.accounts)
            changed = (torch.log_softmax(logits, -1) - rollout.log_policy).abs().amax((1, 2))
            assert bool(changed.max() < 1e-5) == is_same
    # Segments that skip nothing are weighed, all the same.
    assert (changed > 1e-5).all()
    assert float(learner.update(rollout, 0.5)["ppo/first_kl"]) < 1e-7  # type: ignore[index]
    assert learner.find_corruption() == ("", "")


@pytest.mark.parametrize("chance", [0.3, 0.9])
def test_blocks_are_skipped_as_often_as_asked_and_add_as_much_on_average(chance: float) -> None:
    depth = draw_depth(20_000, 4, chance, torch.Generator().manual_seed(0))
    skipped = (depth == 0).double().mean(0)
    expected = chance * torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    torch.testing.assert_close(skipped, expected, rtol=0, atol=0.015)
    torch.testing.assert_close(depth.mean(0), torch.ones(4), rtol=0, atol=0.1)


def test_with_weights_of_one_nothing_changes_and_with_zeros_blocks_add_nothing() -> None:
    env = env_of(market_of(walk()))
    policy, bars = policy_for(env), env.begin_segment()
    with torch.no_grad():
        plain = policy.hidden(bars, HORIZON)
        assert torch.equal(policy.hidden(bars, HORIZON, torch.ones(len(bars), 2)), plain)
        none = policy.hidden(bars, HORIZON, torch.zeros(len(bars), 2))
        torch.testing.assert_close(none, policy.trunk.norm(policy.trunk.embed(bars))[:, -HORIZON:])
        policy.trunk.recompute = True
    depth = torch.tensor([[2.0, 0.0]] * len(bars))
    kept, again = [], bars.clone().requires_grad_()
    for policy.trunk.recompute in (False, True):
        kept.append(torch.autograd.grad(policy.hidden(again, HORIZON, depth).square().sum(), again)[0])
    assert torch.equal(*kept)


def test_chunks_of_the_trunk_forward_change_nothing() -> None:
    market = market_of(walk())
    rollouts = []
    for chunk in (1, 16):
        env = env_of(market)
        rollouts.append(rollout_of(env, policy_for(env), chunk))
    assert torch.equal(rollouts[0].actions, rollouts[1].actions)
    torch.testing.assert_close(rollouts[0].values, rollouts[1].values, rtol=1e-4, atol=1e-5)


def test_it_is_what_encoding_every_window_anew_gives() -> None:
    market = market_of(walk())
    env = env_of(market)
    quick = rollout_of(env, policy_for(env))
    env = env_of(market)
    plain = collect_by_windows(env, policy_for(env), torch.Generator().manual_seed(7), whole=True)
    assert torch.equal(quick.actions, plain.actions)
    assert quick.actions.unique().numel() == 3
    for name in ("bars", "accounts", "log_policy", "rewards", "values", "next_value", "valid"):
        torch.testing.assert_close(getattr(quick, name), getattr(plain, name), rtol=1e-4, atol=1e-5)


def test_of_windows_alone_the_policy_that_acted_is_the_one_that_learns() -> None:
    env = env_of(market_of(walk()))
    learner = WindowLearner(Objective(policy_for(env), SETTINGS), ALONE, micro_batch_segments=2)
    rollout = collect_by_windows(env, learner.policy, learner.generator)
    flat, seen, accounts = learner.decisions(rollout)
    with torch.no_grad():
        logits, values = learner.policy(seen, accounts)
    torch.testing.assert_close(torch.log_softmax(logits[:, 0], -1), flat.log_policy, rtol=0, atol=1e-5)
    torch.testing.assert_close(values[:, 0], rollout.values.flatten(), rtol=0, atol=5e-5)


def test_rewards_are_the_environments_in_units_of_the_markets_volatility() -> None:
    market = calm_and_wild()
    env, twin = env_of(market), env_of(market)
    rollout = rollout_of(env, policy_for(env))
    twin.begin_segment()
    rewards = torch.stack([twin.step(rollout.actions[:, t])[0] for t in range(HORIZON)], dim=1)
    volatility = market.volatility[symbols_of(env)]
    assert volatility.max() > 5 * volatility.min()
    torch.testing.assert_close(rollout.rewards * volatility[:, None], rewards)
    assert rewards.abs().max() > 0


@pytest.mark.parametrize("reward_scale", [1.0, 0.14])
def test_rewards_and_what_every_choice_earns_are_clipped_alike(reward_scale: float) -> None:
    market = market_of(walk())
    quiet = replace(
        market, volatility=market.volatility / 500
    )  # so that its moves are up to 1,500 usual ones
    usual, clipped = (
        collect(
            env := env_of(given), policy_for(env), torch.Generator().manual_seed(7), 16, hindsight=True,
            reward_scale=reward_scale,
        )
        for given in (market, quiet)
    )  # fmt: skip
    limit = REWARD_LIMIT * reward_scale
    assert usual.hindsight and clipped.hindsight
    for before, after in (
        (usual.rewards, clipped.rewards),
        (usual.hindsight.growth, clipped.hindsight.growth),
    ):
        assert before.abs().max() < limit < 500 * before.abs().max()
        torch.testing.assert_close(after, (500 * before).clamp(-limit, limit), rtol=1e-4, atol=1e-5)
    assert 0.1 < (clipped.rewards.abs() > 0.999 * limit).float().mean() < 0.9


def test_every_chunk_of_the_rollout_is_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    env = env_of(market_of(walk()), num_envs=16)
    beats: list[None] = []
    monkeypatch.setattr("training.rollout.heartbeat", lambda: beats.append(None))
    generator = torch.Generator().manual_seed(0)
    collect(env, policy_for(env), generator, 4)
    assert len(beats) == 4


def test_greedy_takes_the_most_likely_position_and_drawing_does_not_always() -> None:
    market = market_of(walk())
    env = env_of(market)
    policy = policy_for(env)
    greedy = rollout_of(env, policy, greedy=True)
    with torch.no_grad():
        most_likely = policy(greedy.bars, greedy.accounts)[0].argmax(-1)
    assert (greedy.actions == most_likely).float().mean() > 0.99  # ties may fall either way
    env = env_of(market)
    drawn = rollout_of(env, policy)
    with torch.no_grad():
        most_likely = policy(drawn.bars, drawn.accounts)[0].argmax(-1)
    assert 0.1 < (drawn.actions == most_likely).float().mean() < 0.95


def test_actions_are_drawn_from_the_policys_distribution() -> None:
    env = env_of(market_of(walk(num_bars=3_000)), num_envs=512)
    policy = policy_for(env)
    rollout = rollout_of(env, policy, chunk=512)
    with torch.no_grad():
        chances = torch.softmax(policy(rollout.bars, rollout.accounts)[0], -1)
    expected = chances.mean((0, 1))
    counted = torch.bincount(rollout.actions.flatten(), minlength=3) / rollout.actions.numel()
    # 8,192 draws: four standard errors are 0.022 at most.
    torch.testing.assert_close(counted, expected, rtol=0, atol=0.022)


def test_the_bootstrap_value_is_of_the_bar_after_the_segment() -> None:
    env = env_of(market_of(walk()))
    policy = policy_for(env)
    rollout = rollout_of(env, policy)
    # The environment still stands at the bar after the last decision, and so does the account.
    window = torch.arange(-CONTEXT - HORIZON, 1)
    bars = env.market.features[places_of(env)[:, None] + window].float()
    with torch.no_grad():
        _, values = policy(bars, env.account_observations()[:, None])
    torch.testing.assert_close(rollout.next_value, values[:, 0], rtol=1e-4, atol=1e-5)


def test_after_a_ruin_nothing_counts() -> None:
    # 40 % moves a bar ruin most accounts that are not flat.
    env = env_of(market_of(walk(sigma=0.4)), num_envs=64)
    rollout = rollout_of(env, policy_for(env), chunk=64)
    ruined = rollout.terminated.any(dim=1)
    assert ruined.float().mean() > 0.3
    for n in torch.nonzero(ruined).flatten().tolist():
        end = int(torch.nonzero(rollout.terminated[n])[0])
        assert rollout.valid[n, : end + 1].all()
        assert not rollout.valid[n, end + 1 :].any()
        assert (rollout.rewards[n, end + 1 :] == 0).all()


@pytest.fixture
def tf32() -> Iterator[None]:
    """Multiply float32 as a training does (distributed.start): else the compiler warns that it could be faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # see test_compilation.py
@pytest.mark.parametrize("advantages", ["hindsight", "gae"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rollout_and_update_never_wait_for_the_gpu(compiled: bool, advantages: str) -> None:
    device = torch.device("cuda", 0)
    market = moved(market_of(walk(num_bars=2_000)), device)
    config = config_of(num_envs=64, episode_bars=2 * HORIZON)
    env = TradingEnv(market, config, device, seed=0)
    policy = policy_for(env, "bf16").to(device)
    ranks = Ranks(0, 1, device)
    objective = Objective(policy, replace(SETTINGS, advantages=advantages))
    if compiled:
        assert compile_objective(objective, 16, CONTEXT, HORIZON, ranks) == ""
        assert compile_accounts(env, policy, ranks) == ""
        assert compile_hindsight(objective, env, ranks) == ""
    learner = small_learner(objective, ranks, minibatch=32, micro=16)
    generator = torch.Generator(device).manual_seed(0)

    def epoch() -> None:
        learner.update(collect(env, policy, generator, 16, hindsight=advantages == "hindsight"), 0.5)

    epoch()  # allocations and lazy set-up happen here
    with without_syncs():
        epoch()
        epoch()
