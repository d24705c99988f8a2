"""GPU memory, planned before training starts: it fits, or an error names the setting to change.

A plan is the same after every restart on the same kind of GPU, unless other programs use its memory: the
micro-batch decides how gradients round.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from envs.ahead import HORIZONS
from envs.features import chosen_features
from models.policy import Policy, precision_on
from models.transformer import Trunk
from training.distributed import Ranks
from training.model_checks import OwnNeeds, needs_of
from training.validation import minibatch_segments, policy_sizes

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

STATE_BYTES = 16  # per parameter: float32 weight, gradient and the optimizer's two moments
# Per parameter: what autocast makes of it while a forward and backward use it; in fp8 one at a time is rounded.
COPY_BYTES = {"fp8": 0, "bf16": 2, "fp32": 0}
BUCKET_BYTES = 4  # per parameter: DDP averages gradients in memory of its own
# Kept for the backward, per unit of width, layer and bar. On a CPU: tests/training/test_memory.py counts them.
ACTIVATION_BYTES = {"fp8": 54, "bf16": 60, "fp32": 86}
# On a GPU, whose attention and norms keep less, compiled or not: tests/nullgpu compares the plan with the peak.
GPU_ACTIVATION_BYTES = {"fp8": 30, "bf16": 36, "fp32": 72}
# Per unit of width and bar: head and losses, gradients on their way.
GPU_LAST_BYTES = {"fp8": 24, "bf16": 24, "fp32": 48}
# Of a number that goes into a layer; recomputing starts from it.
INPUT_BYTES = {"fp8": 2, "bf16": 2, "fp32": 4}
USABLE = 0.9  # of a GPU's memory: CUDA itself and the allocator's rounding take the rest
MOST_SEGMENTS = 128  # a GPU is busy long before that
FEWEST_SEGMENTS = 4  # with fewer, recomputing blocks is cheaper


class DoesNotFit(Exception):
    """No micro-batch is small enough; the text names the largest part and the setting to change."""


@dataclass(frozen=True)
class MemoryNeeds:
    """What training needs of one rank's memory."""

    num_parameters: int
    d_model: int
    num_layers: int
    context_bars: int
    horizon: int
    envs_per_gpu: int
    minibatch_segments: int
    num_positions: int
    precision: str  # of the trunk
    market_bytes: int
    num_heads: int = 1
    num_inputs: int = 0  # of the transformer's first layer, per bar
    num_forecasts: int = 0
    shards: int = 1  # ranks among which the trunk's weights are divided
    replicas: int = 1  # ranks that hold all weights, and average their gradients
    own: OwnNeeds | None = None  # of a model of one's own; its activations are never computed twice
    # The setting that decides how many bars there are, and its value.
    bars_setting: tuple[str, int] = ("history_days", 1)

    @staticmethod
    def of(settings: Settings, market_bytes: int, world_size: int, precision: str) -> MemoryNeeds:
        """Add up what training with these settings needs of one GPU."""
        bars_setting = "start_date" if settings.start_date else "history_days"
        if "simulated" in settings.sources:
            bars_setting = "simulated_symbols"
        policy = policy_without_memory(settings)
        return MemoryNeeds(
            num_parameters=num_parameters(settings),
            d_model=settings.d_model,
            num_layers=settings.num_layers,
            context_bars=settings.context_bars,
            horizon=settings.horizon,
            envs_per_gpu=settings.envs_per_gpu,
            minibatch_segments=minibatch_segments(settings, world_size),
            num_positions=len(settings.positions),
            precision=precision,
            market_bytes=market_bytes,
            num_heads=settings.num_heads,
            num_inputs=policy.trunk.embed.in_features if isinstance(policy.trunk, Trunk) else 0,
            num_forecasts=num_forecasts(settings),
            shards=world_size if settings.parallel == "fsdp" else 1,
            replicas=1 if settings.parallel == "fsdp" else world_size,
            own=needs_of(policy, settings.context_bars + settings.horizon),
            bars_setting=(
                bars_setting,
                getattr(settings, bars_setting) if bars_setting != "start_date" else 0,
            ),
        )

    def with_width(self, d_model: int) -> MemoryNeeds:
        """Return the needs with a model of another width."""
        if self.own:
            share = d_model / self.d_model
            own = OwnNeeds(
                trunk_parameters=int(self.own.trunk_parameters * share**2),
                block_parameters=int(self.own.block_parameters * share**2),
                segment_bytes=int(self.own.segment_bytes * share),
            )
            less = self.own.trunk_parameters - own.trunk_parameters
            return replace(self, d_model=d_model, num_parameters=self.num_parameters - less, own=own)
        less = 12 * self.num_layers * (self.d_model**2 - d_model**2)
        return replace(self, d_model=d_model, num_parameters=self.num_parameters - less)

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments; with shards two whole blocks too, with replicas buckets."""
        held, copied = self._held_parameters, self.num_parameters
        if self.shards > 1:
            copied = 2 * self._block_parameters
            held += copied
        return held * STATE_BYTES + copied * COPY_BYTES[self.precision] + self._bucket_bytes

    @property
    def _bucket_bytes(self) -> int:
        return self.num_parameters * BUCKET_BYTES if self.replicas > 1 else 0

    @property
    def _block_parameters(self) -> int:
        return self.own.block_parameters if self.own else 12 * self.d_model**2

    @property
    def _held_parameters(self) -> int:
        # Of this rank between two updates.
        if self.own and self.shards > 1:
            trunk = self.own.trunk_parameters
        else:
            trunk = self.num_layers * self._block_parameters if self.shards > 1 else 0
        return (self.num_parameters - trunk) + trunk // self.shards

    @property
    def exam_bytes(self) -> int:
        """All that an exam needs of a rank: it has no gradients, but the champion, and with shards all weights."""
        copies = 2 if self.shards > 1 else 1
        weights = self._held_parameters * (STATE_BYTES - 4) + copies * 4 * self.num_parameters
        return weights + self._bucket_bytes + self.bars_bytes + self.rollout_bytes

    @property
    def rollout_bytes(self) -> int:
        """Everything that a rollout keeps of its decisions, and their valuation in float64."""
        width = min(256, self.d_model)
        # Forecasts and what came: both, and what they are ranked by in float64.
        per_decision = 8 * width + 32 * self.num_positions**2 + 512 + 128 * self.num_forecasts
        return self.envs_per_gpu * (self.horizon + 1) * per_decision

    @property
    def bars_bytes(self) -> int:
        """Bars of two runs: while one begins, those of the last one are still there."""
        return 2 * self.market_bytes

    @property
    def fixed_bytes(self) -> int:
        """All but the activations."""
        return self.state_bytes + self.bars_bytes + self.rollout_bytes

    def segment_bytes(self, recompute: bool, on_gpu: bool = True) -> int:
        """Activations of one segment of a micro-batch."""
        last = GPU_LAST_BYTES[self.precision] if on_gpu else 0
        if self.own:  # counted in float32; bf16 keeps less
            return self.own.segment_bytes + last * self.d_model * (self.context_bars + self.horizon)
        block = (GPU_ACTIVATION_BYTES if on_gpu else ACTIVATION_BYTES)[self.precision]
        blocks = (
            self.num_layers * INPUT_BYTES[self.precision] + block if recompute else self.num_layers * block
        )
        of_a_bar = self.d_model * (blocks + last) + self.num_inputs * INPUT_BYTES[self.precision]
        return (self.context_bars + self.horizon) * of_a_bar


@dataclass(frozen=True)
class MemoryPlan:
    """How training fits into the memory."""

    needs: MemoryNeeds
    memory_bytes: int | None  # of the GPU; None on a CPU, where nothing is planned
    micro_batch_segments: int
    recompute: bool = False  # blocks are recomputed in the backward pass instead of kept
    on_gpu: bool = True

    @property
    def activation_bytes(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch_segments * self.needs.segment_bytes(self.recompute, self.on_gpu)

    @property
    def training_bytes(self) -> int:
        """All that an update needs."""
        return self.needs.fixed_bytes + self.activation_bytes

    @property
    def needed_bytes(self) -> int:
        """All that training needs, exams included: one that does not fit is left out."""
        return max(self.training_bytes, self.needs.exam_bytes)

    def smaller(self) -> MemoryPlan:
        """Return the plan with half the micro-batch, after it did not fit.

        Raises:
            DoesNotFit: it is one segment already.
        """
        if self.micro_batch_segments == 1:
            raise DoesNotFit(self.suggest_fix())
        fewer = _largest_divisor(_common(self.needs), self.micro_batch_segments // 2)
        return replace(self, micro_batch_segments=fewer)

    def __str__(self) -> str:
        needs = self.needs
        text = (
            f"{_gib(self.training_bytes)}: weights and optimizer {_gib(needs.state_bytes)}, bars "
            f"{_gib(needs.bars_bytes)}, rollout {_gib(needs.rollout_bytes)}, activations "
            f"{_gib(self.activation_bytes)} for {self.micro_batch_segments} segments"
        )
        if self.recompute:
            text += ", computed twice to save memory"
        if needs.exam_bytes > self.training_bytes:
            text += f"; an exam {_gib(needs.exam_bytes)}"
        return text

    def suggest_fix(self, place: str = "GPU") -> str:
        """Return what needs how much memory, and one setting to change with a value that fits."""
        needs, have = self.needs, self.memory_bytes or 0
        parts = {
            "bars": needs.bars_bytes,
            "rollout": needs.rollout_bytes,
            "activations": self.activation_bytes,
            "state": needs.state_bytes,
        }
        largest = max(parts, key=lambda name: parts[name])
        left = USABLE * have - (self.training_bytes - parts[largest])
        # If the other parts alone are too large: a step in the right direction.
        share = left / parts[largest] if left > 0 else 0.5 * have / self.training_bytes
        name, value = needs.bars_setting
        if largest == "bars" and name == "start_date":
            fix = f"choose a later start_date, so that {share:.0%} of the days are left"
        elif largest == "bars":
            fix = f"set {name} to {max(1, int(value * share))}"
        elif largest == "rollout":
            fix = f"set envs_per_gpu to {max(1, int(needs.envs_per_gpu * share))}"
        elif largest == "activations" and self.micro_batch_segments > 1:
            fix = f"set micro_batch_segments to {max(1, int(self.micro_batch_segments * share))}"
        elif largest == "activations":
            fix = f"set horizon to {max(1, int(needs.horizon * share))}"
        else:
            fix = f"set d_model to {self._widest()}"
            if needs.shards == 1 and place == "GPU":
                fix += ", or with several GPUs parallel to fsdp"
        return f"it needs {self}; the {place} has {_gib(have)}: {fix}"

    def _widest(self) -> int:
        """Return the widest model that fits, of as many layers and heads."""
        step, room = 2 * self.needs.num_heads, USABLE * (self.memory_bytes or 0)
        narrower = range(self.needs.d_model - step, step, -step)
        plans = (replace(self, needs=self.needs.with_width(width)) for width in narrower)
        return next((plan.needs.d_model for plan in plans if plan.training_bytes <= room), step)


def plan_memory(settings: Settings, market_bytes: int, ranks: Ranks) -> MemoryPlan:
    """Plan each rank's memory, all ranks alike; warns if other programs use its GPU (all ranks take part).

    Each rank finds what fits its own GPU; all take the smallest micro-batch, and recompute blocks if any must.
    Ranks that gather shards of weights do so once per micro-batch: other numbers of them would be a hang.

    Raises:
        DoesNotFit: on every rank, if on one no micro-batch is small enough.
    """
    memory_bytes = gpu_memory(ranks.device) if ranks.device.type == "cuda" else None
    precision = precision_on(ranks.device, settings.precision)
    needs = MemoryNeeds.of(settings, market_bytes, ranks.world_size, precision)
    chosen, refusal = None, ""
    try:
        chosen = plan(needs, memory_bytes, settings.micro_batch_segments)
    except DoesNotFit as error:
        refusal = str(error)
    if ranks.any(chosen is None):
        refusals = enumerate(ranks.gather(refusal))
        rank, refusal = next((rank, reason) for rank, reason in refusals if reason)
        raise DoesNotFit(refusal if ranks.world_size == 1 else f"on rank {rank}, {refusal}")
    assert chosen is not None
    smallest = ranks.min(chosen.micro_batch_segments)
    return replace(chosen, micro_batch_segments=smallest, recompute=ranks.any(chosen.recompute))


def plan(needs: MemoryNeeds, memory_bytes: int | None, micro_batch_segments: int | None = None) -> MemoryPlan:
    """Choose the largest micro-batch that fits, and recompute blocks where only a few segments would.

    Args:
        needs: of training.
        memory_bytes: of the GPU; None on a CPU, where larger micro-batches only fall out of the cache.
        micro_batch_segments: the setting; kept if it fits.

    Raises:
        DoesNotFit: not even one segment does.
    """
    most = micro_batch_segments or (MOST_SEGMENTS if memory_bytes else 16)
    if memory_bytes is None:
        segments = micro_batch_segments or _largest_divisor(_common(needs), most)
        return MemoryPlan(needs, None, segments, on_gpu=False)
    left = USABLE * memory_bytes - needs.fixed_bytes
    for recompute in (False,) if needs.own else (False, True):
        fitting = int(left // needs.segment_bytes(recompute))
        is_last_way = recompute or needs.own is not None
        if fitting >= min(most, FEWEST_SEGMENTS) or (is_last_way and fitting >= 1):
            if micro_batch_segments and fitting >= micro_batch_segments:
                return MemoryPlan(needs, memory_bytes, micro_batch_segments, recompute)
            segments = _largest_divisor(_common(needs), min(most, fitting))
            return MemoryPlan(needs, memory_bytes, segments, recompute)
    raise DoesNotFit(MemoryPlan(needs, memory_bytes, 1, recompute=needs.own is None).suggest_fix())


def num_parameters(settings: Settings) -> int:
    """Count the weights that are learnt without allocating them."""
    heads = num_forecasts(settings) * (settings.d_model + 1)
    return policy_without_memory(settings).num_parameters() + heads


def policy_without_memory(settings: Settings) -> Policy:
    """Make a new policy on the device meta, where weights have shapes only."""
    with torch.device("meta"):
        return Policy.from_sizes(policy_sizes(settings, len(chosen_features(settings.features))))


def num_forecasts(settings: Settings) -> int:
    """Return how many forecasts of the market ahead are learnt at every decision."""
    return 2 * len(HORIZONS) if settings.forecast_coef else 0


def gpu_memory(device: torch.device) -> int:
    """Return the bytes of a GPU to plan with; warns if other programs hold some of them."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if free >= USABLE * total:
        return total
    log.warning(
        f"other programs hold {_gib(total - free)} of the GPU's {_gib(total)}: training uses the rest"
    )
    return int(free / USABLE)


def _common(needs: MemoryNeeds) -> int:
    """Return the number that micro-batches should divide: compiled code knows one size."""
    return math.gcd(needs.minibatch_segments, needs.envs_per_gpu)


def _largest_divisor(number: int, most: int) -> int:
    """Return it, or ``most`` if all divisors are much smaller: then the last micro-batch has another size."""
    largest = max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)
    return largest if 2 * largest > min(number, most) else most


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
