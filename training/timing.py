"""Where an epoch's time goes, measured without making the host wait for the device."""

from __future__ import annotations

import time

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
