"""Metrics of training: where an epoch's time goes, whether the network can still learn, what the GPU reports."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pynvml
import torch
import torch.nn.functional as F
from torch import Tensor

from envs.market import Market
from models.own import OwnTrunk
from models.policy import Policy
from models.transformer import Block, Trunk


class Stopwatch:
    """Marks moments on the device's own timeline (CUDA events), or on the host's clock without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        """Add a mark."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between marks; on a GPU this waits until the last mark is reached."""
        if self._cuda:
            self._marks[-1].synchronize()  # type: ignore[union-attr]
        return [_between(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]


class Phases:
    """Measures by the host's clock how long training waits for anything but rollout and update.

    ``on_phase`` is called with the name of every phase that begins.
    """

    NAMES = ("data", "evaluation", "checkpoint")

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self._on_phase = on_phase
        self._seconds = dict.fromkeys(self.NAMES, 0.0)
        self._last = time.perf_counter()

    def now(self, name: str) -> None:
        """Announce a phase whose time is measured on the device."""
        self._on_phase(name)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Measure one of ``NAMES``."""
        self._on_phase(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def figures(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and of all together (``perf/epoch_seconds``)."""
        now = time.perf_counter()
        figures = {f"perf/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        figures["perf/epoch_seconds"] = now - self._last
        self._seconds = dict.fromkeys(self.NAMES, 0.0)
        self._last = now
        return figures


class Yardstick:
    """The fastest that a large matrix product has been on this device: the reference of ``perf/mfu``.

    At the start another program may use the device, so it is measured again in epochs 10, 100, 1000, ... and
    whenever training itself is faster.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._epochs = 0
        self.rate = matmul_rate(device, dtype)  # FLOP/s

    def share(self, rate: float) -> float:
        """Return an epoch's FLOP/s as a share of it, at most 1."""
        self._epochs += 1
        if rate > self.rate or (self._epochs >= 10 and math.log10(self._epochs).is_integer()):
            with contextlib.suppress(torch.OutOfMemoryError):  # training has the memory
                self.rate = max(self.rate, matmul_rate(self._device, self._dtype))
        self.rate = max(self.rate, rate)
        return rate / self.rate


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a square matrix product on this device.

    No product reaches the peaks of data sheets. Takes a fraction of a second.
    """
    size = 8_192 if device.type == "cuda" else 1_024
    # Random: equal numbers flip few bits, so that a GPU draws less power and clocks higher than in training.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        watch = Stopwatch(device)
        torch.mm(left, right)
        watch.mark()
        seconds += watch.seconds()
    return 2 * size**3 / min(seconds)


def _between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event)
    return first.elapsed_time(second) / 1e3


# --- plasticity -------------------------------------------------------------------------------------------
#
# Can the network still learn? Networks that train for long lose plasticity: units fall silent, weights grow,
# features collapse onto few directions. Dormant units: Sokar et al. 2023, arXiv:2302.12902, definition 3.1.
# Effective rank: Roy and Vetterli 2007, EUSIPCO. No random number is drawn and no gradient is kept, so training
# stays the same to the last bit. Shapes: B = segments, S = bars of a segment, D = d_model, U = units of one
# feed-forward layer, n = rows.

NUM_SEGMENTS = 8
BARS_OF_EACH = 32  # rows of the feature matrix per segment
TAU = 0.025  # a unit is dormant below this fraction of its layer's average activation


def fixed_batch(market: Market) -> Tensor:
    """Return segments (B, C + H, F) spread evenly over all possible starts."""
    total = market.starts.sum()
    number = (torch.arange(NUM_SEGMENTS, device=market.device) * total) // NUM_SEGMENTS
    stretch = torch.searchsorted(market.stretch_starts_before, number, right=True) - 1
    first = market.stretch_first[stretch] + number - market.stretch_starts_before[stretch]
    return market.windows(first, market.context_bars + market.horizon)


@torch.no_grad()
def plasticity(policy: Policy, bars: Tensor) -> dict[str, float]:
    """Measure the trunk on ``bars`` (B, S, F); waits for the device, so call it where the host waits anyway."""
    trunk, dormant = policy.trunk, {}
    with policy.autocast(bars.device):
        if isinstance(trunk, OwnTrunk):  # whose units only its author knows
            with torch.compiler.set_stance("force_eager"):
                hidden = trunk(bars)
        else:
            hidden, activity = activations(trunk, bars)
            dormant = {"plasticity/dormant_units": float(dormant_share(activity))}
    features = hidden[:, -BARS_OF_EACH:].reshape(-1, hidden.shape[-1])
    norm = torch.stack([parameter.double().square().sum() for parameter in policy.parameters()]).sum().sqrt()
    return dormant | {
        "plasticity/effective_rank": effective_rank(features),
        "plasticity/weight_norm": float(norm),
    }


def activations(trunk: Trunk, bars: Tensor) -> tuple[Tensor, Tensor]:
    """Run the trunk block by block, never compiled: (B, S, F) -> hidden (B, S, D) and mean |activation| (L, U).

    The same arithmetic as Trunk.forward, which would have to be compiled again for this batch.
    """
    length = bars.shape[1]
    cos, sin = trunk.cos[:length], trunk.sin[:length]
    x = trunk.embed(bars)
    activity = []
    for block in trunk.blocks:
        assert isinstance(block, Block)
        x = x + block.attention(block.attention_norm(x), cos, sin)
        units = F.gelu(block.up(block.feed_forward_norm(x)))
        activity.append(units.abs().float().mean(dim=(0, 1)))
        x = x + block.down(units)
    return trunk.norm(x.float()), torch.stack(activity)


def dormant_share(activity: Tensor, tau: float = TAU) -> Tensor:
    """Return the share of units whose mean |activation| (L, U) is at most ``tau`` of their layer's average."""
    return (activity <= tau * activity.mean(dim=1, keepdim=True)).double().mean()


def effective_rank(features: Tensor) -> float:
    """Return exp(entropy) of the singular values of (n, D), as shares of their sum: 1 to min(n, D); 0 for zeros.

    NaN if features are not finite.
    """
    # The smaller Gram matrix: singular values are the roots of its eigenvalues. On the CPU, where a
    # few hundred rows take milliseconds and no solver is started on the GPU.
    wide = features.double().cpu()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    if not bool(gram.isfinite().all()):
        return float("nan")
    singular = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt()
    if not float(singular.sum()):
        return 0.0
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def gpu_figures(device: torch.device) -> dict[str, float]:
    """Return metrics of this rank's GPU; those that its driver does not report are left out."""
    figures = {"gpu/memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    for name, ask, scale in (
        ("gpu/utilization_percent", torch.cuda.utilization, 1.0),
        ("gpu/power_watts", torch.cuda.power_draw, 1e-3),
        ("gpu/temperature_celsius", torch.cuda.temperature, 1.0),
    ):
        with contextlib.suppress(pynvml.NVMLError, RuntimeError):
            figures[name] = ask(device) * scale
    return figures
