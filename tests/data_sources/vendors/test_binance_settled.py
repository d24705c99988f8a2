"""Perpetuals that were settled or renamed: what was traded stays, flat bars and foreign funding are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources.funding import FundingLedger
from data_sources.load import load
from data_sources.sources import DataRequest
from data_sources.vendors.binance_product import USD_M
from tests.data_sources.bar_tables import ns
from tests.data_sources.vendors.binance_harness import Harness
from tests.data_sources.vendors.binance_server import HOUR_NS, MINUTE_NS, BinanceServer
from tests.data_sources.vendors.loopback import Fault

NOW, START = ns("2026-11-04T12:00:30"), ns("2026-10-30T00:00")
SETTLED = ns("2026-11-02T09:00")
PERPETUAL = "BTCUSDT.P"


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with BinanceServer(NOW, (PERPETUAL, "SHIBUSDT.P", "1000SHIBUSDT.P")) as server:
        server.listed_ns = dict.fromkeys(server.pairs, ns("2026-10-29T00:00"))
        server.delisted_ns = {PERPETUAL: SETTLED}
        yield Harness(server, tmp_path / "lake", USD_M)


def loaded(harness: Harness, symbol: str = PERPETUAL) -> tuple[Any, Any]:
    names = {"binance_perpetuals": (symbol,)}
    data = load(harness.lake, DataRequest(("binance_futures",), names, START, NOW, min_bars=10))
    return (data.bars[0] if data.bars else None), data.rows[0]


def test_the_flat_bars_after_a_settlement_and_their_funding_are_left_out(harness: Harness) -> None:
    harness.server.lingering.add(PERPETUAL)
    harness.refresh(start_ns=START)
    assert len(harness.minutes(start_ns=SETTLED)) == 51 * 60  # the lake has what Binance has
    bars, row = loaded(harness)
    traded, values = harness.server.truth(PERPETUAL, START, SETTLED)
    last_ns = int(traded[values[:, 4] > 0][-1])
    assert last_ns <= bars.open_time[-1] <= last_ns + HOUR_NS
    np.testing.assert_array_equal(bars.open_time[: len(traded)], traded)
    (flag,) = row.flags
    assert "bars after an hour without a trade are left out, from 2026-11-02 1" in flag
    assert flag.endswith(" to 2026-11-04 11:59 UTC: settled?")
    known = FundingLedger(harness.lake.root).rates(PERPETUAL)[0]
    assert known.max() > SETTLED  # as at Binance
    charged = bars.open_time[np.flatnonzero(bars.funding)]
    assert charged.max() == ns("2026-11-02T08:00") and len(charged) >= 8


def test_a_halt_leaves_out_its_bars_alone(harness: Harness) -> None:
    harness.server.delisted_ns = {}
    halt = ns("2026-11-03T10:00")

    def silent(rows: list[list[Any]]) -> list[list[Any]]:
        return [
            [*row[:5], "0", row[6], "0", 0, "0", "0", "0"]
            if 0 <= row[0] * 10**6 - halt < 3 * HOUR_NS
            else row
            for row in rows
        ]

    harness.server.faults = [Fault("2026-11-03|/fapi/v1/klines", "rows", rows=silent)]
    harness.refresh(start_ns=START)
    bars, row = loaded(harness)
    assert not ((bars.open_time > halt + HOUR_NS) & (bars.open_time < halt + 3 * HOUR_NS)).any()
    assert {halt - MINUTE_NS, halt + 59 * MINUTE_NS, halt + 3 * HOUR_NS} <= set(bars.open_time.tolist())
    assert [flag for flag in row.flags if "settled" in flag] == []


@pytest.mark.parametrize(
    "code", [-4108, *(pytest.param(code, marks=pytest.mark.drill) for code in (-1121, -1122, -4141))]
)
def test_a_contract_that_rest_no_longer_knows_comes_from_the_archive(harness: Harness, code: int) -> None:
    harness.server.codes[PERPETUAL] = code
    for later in (0, 60):
        harness.refresh(start_ns=START, seconds_later=later)
        harness.assert_complete(start_ns=START, end_ns=SETTLED)
        assert harness.notes.warnings == []
    times, _ = FundingLedger(harness.lake.root).rates(PERPETUAL)
    assert times.max() == ns("2026-10-31T16:00")  # the archive's newest month
    bars, row = loaded(harness)
    assert len(bars) == (SETTLED - START) // MINUTE_NS
    assert "no funding is known of 2026-11-01 00:00 to 2026-11-02 08:00, 5 times" in row.flags[0]


def test_a_contract_on_a_thousand_coins_continues_the_one_on_a_coin(harness: Harness) -> None:
    """SHIBUSDT became 1000SHIBUSDT: a thousandth of a new unit for an old one."""
    old, new, day = "SHIBUSDT.P", "1000SHIBUSDT.P", ns("2026-11-02T05:00")  # midnight in New York
    harness.server.delisted_ns[old], harness.server.listed_ns[new] = day - 3 * HOUR_NS, day + 2 * HOUR_NS
    harness.lake.root.mkdir(exist_ok=True)
    (harness.lake.root / "renames.csv").write_text(
        "setting,old,new,first_day,ratio,source\n"
        f"binance_perpetuals,{old},{new},2026-11-02,0.001,Binance's announcement\n"
    )
    harness.refresh(new, start_ns=START)
    bars, row = loaded(harness, new)
    before, prices = harness.server.truth(old, START, day)
    after, newer = harness.server.truth(new, day, NOW - 30 * 10**9)
    np.testing.assert_array_equal(bars.open_time, np.append(before, after))
    np.testing.assert_array_equal(bars.close, np.append(prices[:, 3] / 0.001, newer[:, 3]))
    np.testing.assert_array_equal(bars.volume, np.append(prices[:, 4] * 0.001, newer[:, 4]))
    assert bars.taker_buy_volume is not None and (bars.taker_buy_volume <= bars.volume).all()
    expected = {
        time: rate
        for name, start_ns, end_ns in ((old, START + 1, day - 3 * HOUR_NS), (new, day, NOW))
        for time, rate, _ in harness.server.funding(name, start_ns, end_ns)
        if rate
    }
    charged = np.flatnonzero(bars.funding)
    found = dict(zip(bars.open_time[charged].tolist(), bars.funding[charged].tolist(), strict=True))
    assert {time: found.get(time) for time in expected} == expected
    assert any(f"{old} until 2026-11-02" in flag for flag in row.flags)


def test_a_settled_contract_names_the_one_that_took_its_place(harness: Harness) -> None:
    harness.refresh("MATICUSDT.P", PERPETUAL, start_ns=ns("2026-11-01T00:00"))
    assert harness.notes.warnings == [
        "MATICUSDT.P: Binance does not know this perpetual; MATICUSDT.P is POLUSDT.P since 2024-09-05"
    ]
