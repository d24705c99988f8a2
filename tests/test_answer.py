"""benchmarks/answer.py: its exam, by steps for others and by segments for ours, ranks policies as it says."""

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import answer
from commands.selftest import Sizes
from training.distributed import Ranks

SMALL = Sizes(
    num_symbols=2,
    num_bars=2_500,
    exam_symbols=2,
    num_envs=8,
    context_bars=16,
    horizon=128,
    minibatch_segments=8,
)


class Market(answer.KnownMarket):
    """One whose reference knows the drift of the next bar, as to find the best rule takes seconds."""

    @property
    def reference(self) -> np.ndarray:
        drift = self.fresh_paths.expectation
        return np.append(np.sign(drift[:, 1:]), np.zeros((len(drift), 1)), axis=1).astype(np.int8) + 1


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Market:
    monkeypatch.setattr(answer, "EXAM_BARS", 128)
    monkeypatch.setattr(answer, "EXAM_ACCOUNTS", 8)
    return Market("strong", 0, SMALL)


def test_share_of_the_reference(known: Market) -> None:
    accounts = answer.Accounts(known, num_envs=8, context=1, cost_ramp=0)
    best = known.choose_best
    fresh, most = accounts.fresh
    against, _ = answer.play_steps(known, fresh, lambda seen, *where: 2 - best(seen, *where))
    assert most > 0 and against < -most  # loses as much, and pays the costs
    assert answer.play_steps(known, fresh, best)[0] == most
    assert accounts.examine(lambda seen: np.ones(len(seen), np.int64)) == (0.0, 1.0)


def test_costs_grow(known: Market) -> None:
    accounts = answer.Accounts(known, num_envs=8, context=1, cost_ramp=100)
    accounts.grow_costs(25)
    assert accounts.training.env.cost_scale == 0.25
    accounts.grow_costs(1_000)
    assert accounts.training.env.cost_scale == 1.0


@pytest.mark.drill  # it makes a trainer, and draws
def test_one_training(known: Market, capsys: pytest.CaptureFixture, tmp_path) -> None:
    settings = known.settings(epochs=2)
    training = answer.OurTraining(
        known, settings, known.training_market(settings), Ranks(0, 1, answer.DEVICE)
    )
    facts = {"market": "strong", "symbols": 2, "seed": 0, "changes": {}}
    lines = list(answer.race("ours", training.epochs(), facts, limit=1e9))
    assert lines[-1]["transitions"] == 2 * 8 * 128
    assert np.isfinite(lines[-1]["share"]) and 0 <= lines[-1]["flat"] <= 1
    path = tmp_path / "lines"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    answer.report(Namespace(lines=path, plot=tmp_path / "plot.png"))
    assert "| strong | ours | 0 | not reached |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 1_000
