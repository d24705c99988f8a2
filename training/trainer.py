"""Trainer: one rank's environment, policy and optimizer, carried through runs and restarts."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.market import Market
from models.policy import Policy, precision_on
from models.transformer import FIRST_SCALE
from training.checkpoint import Checkpoint, ResumeState, name_of
from training.compilation import (
    compile_accounts,
    compile_hindsight,
    compile_objective,
    dry_run,
    uncompile,
)
from training.distributed import Ranks
from training.enough_days import shortage_in
from training.environments import exit_without_groups, make_env, play_segment
from training.learner import Learner
from training.losses import Objective
from training.memory import DoesNotFit, MemoryPlan
from training.metrics import Stopwatch, Yardstick, fixed_batch, gpu_figures, plasticity
from training.model_checks import describe_model, warn_if_changed
from training.muon import hidden_matrices
from training.parallel import is_sharded, load_weights, new_policy
from training.progress import TrainingProgress
from training.rewards import describe_reward, own_reward
from training.rollout import Rollout
from training.setting_types import recorded
from training.validation import policy_sizes

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

LARGE_MODEL = 50_000_000  # parameters: hours per epoch on a CPU
PLASTICITY_EVERY = 10  # epochs; 30 to 50 ms on a GPU, in which all ranks wait


def compile_is_on(settings: Settings, device: torch.device) -> bool:
    """Whether the settings ask for a compiled update and compiled account steps on this device."""
    return settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")


class Trainer:
    """One rank's environment, policy and optimizer, carried through runs and restarts (all ranks do the same)."""

    def __init__(
        self,
        market: Market,
        settings: Settings,
        ranks: Ranks,
        plan: MemoryPlan,
        progress: TrainingProgress,
        saved: Checkpoint | None = None,
    ) -> None:
        """Make everything, try it out within the memory plan, then restore what was saved.

        Raises:
            DoesNotFit: neither the plan nor half its micro-batch fits this GPU.
        """
        self.settings = settings
        self.ranks = ranks
        self.progress = progress
        self.on_phase: Callable[[str], None] = lambda _: None  # called as "rollout" and "update" begin
        # One stream per rank, so that the ranks' accounts differ.
        env_config = EnvConfig.from_settings(settings)
        with exit_without_groups():
            self.env = make_env(market, env_config, ranks.device, settings.seed * 1_000_003 + ranks.rank)
        self._own_reward = own_reward(is_of_groups=env_config.group is not None)
        # A training that began before attention had a scale goes on without one.
        trunk = saved.model_config["trunk"] if saved else None
        self._kept_sizes = {"attention_scale": trunk.get("attention_scale", FIRST_SCALE)} if trunk else {}
        self._make_policy()
        self.not_compiled = "not requested"
        if compile_is_on(settings, ranks.device):
            log.info("Compiling the update and the accounts' steps, which takes a minute or two once")
        self.memory_plan = self._dry_run(plan)
        # The rollout of an update that a stop request interrupted, and where; the next epoch begins there.
        self._pending_update: tuple[Rollout, dict[str, Any]] | None = None
        self._yardstick = Yardstick(ranks.device, self.policy.dtype)
        if saved:
            load_weights(self.policy, saved.model)
            if ranks.is_first:
                warn_if_changed(saved.model_config, saved.path)
        self.learner = Learner(self.objective, ranks, self.memory_plan.micro_batch_segments)
        if saved and saved.resume:
            self.learner.load_state_dict(saved.resume.learner)
            states = saved.resume.ranks
            if ranks.rank < len(states):  # a rank that was not there before starts with fresh accounts
                self.env.load_state_dict(states[ranks.rank]["env"])
                self._restore_generator(states[ranks.rank]["generator"])
            self._restore_update(states)

    @property
    def transitions_per_step(self) -> int:
        """Transitions of one optimizer step, over all ranks."""
        return self.learner.minibatch_segments * self.settings.horizon * self.ranks.world_size

    def log_sizes(self) -> None:
        """Log what is trained and how, and warn of what slows it down."""
        settings, ranks, num_parameters = self.settings, self.ranks, self.policy.num_parameters()
        for own in filter(None, (describe_model(), describe_reward())):
            log.info(own)
        if self.memory_plan.memory_bytes:
            log.info(f"GPU memory: {self.memory_plan}")
        if compile_is_on(settings, ranks.device) and self.not_compiled:
            log.warning(f"not all is compiled, so training is somewhat slower: {self.not_compiled}")
        log.info(
            f"Policy: {num_parameters:,} parameters, trunk in {self.policy.precision}, on "
            f"{ranks}; {self._num_accounts()}; "
            f"{self.transitions_per_step:,} transitions per optimizer step, "
            f"{self.learner.micro_batch_segments} segments per micro-batch; "
            f"{self.flops_per_transition() / 1e9:.3g} GFLOP per transition"
        )
        if settings.optimizer == "muon" and not hidden_matrices(self.policy)[0]:
            log.warning("optimizer=muon moves the head alone: the model has no matrices in self.blocks")
        if shortage := shortage_in(self.env.market, settings, ranks.world_size):
            log.warning(shortage)
        if ranks.device.type == "cpu" and num_parameters > LARGE_MODEL:
            log.warning("no GPU was found: a model of this size takes hours per epoch; try --preset small")
        if self.transitions_per_step < settings.batch_size:
            log.warning(
                f"batch_size={settings.batch_size:,} is more than the {self.transitions_per_step:,} transitions "
                "of an epoch, which make one step; raise envs_per_gpu for a larger one"
            )

    def _num_accounts(self) -> str:
        slots, group = self.settings.envs_per_gpu * self.ranks.world_size, self.env.config.group
        return f"{slots // group.size:,} accounts of {group.size} symbols" if group else f"{slots:,} accounts"

    def _make_policy(self) -> None:
        """Make policy and objective, on every rank with the same initial weights (all ranks)."""
        settings, device = self.settings, self.ranks.device
        sizes = policy_sizes(settings, self.env.market.num_features)
        sizes["trunk"] |= self._kept_sizes
        precision, sharded = precision_on(device, settings.precision), settings.parallel == "fsdp"
        self.policy = new_policy(sizes, precision, settings.seed, self.ranks, sharded)
        self.objective = Objective(self.policy, settings)

    def _after_failure(self) -> None:
        """Undo what a failed dry run leaves: compiled code, and FSDP in the middle of a step (all ranks)."""
        uncompile(self.objective)
        if is_sharded(self.policy):
            self._make_policy()
            gc.collect()  # of the one before, whose hooks refer to it in a circle

    def _dry_run(self, plan: MemoryPlan) -> MemoryPlan:
        """Return the plan that works on this GPU: the given one, or one with half the micro-batch (all ranks).

        Raises:
            DoesNotFit: neither does.
        """
        with contextlib.suppress(torch.OutOfMemoryError):  # gone with everything that its traceback holds
            self._compile_and_run(plan)
            return plan
        log.warning(f"the GPU's memory was full with {plan}; half the micro-batch is tried")
        plan = plan.smaller()
        self._after_failure()
        try:
            self._compile_and_run(plan)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(plan.suggest_fix()) from error
        return plan

    def _compile_and_run(self, plan: MemoryPlan) -> None:
        settings = self.settings
        sizes = plan.micro_batch_segments, settings.context_bars, settings.horizon
        self.policy.trunk.recompute = plan.recompute
        if compile_is_on(settings, self.ranks.device):
            reason = compile_objective(self.objective, *sizes, self.ranks)
            if reason:
                self._after_failure()
                self.policy.trunk.recompute = plan.recompute
            self.not_compiled = (
                reason
                or compile_accounts(self.env, self.policy, self.ranks)
                or compile_hindsight(self.objective, self.env, self.ranks)
            )
        elif self.ranks.device.type == "cuda":
            dry_run(self.objective, *sizes, self.ranks)

    def full_policy(self) -> Policy:
        """Return the unsharded policy (all ranks take part)."""
        learner = self.learner
        if not is_sharded(self.policy):
            return self.policy
        weights = learner.parallel.weights()  # gathered from all ranks
        policy = Policy.from_sizes(self.policy.sizes, self.policy.precision).to(self.ranks.device)
        policy.load_state_dict(weights)
        return policy

    def set_market(self, market: Market) -> None:
        """Continue on fresh bars; accounts whose place still exists keep it."""
        with exit_without_groups():
            self.env.use(market)

    def collect(self) -> Rollout:
        """Play one segment in every environment: one trunk forward, then ``horizon`` account steps.

        The segment of an interrupted update was played before; it is returned unchanged.
        """
        settings = self.settings
        self._stopwatch = Stopwatch(self.ranks.device)
        self.on_phase("rollout")
        self.env.cost_scale = self.progress.cost_scale(settings.cost_ramp, settings.epochs)
        if self._pending_update:
            return self._pending_update[0]
        return play_segment(
            self.env,
            self.policy,
            self.learner.generator,
            self.learner.micro_batch_segments,
            hindsight=settings.advantages == "hindsight",
            # Discounted sums of unit noise have this deviation: the critic's targets are about one.
            reward_scale=math.sqrt(1.0 - settings.gamma**2),
            less_market=settings.reward == "less market",
            feature_noise=settings.feature_noise,
            own_reward=self._own_reward,
            forecaster=self.objective.forecaster,
            stochastic_depth=settings.stochastic_depth,
        )

    def _own_state(self) -> dict[str, Any]:
        state = {"env": self.env.state_dict(), "generator": self.learner.generator.get_state()}
        if self._pending_update:
            rollout, stopped_at = self._pending_update
            state["update"] = stopped_at | {"rollout": rollout.state_dict(), "plan": self._update_plan()}
        return state

    def _update_plan(self) -> list[Any]:
        """Return what must not change during an update."""
        settings, learner = self.settings, self.learner
        sizes = [
            settings.envs_per_gpu,
            settings.horizon,
            learner.minibatch_segments,
            settings.update_passes,
        ]
        more = ["forecasts"] if settings.forecast_coef else []
        return [self.ranks.world_size, self.ranks.device.type, settings.advantages, *sizes, *more]

    def _restore_update(self, states: list[dict[str, Any]]) -> None:
        """Resume an interrupted update, on all ranks or on none (all ranks take part).

        Where ranks or sizes have changed since, the epoch is played again.
        """
        update = states[self.ranks.rank].get("update") if self.ranks.rank < len(states) else None
        if self.ranks.any(update is None or list(update["plan"]) != self._update_plan()):
            return
        assert update is not None
        self._pending_update = Rollout.from_state_dict(update["rollout"], self.ranks.device), update

    def _restore_generator(self, state: Tensor) -> None:
        # Generators of other kinds of devices have states of another length.
        if len(state) == len(self.learner.generator.get_state()):
            self.learner.generator.set_state(state.cpu())

    def flops_per_transition(self) -> float:
        """Count the trunk's FLOPs: a forward in the rollout, a forward and a backward in every pass."""
        trunk, settings = self.policy.trunk, self.settings
        context, horizon = settings.context_bars, settings.horizon
        rollout = trunk.forward_flops(context + horizon + 1, horizon + 1)
        update = 3 * trunk.forward_flops(context + horizon, horizon)
        return (rollout + settings.update_passes * update) / horizon

    def update(
        self, rollout: Rollout, stop_now: Callable[[], bool] = lambda: False
    ) -> dict[str, Tensor | float] | None:
        """Learn from a rollout and count the epoch; see Learner.update (all ranks take part).

        Returns:
            Losses and diagnostics on the device; None if ``stop_now`` interrupted the update. A checkpoint then
            holds the rest of it.
        """
        progress = self.progress
        self._stopwatch.mark()
        self.on_phase("update")
        self.learner.rate_scale = progress.rate_scale
        resume_from = self._pending_update[1] if self._pending_update else None
        losses = self.learner.update(rollout, progress.epoch / self.settings.epochs, stop_now, resume_from)
        stopped_at = self.learner.stopped_at
        self._pending_update = (rollout, stopped_at) if stopped_at else None
        if losses is not None:
            self._stopwatch.mark()
            progress.tick(rollout.num_segments * rollout.horizon * self.ranks.world_size)
        return losses

    def has_diverged(self, metrics: Mapping[str, Any]) -> bool:
        """Whether most optimizer steps of the epoch were skipped because gradients were not finite."""
        settings = self.settings
        steps = settings.update_passes * math.ceil(settings.envs_per_gpu / self.learner.minibatch_segments)
        return bool(metrics["ppo/skipped_steps"] > steps / 2)

    def metrics(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """Bring one epoch's metrics to the host; docs/metrics.md explains the names (all ranks take part)."""
        progress = self.progress
        episodes = self.env.episode_statistics()
        sums = self.ranks.sum(torch.stack([value.double() for value in episodes.values()]))
        total = dict(zip(episodes, sums.tolist(), strict=True))
        rollout_seconds, update_seconds = self._stopwatch.seconds()
        seconds = rollout_seconds + update_seconds
        settings = self.settings
        transitions = settings.envs_per_gpu * settings.horizon * self.ranks.world_size
        decisions, episodes_ended = max(1.0, total["decisions"]), total["episodes"]
        mean_return = total["episode_log_returns"] / max(1.0, episodes_ended)
        figures = {
            "run": progress.run,
            "epoch": progress.epoch,
            "transitions": progress.transitions,
            "rollout/reward_bps": 1e4 * total["rewards"] / decisions,
            "rollout/episodes": int(episodes_ended),
            "rollout/episode_return_percent": 100 * math.expm1(mean_return),
            "rollout/ruined_episodes": int(total["ruins"]),
            "rollout/turnover": total["traded"] / decisions,
            "rollout/cost_scale": self.env.cost_scale,
            "rollout/costs_bps": 1e4 * (total["costs"] + total["borrow_costs"]) / decisions,
            **(
                {"rollout/funding_bps": 1e4 * total["funding"] / decisions}
                if self.env.market.has_funding
                else {}
            ),
            **(
                {"rollout/market_bps": 1e4 * total["market_rewards"] / decisions}
                if settings.reward == "less market"
                else {}
            ),
            **{
                f"rollout/{name}": total[name] / decisions for name in total if name.startswith("in_position")
            },
            **self._exposures(total),
            **{name: float(value) for name, value in losses.items()},
            **self._figures_by_symbol(),
            "perf/rollout_seconds": rollout_seconds,
            "perf/update_seconds": update_seconds,
            "perf/transitions_per_second": transitions / seconds,
            "perf/episodes_per_second": episodes_ended / seconds,
            # Of what a matrix product reaches on as many of these devices.
            "perf/mfu": self._yardstick.share(
                transitions * self.flops_per_transition() / (seconds * self.ranks.world_size)
            ),
        }
        # A shard alone shows nothing; the other ranks wait meanwhile, so not in every epoch.
        due = progress.epoch == 1 or progress.epoch % PLASTICITY_EVERY == 0
        if due and self.ranks.is_first and not is_sharded(self.policy):
            figures |= plasticity(self.policy, fixed_batch(self.env.market))
        if self.ranks.device.type == "cuda":
            figures |= gpu_figures(self.ranks.device)
        return figures

    def _exposures(self, total: Mapping[str, float]) -> dict[str, float]:
        if self.env.config.group is None:
            return {}
        decisions = max(1.0, total["decisions"])
        return {
            "rollout/gross_exposure": total["gross_exposure"] / decisions,
            "rollout/net_exposure": total["net_exposure"] / decisions,
        }

    def _figures_by_symbol(self) -> dict[str, Any]:
        """Find the symbol in which the critic is worst, and count clipped rewards (all ranks take part)."""
        market, by_segment = self.env.market, self.learner.by_segment
        if by_segment is None:
            return {}
        sums = by_segment.new_zeros(3, len(market.symbols))
        numbers = torch.searchsorted(market.offsets, self.env.cursor, right=True) - 1
        errors, decisions, clipped = self.ranks.sum(sums.index_add_(1, numbers, by_segment)).cpu()
        figures: dict[str, Any] = {"rollout/clipped_rewards": int(clipped.sum())}
        # Per decision, as a multiple of that of all other symbols.
        ratios = (errors / decisions) / ((errors.sum() - errors) / (decisions.sum() - decisions))
        ratios = torch.where(errors.isfinite(), ratios.nan_to_num(0.0, 0.0), math.inf)
        worst = int(ratios.argmax())
        if ratios[worst] > 0:
            figures |= {
                "loss/outlying_symbol": market.symbols[worst],
                "loss/outlier_ratio": float(ratios[worst]),
            }
        return figures

    def checkpoint(self, fingerprint: str, metrics: Mapping[str, Any], exam: Mapping[str, Any]) -> Checkpoint:
        """Gather what people use and what the next start needs (all ranks take part).

        Args:
            fingerprint: digest of the run's bars.
            metrics: of the last epoch.
            exam: record of the exam of these weights; dropped in the middle of an update, since exams are of
                whole epochs.
        """
        progress = self.progress
        step = self._pending_update[1]["steps"] if self._pending_update else 0
        return Checkpoint(
            path=Path(self.settings.checkpoint_dir) / name_of(progress.run, progress.epoch, step),
            run=progress.run,
            epoch=progress.epoch,
            step=step,
            transitions=progress.transitions,
            model=self.learner.parallel.weights(),
            model_config=self.policy.sizes,
            symbols=list(self.env.market.symbols),
            features=self.env.market.statistics.state_dict(),
            config=recorded(self.settings),
            data_fingerprint=fingerprint,
            data_cutoff_ns=progress.cutoff_ns,
            trained_until_ns=progress.trained_until_ns,
            metrics=dict(metrics),
            exam={} if step else dict(exam),
            resume=ResumeState(
                clock=progress.state_dict(),
                learner=self.learner.state_dict(),
                ranks=self.ranks.gather(self._own_state()),
            ),
        )
