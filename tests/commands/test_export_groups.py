"""What is exported of accounts over groups decides as the checkpoint does, with its caps; its episode is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from commands import export
from commands.episode import owner_of, play
from continuous_training import Settings
from envs.config import GroupConfig
from evaluation import plots
from evaluation.group_decisions import decide_groups
from evaluation.group_exam import examine_groups, groups_of
from evaluation.trained_policy import NEVER_NS, Actor, TrainedPolicy
from models import load_policy
from tests.commands.test_export import frame_of
from tests.envs.markets import walk
from tests.program import PATIENCE, ROOT, environment
from tests.training.checkpoints import untrained

BARS = [walk(symbol, 300, seed=number) for number, symbol in enumerate(("BTCUSDT", "ETHUSDT"))]


@pytest.fixture
def trained(tmp_path: Path) -> TrainedPolicy:
    return TrainedPolicy.read(untrained(tmp_path, account="pair", net_exposure=0.4), Settings)


def test_an_export_decides_as_its_checkpoint_with_the_caps_of_the_account(
    trained: TrainedPolicy, tmp_path: Path
) -> None:
    folder = export.command(trained, tmp_path / "out", False, print)
    card = json.loads((folder / "card.json").read_text())
    assert card["accounts"]["group"] == {"size": 2, "gross": 1.0, "net": 0.4}
    actor = Actor.with_card(load_policy(folder), folder)
    assert actor.config.group == GroupConfig(2, 1.0, 0.4)
    decided, unavailable = decide_groups(actor, BARS, [], {"BTCUSDT": 1.0})
    assert (decided, unavailable) == decide_groups(trained.actor, BARS, [], {"BTCUSDT": 1.0})
    assert len(decided) == 2 and not unavailable
    assert abs(sum(each.weight for each in decided)) <= 0.4 + 1e-9
    with pytest.raises(ValueError, match=r"accounts over groups: decide with .*decide_groups"):
        actor.decide(BARS)
    readme = " ".join((folder / "README.md").read_text().split())
    assert "over a group of 2 symbols. A position of 1 asks for 0.5 of its equity" in readme
    assert "longs and shorts differ by 0.4 of equity at most" in readme


@pytest.mark.drill  # a process of its own imports torch; the same of single accounts runs in every test
def test_the_example_acts_on_frames_of_bars(trained: TrainedPolicy, tmp_path: Path) -> None:
    folder = export.command(trained, tmp_path / "out", False, print)
    files = []
    for bars in BARS:
        frame_of(bars).to_csv(tmp_path / f"{bars.symbol}.csv", index=False)
        files.append(f"{bars.symbol}={tmp_path / bars.symbol}.csv")
    command = [sys.executable, str(folder / "example.py"), "crypto", *files]
    shown = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    expected = [
        f"{each.group}, {each.decision.symbol}: {each.decision.when_holding(0.0)[0]:+g}, probability "
        f"{each.decision.when_holding(0.0)[1]:.3f}, {each.weight:+.3f} of equity"
        for each in decide_groups(trained.actor, BARS, [], {})[0]
    ]
    assert shown.stdout.splitlines() == expected


def test_an_episode_of_a_group_is_that_of_its_exam(trained: TrainedPolicy) -> None:
    config = replace(trained.env_config(1), episode_bars=32)
    market = trained.market([*BARS, walk("AAA", 300, seed=7)])
    start = int(BARS[0].open_time[100])
    (first, second) = groups_of(market, 2)
    assert second.symbols == ("AAA", "BTCUSDT") and owner_of("AAA", market, config) == second
    drawn = play(trained.policy, market, config, second, start)
    walks = examine_groups(trained.policy, market, config, [first, second], start, NEVER_NS, max_segments=2)
    assert len(drawn.time) == 32
    assert np.array_equal(drawn.log_returns, walks["policy"][1].log_returns)
    assert plots.episode(drawn, "AAA").axes[0].get_title("left") == "AAA"
    stock = trained.market([*BARS, walk("SSS", 300, "stock", seed=7)])
    with pytest.raises(ValueError, match="--symbol SSS is in no group of 2: its kind has too few symbols"):
        owner_of("SSS", stock, config)
