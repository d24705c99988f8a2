"""For every test: those marked ``gpu`` or ``drill`` are skipped, and say so, where they cannot or need not run.

None waits for what a vendor asked of another one.
"""

import os

import pytest
import torch

from data_sources.vendors import http


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if os.environ.get("DRILL") != "1":
        skipped["drill"] = pytest.mark.skip(reason="takes long: make drill")
    for item in items:
        for name, skip in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What vendors asked to wait for, none at first: a server may be that of another test."""
    own: dict[str, float] = {}
    monkeypatch.setattr(http, "_WAITS", own)
    return own
