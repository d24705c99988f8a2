"""The panel: its features are those of a plain computation, and no bar of any symbol reaches back in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import DAY_NS, MINUTE_NS, Bars
from envs import features, panel
from envs.feature_checks import features_that_look_across
from envs.feature_errors import FeatureError
from envs.features import GROUPS, History, chosen_features, compute, panel_of
from tests.envs.markets import MONDAY, market_of, walk
from tests.envs.panel_reference import panel_features

CPU = torch.device("cpu")
NAMES = GROUPS["panel"]
FUNCTIONS = chosen_features(("panel",))


def with_flow(bars: Bars, seed: int) -> Bars:
    share = np.random.default_rng(seed).random(len(bars))
    share[20:30] = np.nan
    return replace(bars, taker_buy_volume=bars.volume * share)


def moved(bars: Bars, minutes: int) -> Bars:
    return replace(bars, open_time=bars.open_time + minutes * MINUTE_NS)


def awkward_market(length: int = 400) -> list[Bars]:
    """Gaps, a halt, a listing, a ticker that another coin took up, a coin in two spellings and as a perpetual."""
    taken_up = walk("TAKEUSDT", length, seed=7, gaps={150: 9})
    higher = np.where(np.arange(length) < 150, 1.0, 40.0)
    prices = {name: getattr(taken_up, name) * higher for name in ("open", "high", "low", "close")}
    return [
        with_flow(walk("BTCUSDT", length, seed=1), 1),
        with_flow(walk("ETHUSDT", length, seed=2, sigma=2e-3, gaps={60: 1, 61: 2, 90: 5, 200: 60}), 2),
        walk("X:BTC-USD", length // 2, seed=3, gaps=dict.fromkeys(range(0, length // 2, 3), 2)),
        moved(walk("NEWUSDT", length // 2, seed=4), length // 2),
        moved(walk("GONEUSDT", length // 4, seed=5), -30),
        replace(taken_up, **prices),
        walk("ETHUSDT.P", length, "perpetual", seed=2, sigma=2e-3),
        walk("SOLUSDT.P", length, "perpetual", seed=8, gaps={100: 4}),
        walk("AAPL", length, "stock", seed=9, gaps={length // 2: 1_050}),
        walk("SPY", length, "stock", seed=10, gaps={length // 2: 1_050, length // 2 + 1: 7}),
    ]


def of_panel(bars: Sequence[Bars], symbol: str, members: Sequence[str] | None = None) -> torch.Tensor:
    (own,) = [series for series in bars if series.symbol == symbol]
    return compute(own, CPU, FUNCTIONS, panel_of(bars, CPU, members=members))


def assert_same(
    actual: torch.Tensor, bars: Sequence[Bars], symbol: str, members: Sequence[str] | None
) -> None:
    expected = panel_features(bars, symbol, members)
    for column, name in enumerate(NAMES):
        difference = np.abs(actual[:, column].numpy() - expected[name].to_numpy())
        tolerance = 2e-3 if name.endswith("_rank") else 2e-4  # ranks are kept in 16 bits
        assert difference.max() < tolerance, (symbol, name, int(difference.argmax()), difference.max())


@pytest.mark.parametrize("members", [None, ["AAPL", "BTCUSDT", "ETHUSDT.P", "NEWUSDT", "TAKEUSDT"]])
def test_features_of_the_panel_are_those_of_a_plain_computation(
    members: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panel, "GRID_VALUES", 333)  # many parts
    bars = awkward_market()
    for series in bars:
        if members is None or series.symbol in (*members, "ETHUSDT", "SOLUSDT.P"):
            assert_same(of_panel(bars, series.symbol, members), bars, series.symbol, members)


def test_the_order_of_symbols_parts_and_older_bars_do_not_change_a_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bars = [walk(name, 3_600, seed=seed, gaps={2_000 + seed: seed}) for seed, name in enumerate("ABCDE")]
    bars = [with_flow(series, seed) for seed, series in enumerate(bars)]
    whole = [of_panel(bars, series.symbol) for series in bars]
    recent = [series.rows(700, 3_600) for series in bars]
    monkeypatch.setattr(panel, "GRID_VALUES", 1_001)
    for series, expected in zip(bars, whole, strict=True):
        assert torch.equal(of_panel(bars[::-1], series.symbol), expected)
        # 1,440 bars of a beta, whose residuals look back 240.
        assert torch.equal(of_panel(recent, series.symbol)[1_700:], expected[2_400:])


def test_no_later_bar_of_any_symbol_is_seen() -> None:
    bars = [walk(f"{name}USDT", 900, seed=seed) for seed, name in enumerate(("BTC", "ETH", "SOL"))]
    bars += [with_flow(series, 1) for series in awkward_market()[3:]]
    moments = [MONDAY + minute * MINUTE_NS for minute in (5, 100, 149, 150, 199, 230, 390, 899)]
    assert features_that_look_across(bars, [*moments, MONDAY + DAY_NS]) == {}


def test_a_feature_that_sees_a_later_bar_of_another_symbol_is_found() -> None:
    bars = [walk(name, 900, seed=seed) for seed, name in enumerate("AB")]

    def peeks(history: History) -> torch.Tensor:
        return history.peers.log_return(1).roll(-1)

    def ranks_all(history: History) -> torch.Tensor:
        return history.peers.rank("volume").argsort().float()

    own = {"peeks": peeks, "ranks_all": ranks_all, "honest": lambda history: history.peers.mean("return_5")}
    moments = [MONDAY + 300 * MINUTE_NS, MONDAY + 500 * MINUTE_NS]
    assert features_that_look_across(bars, moments, own) == dict.fromkeys(
        ("peeks", "ranks_all"), ("A", moments[0])
    )


def test_one_symbol_has_no_others() -> None:
    raw = of_panel([walk("AAA", 600)], "AAA")
    own = compute(walk("AAA", 600), CPU)
    names = list(features.FEATURES)
    for column, name in enumerate(NAMES):
        bars = name.rpartition("_")[2]
        if name == "beta":
            assert (raw[:, column] == 1).all()
        elif name.startswith("residual") and f"return_{bars}" in names:
            assert torch.equal(raw[:, column], own[:, names.index(f"return_{bars}")])
        elif not name.startswith("residual"):
            assert not raw[:, column].any(), name


def test_a_late_bar_shifts_no_other_symbol() -> None:
    bars = [walk(name, 600, seed=seed) for seed, name in enumerate("ABCD")]
    late = [*bars[:3], bars[3].rows(0, 597)]
    for name in "ABC":
        now, known = of_panel(bars, name), of_panel(late, name)
        assert torch.equal(now[:597], known[:597])
        assert not torch.equal(now[597:], known[597:])
        assert (now[597:] - known[597:]).abs().max() < 3


def test_the_panel_has_the_bars_of_its_market_and_refuses_what_it_cannot_know() -> None:
    bars = [walk("AAA"), walk("BBB", seed=1)]
    with pytest.raises(ValueError, match=r"^BBB must have the same bars in the panel as here$"):
        compute(bars[1].rows(5, 600), CPU, FUNCTIONS, panel_of(bars, CPU))

    def asks_itself(history: History) -> torch.Tensor:
        return history.peers.mean("beta")

    def asks_for_nothing(history: History) -> torch.Tensor:
        return history.peers.rank("moon")

    for function, message in (
        (asks_itself, "must not ask its own peers"), (asks_for_nothing, "peers have no feature moon"),
    ):  # fmt: skip
        with pytest.raises(FeatureError, match=message):
            compute(bars[0], CPU, {"mine": function}, panel_of(bars, CPU))


def test_a_market_of_some_symbols_sees_all_of_the_panel() -> None:
    bars = [walk("AAA", 900), walk("BBB", 900, seed=1), walk("CCC", 900, seed=2)]
    given = {"features": FUNCTIONS, "context_bars": 8, "horizon": 16}
    everyone = market_of(*bars, **given)
    alone = market_of(bars[1], statistics=everyone.statistics, panel=panel_of(bars, CPU), **given)
    assert torch.equal(alone.features, everyone.features[900:1_800])
    assert alone.symbols == ("BBB",)
