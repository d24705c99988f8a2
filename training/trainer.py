"""Session: one rank's environment and learner, carried through runs and restarts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from envs.market import Market
from envs.trading_env import EnvConfig, TradingEnv
from models.policy import Policy
from models.transformer import TransformerConfig
from training.checkpoint import Restored
from training.compilation import compile_accounts, compile_objective, rehearse
from training.distributed import Ranks
from training.learner import Learner, LearnerConfig
from training.losses import Objective, PPOConfig
from training.memory import DoesNotFit, MemoryPlan
from training.metrics import Stopwatch, fixed_batch, gpu_figures, matmul_rate, plasticity
from training.parallel import Shares
from training.progress import Clock
from training.rollout import Rollout, collect


@dataclass(frozen=True)
class SessionConfig:
    """Everything that shapes a session, in the words of its parts."""

    env: EnvConfig
    ppo: PPOConfig
    learner: LearnerConfig
    d_model: int
    num_layers: int
    num_heads: int
    bf16: bool
    seed: int
    compile: bool = False
    memory: MemoryPlan | None = None  # to be rehearsed; the micro-batch is the learner's where there is none


class Session:
    """Plays, learns, tells figures, and hands out what a checkpoint needs (all ranks do the same)."""

    def __init__(self, market: Market, config: SessionConfig, ranks: Ranks, saved: Restored | None) -> None:
        self.config = config
        self.ranks = ranks
        # One stream per rank: the accounts of different ranks live different lives.
        self.env = TradingEnv(market, config.env, ranks.device, seed=config.seed * 1_000_003 + ranks.rank)
        torch.manual_seed(config.seed)  # every rank draws the same first weights
        self.policy = self._new_policy().to(ranks.device)
        self.objective = Objective(self.policy, config.ppo)
        self.not_compiled = "not asked for"
        self.memory = config.memory
        if config.memory:
            self.memory = self._rehearsed(config.memory)
            micro_batch = self.memory.micro_batch_segments
            config = replace(config, learner=replace(config.learner, micro_batch_segments=micro_batch))
            self.config = config
        # The rollout whose update was stopped by the wish to end, and where; the next epoch begins there.
        self._under_way: tuple[Rollout, dict[str, Any]] | None = None
        self._matmul_rate = matmul_rate(ranks.device, torch.bfloat16 if config.bf16 else torch.float32)
        if saved:
            self.policy.load_state_dict(saved.weights["model"])
        self.learner = Learner(self.objective, config.learner, ranks, config.seed)
        if saved and saved.resume:
            self.learner.load_state_dict(saved.resume["learner"])
            states = saved.resume["ranks"]
            if ranks.rank < len(states):  # a rank that was not there before starts with fresh accounts
                self.env.load_state_dict(states[ranks.rank]["env"])
                self._restore_generator(states[ranks.rank]["generator"])
            self._restore_update(states)

    def _new_policy(self) -> Policy:
        config, env = self.config, self.env
        trunk = TransformerConfig(
            num_features=env.market.num_features,
            d_model=config.d_model,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=env.config.context_bars + env.config.horizon + 1,
        )
        return Policy(trunk, env.num_account_features, len(env.config.positions), config.bf16)

    def _rehearsed(self, plan: MemoryPlan) -> MemoryPlan:
        """Return the plan as it works out on this GPU: as it is, or with half the micro-batch (all ranks).

        Raises:
            DoesNotFit: neither does.
        """
        with contextlib.suppress(torch.OutOfMemoryError):  # gone with all that its traceback holds
            self._rehearse(plan)
            return plan
        plan = plan.smaller()
        try:
            self._rehearse(plan)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(plan.advice()) from error
        return plan

    def _rehearse(self, plan: MemoryPlan) -> None:
        config = self.config
        sizes = plan.micro_batch_segments, config.env.context_bars, config.env.horizon
        self.policy.trunk.recompute = plan.recompute
        if config.compile:
            self.not_compiled = compile_objective(
                self.objective, *sizes, self.ranks, config.learner.sharded
            ) or compile_accounts(self.env, self.policy, self.ranks)
        elif self.ranks.device.type == "cuda":
            rehearse(self.objective, *sizes, self.ranks)

    def policy_to_ask(self) -> Policy:
        """Return a policy that rank 0 can ask while the others wait (all ranks take part)."""
        learner = self.learner
        if not isinstance(learner.parallel, Shares):
            return self.policy
        weights = learner.parallel.weights()  # gathered by all
        if not self.ranks.is_first:
            return self.policy
        policy = self._new_policy().to(self.ranks.device)
        policy.load_state_dict(weights)
        return policy

    def use(self, market: Market) -> None:
        """Go on with fresh bars; accounts whose place is still there keep it."""
        self.env.use(market)

    def collect(self, cost_scale: float) -> Rollout:
        """Play one segment in every environment, at this share of all trading costs.

        The segment of a stopped update was played before, and is returned as it was.
        """
        self.env.cost_scale = cost_scale
        if self._under_way:
            return self._under_way[0]
        config = self.config
        return collect(
            self.env,
            self.policy,
            self.learner.generator,
            config.learner.micro_batch_segments,
            hindsight=config.ppo.advantages == "hindsight",
            # Discounted sums of unit noise have this deviation: the critic's targets are about one.
            reward_scale=math.sqrt(1.0 - config.ppo.gamma**2),
        )

    def _own_state(self) -> dict[str, Any]:
        state = {"env": self.env.state_dict(), "generator": self.learner.generator.get_state()}
        if self._under_way:
            rollout, stopped = self._under_way
            state["update"] = stopped | {"rollout": rollout.state_dict(), "plan": self._plan()}
        return state

    def _plan(self) -> list[Any]:
        """Return what must not change while an update is under way."""
        env, learner = self.config.env, self.config.learner
        sizes = [env.num_envs, env.horizon, learner.minibatch_segments, learner.update_passes]
        return [self.ranks.world_size, self.ranks.device.type, self.config.ppo.advantages, *sizes]

    def _restore_update(self, states: list[dict[str, Any]]) -> None:
        """Take up a stopped update, on all ranks or on none (all ranks take part).

        Where ranks or sizes have changed since, the epoch is played anew.
        """
        update = states[self.ranks.rank].get("update") if self.ranks.rank < len(states) else None
        if self.ranks.any(update is None or list(update["plan"]) != self._plan()):
            return
        assert update is not None
        self._under_way = Rollout.from_state_dict(update["rollout"], self.ranks.device), update

    def _restore_generator(self, state: Tensor) -> None:
        # A state goes on only on the same kind of device.
        if len(state) == len(self.learner.generator.get_state()):
            self.learner.generator.set_state(state.cpu())

    def flops_per_transition(self) -> float:
        """Count the trunk's operations: a forward in the rollout, a forward and a backward in every pass."""
        trunk, env = self.policy.trunk, self.config.env
        rollout = trunk.forward_flops(env.context_bars + env.horizon + 1, env.horizon + 1)
        update = 3 * trunk.forward_flops(env.context_bars + env.horizon, env.horizon)
        return (rollout + self.config.learner.update_passes * update) / env.horizon

    def update(
        self, rollout: Rollout, run_fraction: float, stop_now: Callable[[], bool]
    ) -> dict[str, Tensor | float] | None:
        """Learn from it; see Learner.update. None when stopped: a checkpoint now holds what is left to do."""
        go_on = self._under_way[1] if self._under_way else None
        statistics = self.learner.update(rollout, run_fraction, stop_now, go_on)
        self._under_way = (rollout, self.learner.stopped) if self.learner.stopped else None
        return statistics

    def is_lost(self, metrics: Mapping[str, Any]) -> bool:
        """Tell whether most optimizer steps of the epoch were skipped, for gradients that are not finite."""
        config = self.config.learner
        steps = config.update_passes * math.ceil(self.config.env.num_envs / config.minibatch_segments)
        return bool(metrics["ppo/skipped_steps"] > steps / 2)

    def metrics(self, clock: Clock, statistics: Mapping[str, Any], watch: Stopwatch) -> dict[str, Any]:
        """Bring one epoch's figures to the host; the names are explained in docs/metrics.md."""
        episodes = self.env.episode_statistics()
        sums = self.ranks.sum(torch.stack([value.double() for value in episodes.values()]))
        total = dict(zip(episodes, sums.tolist(), strict=True))
        rollout_seconds, update_seconds = watch.seconds()
        seconds = rollout_seconds + update_seconds
        env = self.config.env
        transitions = env.num_envs * env.horizon * self.ranks.world_size
        decisions, episodes_ended = max(1.0, total["decisions"]), total["episodes"]
        mean_return = total["episode_log_returns"] / max(1.0, episodes_ended)
        figures = {
            "run": clock.run,
            "epoch": clock.epoch,
            "transitions": clock.transitions,
            "rollout/reward_bps": 1e4 * total["rewards"] / decisions,
            "rollout/episodes": int(episodes_ended),
            "rollout/episode_return_percent": 100 * math.expm1(mean_return),
            "rollout/ruined_episodes": int(total["ruins"]),
            "rollout/turnover": total["traded"] / decisions,
            "rollout/cost_scale": self.env.cost_scale,
            "rollout/costs_bps": 1e4 * (total["costs"] + total["borrow_costs"]) / decisions,
            **{
                f"rollout/{name}": total[name] / decisions for name in total if name.startswith("in_position")
            },
            **{name: float(value) for name, value in statistics.items()},
            "perf/rollout_seconds": rollout_seconds,
            "perf/update_seconds": update_seconds,
            "perf/transitions_per_second": transitions / seconds,
            "perf/episodes_per_second": episodes_ended / seconds,
            # Of what a matrix product reaches on as many of these devices.
            "perf/mfu": transitions
            * self.flops_per_transition()
            / (seconds * self._matmul_rate * self.ranks.world_size),
        }
        if self.ranks.is_first and not isinstance(
            self.learner.parallel, Shares
        ):  # a share tells nothing alone
            figures |= plasticity(self.policy, fixed_batch(self.env.market))
        if self.ranks.device.type == "cuda":
            figures |= gpu_figures(self.ranks.device)
        return figures

    def checkpoint(self, clock: Clock) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gather what people use and what the next start needs (all ranks take part)."""
        weights = {
            "run": clock.run,
            "epoch": clock.epoch,
            "step": self._under_way[1]["steps"] if self._under_way else 0,
            "transitions": clock.transitions,
            "model": self.learner.parallel.weights(),
            "model_config": {
                "trunk": asdict(self.policy.trunk.config),
                "num_account_features": self.env.num_account_features,
                "num_positions": len(self.config.env.positions),
            },
            "symbols": list(self.env.market.symbols),
            "features": self.env.market.statistics.state_dict(),
        }
        resume = {
            "clock": clock.state_dict(),
            "learner": self.learner.state_dict(),
            "ranks": self.ranks.gather(self._own_state()),
        }
        return weights, resume
