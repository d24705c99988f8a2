"""Several checkpoints decide by the plain average of their probabilities, or say in a line why they cannot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from commands import export, signals
from continuous_training import Settings
from data_sources.bars import DAY_NS, Bars
from envs.walk_env import ExamEnv
from evaluation import ensemble
from evaluation.exam import examine
from evaluation.provenance import how_it_was_made, members_of
from evaluation.trained_policy import NEVER_NS, Actor, TrainedPolicy, stem_of
from models import load_policy
from models.ensemble import Ensemble, View
from runtime.files import sha256_of
from tests.envs.markets import MONDAY, walk
from tests.evaluation.members import read_alone, save_member, save_members
from tests.program import is_same
from tests.training.checkpoints import NOW
from training.checkpoint import CheckpointError

HORIZON = 16
COINS = [walk("BTCUSDT", 1600), walk("ETHUSDT", 1580, seed=1)]
# From midnight on segments are laid out alike, whatever the context.
START = MONDAY + DAY_NS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def together(paths: list[Path]) -> TrainedPolicy:
    return ensemble.read(paths, Settings)


def odds(trained: TrainedPolicy, bars: list[Bars]) -> np.ndarray:
    decisions, unavailable = trained.actor.decide(bars)
    assert not unavailable
    return np.array([decision.probabilities for decision in decisions])


def test_one_is_its_checkpoint_to_the_bit(paths: list[Path]) -> None:
    (alone,) = read_alone(paths[:1])
    one = ensemble.read(paths[:1], Settings)
    assert one.members == () and one.name == "run1_epoch2.pt"
    assert is_same(dict(one.policy.state_dict()), dict(alone.policy.state_dict()))
    assert one.actor.decide(COINS) == alone.actor.decide(COINS)
    wrapped = Ensemble([alone.policy], [View(0, 0)])  # type: ignore[list-item]
    assert replace(alone.actor, policy=wrapped).decide(COINS) == alone.actor.decide(COINS)


@pytest.mark.parametrize("which", [(0, 1), (0, 2), (1, 0, 2)])
def test_probabilities_are_the_plain_average(paths: list[Path], which: tuple[int, ...]) -> None:
    chosen = [paths[number] for number in which]
    each = [odds(alone, COINS) for alone in read_alone(chosen)]
    ours = odds(ensemble.read(chosen, Settings), COINS)
    np.testing.assert_allclose(ours, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 0.05  # they differ


@torch.no_grad()
def walk_by_hand(paths: list[Path], together: TrainedPolicy, number: int) -> list[list[float]]:
    """Rows of fill time and target: each member reads its own market, probabilities are averaged in float64."""
    members = read_alone(paths)
    markets = [member.market(COINS) for member in members]
    market = together.market(COINS)
    env = ExamEnv(
        market.until(NEVER_NS), together.env_config(1), market.device, [(COINS[number].symbol, START)]
    )
    rows = []
    for _ in range(env.num_segments):
        env.begin_segment()
        for bar in range(int(env.cursor), int(env.cursor) + HORIZON):
            observed, chances = env.account_observations(), []
            for member, own in zip(members, markets, strict=True):
                begin = int(own.segment_starts(number, torch.tensor([bar]), HORIZON))
                tokens = own.features[begin - own.context_bars : bar + 1].float()[None]
                projected = member.policy.encode(tokens, bar - begin + 1)[:, -1]
                chances.append(member.policy.head.decide(projected, observed)[0].double().softmax(-1))
            action = torch.stack(chances).mean(dim=0).argmax(-1)
            env.step(action)
            rows.append([float(market.open_time[bar + 1]), together.settings.positions[int(action)]])
    return rows


def test_an_exam_walks_by_that_average(paths: list[Path], together: TrainedPolicy) -> None:
    walks = examine(
        together.policy,
        together.market(COINS),
        together.env_config(1),
        ["BTCUSDT", "ETHUSDT"],
        START,
        NEVER_NS,
    )
    targets = set()
    for number, played in enumerate(walks["policy"]):
        time, target = np.array(walk_by_hand(paths, together, number)).T
        assert np.array_equal(played.time.astype(np.int64), time.astype(np.int64))
        np.testing.assert_allclose(played.position, target, atol=0.05)  # exposures drift between fills
        targets |= set(target)
    assert targets == {-1, 0, 1}


def test_days_that_any_member_was_trained_on_are_not_unseen(tmp_path: Path) -> None:
    older = save_member(tmp_path / "a", 1, trained_until_ns=NOW - DAY_NS)
    newer = save_member(tmp_path / "b", 2, trained_until_ns=NOW, data_cutoff_ns=NOW - 1)
    for order in ([older, newer], [newer, older]):
        trained = ensemble.read(order, Settings)
        assert trained.newest.trained_until_ns == NOW and trained.newest.path == newer
        assert trained.data_cutoff_ns == NOW


def test_all_members_are_named_with_their_hashes(paths: list[Path], together: TrainedPolicy) -> None:
    assert (
        together.name
        == "a/checkpoints/run1_epoch2.pt + b/checkpoints/run1_epoch2.pt + c/checkpoints/run1_epoch2.pt"
    )
    known = members_of(together)
    assert [member["sha256"] for member in known] == [sha256_of(path) for path in paths]
    made = how_it_was_made(together, *_nothing(), 2, torch.device("cpu"))
    assert made["ensemble"].startswith("3 members, whose probabilities are averaged; ")
    for number, path in enumerate(paths, 1):
        assert made[f"checkpoint of member {number}"].endswith(f"SHA-256 {sha256_of(path)[:16]}")
        assert "wide" in made[f"policy of member {number}"]
    assert stem_of(together.names[:2]) == "a-checkpoints-run1_epoch2+b-checkpoints-run1_epoch2"
    assert len(stem_of(together.names * 9)) <= 120 and stem_of(together.names * 9) != stem_of(
        together.names * 8
    )


def _nothing() -> Any:
    return SimpleNamespace(bars=[], fingerprint="0" * 16), SimpleNamespace(digest="1" * 16)


def test_signals_name_all_members_and_their_verdicts(together: TrainedPolicy) -> None:
    decisions, _ = together.actor.decide(COINS)
    shown = [signals.Signal(decision, 0.0, 0, "ok", True) for decision in decisions]
    assert signals.table(together, shown, NOW, False)[0].startswith(f"{together.name} at 2026-11-20 12:00")
    content = signals.report(together, shown, {}, NOW, "")
    assert content["checkpoint"] == together.name and content["run"] is content["verdict"] is None
    assert " + ".join(member["checkpoint"] for member in content["members"]) == together.name
    examined = replace(together.parts[1].checkpoint, exam={"line": {"verdict": "edge"}})
    known = replace(together.parts[1], checkpoints=(examined,))
    members = (together.parts[0], known, together.parts[2])
    reason = signals.report(replace(together, members=members), shown, {}, NOW, "")["verdict_reason"]
    assert reason.startswith("no exam is known of this ensemble")
    assert "a/checkpoints/run1_epoch2.pt no exam, b/checkpoints/run1_epoch2.pt edge, c/" in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slippage_bps": 2.0}, "slippage_bps=2.0, not 1.0; --slippage-bps sets one for all"),
        ({"episode_bars": 128}, "episode_bars=128, not 64; --episode-bars sets one for all"),
        ({"extended_hours": True}, "extended_hours=True, not False; --extended-hours sets one for all"),
        ({"sources": ("binance", "yahoo")}, "sources=binance,yahoo, not binance; --sources sets one for all"),
        ({"positions": (-1.0, 0.0, 0.5)}, "positions=-1.0,0.0,0.5, not -1.0,0.0,1.0; leave one of them out"),
        (
            {"symbols": ["BTCUSDT", "XRPUSDT"]},
            "other symbols, without ETHUSDT, with XRPUSDT; leave one of them out",
        ),
    ],
)
def test_what_members_must_share_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = [
        save_member(tmp_path / "a", 1),
        save_member(tmp_path / "b", 2),
        save_member(tmp_path / "c", 3, **changes),
    ]
    with pytest.raises(ValueError, match="cannot decide together") as error:
        ensemble.read(given, Settings)
    assert str(error.value).startswith(
        "c/checkpoints/run1_epoch2.pt cannot decide together with a/checkpoints/"
    )
    assert str(error.value).endswith(message)
    if "sets one for all" in message:
        assert len(ensemble.read(given, Settings, **changes).members) == 3


def test_a_member_that_is_missing_broken_or_named_twice_is_one_line(
    paths: list[Path], tmp_path: Path
) -> None:
    torn, again = tmp_path / "torn.pt", tmp_path / "best.pt"
    torn.write_bytes(paths[0].read_bytes()[:1000])
    shutil.copy(paths[1], again)
    for wrong, kind, message in (
        (tmp_path / "none.pt", CheckpointError, "none.pt cannot be read: No such file"),
        (torn, CheckpointError, "torn.pt is damaged, its end"),
        (again, ValueError, "best.pt is the same checkpoint as run1_epoch2.pt: name each member once"),
    ):
        with pytest.raises(kind, match=message) as error:
            ensemble.read([paths[1], wrong], Settings)
        assert "\n" not in str(error.value)


def test_an_export_holds_all_members_and_acts_to_the_bit_as_they_do(
    paths: list[Path], together: TrainedPolicy, tmp_path: Path
) -> None:
    folder = export.command(together, tmp_path / "out", False, print)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "card.json",
        "example.py",
        "model.safetensors",
    }
    assert Actor.with_card(load_policy(folder), folder).decide(COINS) == together.actor.decide(COINS)
    text = (folder / "card.json").read_text()
    assert all(sha256_of(path) in text for path in paths) and str(paths[0].parent) not in text


@pytest.mark.drill
def test_graphs_of_an_ensemble_compute_what_it_does(paths: list[Path], tmp_path: Path) -> None:
    lines: list[str] = []
    together = ensemble.read(paths[:2], Settings)
    export.command(together, tmp_path / "graphs", True, lines.append)  # compares them, over several lengths
    assert [line.split()[0] for line in lines] == ["policy.pt2", "policy.onnx"]
