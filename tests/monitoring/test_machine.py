"""Readings with NVIDIA's driver, without it, and with a GPU that does not report everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from monitoring.machine import Disk, Gauges, Gpu, read_disk
from tests.monitoring.nvml import Nvml
from training.metrics import gpu_figures, matmul_rate


def test_every_gpu_is_read_in_plain_units() -> None:
    nvml = Nvml()
    gauges = Gauges(nvml)
    machine = gauges.read()
    assert machine.gpus == (
        Gpu(0, "NVIDIA H200", 0.98, 62e9, 141e9, 412.3, 61),
        Gpu(1, "NVIDIA A100-SXM4-80GB", 0.98, 62e9, 141e9, 412.3, None),
    )
    assert nvml.is_up and machine.driver == "570.86"
    gauges.close()
    assert not nvml.is_up and gauges.read().gpus == ()


def test_without_a_driver_there_are_no_gpus_and_no_message(capfd: Any) -> None:
    machine = Gauges(Nvml(has_driver=False)).read()
    assert machine.gpus == ()
    assert 0 <= machine.cpu <= 1 and machine.num_cores >= 1
    assert 0 < machine.memory_used < machine.memory_total
    assert capfd.readouterr() == ("", "")


def test_the_real_library_can_be_opened_and_closed() -> None:
    Gauges().close()  # on a machine without a GPU: silently


def test_the_disk_is_read_with_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert read_disk(folder) == Disk()
    (folder / "resume").mkdir(parents=True)
    (folder / "demo").mkdir()
    for name, length in (
        ("run1_epoch1.pt", 10),
        ("run1_epoch2.pt", 20),
        ("resume/run1_epoch2.pt", 300),
        ("best.pt", 7),
        ("demo/run1_epoch50.pt", 9),  # of another training
    ):
        (folder / name).write_bytes(b"x" * length)
    found = read_disk(folder)
    assert (found.checkpoints, found.num_checkpoints, found.newest) == (330, 2, 320)
    assert found.needed(keep=16) == 16 * 20 + 2 * 300
    assert found.free is not None and found.free > 0 and not found.is_short


def test_a_disk_is_short_when_two_more_checkpoints_do_not_fit() -> None:
    assert Disk(free=199.0, checkpoints=100.0, num_checkpoints=1, newest=100.0).is_short
    assert not Disk(free=200.0, checkpoints=100.0, num_checkpoints=1, newest=100.0).is_short
    assert not Disk(free=0.0).is_short  # nothing saved yet, so the size is unknown
    assert not Disk().is_short


def test_a_metric_that_the_gpu_does_not_report_is_left_out(monkeypatch: Any) -> None:
    import pynvml

    def not_supported(_: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2_000_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", not_supported)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 412_300)
    monkeypatch.setattr(torch.cuda, "temperature", lambda _: 61)
    figures = gpu_figures(torch.device("cpu"))
    assert figures == {
        "gpu/memory_gb": 2.0,
        "gpu/power_watts": pytest.approx(412.3),
        "gpu/temperature_celsius": 61.0,
    }


def test_the_yardstick_of_mfu_multiplies_random_numbers(monkeypatch: Any) -> None:
    # A product of ones flips few bits: a GPU draws less power for it, and runs at clocks that training never sees.
    multiplied, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *pair: (multiplied.append(pair), mm(*pair))[1])
    before = torch.get_rng_state()
    assert matmul_rate(torch.device("cpu"), torch.bfloat16) > 0
    assert torch.equal(torch.get_rng_state(), before)
    for left, right in multiplied:
        assert not torch.equal(left, right)
        for matrix in (left, right):
            assert matrix.dtype == torch.bfloat16 and matrix.float().std() > 0.9
