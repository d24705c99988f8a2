"""Spot and perpetual of a pair side by side, from an empty lake to a checkpoint: ``make drill``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from data_sources.bars import COLUMNS, DAY_NS, FLOW_COLUMNS, MINUTE_NS
from data_sources.funding import FundingLedger
from data_sources.lake.lake import Lake
from tests.data_sources.vendors.binance_server import flow_of
from tests.program import ALONE, Start, environment, tiny_flags
from tests.vendors import BinanceNow

PERPETUALS = ("BTCUSDT.P", "ETHUSDT.P")
CHANGES = {
    "binance_pairs": "BTCUSDT,ETHUSDT",
    "binance_perpetuals": ",".join(PERPETUALS),
    "end_date": "none",
    "history_days": 40,
    "epochs": 4,
    "runs": 1,
}


@pytest.mark.drill
def test_the_truth_arrives_whole_and_is_trained_on(tmp_path: Path) -> None:
    with BinanceNow(0, ("BTCUSDT", "ETHUSDT", *PERPETUALS)) as server:
        server.intervals["ETHUSDT.P"] = [(time.time_ns() - 5 * DAY_NS, 4)]  # 8 hours until then
        since_ns = time.time_ns() - 39 * DAY_NS  # funding begins where the bars of a request do
        addresses = ("BINANCE_API_URL", "BINANCE_FUTURES_API_URL", "BINANCE_ARCHIVE_URL")
        env = environment(**dict.fromkeys(addresses, server.url))
        words = tiny_flags(tmp_path, **CHANGES, sources="binance_futures")
        data = Start(tmp_path / "first", [*ALONE, "data", *words, "--json"], env)
        data.ends_well()
        train = Start(
            tmp_path / "second",
            [*ALONE, *tiny_flags(tmp_path, **CHANGES, sources="binance,binance_futures")],
            env,
        )
        train.ends_well()
        lake = Lake(tmp_path / "data")
        for symbol in PERPETUALS:
            columns = lake.columns("binance_futures", symbol, (symbol,), 0, 2**62)[symbol]
            first, end = int(columns["open_time"][0]), int(columns["open_time"][-1]) + MINUTE_NS
            times, values = server.truth(symbol, first, end)
            assert len(times) >= 40 * 1440
            flow = flow_of(values[:, 4], times // MINUTE_NS)
            for name, expected in zip((*COLUMNS, *FLOW_COLUMNS), (times, *values.T, *flow.T), strict=True):
                np.testing.assert_array_equal(columns[name], expected)
            found = zip(*(array.tolist() for array in FundingLedger(lake.root).rates(symbol)), strict=True)
            known = [row for row in found if since_ns <= row[0] < end]
            assert known == [(at, rate) for at, rate, _ in server.funding(symbol, since_ns, end)]
    assert "run1_epoch4.pt" in train.output and "Traceback" not in train.output
    assert [row["symbol"] for row in json.loads(data.output[data.output.index("{") :])["symbols"]] == [
        *PERPETUALS
    ]
    for symbol in ("BTCUSDT", "ETHUSDT", *PERPETUALS):
        assert f"\n{symbol} " in train.output
