"""Names as other vendors, programs and sites spell them: what is advised, and what the vendors' adapters find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from continuous_training import Settings
from data_sources.lake.lake import Lake
from data_sources.vendors import ADVISERS
from data_sources.vendors.spelling import at_yahoo
from tests.data_sources.vendors.binance_harness import Harness as BinanceHarness
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import ns
from tests.data_sources.vendors.polygon_harness import put_days, refresh
from tests.data_sources.vendors.s3_server import CRYPTO

TO_APPLE = (
    "aapl Aapl $AAPL AAPL.US AAPL.OQ NASDAQ:AAPL nasdaq:aapl|AAPL US|AAPL US Equity|AAPL UW Equity| aapl"
)
TO_BERKSHIRE = "BRK-B BRK/B BRK_B brk.b brk-b BRKb NYSE:BRK.B|BRK B|BRK/B US Equity"
TO_PREFERRED = "BAC-PK BAC/PRK BAC.PRK BAC.PR.K BAC^K|BAC PRK"
ETHER = ("ETH-USD", "X:ETHUSD", "ETHUSDT")
TO_PAIR = (
    "btcusdt BTC/USDT BTC-USDT BTC_USDT BTC.USDT BTC-USD BTC/USD BTC_USD btc/usdt X:BTC-USD X:BTCUSD BTC XBT btc "
    "BTC/USDT:USDT BTCUSDT.P BTCUSDT_PERP BTC-PERP BTC-USDT-SWAP BINANCE:BTCUSDT KRAKEN:XBT/USD tBTCUSD "
    "USDT-BTC KRW-BTC|BTC USDT"
)
TO_PERPETUAL = "BTCUSDT btcusdt.p BTC/USDT:USDT BTCUSDT_PERP BTC-PERP BTC-USDT-SWAP BINANCE:BTCUSDT.P BTC"
TO_FLAT_FILE_PAIR = (
    "BTC-USD BTC/USD BTC_USD BTCUSD X:BTCUSD x:btc-usd X:BTC/USD BTCUSDT BTC/USDT BTC btc XBT/USD XXBTZUSD "
    "tBTCUSD KRAKEN:XBTUSD BINANCE:BTCUSDT COINBASE:BTCUSD BTC-PERP USD-BTC C:BTCUSD"
)


def spread(names: str) -> list[str]:
    """Split at spaces; what follows a bar has spaces of its own."""
    first, *others = names.split("|")
    return [*first.split(), *others]


@pytest.mark.parametrize(
    ("setting", "name", "right"),
    [
        *(("stocks", name, "AAPL") for name in spread(TO_APPLE)),
        *(("stocks", name, "BRK.B") for name in spread(TO_BERKSHIRE)),
        *(("stocks", name, "BACpK") for name in spread(TO_PREFERRED)),
        *(("stocks", name, "XYZ.WS") for name in ("XYZ-WT", "XYZ/WS", "XYZ+")),
        *(("stocks", name, "X:ETH-USD in polygon_crypto or ETHUSDT") for name in ETHER),
        *(("binance_pairs", name, "BTCUSDT") for name in spread(TO_PAIR)),
        ("binance_pairs", "ETH-BTC", "ETHBTC"),
        ("binance_pairs", "SHIB/EUR", "SHIBEUR"),
        *(("binance_perpetuals", name, "BTCUSDT.P") for name in spread(TO_PERPETUAL)),
        ("binance_perpetuals", "SHIBUSDT.P", "1000SHIBUSDT.P"),
        ("binance_perpetuals", "PEPE", "1000PEPEUSDT.P"),
        *(("polygon_crypto", name, "X:BTC-USD") for name in spread(TO_FLAT_FILE_PAIR)),
        ("polygon_crypto", "BTC-EUR", "X:BTC-EUR"),
    ],
)
def test_a_name_of_another_spelling_is_an_invalid_setting_with_the_right_one(
    setting: str, name: str, right: str
) -> None:
    with pytest.raises(ValueError) as error:
        Settings(**{setting: ("top:5", name) if setting == "stocks" else (name,)})
    assert f"{name!r}, which is " in str(error.value) and f" {right} " in f"{error.value} "
    assert ADVISERS[setting](right.split()[0]) == "" or setting == "stocks"


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("stocks", ["GOOGLE", "^GSPC", "ES=F", "EURUSD=X", "Berkshire Hathaway", "", "../etc"]),
        ("polygon_crypto", ["C:EURUSD", "EUR-USD", "AAPL", "", "X:BTC"]),
        ("binance_pairs", ["AAPL", "BRK.B", "", "../etc"]),
        ("binance_perpetuals", ["AAPL", "BTCUSDT_270326", "", "../etc"]),
    ],
)
def test_what_is_no_symbol_at_all_is_an_invalid_setting_with_an_example(
    setting: str, names: list[str]
) -> None:
    for name in names:
        with pytest.raises(ValueError, match=r"such as (AAPL|X:BTC-USD|BTCUSDT)|spelled X:BTC-USD"):
            Settings(**{setting: (name,)})


def test_names_as_the_vendors_spell_them_are_left_alone() -> None:
    Settings(
        stocks=(
            "AAPL",
            "BRK.B",
            "BACpK",
            "NA",
            "TRUE",
            "1E5",
            "XYZ.WS",
            "XYZ.U",
            "ABCw",
            "ABCrw",
            "ZVZZT",
            "top:9",
        ),
        polygon_crypto=("X:BTC-USD", "X:USDT-USD", "X:1INCH-USD", "X:ETH-BTC", "top:9"),
        binance_perpetuals=("BTCUSDT.P", "1000SHIBUSDT.P", "1MBABYDOGEUSDT.P", "BTCUSDC.P"),
        binance_pairs=("BTCUSDT", "1000SATSUSDT", "ETHBTC", "BTCUSD", "WUSDT"),
    )


def test_yahoo_is_asked_in_its_own_spelling() -> None:
    ours = ("AAPL", "BRK.B", "BACpK", "XYZ.WS", "XYZ.U")
    assert [at_yahoo(name) for name in ours] == ["AAPL", "BRK-B", "BAC-PK", "XYZ-WT", "XYZ-UN"]


# ------------------------------------------------------------------ what only the vendors know


@pytest.fixture
def binance(tmp_path: Path) -> Any:
    with BinanceServer(ns("2026-11-24T12:00:31")) as server:
        yield BinanceHarness(server, tmp_path / "lake")


def test_a_pair_that_binance_never_had_is_answered_with_the_one_that_it_has(binance: BinanceHarness) -> None:
    advice = dict.fromkeys(("BTCUSD", "XBTUSDT", "BTCBUSD", "BTCPERP"), "it has BTCUSDT")
    advice |= {
        "MATICUSDT": "MATICUSDT is POLUSDT since 2024-09-13",
        "FTMUSDT": "FTMUSDT is SUSDT since 2025-01-16",
        "QQQQUSDT": "take it out of binance_pairs",
    }
    binance.refresh(*advice, "BTCUSDT", start_ns=ns("2026-11-23T00:00"))
    assert binance.notes.warnings == [
        f"{pair}: Binance does not know this pair; {text}" for pair, text in advice.items()
    ]


def test_a_pair_without_bars_there_is_told_from_one_that_never_existed(binance: BinanceHarness) -> None:
    server = binance.server
    server.pairs = ("BTCUSDT", "ETHUSDT", "MATICUSDT")
    server.delisted_ns = dict.fromkeys(("ETHUSDT", "MATICUSDT"), ns("2024-09-10T03:00"))
    server.listed_ns = {"BTCUSDT": ns("2026-12-01T00:00")}
    reasons = {
        "ETHUSDT": "it was delisted before",
        "BTCUSDT": "it was listed later",
        "MATICUSDT": "MATICUSDT is POLUSDT since 2024-09-13",
    }
    binance.refresh(*reasons, start_ns=ns("2026-11-23T00:00"))
    silence = "Binance knows this pair, but has no bars of it from 2026-11-23 to 2026-11-24"
    assert sorted(binance.notes.warnings) == sorted(
        f"{pair}: {silence}: {reason}" for pair, reason in reasons.items()
    )


def test_polygon_names_the_ticker_that_its_files_have(server: Any, source: Any, lake: Lake) -> None:
    put_days(server, ["AAPL", "BRK.B"])
    put_days(server, ["X:BTC-USD"], data_type=CRYPTO)
    names = (["AAPL", "BRKB", "AAPL.O", "FB", "QQQQQ"], ["X:BTC-USDT", "X:MATIC-USD", "X:BTC-USD"])
    warnings = refresh(source, lake, *names).warnings
    assert len(warnings) == 2
    for text in (
        "no bars of BRKB, AAPL.O, FB, QQQQQ in 5 day files: ",
        "BRKB is spelled BRK.B there; AAPL.O is spelled AAPL there; FB is META since 2022-06-09; no file from ",
        " has QQQQQ: it never existed there",
    ):
        assert text in warnings[0]
    assert "X:BTC-USDT is spelled X:BTC-USD there; X:MATIC-USD is X:POL-USD since 2024-09-13" in warnings[1]
    for part in lake.parts("polygon", "us_stocks_sip").values():
        assert part.symbols == tuple(sorted(names[0])) and not part.rejected
