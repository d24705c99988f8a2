"""What the machine does: its NVIDIA GPUs (NVML), CPU, memory and disk. For the eye, never for a decision.

Without an NVIDIA driver there are no GPUs here and no message about it; what a card does not tell is None.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from training.checkpoint import NUM_RESUME_STATES, RESUME


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine."""

    index: int
    name: str
    utilization: float | None  # 0 to 1
    memory_used: float | None  # bytes
    memory_total: float | None  # bytes
    power: float | None  # W
    power_limit: float | None  # W
    temperature: float | None  # Celsius


@dataclass(frozen=True)
class Machine:
    """One look at the machine."""

    gpus: tuple[Gpu, ...] = ()
    cpu: float = 0.0  # 0 to 1, over all cores since the look before
    num_cores: int = 1
    memory_used: float = 0.0  # bytes
    memory_total: float = 0.0  # bytes


@dataclass(frozen=True)
class Disk:
    """Room for checkpoints, bytes. ``newest`` is the size of the newest checkpoint with its resume state."""

    free: float | None = None
    checkpoints: float = 0.0
    num_checkpoints: int = 0
    newest: float = 0.0
    newest_state: float = 0.0  # the share of it that is the resume state

    def needed(self, keep: int) -> float:
        """Return the bytes of ``keep`` such checkpoints, with the resume states that stay beside them."""
        return keep * (self.newest - self.newest_state) + NUM_RESUME_STATES * self.newest_state

    @property
    def is_short(self) -> bool:
        """Whether two more checkpoints do not fit."""
        return self.free is not None and self.newest > 0 and self.free < 2 * self.newest


class Gauges:
    """Looks at the machine. ``nvml`` is the module pynvml, or one that speaks like it."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._handles: list[Any] = []
        self._names: list[str] = []
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            self._names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in self._handles]
        except nvml.NVMLError:  # no driver, or no right to ask it
            self._handles = []
        psutil.cpu_percent()  # begins to count

    def read(self) -> Machine:
        """Look now; takes about a millisecond per GPU."""
        memory = psutil.virtual_memory()
        return Machine(
            gpus=tuple(self._gpu(i, handle) for i, handle in enumerate(self._handles)),
            cpu=psutil.cpu_percent() / 100,
            num_cores=psutil.cpu_count() or 1,
            memory_used=float(memory.total - memory.available),
            memory_total=float(memory.total),
        )

    def close(self) -> None:
        """Let NVML go."""
        if self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._handles = []

    def _gpu(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return Gpu(
            index=index,
            name=self._names[index],
            utilization=None if rates is None else rates.gpu / 100,
            memory_used=None if memory is None else float(memory.used),
            memory_total=None if memory is None else float(memory.total),
            power=None if power is None else power / 1000,
            power_limit=None if limit is None else limit / 1000,
            temperature=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Return the answer; None where the card (a MIG slice, an old one) does not tell."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def disk(checkpoint_dir: Path) -> Disk:
    """Look at the folder of checkpoints and at the room left beside it."""
    sizes: dict[str, float] = {}
    states: dict[str, float] = {}
    newest, newest_time = "", -1.0
    try:
        free = float(shutil.disk_usage(checkpoint_dir).free)
        for path in checkpoint_dir.rglob("run*.pt"):
            status = path.stat()
            sizes[path.name] = sizes.get(path.name, 0.0) + status.st_size
            if path.parent.name == RESUME:
                states[path.name] = status.st_size
            elif status.st_mtime > newest_time:
                newest, newest_time = path.name, status.st_mtime
    except OSError:  # the folder is not there yet, or a file was removed between two looks
        return Disk()
    return Disk(free, sum(sizes.values()), len(sizes), sizes.get(newest, 0.0), states.get(newest, 0.0))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
