"""Yahoo's server and client, and a folder of own files, for their tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_sources.vendors.files_harness import Own
from tests.data_sources.vendors.yahoo_harness import NOW, STOCKS, Harness
from tests.data_sources.vendors.yahoo_server import YahooServer


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with YahooServer(NOW, STOCKS) as server:
        yield Harness(server, tmp_path / "lake")


@pytest.fixture
def own(tmp_path: Path) -> Own:
    return Own(tmp_path)
