"""Features that are taken over from a former table have the bits that all bars give, whatever changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sources.bars import MINUTE_NS, Bars
from envs import feature_reuse, features
from envs.feature_reuse import LOOKBACK_BARS, FormerTable, TableDiffersError, table_parts
from envs.features import BUILT_IN, FeatureStatistics, History, chosen_features, compute, panel_of
from tests.envs.markets import walk

CPU = torch.device("cpu")
ALONE, TOGETHER = ("symbol", "day", "flow"), ("symbol", "panel")


@pytest.fixture(autouse=True)
def short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (features, feature_reuse):
        monkeypatch.setattr(module, "SAME_TIME_BARS", 30)


def with_flow(bars: Bars, seed: int) -> Bars:
    share = np.random.default_rng(seed).random(len(bars))
    share[::7] = np.nan
    return replace(bars, taker_buy_volume=bars.volume * share, trades=np.where(bars.volume > 0, 9.0, 0.0))


def changed(bars: Bars, first: int, end: int, factor: float = 1.01) -> Bars:
    scale = np.ones(len(bars))
    scale[first:end] = factor
    return replace(bars, **{name: getattr(bars, name) * scale for name in ("open", "high", "low", "close")})


def market(length: int = 7_000) -> list[Bars]:
    """Coins with gaps, one at a time of its own, a break, a stock with rare bars after the close, a delisting."""
    rare = dict.fromkeys(range(390, length, 391), 30) | dict.fromkeys(range(391, length, 391), 1_020)
    return [
        with_flow(walk("BTCUSDT", length, seed=1, gaps={3_000: 2, 5_000: 700}), 1),
        changed(walk("ETHUSDT", length, seed=2, gaps={4_100: 60}), 4_100, length, 40.0),
        walk("SPY", length, "stock", seed=3, gaps=rare),
        walk("GONEUSDT", length // 2, seed=4),
        walk("LATEUSDT", length, seed=5, gaps={0: 1_500}),
    ]


def rows_of(bars: Sequence[Bars], groups: Sequence[str], former: FormerTable | None = None) -> torch.Tensor:
    functions = chosen_features(groups)
    size = len(functions)
    statistics = FeatureStatistics(
        tuple(functions), torch.linspace(-0.2, 0.3, size), torch.full((size,), 1.7)
    )
    parts = list(table_parts(bars, functions, statistics, CPU, former))
    assert all(part.dtype == torch.float16 for part in parts)
    return torch.cat(parts)


def table_of(bars: Sequence[Bars], groups: Sequence[str]) -> FormerTable:
    rows = rows_of(bars, groups).split([len(series) for series in bars])
    names = [series.symbol for series in bars]
    return FormerTable(dict(zip(names, bars, strict=True)), dict(zip(names, rows, strict=True)))


def trim(bars: Bars, first: int, left_out: int = 0) -> Bars:
    return bars.rows(min(first, len(bars) - 1), len(bars) - left_out)


Change = Callable[[list[Bars]], tuple[list[Bars], list[Bars]]]  # all bars -> before and now
CHANGES: dict[str, Change] = {
    "newer bars": lambda bars: ([trim(b, 0, 200) for b in bars], bars),
    "older bars are gone": lambda bars: (bars, [trim(b, 333) for b in bars]),
    "both": lambda bars: ([trim(b, 0, 200) for b in bars], [trim(b, 333) for b in bars]),
    "older bars came": lambda bars: ([trim(b, 400) for b in bars], bars),
    "a revision": lambda bars: (bars, [changed(bars[0], 6_000, 6_010), *bars[1:]]),
    "all of one was rescaled": lambda bars: (bars, [*bars[:2], changed(bars[2], 0, 9_999), *bars[3:]]),
    "flow of the last bars came": lambda bars: (
        [replace(bars[0], taker_buy_volume=None, trades=None), *bars[1:]],
        bars,
    ),
    "one has fewer bars": lambda bars: (bars, [bars[0], trim(bars[1], 0, 90), *bars[2:]]),
    "another symbol": lambda bars: (bars[1:], bars),
    "one that is gone": lambda bars: (bars, [bars[2], *bars[:2]]),
    "nothing": lambda bars: (bars, bars),
}


SHORT = {"both"}  # of the panel: each takes seconds


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        *((name, ALONE) for name in CHANGES),
        *(pytest.param(n, TOGETHER, marks=[] if n in SHORT else [pytest.mark.drill]) for n in CHANGES),
    ],
)
def test_every_bit_is_what_all_bars_give(name: str, groups: Sequence[str]) -> None:
    before, now = CHANGES[name](market(5_200 if groups == TOGETHER else 7_000))
    actual, expected = rows_of(now, groups, table_of(before, groups)), rows_of(now, groups)
    different = actual.view(torch.int16) != expected.view(torch.int16)
    assert not different.any(), (different.any(0).nonzero().flatten(), different.any(1).nonzero().flatten())


def test_little_is_computed_where_little_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(bars: Bars, *given: object) -> torch.Tensor:
        computed.append(len(bars))
        return compute(bars, *given)

    bars = [walk("AAA", 40_000), walk("BBB", 40_000, seed=1)]
    former = table_of([trim(b, 0, 500) for b in bars], ("symbol",))
    monkeypatch.setattr(feature_reuse, "compute", counted)
    rows_of([trim(b, 700) for b in bars], ("symbol",), former)
    assert len(computed) == 4 and sum(computed) < 13_000
    computed.clear()
    rows_of([trim(b, 0, 500) for b in bars], ("symbol",), former)
    assert computed == []


def test_no_built_in_feature_looks_back_further() -> None:
    groups = ("symbol", "day", "flow", "panel")
    functions = {
        name: function
        for name, function in chosen_features(groups).items()
        if name in BUILT_IN and name != "volume_for_the_time_of_day"
    }
    bars = [with_flow(walk(name, 4_400, seed=seed), seed) for seed, name in enumerate(("BTCUSDT", "AUSDT"))]
    recent = [series.rows(4_400 - LOOKBACK_BARS, 4_400) for series in bars]
    for whole, part in zip(bars, recent, strict=True):
        one = compute(whole, CPU, functions, panel_of(bars, CPU, functions))[-1]
        other = compute(part, CPU, functions, panel_of(recent, CPU, functions))[-1]
        assert [name for name, same in zip(functions, one == other, strict=True) if not same] == []


def test_a_feature_of_ones_own_is_computed_from_all_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def bars_so_far(history: History) -> torch.Tensor:
        return torch.arange(len(history)) * 1e-3

    monkeypatch.setitem(features.FEATURES, "bars_so_far", bars_so_far)
    before, now = CHANGES["both"](market())
    former = table_of(before, ("symbol",))
    actual, expected = rows_of(now, ("symbol",), former), rows_of(now, ("symbol",))
    assert torch.equal(actual, expected)
    assert actual[:, -1].float().diff().abs().max() > 0


def test_a_table_with_other_values_is_found() -> None:
    bars = market()
    former = table_of([trim(b, 0, 200) for b in bars], ("symbol",))
    former.rows["BTCUSDT"][-3] += 1
    with pytest.raises(TableDiffersError, match=r"^the known features of BTCUSDT are not"):
        rows_of(bars, ("symbol",), former)


def test_bars_a_minute_later_are_other_bars() -> None:
    bars = [walk("AAA", 6_000)]
    moved = [replace(bars[0], open_time=bars[0].open_time + MINUTE_NS)]
    assert torch.equal(rows_of(moved, ("symbol",), table_of(bars, ("symbol",))), rows_of(moved, ("symbol",)))
