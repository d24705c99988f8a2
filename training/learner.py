"""Learner: updates the policy from a rollout, in micro-batches, identically on every rank.

Shapes: N = segments of this rank's rollout, T = horizon, M = segments of one minibatch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.control import heartbeat
from training.distributed import Ranks
from training.forecasts import FORECAST_FIGURES, rank_correlations
from training.hindsight import hindsight_advantages
from training.integrity import Inspector, Sample, Seal, sample_of
from training.losses import Losses, Objective, Targets, advantages_and_returns
from training.muon import Muon, hidden_matrices
from training.parallel import parallelize
from training.rollout import REWARD_LIMIT, Rollout
from training.validation import minibatch_segments

# Of the critic's targets, whose deviation is about one: a slip that lasts for an hour adds up to more.
RETURN_LIMIT = 32.0


class Learner:
    """Policy, optimizer and the arithmetic between them.

    Weights and optimizer state are float32 masters; the trunk may compute in bf16. A step whose gradient
    is not finite is skipped on all ranks alike, since they all see the same all-reduced gradient.
    """

    def __init__(self, objective: Objective, ranks: Ranks, micro_batch_segments: int) -> None:
        """``micro_batch_segments``: segments of one forward and backward."""
        self.policy = objective.policy
        self._hindsight_is_compiled = objective.hindsight_is_compiled
        self.settings = settings = objective.settings
        self.ranks = ranks
        self.micro_batch_segments = micro_batch_segments
        self.minibatch_segments = minibatch_segments(settings, ranks.world_size)
        self.parallel = parallelize(objective, ranks, settings.parallel == "fsdp")
        self._objective = objective
        self._names = [name for name, _ in objective.learnt()]
        self.optimizer = self._make_optimizer()
        self.optimizer_steps = 0
        self.rate_scale = 1.0  # lowered by a rollback to a checkpoint
        # One stream per rank: ranks shuffle and sample differently.
        self.generator = torch.Generator(ranks.device).manual_seed(settings.seed * 1_000_003 + ranks.rank)
        self.stopped_at: dict[str, Any] | None = None  # where the update was stopped
        self.seal = Seal(self._owned)
        self._inspector = Inspector(objective, ranks)
        self._sample: Sample | None = None  # of the newest rollout
        # (3, N) of the newest rollout's segments: squared errors of the critic, decisions, clipped rewards
        self.by_segment: Tensor | None = None

    def find_corruption(self) -> tuple[str, str]:
        """Compare this rank's numbers with the other ranks' and with each other, see Inspector (all ranks)."""
        return self._inspector.find(self.seal, self._sample)

    def _owned(self) -> dict[str, Tensor]:
        """Return the tensors that only a step changes by name: weights, then moments where there are any."""
        named = list(zip(self._names, self.parallel.parameters, strict=True))
        moments = {
            f"{kind} moment of {name}": state[moment]
            for kind, moment in (("first", "exp_avg"), ("second", "exp_avg_sq"))
            for name, parameter in named
            if moment in (state := self.optimizer.state.get(parameter, {}))
        }
        return {f"weight {name}": parameter for name, parameter in named} | moments

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings, parameters = self.settings, self.parallel.parameters
        num_own = len(list(self.policy.parameters()))
        own, others = parameters[:num_own], parameters[num_own:]
        # Matrices decay, gains and biases do not (the usual rule of transformer training).
        groups = [
            {"params": [p for p in own if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0},
            # Last, so that a training may begin or end to learn forecasts.
            *([{"params": others, "weight_decay": 0.0}] if others else []),
        ]
        adamw: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "fused": True}
        if settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, **adamw)
        pairs = zip(self._objective.learnt(), parameters, strict=True)
        held = {id(parameter): of_this_rank for (_, parameter), of_this_rank in pairs}
        matrices = [[held[id(matrix)] for matrix in part] for part in hidden_matrices(self.policy)]
        dtype = torch.float32 if self.policy.precision == "fp32" else torch.bfloat16
        return Muon(groups, matrices, self.parallel, dtype, **adamw)

    def learning_rate(self, run_fraction: float) -> float:
        """Return the rate now: linear warm-up once, then a cosine down over each run, and up again.

        A function of counters only (warm restarts: Loshchilov and Hutter 2017, arXiv:1608.03983), so that
        it survives restarts.
        """
        settings = self.settings
        warmup = min(1.0, (self.optimizer_steps + 1) / max(1, settings.warmup_steps))
        floor = settings.final_learning_rate_fraction
        cosine = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, run_fraction)))
        return settings.learning_rate * warmup * cosine * self.rate_scale

    def update(
        self,
        rollout: Rollout,
        run_fraction: float,
        stop_now: Callable[[], bool] = lambda: False,
        resume_from: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor | float] | None:
        """Improve the policy on one rollout (all ranks take part).

        Args:
            rollout: this rank's N segments.
            run_fraction: how far the run is, 0 to 1, for the learning rate.
            stop_now: asked before every optimizer step; True stops the update there, on all ranks together.
            resume_from: ``stopped_at`` of the same update, which then takes the remaining steps.

        Returns:
            Diagnostics averaged over ranks and steps, as device scalars (nothing waits for the device); None
            when stopped: ``stopped_at`` holds where, and resuming needs the same rollout.
        """
        targets, explained_variance = self._targets(rollout)
        inputs = rollout.bars, rollout.accounts, targets
        self._sample = sample_of(*inputs, rollout.depth, self.micro_batch_segments)
        statistics = _Statistics(rollout.actions.device, has_forecasts=rollout.ahead is not None)
        self.stopped_at, steps = None, 0
        if resume_from:
            steps = resume_from["steps"]
            statistics.load_state_dict(resume_from["statistics"])
            self.generator.set_state(resume_from["generator"].cpu())
        before_shuffles = self.generator.get_state()
        rate = self.learning_rate(run_fraction)
        for number, rows in enumerate(self._minibatches(rollout.num_segments)):
            if number < steps:
                continue
            if stop_now():
                self.stopped_at = {
                    "steps": number,
                    "generator": before_shuffles,
                    "statistics": statistics.state_dict(),
                }
                return None
            rate = self.learning_rate(run_fraction)
            self._step(rollout, targets, rows, rate, statistics)
            if number == 0:
                statistics.freeze_first()
        return {
            **statistics.average(self.ranks),
            **self._forecast_figures(rollout),
            "ppo/explained_variance": explained_variance,
            "learning_rate": rate,
        }

    def _minibatches(self, num_segments: int) -> Iterator[Tensor]:
        """Yield the segments (M,) at a time, shuffled again for every pass."""
        for _ in range(self.settings.update_passes):
            order = torch.randperm(num_segments, generator=self.generator, device=self.ranks.device)
            yield from order.split(self.minibatch_segments)

    def _step(
        self,
        rollout: Rollout,
        targets: Targets,
        rows: Tensor,
        rate: float,
        statistics: _Statistics,
    ) -> None:
        """Take one optimizer step on the segments ``rows`` (M,), accumulated over micro-batches."""
        num_decisions = rows.numel() * rollout.horizon
        micro_batches = rows.split(self.micro_batch_segments)
        for number, micro in enumerate(micro_batches):
            heartbeat()
            with self.parallel.micro_batch(is_last=number == len(micro_batches) - 1):
                inputs = rollout.bars[micro], rollout.accounts[micro], targets[micro], num_decisions
                more = () if rollout.depth is None else (rollout.depth[micro],)
                losses = self.parallel.objective(*inputs, *more)
                losses.total.backward()
            statistics.add(losses)
        statistics.add_step(*self._apply_gradients(rate))

    def _apply_gradients(self, rate: float) -> tuple[Tensor, Tensor]:
        """Clip, step unless something is not finite, clear; return (gradient norm, 1.0 if skipped)."""
        gradients, norm = self.parallel.gradients()
        skipped = (~torch.isfinite(norm)).float()
        torch._foreach_mul_(gradients, (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The fused kernel leaves weights and moments alone where found_inf is 1: a skip without a host sync.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.seal.check()
        self.optimizer.step()
        self.seal.renew()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return norm, skipped

    def _targets(self, rollout: Rollout) -> tuple[Targets, Tensor]:
        """Return the targets of the update, and the explained variance of the critic."""
        settings = self.settings
        if rollout.hindsight is None:
            advantages, returns = advantages_and_returns(
                rollout.rewards,
                rollout.values,
                rollout.next_value,
                rollout.terminated,
                settings.gamma,
                settings.gae_lambda,
            )
            advantages = self._normalise(_by_volatility(advantages, rollout), rollout.valid)
            advantages = advantages[..., None].expand_as(rollout.log_policy)
            weights = F.one_hot(rollout.actions, advantages.shape[-1]).to(advantages.dtype)
        else:
            advantages, returns = hindsight_advantages(
                rollout.hindsight,
                rollout.valid,
                settings.gamma,
                settings.gae_lambda,
                self._hindsight_is_compiled,
            )
            advantages = self._scale(_by_volatility(advantages, rollout), rollout.valid)
            weights = rollout.log_policy.exp()
        returns = returns.clamp(-RETURN_LIMIT, RETURN_LIMIT)
        self.by_segment = self._sum_up(rollout, returns)
        targets = Targets(rollout.log_policy, weights, advantages, returns, rollout.valid, rollout.ahead)
        return targets, self._explained_variance(rollout, returns)

    def _sum_up(self, rollout: Rollout, returns: Tensor) -> Tensor:
        """Return each segment's squared errors of the critic, decisions, and rewards at their limit, (3, N)."""
        limit = REWARD_LIMIT * math.sqrt(1.0 - self.settings.gamma**2)
        columns = (
            (returns - rollout.values).double().square(),
            torch.ones_like(returns, dtype=torch.float64),
            (rollout.rewards.abs() > 0.999 * limit).double(),
        )
        return torch.stack([torch.where(rollout.valid, column, 0.0).sum(1) for column in columns])

    def _scale(self, advantages: Tensor, valid: Tensor) -> Tensor:
        """Give advantages (N, T, K) a mean square of 1 over all choices, likely or not, of all ranks.

        Their mean under the policy is 0 already. Weighted by the policy instead, they would grow without
        bound as it becomes deterministic.
        """
        weight = valid.to(torch.float64)
        sums = torch.stack((weight.sum(), (weight * advantages.double().square().mean(-1)).sum()))
        count, squares = self.ranks.sum(sums).unbind()
        return (advantages / ((squares / count).sqrt() + 1e-8)).to(advantages.dtype)

    def _normalise(self, advantages: Tensor, valid: Tensor) -> Tensor:
        """Give advantages mean 0 and deviation 1 over the valid decisions of all ranks."""
        weight = valid.to(torch.float64)
        wide = advantages.double()
        sums = torch.stack((weight.sum(), (weight * wide).sum(), (weight * wide.square()).sum()))
        count, total, squares = self.ranks.sum(sums).unbind()
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0.0).sqrt()
        return ((wide - mean) / (deviation + 1e-8)).to(advantages.dtype)

    def _explained_variance(self, rollout: Rollout, returns: Tensor) -> Tensor:
        """One minus the share of the returns' variance that the critic misses, over all ranks."""
        weight = rollout.valid.to(torch.float64)
        target, error = returns.double(), (returns - rollout.values).double()
        sums = torch.stack(
            [weight.sum()] + [(weight * x**power).sum() for x in (target, error) for power in (1, 2)]
        )
        count, target_sum, target_squares, error_sum, error_squares = self.ranks.sum(sums).unbind()
        target_variance = target_squares / count - (target_sum / count).square()
        error_variance = error_squares / count - (error_sum / count).square()
        return 1.0 - error_variance / target_variance.clamp(min=1e-12)

    def _forecast_figures(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return how well the forecasts of the rollout rank what came, a mean over ranks (all ranks)."""
        if rollout.forecasts is None or rollout.ahead is None:
            return {}
        columns = (values.flatten(0, 1).flatten(1) for values in (rollout.forecasts, rollout.ahead))
        means = self.ranks.sum(rank_correlations(*columns)) / self.ranks.world_size
        return dict(zip(FORECAST_FIGURES, means.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs beside the weights, the same for replicated and sharded models (all ranks).

        The generator is this rank's own and not in it.
        """
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = self._moments(optimizer["state"], self.parallel.unshard)
        state = {"optimizer": optimizer, "optimizer_steps": self.optimizer_steps}
        if forecaster := self._objective.forecaster:
            state["forecaster"] = forecaster.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``. Rates and decay come from the settings, not from the file.

        Forecasts that were not learnt before begin fresh; those that are not learnt any more are dropped.
        """
        if (forecaster := self._objective.forecaster) and "forecaster" in state:
            forecaster.load_state_dict(state["forecaster"])
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        ours, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]
        both = [*saved["param_groups"][: len(ours)], *ours[len(saved["param_groups"]) :]]
        kept = {number for group in both for number in group["params"]}
        known = {number: moments for number, moments in saved["state"].items() if number in kept}
        moments = self._moments(self._usable(known), self.parallel.shard)
        self.optimizer.load_state_dict({"param_groups": both, "state": moments})
        for group, configured in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(configured)
        self.optimizer_steps = int(state["optimizer_steps"])
        self.seal.close()

    def _usable(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Mapping[str, Tensor]]:
        """Return the part of a saved state that this optimizer can use; the other one may have written it.

        Muon takes AdamW's first moment of a matrix; AdamW, which needs both, begins matrices of Muon afresh.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        of_muon = self.optimizer.matrices if isinstance(self.optimizer, Muon) else ()
        usable: dict[int, Mapping[str, Tensor]] = {}
        for number, moments in state.items():
            if any(parameters[number] is matrix for matrix in of_muon):
                usable[number] = {name: moments[name] for name in ("step", "exp_avg")}
            elif "exp_avg_sq" in moments:
                usable[number] = moments
        return usable

    def _moments(
        self, state: Mapping[int, Mapping[str, Tensor]], convert: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[int, dict[str, Tensor]]:
        """Convert every tensor of the optimizer's state that is shaped like its parameter."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            number: {name: convert(parameters[number], v) if v.dim() else v for name, v in values.items()}
            for number, values in state.items()
        }


def _by_volatility(advantages: Tensor, rollout: Rollout) -> Tensor:
    """Divide advantages (N, T) or (N, T, K) by the square root of how much their symbol moved just before.

    The best choice of a state stays the best. But most of the noise is in wild minutes, which drowned the others:
    more is learnt of the same bars, on real ones (docs/real_markets.md). Divided by all of it, what calm minutes
    teach would count for as much, though little is to be earned there.
    """
    if rollout.volatility is None:
        return advantages
    divisor = rollout.volatility.sqrt()
    return advantages / (divisor if advantages.dim() == 2 else divisor[..., None])


class _Statistics:
    """Diagnostics of one update, added up on the device."""

    NAMES = (
        "loss/policy",
        "loss/value",
        "loss/entropy",
        "ppo/approx_kl",
        "ppo/clip_fraction",
        "loss/forecast",  # where forecasts are learnt
    )

    def __init__(self, device: torch.device, has_forecasts: bool) -> None:
        num_figures = len(self.NAMES) - (not has_forecasts)
        self.sums = torch.zeros(num_figures, device=device, dtype=torch.float64)
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.first_kl = torch.zeros((), device=device, dtype=torch.float64)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, on the host."""
        return {name: v.cpu() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        device = self.sums.device
        vars(self).update((name, v.to(device) if isinstance(v, Tensor) else v) for name, v in state.items())

    def add(self, losses: Losses) -> None:
        """Add one micro-batch."""
        parts = [losses.policy, losses.value, losses.entropy, losses.approx_kl, losses.clip_fraction]
        parts += [] if losses.forecast is None else [losses.forecast]
        self.sums += torch.stack(parts).detach()

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Add one optimizer step; the norm of a skipped one does not count."""
        self.norm += torch.where(skipped > 0, 0.0, norm)
        self.skipped += skipped
        self.steps += 1

    def freeze_first(self) -> None:
        """Remember the KL of the first minibatch: rollout and update should agree there."""
        self.first_kl = self.sums[self.NAMES.index("ppo/approx_kl")].clone()

    def average(self, ranks: Ranks) -> dict[str, Tensor]:
        """Average over ranks and steps (all ranks take part)."""
        steps = max(1, self.steps)
        means = ranks.sum(torch.cat((self.sums / steps, self.first_kl[None]))) / ranks.world_size
        return {
            **dict(zip((*self.NAMES[: len(self.sums)], "ppo/first_kl"), means.unbind(), strict=True)),
            # Gradients are all-reduced, so these are the same on every rank.
            "ppo/grad_norm": self.norm / (steps - self.skipped).clamp(min=1.0),
            "ppo/skipped_steps": self.skipped,
        }
