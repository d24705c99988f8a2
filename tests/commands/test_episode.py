"""The picture of an episode shows what the ledger did, for any checkpoint and symbol."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from commands.episode import command, owner_of, play
from continuous_training import Settings
from evaluation import plots
from evaluation.trained_policy import TrainedPolicy
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import CONTEXT, HORIZON, config_of, market_of, walk
from tests.program import environment, tiny_flags

ROOT = Path(__file__).parent.parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def test_what_is_drawn_is_what_the_account_did() -> None:
    bars = walk("AAA", 400, "stock", gaps={100: 1050})
    market = market_of(bars)
    config = config_of(num_envs=9)
    torch.manual_seed(0)
    trunk = TransformerConfig(market.num_features, 32, 2, 4, CONTEXT + HORIZON + 1)
    policy = Policy(trunk, 9, 3)
    torch.nn.init.normal_(policy.head.logits.weight, std=0.5)
    start = 60
    episode = play(policy, market, config, owner_of("AAA", market, config), int(bars.open_time[start]))
    length = 4 * HORIZON
    filled = slice(start + 1, start + 1 + length)
    assert np.array_equal(episode.time.astype(np.int64), bars.open_time[filled])
    assert np.array_equal(episode.price, bars.open[filled].astype(np.float32))
    assert len({round(position) for position in episode.position}) > 1
    # Equity from the drawn positions and costs alone: value gained less what was paid.
    before = episode.equity_before
    equity = np.append(before[1:], np.exp(episode.log_returns.sum()))
    after = bars.open[start + 2 : start + 2 + length].astype(np.float32) / episode.price
    paid, borrowed = (episode.costs - episode.borrowing) * before, episode.borrowing * before
    invested = episode.position * (before - paid)
    np.testing.assert_allclose(equity - before, invested * (after - 1) - paid - borrowed, atol=1e-6)
    assert paid.sum() > 0 and borrowed.sum() > 0

    prices, positions, net, costs = plots.episode(episode, "AAA").axes
    assert prices.get_title("left") == "AAA"
    trades = sum(len(points.get_offsets()) for points in prices.collections)
    assert trades == (np.abs(np.diff(episode.position.round(2), prepend=0.0)) > 0.2).sum() > 0
    np.testing.assert_array_equal(prices.lines[0].get_ydata(), episode.price)
    np.testing.assert_allclose(net.lines[0].get_ydata(), 100 * (equity - 1), atol=1e-9)  # plots round
    assert positions.collections
    highest = max(path.vertices[:, 1].max() for part in costs.collections for path in part.get_paths())
    assert highest == pytest.approx(100 * (paid + borrowed).sum())


def test_the_command_draws_any_symbol_of_a_checkpoint(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "continuous_training.py", *arguments]
        return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)

    trained = run("train", *tiny_flags(tmp_path, epochs=1, runs=1))
    assert trained.returncode == 0, trained.stderr
    path, output = tmp_path / "checkpoints" / "run1_epoch1.pt", tmp_path / "here.png"
    drawn = run("episode", str(path), "--symbol", "SIM001", "--output", str(output))
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.startswith("SIM001, 16 decisions from 2026-01-31T23:")
    assert output.read_bytes().startswith(PNG)
    refused = run("episode", str(path), "--symbol", "AAPL")
    message = "Invalid setting: --symbol AAPL has no bars here; there are: SIM000, SIM001\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", message)
    for start, message in (
        ("soon", "--start soon must be a time in UTC such as 2026-11-20T14:30"),
        ("2999-01-01", "no place has the 10 bars of a segment after its start: take earlier starts"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            command(TrainedPolicy.read(path, Settings), "", start, output)
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        command(TrainedPolicy.read(path, Settings), "", "", tmp_path / "nowhere" / "episode.png")
    gone = run("episode", str(tmp_path / "gone.pt"))
    message = f"{tmp_path / 'gone.pt'} cannot be read: No such file or directory\n"
    assert (gone.returncode, gone.stdout, gone.stderr) == (2, "", message)
