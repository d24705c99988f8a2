"""Where an epoch's time goes, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Marks moments on the device's own timeline (CUDA events), or on the host's clock without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        """Note this moment."""
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
    """How long training waits for what is neither rollout nor update, by the host's clock.

    Args:
        tell: told which phase begins, for whoever watches.
    """

    NAMES = ("data", "evaluation", "checkpoint")

    def __init__(self, tell: Callable[[str], None] = lambda _: None) -> None:
        self._tell = tell
        self._seconds = dict.fromkeys(self.NAMES, 0.0)
        self._told = time.perf_counter()

    def now(self, name: str) -> None:
        """Say that a phase begins whose time is measured elsewhere, on the device."""
        self._tell(name)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Measure one of ``NAMES``."""
        self._tell(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def figures(self) -> dict[str, float]:
        """Return the seconds of each since the last call, and of everything (``perf/epoch_seconds``)."""
        now = time.perf_counter()
        figures = {f"perf/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        figures["perf/epoch_seconds"] = now - self._told
        self._seconds = dict.fromkeys(self.NAMES, 0.0)
        self._told = now
        return figures


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many floating-point operations per second a square matrix product reaches here.

    The yardstick for how well the training uses the device: no table of data sheets, which promise what no
    product reaches. Takes a fraction of a second.
    """
    size = 8_192 if device.type == "cuda" else 1_024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
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
