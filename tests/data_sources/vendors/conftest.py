"""Yahoo's server and client, for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_sources.vendors.yahoo_harness import NOW, STOCKS, Harness
from tests.data_sources.vendors.yahoo_server import YahooServer


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with YahooServer(NOW, STOCKS) as server:
        yield Harness(server, tmp_path / "lake")
