"""What is read of NVIDIA's driver, with its tool and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime.gpus import Driver, hides_gpus, named_gpus, read_capabilities, read_driver
from tests.runtime.machines import add_nvidia_smi, load_driver, use_only, write_tool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for nvidia-smi")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_only(monkeypatch, tmp_path)
    return tmp_path


def test_the_tool_lists_gpus_and_their_slices(here: Path) -> None:
    add_nvidia_smi(here, "535.183.01", count=4, capability="9.0")
    assert read_driver() == Driver("535.183.01", 4)
    assert (read_driver().major, read_capabilities()) == (535, [(9, 0)])
    add_nvidia_smi(here, "570.86.15", count=2, mig=3)
    assert read_driver() == Driver("570.86.15", 2, num_instances=6)


def test_a_container_without_the_tool_has_the_gpus_of_its_device_files(here: Path) -> None:
    assert read_driver() == Driver()
    load_driver(here, "570.86.15", count=0)
    assert read_driver() == Driver("570.86.15", 0)
    load_driver(here, "570.86.15", count=2)
    assert read_driver() == Driver("570.86.15", 2)


def test_a_tool_that_fails_counts_only_where_there_is_a_card_or_a_driver(here: Path) -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch"
    write_tool(here, f"#!/bin/sh\necho '{words}'; exit 18\n")
    assert read_driver() == Driver()  # an image that has the tool, on a machine without a card
    card = here / "pci" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    assert read_driver() == Driver(fault=words)
    load_driver(here, "535.54.03", count=1)
    assert read_driver() == Driver("535.54.03", fault=words)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0", ["0"]),
        ("0,9", ["0", "9"]),
        ("0, 2", ["0", "2"]),
        ("0,-1,2", ["0"]),
        ("0,", ["0"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_names_are_read_as_cuda_reads_them(visible: str, names: list[str]) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert named_gpus(environment) == names and not hides_gpus(environment)


def test_only_what_asks_for_no_gpu_hides_them() -> None:
    assert not hides_gpus({}) and named_gpus({}) is None
    assert all(hides_gpus({"CUDA_VISIBLE_DEVICES": visible}) for visible in ("", " ", "-1", "NoDevFiles"))
