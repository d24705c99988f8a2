"""A moto S3 server for the tests of Polygon's flat files: one per module, empty for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_sources.lake.lake import Lake
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.polygon_refresh import Polygon
from tests.data_sources.vendors.polygon_harness import KEY_ID, SECRET
from tests.data_sources.vendors.s3_server import S3Server


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def server(running_server: S3Server) -> S3Server:
    running_server.empty()
    return running_server


@pytest.fixture
def source(server: S3Server) -> Polygon:
    policy = RetryPolicy(
        connect_seconds=2, read_seconds=5, backoff_seconds=0.01, attempts=3, failures_in_a_row=4
    )
    return Polygon(KEY_ID, SECRET, server.endpoint, policy)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")
