"""A stand-in for pynvml: two GPUs, of which the second does not report everything."""

# ruff: noqa: N802 - the names are those of pynvml

from __future__ import annotations

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class Nvml:
    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, has_driver: bool = True) -> None:
        self.has_driver = has_driver
        self.is_up = False

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise NVMLError("NVML Shared Library Not Found")
        self.is_up = True

    def nvmlShutdown(self) -> None:
        self.is_up = False

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return b"570.86"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return (b"NVIDIA H200", "NVIDIA A100-SXM4-80GB")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=62e9, total=141e9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=98)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 412_300

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        if handle == 1:
            raise NVMLError("Not Supported")
        return 61
