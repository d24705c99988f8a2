"""Live decisions that look at other symbols: replayed minute by minute, with bars that come late."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import export, signals
from commands.signals import SignalOptions, compute_signals, report, request_of
from continuous_training import Settings
from data_sources.bars import MINUTE_NS, Bars
from data_sources.coverage import Series, row_of
from data_sources.load import LoadedData
from envs.features import GROUPS, chosen_features, panel_of
from envs.latest import latest_decisions
from envs.market import Market
from evaluation.trained_policy import Actor, Decision, TrainedPolicy
from models import load_policy
from models.policy import Policy
from models.transformer import TransformerConfig
from monitoring.console import Console
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import Fault
from tests.envs.markets import CONTEXT, HORIZON, MONDAY, NEVER, config_of, market_of, walk
from tests.training.checkpoints import NOW, PAIRS, untrained
from training.checkpoint import Checkpoint

CONFIG = config_of(num_envs=1)
FUNCTIONS = chosen_features(("symbol", "panel"))
MINUTES = 420


def market_bars() -> list[Bars]:
    """Two coins, one of which misses minutes and halts, a listing, and two stocks."""
    listed = walk("NEWUSDT", 200, seed=3)
    return [
        walk("BTCUSDT", MINUTES, seed=1),
        walk("ETHUSDT", 330, seed=2, gaps={50: 1, 90: 2, 140: 80}),
        replace(listed, open_time=listed.open_time + 200 * MINUTE_NS),
        walk("AAPL", 300, "stock", seed=4, gaps={120: 90}),
        walk("SPY", 300, "stock", seed=5, gaps={120: 90, 200: 3}),
    ]


def actor_of(market: Market, symbols: tuple[str, ...]) -> Actor:
    torch.manual_seed(0)
    policy = Policy(TransformerConfig(market.num_features, 32, 2, 4, CONTEXT + HORIZON + 1), 9, 3)
    for layer in (policy.head.logits, policy.head.account, policy.head.market):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return Actor(policy.eval(), market.statistics, CONFIG, symbols)


def until(bars: Bars, time_ns: int) -> Bars:
    return bars.between(0, time_ns + 1)


def test_minutes_that_come_late_are_seen_as_minutes_without_a_bar_and_then_as_they_are() -> None:
    bars = market_bars()
    whole = market_of(*bars, features=FUNCTIONS)
    actor = actor_of(whole, tuple(series.symbol for series in bars))
    bounds, random = whole.offsets.tolist(), np.random.default_rng(0)
    compared: Counter[str] = Counter()
    for minute in range(60, MINUTES, 20):
        now = MONDAY + minute * MINUTE_NS
        # Some symbols are up to three minutes late; each third minute all are there.
        lateness = random.integers(0, 4, len(bars)) * (minute % 3 > 0)
        known = [
            until(series, now - int(late) * MINUTE_NS) for series, late in zip(bars, lateness, strict=True)
        ]
        known = [series for series in known if len(series) > 2 * CONTEXT]
        market = market_of(*known, horizon=1, statistics=actor.statistics, features=FUNCTIONS)
        latest = latest_decisions(market, CONFIG)
        complete_ns = now - int(lateness.max()) * MINUTE_NS
        for n, symbol in enumerate(latest.symbols):
            number = whole.symbols.index(symbol)
            seen = CONTEXT + int(latest.decision[n]) + 1
            end = bounds[number] + int(latest.bar[n] - market.offsets[market.symbols.index(symbol)]) + 1
            tokens, batch = latest.bars[n, :seen], whole.features[end - seen : end].float()
            # Whatever is complete by now has the values of the batch, to the bit.
            is_complete = whole.open_time[end - seen : end] <= complete_ns
            assert torch.equal(tokens[is_complete], batch[is_complete])
            compared["complete" if bool(is_complete.all()) else "late"] += 1
            compared["other"] += not torch.equal(tokens, batch)
    assert min(compared["complete"], compared["late"], compared["other"]) > 12
    # A late bar is one that does not exist: a batch of bars without it has the same numbers.
    now = MONDAY + 300 * MINUTE_NS
    known = [until(series, now - 2 * MINUTE_NS * (series.symbol == "ETHUSDT")) for series in bars]
    (decision, *_), _ = actor.decide(known)
    gone = (bars[1].open_time > now - 2 * MINUTE_NS) & (bars[1].open_time <= now)
    assert gone.any()
    without = [series.select(~gone) if series.symbol == "ETHUSDT" else series for series in bars]
    batch = market_of(*without, statistics=actor.statistics, features=FUNCTIONS)
    live = latest_decisions(
        market_of(*known, horizon=1, statistics=actor.statistics, features=FUNCTIONS), CONFIG
    )
    seen = CONTEXT + int(live.decision[0]) + 1
    end = int(live.bar[0]) + 1
    assert decision.symbol == "BTCUSDT"
    assert torch.equal(live.bars[0, :seen], batch.features[end - seen : end].float())


def test_decisions_for_some_symbols_look_at_all_whatever_their_order() -> None:
    bars = market_bars()
    actor = actor_of(market_of(*bars, features=FUNCTIONS), tuple(series.symbol for series in bars))
    assert actor.sees_others
    everyone, nothing = actor.decide(bars)
    assert nothing == {}
    by_symbol = {decision.symbol: decision for decision in everyone}
    for series in bars:
        ((alone,), _) = actor.decide([series], bars[::-1])
        assert_same(alone, by_symbol[series.symbol])
    # Without the others it still decides, and says which are missing; a stranger counts for nobody.
    ((blind,), missing) = actor.decide(bars[:1])
    assert blind.probabilities != by_symbol["BTCUSDT"].probabilities
    assert set(missing) == {"ETHUSDT", "NEWUSDT", "AAPL", "SPY"}
    assert missing["SPY"] == "no bars of it, so the others are seen as if it were halted"
    decisions, _ = actor.decide([*bars, walk("XYZUSDT", MINUTES, seed=9)])
    for decision, expected in zip(decisions, everyone, strict=False):
        assert_same(decision, expected)


def assert_same(one: Decision, other: Decision) -> None:
    """Other rows in a matrix product may round differently."""
    assert replace(one, probabilities=other.probabilities) == other
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)


@pytest.fixture
def trained(tmp_path: Path) -> TrainedPolicy:
    """A policy of random weights that sees the panel of two coins and two stocks."""
    return untrained_on(market_bars(), tmp_path)


def untrained_on(bars: list[Bars], folder: Path) -> TrainedPolicy:
    path = untrained(folder, features=("symbol", "panel"))
    saved = Checkpoint.read(path).with_resume()
    market = market_of(*bars, features=FUNCTIONS)
    torch.manual_seed(1)
    policy = Policy(TransformerConfig(market.num_features, 32, 1, 4, 25), 9, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    replace(
        saved,
        model=policy.state_dict(),
        model_config=policy.sizes,
        features=market.statistics.state_dict(),
        symbols=[series.symbol for series in bars],
    ).save(keep=1)
    return TrainedPolicy.read(path, Settings)


def test_an_export_has_the_panel_and_its_symbols(trained: TrainedPolicy, tmp_path: Path) -> None:
    folder = export.command(trained, tmp_path / "out", False, print)
    card = json.loads((folder / "card.json").read_text())
    assert card["features"]["names"] == [*GROUPS["symbol"], *GROUPS["panel"]]
    assert sum(value != 0 for value in card["features"]["probe"][24:]) > 35
    actor, bars = Actor.with_card(load_policy(folder), folder), market_bars()
    assert actor.symbols == tuple(trained.checkpoint.symbols)
    assert actor.decide(bars[:1], bars) == trained.actor.decide(bars[:1], bars)


def test_signals_for_some_symbols_see_all_of_the_training_and_name_the_late_ones(
    trained: TrainedPolicy,
) -> None:
    bars = market_bars()
    now = MONDAY + 300 * MINUTE_NS
    late = [until(series, now - 2 * MINUTE_NS * (series.symbol != "BTCUSDT")) for series in bars]
    rows = [row_of(Series(series, np.zeros(len(series), np.int8)), "") for series in late]
    data = LoadedData(late, {}, rows, "f" * 16)
    after = now + MINUTE_NS + 10**9
    (signal,), missing = compute_signals(trained, data, after, SignalOptions(("BTCUSDT",)))
    assert missing == {} and signal.late == ("ETHUSDT", "NEWUSDT")
    ((decision,), _) = trained.actor.decide(late[:1], late)
    assert signal.decision == decision
    entry = report(trained, [signal], missing, after, data.fingerprint)["signals"][0]
    assert entry["late_symbols"] == ["ETHUSDT", "NEWUSDT"]
    asked = request_of(trained.settings, after, ("BTCUSDT",), trained.actor.sees_others)
    assert asked.symbols["binance_pairs"] == trained.settings.binance_pairs
    narrow = request_of(trained.settings, after, ("BTCUSDT",))
    assert list(narrow.symbols["binance_pairs"]) == ["BTCUSDT"]


def test_an_exam_of_one_symbol_sees_the_others(trained: TrainedPolicy) -> None:
    bars = market_bars()
    everyone, one = trained.market(bars), trained.market(bars[:1], bars[1:])
    assert torch.equal(one.features, everyone.features[:MINUTES])
    assert not torch.equal(trained.market(bars[:1]).features, one.features)
    stranger = replace(bars[1], symbol="OTHERUSDT")
    assert torch.equal(trained.market(bars[:1], [*bars[1:], stranger]).features, one.features)
    # Of another vendor's spelling, all count.
    renamed = [replace(series, symbol=f"X:{series.symbol}") for series in bars]
    panel = panel_of(renamed, "cpu")
    expected = Market.from_settings(
        renamed, trained.settings, torch.device("cpu"), NEVER, trained.statistics, panel
    )
    assert torch.equal(trained.market(renamed).features, expected.features)


def test_the_command_decides_with_a_symbol_late_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = untrained_on([walk(name, MINUTES, seed=seed) for seed, name in enumerate(PAIRS)], tmp_path)
    with BinanceServer(NOW) as server, Console(Path(trained.settings.log_dir), to_stderr=True) as console:
        monkeypatch.setenv("BINANCE_API_URL", server.url)
        monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
        found = []
        for minute in range(3):
            now = server.now_ns = NOW + minute * MINUTE_NS
            server.faults[:] = [Fault("symbol=ETHUSDT", status=451)] if minute == 1 else []
            signals.run(trained, SignalOptions(("BTCUSDT",), as_json=True), console, now, console, None)
            found += json.loads(capsys.readouterr().out)["signals"]
    assert [entry["bar"][11:16] for entry in found] == ["11:59", "12:00", "12:01"]
    assert [entry["late_symbols"] for entry in found] == [[], ["ETHUSDT"], []]
