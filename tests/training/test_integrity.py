"""Silent corruption: every flipped bit is noticed and its rank named; kernels that vary raise no alarm."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from continuous_training import Settings, train
from runtime.control import EXIT_DOES_NOT_FIT, Control, ExitProgram
from tests.program import TINY, checkpoint, is_same
from tests.training.corruption import flip, flip_gradient_once, vary_gradient
from tests.training.rollouts import made_up_rollout, small_learner, small_policy
from training.integrity import Inspections, _odd_ones, checksums
from training.learner import Learner

ROOT = Path(__file__).parents[2]
KINDS = ("weight", "first moment of", "second moment of")
long = pytest.mark.drill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_every_flipped_bit_changes_a_checksum_and_no_order_does(dtype: torch.dtype) -> None:
    tensor = torch.randn(50).mul(100).to(dtype)
    before = checksums([tensor])
    assert torch.equal(checksums([tensor.flip(0)]), before)
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for place in range(8 * dtype.itemsize):
        bits[7] ^= torch.tensor(1, dtype=bits.dtype) << place
        assert not torch.equal(checksums([tensor]), before)
        bits[7] ^= torch.tensor(1, dtype=bits.dtype) << place


def learner_and_rollout(optimizer: Literal["adamw", "muon"] = "adamw") -> tuple[Learner, Any]:
    policy = small_policy()
    learner, rollout = small_learner(policy, optimizer=optimizer), made_up_rollout(policy, 8)
    learner.update(rollout, 0.0)
    return learner, rollout


def test_a_sound_rank_finds_nothing_and_trains_as_without_looking() -> None:
    (looking, rollout), (other, _) = learner_and_rollout(), learner_and_rollout()
    for _ in range(2):
        assert looking.find_corruption() == ("", "")
        for learner in (looking, other):
            learner.update(rollout, 0.0)
    for name, value in looking.policy.state_dict().items():
        assert torch.equal(value, other.policy.state_dict()[name]), name


@pytest.mark.parametrize(
    ("optimizer", "place"),
    [
        *(("adamw", f"{kind} trunk.blocks.1.up.weight") for kind in KINDS),
        *(("muon", f"{kind} trunk.blocks.1.up.weight") for kind in KINDS[:2]),
        ("muon", f"{KINDS[2]} head.value.weight"),  # behind matrices that have no second moment
    ],
)
def test_a_bit_that_flips_between_two_steps_is_found_and_named(
    optimizer: Literal["adamw", "muon"], place: str
) -> None:
    learner, rollout = learner_and_rollout(optimizer)
    kind, _, name = place.rpartition(" ")
    parameter = learner.policy.get_parameter(name)
    moment = {"first moment of": "exp_avg", "second moment of": "exp_avg_sq"}.get(kind)
    flip(learner.optimizer.state[parameter][moment] if moment else parameter, bit=0)
    learner.update(rollout, 0.0)  # which changes every weight, and hides the bit
    found, _ = learner.find_corruption()
    assert f"{place} changed between two optimizer steps" in found
    assert found.startswith("rank 0 (") and "cpu" in found


def test_it_is_named_also_where_moments_came_later_than_others() -> None:
    learner, rollout = learner_and_rollout("muon")
    other = small_learner(small_policy())
    other.load_state_dict(copy.deepcopy(learner.state_dict()))  # matrices begin with no moments
    flip(other.optimizer.state[other.policy.head.value.weight]["exp_avg_sq"], bit=0)
    other.update(rollout, 0.0)
    found, _ = other.find_corruption()
    assert "second moment of head.value.weight changed between two optimizer steps" in found


def test_a_flipped_bit_in_a_gradient_is_found_also_the_first_time() -> None:
    for looks_before in (0, 2):
        learner, _ = learner_and_rollout()
        for _ in range(looks_before):
            assert learner.find_corruption()[0] == ""
        flip_gradient_once(learner.policy.trunk.embed.weight)
        found, _ = learner.find_corruption()
        assert "gradient of trunk.embed.weight came out differently when computed again" in found
        assert learner.find_corruption()[0] == ""


def test_a_kernel_that_varies_is_no_corruption_and_is_left_out_with_one_warning() -> None:
    learner, _ = learner_and_rollout()
    vary_gradient(learner.policy.trunk.embed.weight)
    found, warning = learner.find_corruption()
    assert (found, "gradient of trunk.embed.weight" in warning) == ("", True)
    assert learner.find_corruption() == ("", "")
    flip_gradient_once(learner.policy.head.mix.weight)
    assert "gradient of head.mix.weight" in learner.find_corruption()[0]


def test_of_three_replicas_the_odd_one_is_named_and_of_two_both() -> None:
    held = [("rank 0", {"a": 1, "b": 5}), ("rank 1", {"a": 1, "b": 5}), ("rank 2", {"a": 2, "b": 5})]
    assert _odd_ones(held) == ["rank 2: a differs from the other ranks'"]
    assert _odd_ones(held[1:]) == ["rank 1 and rank 2: a differs from the other ranks'"]
    assert _odd_ones(held[:2]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "",
        pytest.param("sharded", marks=long),
        pytest.param("compiled", marks=long),
        pytest.param("sharded compiled", marks=long),
    ],
)
def test_of_two_ranks_the_one_whose_bit_flips_is_named(tmp_path: Path, how: str) -> None:
    out, script = tmp_path / "out.json", str(ROOT / "tests/training/two_rank_corruption.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, str(out), *how.split()], check=True, cwd=ROOT, timeout=600)
    result = json.loads(out.read_text())
    first, second = result.pop("all")
    assert first == second  # what is decided from it is decided by all ranks alike
    for name in ("sound", "sound again", "after the gradient"):
        assert result[name] == ["", ""], name
    assert result["gradient"][0].startswith("rank 1 (") and "head.mix.weight" in result["gradient"][0]
    assert result["weight"][0].startswith("rank 1 (") and "weight trunk.embed.weight" in result["weight"][0]
    assert ("rank 0 (" in result["weight"][0]) is False
    if "sharded" not in how:
        assert "rank 0 (" in result["replica"][0] and " and rank 1 (" in result["replica"][0]


def settings_in(folder: Path) -> Settings:
    folders = {f"{name}_dir": str(folder / name) for name in ("checkpoint", "data", "log")}
    values = (
        TINY
        | folders
        | {"sources": ("simulated",), "epochs": 6, "runs": 1, "checkpoint_dir": str(folder / "checkpoints")}
    )
    return Settings(**values)


def test_training_returns_to_the_newest_good_checkpoint_and_ends_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings_in(tmp_path / "unbroken"), Control())
    healthy, updates = Learner.update, []

    def spoilt(learner: Learner, *arguments: Any, **more: Any) -> Any:
        updates.append(None)
        if len(updates) == 3:
            flip(learner.parallel.parameters[2])
        return healthy(learner, *arguments, **more)

    monkeypatch.setattr(Learner, "update", spoilt)
    train(settings_in(tmp_path / "spoilt"), Control())
    output = "".join(capsys.readouterr())
    assert output.count("wrong numbers: rank 0 (") == output.count("Resuming from") == 1
    assert len(updates) == 6 + 2
    ours, theirs = (checkpoint(tmp_path / name, "run1_epoch6.pt") for name in ("spoilt", "unbroken"))
    assert is_same(ours["model"], theirs["model"])


def test_a_device_that_stays_wrong_ends_the_training() -> None:
    inspections, answers = Inspections(), ["", *["rank 1: all of it"] * 3, "", *["rank 1: all of it"] * 4]
    seen = [inspections.is_corrupt(lambda answer=answer: (answer, "")) for answer in answers[:-1]]
    assert seen == [bool(answer) for answer in answers[:-1]]
    with pytest.raises(ExitProgram, match="rank 1: all of it") as reason:
        inspections.is_corrupt(lambda: (answers[-1], ""))
    assert reason.value.code == EXIT_DOES_NOT_FIT
