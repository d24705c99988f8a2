"""Load of this machine: NVIDIA GPUs (NVML), CPU, memory and disk. Shown only; no decision depends on it.

Without an NVIDIA driver there are no GPUs, and no message about it. What a GPU does not report is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from runtime.cores import memory_limit, usable_cores
from runtime.files import free_bytes
from training.checkpoint_names import NUM_RESUME_STATES, RESUME


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    utilization: float | None = None  # 0 to 1
    memory_used: float | None = None  # bytes
    memory_total: float | None = None  # bytes
    power: float | None = None  # W
    temperature: float | None = None  # Celsius


@dataclass(frozen=True)
class Machine:
    """One reading."""

    gpus: tuple[Gpu, ...] = ()
    cpu: float = 0.0  # 0 to 1, over all cores since the last reading
    num_cores: int = 1
    memory_used: float = 0.0  # bytes
    memory_total: float = 0.0  # bytes
    driver: str = ""  # NVIDIA's, "" without one


@dataclass(frozen=True)
class Disk:
    """Disk space for checkpoints, in bytes."""

    free: float | None = None
    checkpoints: float = 0.0
    num_checkpoints: int = 0
    newest: float = 0.0  # the newest checkpoint with its resume state
    newest_state: float = 0.0  # the resume state alone

    def needed(self, keep: int) -> float:
        """Return the bytes of ``keep`` checkpoints like the newest, and the resume states kept beside them."""
        return keep * (self.newest - self.newest_state) + NUM_RESUME_STATES * self.newest_state

    @property
    def is_short(self) -> bool:
        """Whether two more checkpoints do not fit."""
        return self.free is not None and self.newest > 0 and self.free < 2 * self.newest


class Gauges:
    """Reads the machine's load. ``nvml`` is the module pynvml or a stand-in."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._handles: list[Any] = []
        self._names: list[str] = []
        self.driver = ""
        try:
            nvml.nvmlInit()
            self.driver = _text(nvml.nvmlSystemGetDriverVersion())
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            self._names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in self._handles]
        except nvml.NVMLError:  # no driver, or no permission
            self._handles = []
        psutil.cpu_percent()  # starts its interval

    def read(self) -> Machine:
        """Take a reading; about a millisecond per GPU."""
        memory = psutil.virtual_memory()
        return Machine(
            gpus=tuple(self._gpu(i, handle) for i, handle in enumerate(self._handles)),
            cpu=psutil.cpu_percent() / 100,
            num_cores=usable_cores(),
            memory_used=float(memory.total - memory.available),
            memory_total=float(memory.total),
            driver=self.driver,
        )

    def close(self) -> None:
        """Shut NVML down."""
        if self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._handles = []

    def _gpu(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._query(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = self._query(nvml.nvmlDeviceGetPowerUsage, handle)
        return Gpu(
            index=index,
            name=self._names[index],
            utilization=None if rates is None else rates.gpu / 100,
            memory_used=None if memory is None else float(memory.used),
            memory_total=None if memory is None else float(memory.total),
            power=None if power is None else power / 1000,
            temperature=self._query(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _query(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call NVML; None where the GPU (a MIG slice, an old one) does not support it."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def read_disk(checkpoint_dir: Path) -> Disk:
    """Measure the checkpoint folder and the free space of its disk."""
    sizes: dict[str, float] = {}
    states: dict[str, float] = {}
    newest, newest_time = "", -1.0
    try:
        known = free_bytes(checkpoint_dir)
        free = None if known is None else float(known)
        # Not the folders below, such as the demo's: those are of other trainings.
        for path in [*checkpoint_dir.glob("run*.pt"), *(checkpoint_dir / RESUME).glob("run*.pt")]:
            status = path.stat()
            sizes[path.name] = sizes.get(path.name, 0.0) + status.st_size
            if path.parent.name == RESUME:
                states[path.name] = status.st_size
            elif status.st_mtime > newest_time:
                newest, newest_time = path.name, status.st_mtime
    except OSError:  # the folder does not exist yet, or a file was removed meanwhile
        return Disk()
    return Disk(free, sum(sizes.values()), len(sizes), sizes.get(newest, 0.0), states.get(newest, 0.0))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container around this process."""
    total = int(psutil.virtual_memory().total)
    return min(total, memory_limit() or total)
