"""What epoch.py leaves out, of a training on a GPU: host syncs, kernels, attention, the exam's share, memory.

    python benchmarks/gpu_probe.py                     # the full preset; any flag of the training
    python benchmarks/gpu_probe.py --kernels FILE      # and a table of the kernels by time

On a CPU only the exam's share is measured. The market is epoch.py's.
"""

from __future__ import annotations

import collections
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.env_throughput import market_of
from commands.cli import command_from
from continuous_training import PRESETS, Settings
from data_sources.bars import DAY_NS
from evaluation.exam import examine
from training import distributed
from training.memory import plan_memory
from training.progress import TrainingProgress
from training.trainer import Trainer

NEVER_NS = 2**62
ROOT = Path(__file__).resolve().parent.parent


def probe(
    settings: Settings,
    bars: Annotated[int, typer.Option(help="bars of each symbol")] = 60_000,
    symbols: Annotated[int, typer.Option(help="symbols of the market")] = 32,
    exam_days: Annotated[int, typer.Option(help="days that the exam walks")] = 14,
    kernels: Annotated[Path | None, typer.Option(help="write a table of the kernels by time")] = None,
) -> None:
    """Train some epochs on one device, and report what they ask of it."""
    with distributed.start() as ranks:
        market = market_of(bars, symbols, ranks.device, settings.horizon, settings.context_bars)
        plan = plan_memory(settings, market.num_bytes, ranks)
        start = time.perf_counter()
        trainer = Trainer(market, settings, ranks, plan, TrainingProgress(run=2))
        print(
            f"prepared in {time.perf_counter() - start:.0f} s, not compiled: {trainer.not_compiled or 'nothing'}"
        )

        def epoch() -> None:
            trainer.update(trainer.collect())

        for _ in range(2):
            epoch()
        is_cuda = ranks.device.type == "cuda"
        if is_cuda:
            print(f"host syncs of an epoch: {_syncs_of(epoch) or 'none'}")
            print(f"attention: {_attention(settings, trainer.policy.dtype)}")
            _print_enqueuing(epoch)
        _print_exam_share(trainer, exam_days, epoch)
        if is_cuda:
            _print_memory(trainer)
            _print_kernels(epoch, kernels)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _sync_warnings() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _syncs_of(epoch: Callable[[], None]) -> dict[str, int]:
    """Count the places of our code where an epoch waits for the GPU."""
    places: collections.Counter[str] = collections.Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
            ours = [frame for frame in frames if frame.filename != __file__ and ".venv" not in frame.filename]
            places[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"] += 1

    _wait()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        with _sync_warnings():
            epoch()
    return dict(places)


def _attention(settings: Settings, dtype: torch.dtype) -> str:
    """Return the kernel that torch chooses for the trunk's attention."""
    shape = (
        8,
        settings.num_heads,
        settings.context_bars + settings.horizon,
        settings.d_model // settings.num_heads,
    )
    values = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    return type(F.scaled_dot_product_attention(values, values, values, is_causal=True).grad_fn).__name__


def _print_enqueuing(epoch: Callable[[], None]) -> None:
    """A host that is ready long before the device keeps it busy."""
    _wait()
    start = time.perf_counter()
    epoch()
    enqueued = time.perf_counter() - start
    _wait()
    print(f"an epoch: enqueued after {enqueued:.3f} s, done after {time.perf_counter() - start:.3f} s")


def _print_exam_share(trainer: Trainer, days: int, epoch: Callable[[], None]) -> None:
    market, every = trainer.env.market, trainer.settings.checkpoint_every
    start = time.perf_counter()
    examine(
        trainer.policy,
        market,
        trainer.env.config,
        market.symbols,
        int(market.open_time.max()) - days * DAY_NS,
        NEVER_NS,
        chunk_segments=min(trainer.learner.micro_batch_segments, trainer.env.config.num_envs),
        compiled=trainer.env.compiled,
    )
    exam = time.perf_counter() - start
    start = time.perf_counter()
    epoch()
    _wait()
    training = every * (time.perf_counter() - start)
    print(
        f"an exam of {days} days without a champion: {exam:.1f} s, {exam / (exam + training):.1%} of the time "
        f"with one every {every} epochs"
    )


def _print_memory(trainer: Trainer) -> None:
    peak, planned = torch.cuda.max_memory_allocated(), trainer.memory_plan.needed_bytes
    print(
        f"memory: peak {peak / 2**30:.1f} GiB, reserved {torch.cuda.max_memory_reserved() / 2**30:.1f}, "
        f"planned {planned / 2**30:.1f}: {peak / planned:.0%}"
    )


def _print_kernels(epoch: Callable[[], None], file: Path | None) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        epoch()
        _wait()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    print(f"kernels and copies of an epoch: {len(kernels):,}, {busy:.3f} s")
    if file:
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90
        )
        file.write_text(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command_from(Settings, PRESETS, probe))
    app()
