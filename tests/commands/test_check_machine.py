"""What ``check`` says of the machine: devices, memory, disks and libraries."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands.check import machine
from commands.check.report import Line
from continuous_training import PRESETS, Settings
from data_sources.bars import DAY_NS
from data_sources.flow import SPARE_BYTES, FlowPlan
from data_sources.lake.lake import Lake
from data_sources.vendors.binance_archive import months
from runtime.launch import Launch
from tests.data_sources.bar_tables import as_format_1, walk
from tests.training.checkpoints import NOW, untrained
from training.checkpoint import Checkpoint
from training.data_feed import data_request
from training.devices import Devices, SeenGpu
from training.memory import MemoryNeeds, num_parameters, plan

GB, GIB = 10**9, 2**30
FULL = Settings()
SMALL = Settings(**PRESETS["small"])
CPU = Devices(1, text="on the CPU")
Usage = namedtuple("Usage", "total used free")


def gpus(*gib: int) -> Devices:
    """Return GPUs of these sizes."""
    found = tuple(SeenGpu(i, "H100", (9, 0), size * GIB) for i, size in enumerate(gib))
    return Devices(len(found), found, "on H100")


def memory_line(found: Devices, settings: Settings, ram: float = 16 * GIB, num_ranks: int = 1) -> Line:
    launch = Launch(num_ranks=num_ranks)
    return machine.check_memory(found, int(ram), settings, request_of(settings), launch)


def request_of(settings: Settings) -> Any:
    return data_request(settings, NOW)


def mended_by(text: str, settings: Settings) -> Settings:
    """Change the one setting that the advice names."""
    found = re.search(r": set (\w+) to (\d+)", text)
    assert found, text
    return replace(settings, **{found[1]: int(found[2])})


def test_memory_that_is_too_small_is_an_error_and_its_fix_fits() -> None:
    large = gpus(80)
    fine = memory_line(large, FULL)
    assert fine.level == "OK" and "the GPU has 80.0 GiB" in fine.text
    few = gpus(8, 80)
    line = memory_line(few, FULL)
    assert (line.level, line.code) == ("error", 4)
    mended = mended_by(line.text, FULL)
    assert memory_line(few, mended).level == "OK", line.text
    many = replace(FULL, micro_batch_segments=128)
    middle = gpus(24)
    line = memory_line(middle, many)
    assert line.level == "warning" and line.text.endswith("micro_batch_segments=128 would not fit")
    crowded = replace(SMALL, stocks=("top:3000",), binance_pairs=())
    line = memory_line(CPU, crowded)
    assert line.code == 4 and "set history_days to " in line.text
    fewer = mended_by(line.text, crowded)
    assert memory_line(CPU, fewer).level == "OK"


def test_memory_is_shared_by_the_processes_of_a_machine_without_gpus() -> None:
    simulated = replace(SMALL, sources=("simulated",))
    need = plan(
        MemoryNeeds.of(
            simulated, machine.num_bars(request_of(simulated)) * machine.bar_bytes(simulated), 1, "fp32"
        ),
        None,
    )
    ram = 1.5 * need.needed_bytes
    assert memory_line(CPU, simulated, ram).level == "OK"
    four = memory_line(CPU, simulated, ram, num_ranks=4)
    assert four.code == 4 and "the machine's part for one of 4 processes has" in four.text
    assert memory_line(CPU, simulated, 1.05 * need.needed_bytes).level == "warning"


@pytest.mark.parametrize(
    ("found", "settings", "level", "expected"),
    [
        (gpus(80), FULL, "OK", "trains on H100"),
        (CPU, FULL, "warning", "trains on the CPU: an epoch of this model takes hours there; use --preset small"),
        (CPU, SMALL, "OK", "trains on the CPU"),
    ],
)  # fmt: skip
def test_the_device_is_named(found: Devices, settings: Settings, level: str, expected: str) -> None:
    (line,) = machine.check_devices(found, settings)
    assert (line.level, line.text) == (level, expected)


def test_the_parameters_are_those_of_the_policy(tmp_path: Path) -> None:
    saved = Checkpoint.read(untrained(tmp_path))
    assert num_parameters(Settings(**saved.config)) == sum(weight.numel() for weight in saved.model.values())
    assert num_parameters(FULL) == pytest.approx(604e6, rel=0.01)


def test_disks_that_are_too_small_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for free, levels in (
        (100, ["OK", "OK", "OK"]),
        (20, ["warning", "OK", "OK"]),
        (5, ["error", "OK", "warning"]),
        (0, ["error", "error", "warning"]),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(100 * GB, 0, free * GB))
        found = list(machine.check_disks(FULL, request_of(FULL)))
        assert [line.level for line in found] == levels, free
        assert {line.code for line in found if line.level == "error"} <= {4}
    assert "lower --keep-checkpoints" not in found[0].text and ": free 7.26 GB more" in found[0].text
    assert found[1].text.startswith("lake: 0 B so far, at most 1.27 GB to fetch, then 12.2 MB a week")
    assert found[2].text.startswith("features: at most 2.03 GB a run, of which 4 are kept")


def test_order_flow_that_is_missing_is_said_with_the_disk_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = replace(FULL, sources=("binance",), binance_pairs=("BTCUSDT",), data_dir=str(tmp_path))
    lake, request = Lake(tmp_path), request_of(settings)
    (month,) = months(request.start_ns, request.start_ns + 1)
    bars = walk("BTCUSDT", month.end_ns - DAY_NS, 1440)
    span = {"start_ns": month.start_ns, "end_ns": month.end_ns, "now_ns": request.end_ns}
    lake.write("binance", "BTCUSDT", month.name, bars, key="k", version="v", symbols=["BTCUSDT"], **span)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100 * GB))
    assert not [line for line in machine.check_disks(settings, request) if "order flow" in line.text]
    as_format_1(lake, "binance", "BTCUSDT")
    *_, line = machine.check_disks(settings, request)
    assert (line.topic, line.level, line.code) == ("disk", "OK", 0)
    assert line.text == f"{FlowPlan(1, 1440)}; 100 GB are free"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, SPARE_BYTES))
    *_, line = machine.check_disks(settings, request)
    assert (line.level, line.code) == ("warning", 0)
    assert line.text.endswith("; 4.29 GB are free: it waits until there is room, or free 11.5 kB more")


def test_libraries_are_compared_with_the_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "INSTALLED_TORCH", tmp_path / "none")
    (line,) = machine.check_versions()
    assert line.level == "OK"
    file = tmp_path / "requirements_simple.txt"
    file.write_text("# libraries\ntorch>=99\nnumpy>=1.0  # fine\nno-such-library>=1\n")
    old, missing = machine.check_versions(file)
    assert (old.level, old.code) == ("warning", 0) and old.text.startswith("torch>=99 is wanted, ")
    assert (missing.level, missing.code) == ("error", 1)
    assert missing.text == (
        "no-such-library>=1 is not installed: python -m pip install -r requirements_simple.txt"
    )
    stamp = tmp_path / "installed-torch"
    stamp.write_text("torch==99+cu126 (cu126)\ntorch>=2\n")
    monkeypatch.setattr(machine, "INSTALLED_TORCH", stamp)
    assert [line.topic for line in machine.check_versions(file) if "torch" in line.text] == []
    (unread,) = machine.check_versions(tmp_path / "gone.txt")
    assert unread.level == "warning" and unread.text.endswith("cannot be read: No such file or directory")
