"""Order flow for a lake of before there was any: the archive's files again, newest first, and no bar changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_sources.bars import FLOW_COLUMNS
from data_sources.flow import KEPT_BYTES_PER_BAR, SPARE_BYTES, FlowPlan, fetch_flow, missing_flow
from data_sources.lake.flow import OTHER_BAR
from data_sources.lake.lake import Lake
from data_sources.lake.quality import bar_table
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.vendors import http
from data_sources.vendors.binance_archive import days, months
from data_sources.vendors.binance_flow import ASK_AGAIN_NS
from data_sources.vendors.binance_product import SPOT, USD_M, Product
from tests.data_sources.bar_tables import as_format_1, read
from tests.data_sources.vendors.binance_harness import DAY_NS, NOW, POLICY, Harness
from tests.data_sources.vendors.binance_server import MINUTE_NS, BinanceServer, flow_of
from tests.data_sources.vendors.loopback import Fault, Notes, ns
from tests.program import ROOT

LONG_AGO, LISTED, NOVEMBER = ns("2026-09-15T00:00"), ns("2026-09-28T00:00"), ns("2026-11-01T00:00")
UNITS = ["2026-11-22", "2026-11-21", "2026-10", "2026-09"]


PAIRS = {SPOT.source: ("BTCUSDT", "ETHUSDT"), USD_M.source: ("BTCUSDT.P",)}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of October, the last days of September and two of November, kept before there was order flow."""
    lake, server = Lake(tmp_path_factory.mktemp("former")), BinanceServer(NOW)
    units = [*months(LISTED, NOVEMBER), *days(ns("2026-11-21T00:00"), ns("2026-11-23T00:00"))]
    for product in (SPOT, USD_M):
        for pair in PAIRS[product.source]:
            for unit in units:
                span = {"start_ns": unit.start_ns, "end_ns": unit.end_ns}
                times, values = server.truth(pair, max(unit.start_ns, LISTED), unit.end_ns)
                table = bar_table(pair, [times, *values.T])
                origin = {"key": unit.name, "version": "sha256", "symbols": [pair], "now_ns": NOW}
                lake.write(product.source, pair, unit.name, table, **origin, **span)
            as_format_1(lake, product.source, pair)
    return lake.root


class FormerLake(Harness):
    """A copy of such a lake, and what comes of fetching its flow."""

    def __init__(
        self, server: BinanceServer, folder: Path, product: Product, *pairs: str, end_ns: int = NOVEMBER
    ) -> None:
        super().__init__(server, folder, product)
        symbols = {product.group.setting: pairs}
        self.request = DataRequest((product.source,), symbols, LONG_AGO, end_ns, min_bars=1)

    def fetch_flow(self, most_files: int | None = None, later_ns: int = 0) -> list[str]:
        """Fetch what is missing; return the requested zips."""
        self.server.requests.clear()
        self.notes = Notes()
        fetch_flow(self.lake, self.request, NOW + later_ns, self.notes, most_files)
        assert not any("klines?" in path for path in self.server.requests)  # REST is not asked
        return [path.rsplit("/", 1)[1] for path in self.server.requests if path.endswith(".zip")]

    def flow(self, first: str, end: str, pair: str = "") -> np.ndarray:
        """Return the two columns of [first, end)."""
        table = read(self.lake, self.product.source, pair or self.pair, None, ns(first), ns(end))
        return np.column_stack([table[name].to_numpy() for name in FLOW_COLUMNS])

    def assert_whole(self, pair: str, first: str, end: str) -> None:
        """Every minute of [first, end) has the truth's bar and flow, bit for bit."""
        times, values = self.server.truth(pair, ns(first), ns(end))
        table = read(self.lake, self.product.source, pair, None, ns(first), ns(end))
        np.testing.assert_array_equal(table["open_time"].to_numpy(), times)
        for column, name in enumerate(("open", "high", "low", "close", "volume")):
            np.testing.assert_array_equal(table[name].to_numpy(), values[:, column])
        np.testing.assert_array_equal(self.flow(first, end, pair), flow_of(values[:, 4], times // MINUTE_NS))


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinanceServer]:
    monkeypatch.setattr(http, "RetryPolicy", lambda: POLICY)
    with BinanceServer(NOW, sum(PAIRS.values(), ())) as running:
        running.listed_ns = dict.fromkeys(running.pairs, LISTED)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", running.url)
        yield running


@pytest.fixture
def lake(templates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(templates, tmp_path / "lake")


@pytest.fixture
def former(server: BinanceServer, lake: Path) -> FormerLake:
    return FormerLake(server, lake, SPOT, "BTCUSDT")


@pytest.mark.parametrize("product", [SPOT, USD_M], ids=["spot", "perpetuals"])
def test_files_get_their_flow_newest_first_and_nothing_else_changes(
    server: BinanceServer, lake: Path, product: Product
) -> None:
    pairs = PAIRS[product.source]
    former = FormerLake(server, lake, product, *pairs, end_ns=NOW)
    before = {pair: former.lake.parts(product.source, pair) for pair in pairs}
    bars = {pair: read(former.lake, product.source, pair, None, 0, NOW) for pair in pairs}
    plan = missing_flow(former.lake, former.request, NOW)
    assert plan == FlowPlan(4 * len(pairs), len(pairs) * (3 + 31 + 2) * 1440)
    if product is SPOT:
        assert "order flow: the lake has 8 files from before it was kept" in str(plan)
        assert str(plan).endswith("about 5.9 MB to download, 0.8 MB more on the disk")

    asked = former.fetch_flow()
    assert asked == [f"{name}-1m-{unit}.zip" for unit in UNITS for name in map(product.at_binance, pairs)]
    for pair in pairs:
        former.assert_whole(pair, "2026-09-01T00:00", "2026-11-01T00:00")
        former.assert_whole(pair, "2026-11-21T00:00", "2026-11-23T00:00")
        after = former.lake.parts(product.source, pair)
        assert (
            read(former.lake, product.source, pair, None, 0, NOW)
            .select(bars[pair].column_names)
            .equals(bars[pair])
        )
        for unit, part in after.items():
            kept = replace(part, format=1, flow={}, flow_content="")
            assert kept == before[pair][unit]  # digest, age and origin, too
    assert former.lake.verify() == []
    assert former.notes.warnings == [] and former.notes.units == former.notes.total == plan.files
    assert former.notes.summary == f"order flow of {plan.files} of {plan.files} files added"
    assert former.fetch_flow() == []
    assert missing_flow(former.lake, former.request, NOW).files == 0


def test_a_bounded_fetch_goes_on_where_it_ended_and_so_does_one_that_is_interrupted(
    server: BinanceServer, lake: Path
) -> None:
    former = FormerLake(server, lake, SPOT, "BTCUSDT", "ETHUSDT")
    assert former.fetch_flow(most_files=1) == ["BTCUSDT-1m-2026-10.zip"]
    former.assert_whole("BTCUSDT", "2026-10-01T00:00", "2026-11-01T00:00")

    class Interrupted(Notes):
        def advance(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_flow(former.lake, former.request, NOW, Interrupted())
    assert missing_flow(former.lake, former.request, NOW).files == 2
    assert former.fetch_flow() == ["BTCUSDT-1m-2026-09.zip", "ETHUSDT-1m-2026-09.zip"]
    former.assert_whole("BTCUSDT", "2026-09-01T00:00", "2026-11-01T00:00")


KILLED = """
import sys
from pathlib import Path
from data_sources.flow import fetch_flow
from data_sources.lake.lake import Lake
from data_sources.progress import NullProgress
from data_sources.sources import DataRequest
root, start_ns, now_ns, *pairs = sys.argv[1:]
request = DataRequest(("binance",), {"binance_pairs": tuple(pairs)}, int(start_ns), int(now_ns), min_bars=1)
fetch_flow(Lake(Path(root)), request, int(now_ns), NullProgress())
"""


@pytest.mark.drill
def test_a_fetch_that_is_killed_goes_on_where_it_was(server: BinanceServer, lake: Path) -> None:
    pairs = PAIRS[SPOT.source]
    command = [sys.executable, "-c", KILLED, str(lake), str(LONG_AGO), str(NOW), *pairs]
    former = FormerLake(server, lake, SPOT, *pairs, end_ns=NOW)
    for files in (1, 2, 1, 3):
        server.requests.clear()
        child = subprocess.Popen(command, cwd=ROOT)
        while sum(path.endswith(".zip") for path in server.requests) < files:
            time.sleep(0.001)
        time.sleep(0.03 * files)  # within the answer, the rows or the write
        child.kill()
        child.wait()
        left = missing_flow(Lake(lake), former.request, NOW).files
        assert Lake(lake).verify() == []
    assert 1 <= left <= 8 - 3  # each but the last of every process is kept
    former.lake = Lake(lake)
    assert len(former.fetch_flow()) == left
    for pair in pairs:
        former.assert_whole(pair, "2026-09-01T00:00", "2026-11-01T00:00")
        former.assert_whole(pair, "2026-11-21T00:00", "2026-11-23T00:00")


def test_a_month_that_has_other_prices_by_now_changes_no_bar_and_is_said(former: FormerLake) -> None:
    bars = read(former.lake, "binance", "BTCUSDT", None, 0, NOW)
    content = former.lake.parts("binance", "BTCUSDT")["2026-09"].content

    def revise(rows: list[list[Any]]) -> list[list[Any]]:
        for row in rows[1000:1005]:
            row[4] = row[2]  # closes at its high
        for row in rows[2000:2002]:
            row[5] = "9999.0"
        rows[3000][9] = "1e9"  # takers bought more than was traded
        return [*rows[:4000], *rows[4010:]]  # an outage

    former.server.faults = [Fault("1m-2026-09.zip", "rows", rows=revise)]
    former.fetch_flow()
    assert former.notes.warnings == [
        "BTCUSDT 2026-09: 7 of 4,320 minutes have other prices or another volume in the archive than on "
        "2026-11-24, when they were fetched; they stay as they are, without order flow"
    ]
    table = read(former.lake, "binance", "BTCUSDT", None, 0, NOW)
    assert table.select(bars.column_names).equals(bars)
    part = former.lake.parts("binance", "BTCUSDT")["2026-09"]
    assert part.content == content
    assert part.flow_rejected == {"BTCUSDT": {OTHER_BAR: 7, "taker_above_volume": 1}}
    flow = former.flow("2026-09-01T00:00", "2026-10-01T00:00")
    without = [*range(1000, 1005), *range(2000, 2002), 3000, *range(4000, 4010)]
    assert (
        np.flatnonzero(np.isnan(flow[:, 0])).tolist()
        == np.flatnonzero(np.isnan(flow[:, 1])).tolist()
        == without
    )
    aside = pq.read_table(former.lake.root / "binance/BTCUSDT/2026-09.quarantine.parquet")
    assert sorted(aside["reason"].to_pylist()) == [OTHER_BAR] * 7 + ["taker_above_volume"]
    assert aside.column_names == [*bars.column_names, *FLOW_COLUMNS, "reason"]
    assert (load(former.lake, former.request).rows[0].rejected) == {OTHER_BAR: 7, "taker_above_volume": 1}
    assert former.lake.verify() == []
    former.server.faults = []
    assert former.fetch_flow() == []


def test_a_file_that_is_gone_or_damaged_is_asked_for_again_a_week_later(former: FormerLake) -> None:
    former.server.faults = [
        Fault("1m-2026-10.zip", status=404),
        Fault("1m-2026-09.zip$", "corrupt"),
    ]
    assert former.fetch_flow() == ["BTCUSDT-1m-2026-09.zip"] * POLICY.attempts
    (warning,) = former.notes.warnings
    assert warning.startswith("data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2026-09.zip: sha256 is ")
    assert former.notes.summary == "order flow of 0 of 2 files added"
    assert former.fetch_flow() == []
    assert former.fetch_flow(later_ns=ASK_AGAIN_NS - 1) == []
    former.server.faults = []
    assert former.fetch_flow(later_ns=ASK_AGAIN_NS) == ["BTCUSDT-1m-2026-10.zip", "BTCUSDT-1m-2026-09.zip"]
    former.assert_whole("BTCUSDT", "2026-09-01T00:00", "2026-11-01T00:00")


def test_what_rest_gave_of_the_last_days_comes_again_once_with_the_next_refresh(
    server: BinanceServer, tmp_path: Path
) -> None:
    harness = Harness(server, tmp_path)
    start_ns = NOW - NOW % DAY_NS - DAY_NS
    harness.refresh(start_ns=start_ns)
    assert harness.units() == {"recent"}
    as_format_1(harness.lake, "binance", "BTCUSDT")
    assert len(harness.refresh(start_ns=start_ns)) == 3  # pages of a day and a half
    harness.assert_complete(start_ns=start_ns)
    assert harness.refresh(start_ns=start_ns) == []


def test_a_dead_archive_and_a_full_disk_are_a_line_each(
    former: FormerLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    former.server.faults = [Fault(".", status=503)]
    former.fetch_flow()
    assert former.notes.warnings == ["order flow of Binance waits: Binance archive answered HTTP 503"]
    former.server.faults = []
    needed = SPARE_BYTES + KEPT_BYTES_PER_BAR * missing_flow(former.lake, former.request, NOW).bars
    usage = shutil.disk_usage(former.lake.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 2 * 10**9))
    assert former.fetch_flow() == []
    assert former.notes.warnings == [
        f"order flow of Binance waits: 2.0 GB more must be free in {former.lake.root}"
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert len(former.fetch_flow()) == 2


def test_what_a_refresh_replaced_meanwhile_stays(former: FormerLake) -> None:
    part = former.lake.parts("binance", "BTCUSDT")["2026-10"]
    table = read(former.lake, "binance", "BTCUSDT", None, part.start_ns, part.end_ns)
    span = {"start_ns": part.start_ns, "end_ns": part.end_ns, "symbols": part.symbols}
    new = former.lake.write("binance", "BTCUSDT", "2026-10", table, key="k", version="w", now_ns=NOW, **span)
    assert former.lake.add_flow(part, table, NOW) is None
    assert former.lake.parts("binance", "BTCUSDT")["2026-10"] == new


def test_rows_set_aside_before_stay_so_and_an_attempt_that_was_killed_adds_none_twice(
    former: FormerLake,
) -> None:
    path = former.lake.root / "binance/BTCUSDT/2026-09.quarantine.parquet"
    part = former.lake.parts("binance", "BTCUSDT")["2026-09"]
    table = read(former.lake, "binance", "BTCUSDT", None, part.start_ns, part.end_ns)
    aside = table.slice(0, 3).append_column("reason", [["not_positive", "not_finite", "not_finite"]])
    pq.write_table(aside, path)
    former.server.faults = [
        Fault("1m-2026-09.zip", "rows", rows=lambda rows: [[*rows[0][:9], "1e9", "0", "0"], *rows[1:]])
    ]
    former.fetch_flow()
    kept = pq.read_table(path)
    assert kept["reason"].to_pylist() == ["not_positive", "not_finite", "not_finite", "taker_above_volume"]
    assert kept.slice(0, 3).select(aside.column_names).cast(aside.schema).equals(aside)
    # As after a kill between the two files.
    as_format_1(former.lake, "binance", "BTCUSDT")
    former.fetch_flow()
    assert pq.read_table(path).equals(kept)
    # A quarantine that cannot be read costs its rows, not the flow.
    as_format_1(former.lake, "binance", "BTCUSDT")
    path.write_bytes(b"junk")
    former.fetch_flow()
    assert path.read_bytes() == b"junk"
    assert np.isfinite(former.flow("2026-09-28T00:01", "2026-10-01T00:00")).all()
