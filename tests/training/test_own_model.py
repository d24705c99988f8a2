"""A model of one's own: the page's example trains, is saved and sharded; what cannot be is refused in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from continuous_training import PRESETS, Settings
from envs.feature_errors import FeatureError
from envs.features import chosen_features
from models import own
from models.own import OwnModelError, OwnTrunk, model
from models.policy import Policy
from tests.program import ROOT
from tests.training.rollouts import ALONE, FEATURES, SETTINGS
from tests.training.test_sharding import local, one_rank
from tests.training.test_trainer import small_trainer
from training.checkpoint import Checkpoint, CheckpointError
from training.memory import DoesNotFit, MemoryNeeds, plan
from training.metrics import fixed_batch, plasticity
from training.model_checks import check_own_model, count, describe_model, identify_model, why_not_trained_here
from training.parallel import new_policy
from training.validation import policy_sizes

EXAMPLE = ROOT / "docs" / "own_model.md"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[type[nn.Module]]:
    none: list[type[nn.Module]] = []
    monkeypatch.setattr(own, "_registered", none)
    return none


@pytest.fixture
def example() -> type[nn.Module]:
    """The class of docs/own_model.md, as a start finds it."""
    (code,) = re.findall(r"^```python\n(.*?)^```", EXAMPLE.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, own.OWN_FILE, "exec"), {"__name__": own.MODULE})  # the page is ours
    found = own.own_model()
    assert found is not None and found.__name__ == "Convolutions"
    return found


def test_there_is_none_at_first() -> None:
    assert identify_model() == {} and describe_model() == ""
    check_own_model(SETTINGS)
    assert "own_model" not in policy_sizes(SETTINGS, 5)


def test_the_example_passes_every_check_at_the_sizes_of_each_preset(example: type[nn.Module]) -> None:
    for preset in ({}, PRESETS["demo"]):
        check_own_model(Settings(**preset))
    assert describe_model() == "Model: Convolutions of models/own_model.py:24, instead of the transformer"


class Base(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.embed = nn.Linear(config.num_features, config.d_model)  # type: ignore[attr-defined]

    def forward(self, bars: Tensor) -> Tensor:
        x: Tensor = self.embed(bars)
        return x


class Mixed(Base):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        width = config.d_model  # type: ignore[attr-defined]
        self.blocks = nn.ModuleList((nn.Linear(width, width), nn.LayerNorm(width)))

    def forward(self, bars: Tensor) -> Tensor:
        x: Tensor = self.embed(bars)
        for block in self.blocks:
            x = x + block(x)
        return x


class Centered(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars - bars.mean(dim=1, keepdim=True))


class Shifted(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars.roll(-1, dims=1))


class HiddenLeak(Base):
    """Looks ahead through a layer that begins with zeros."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.d_model))  # type: ignore[attr-defined]

    def forward(self, bars: Tensor) -> Tensor:
        x = self.embed(bars)
        return x + self.gate * x.flip(1)


class ByLength(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars) * bars.shape[1]


class BatchNorm(Base):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.num_features)  # type: ignore[attr-defined]

    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(self.norm(bars.transpose(1, 2)).transpose(1, 2))


class Dropout(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return nn.functional.dropout(self.embed(bars), 0.1, self.training)


class OverSegments(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars - bars.mean(dim=0))


class OneVector(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars)[:, -1]


class Words(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars), None  # type: ignore[return-value]


class Fails(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars.flatten(1))


class InPlace(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars.mul_(1.5))


class Unused(Base):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.other = nn.Linear(3, 3)


class Double(Base):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.embed = self.embed.double()


class Weightless(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()


class OnCpu(Base):
    def forward(self, bars: Tensor) -> Tensor:
        return self.embed(bars) + torch.ones(bars.shape[1], 1, device="cpu")


class TooFew(nn.Module):
    pass


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Centered, "looks ahead: changed bars"),
        (Shifted, "looks ahead: changed bars"),
        (HiddenLeak, "looks ahead: changed bars"),
        (ByLength, "depends on the length of a segment"),
        (BatchNorm, "mixes the segments of a batch"),
        (Dropout, "computes something else in every call"),
        (OverSegments, "mixes the segments"),
        (OneVector, r"must return a vector for every bar, \(3, 13, 64\)"),
        (Words, r"must return a tensor of floats of shape \(3, 13, 64\), was tuple"),
        (Fails, r"model Fails failed on bars of shape .*test_own_model.py:\d+: RuntimeError"),
        (InPlace, "changes its bars in place"),
        (Unused, "has weights that no gradient reaches, such as other.weight"),
        (Double, "must have float32 weights"),
        (Weightless, "has no weights to train"),
        (OnCpu, "failed on the device meta: make new tensors on the device of the bars"),
        (TooFew, "model TooFew cannot be made of TransformerConfig"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(network: type[nn.Module], words: str) -> None:
    model(network)
    with pytest.raises(FeatureError, match=words) as refusal:
        check_own_model(SETTINGS)
    assert "\n" not in str(refusal.value) and network.__name__ in str(refusal.value)


@pytest.fixture
def trained(example: type[nn.Module], tmp_path: Path) -> Checkpoint:
    """The example after an epoch."""
    trainer = small_trainer()
    assert trainer.update(trainer.collect()) is not None
    assert "plasticity/effective_rank" in plasticity(trainer.policy, fixed_batch(trainer.env.market))
    saved = trainer.checkpoint("none", {}, {})
    return replace(saved, path=tmp_path / saved.path.name)


def test_the_example_learns_and_goes_on_from_its_checkpoint(trained: Checkpoint) -> None:
    trained.save(keep=1)
    read = Checkpoint.read(trained.path)
    fresh, again = small_trainer(), small_trainer(read.with_resume())
    for name, weight in trained.model.items():
        assert torch.equal(again.policy.state_dict()[name], weight), name
    moved = [
        name
        for name, weight in fresh.policy.state_dict().items()
        if not torch.equal(weight, read.model[name])
    ]
    assert len(moved) > 5
    again.update(again.collect())
    policy = read.policy(ALONE.device, "fp32")
    bars = torch.randn(2, 9, policy.num_features)
    accounts = torch.randn(2, 3, policy.num_account_features)
    whole = policy(bars, accounts)[0]
    torch.testing.assert_close(
        policy(bars[:, :8], accounts[:, :2])[0], whole[:, :2]
    )  # as PPO's ratio needs it
    assert whole.shape == (2, 3, 3)


def test_muon_moves_the_matrices_of_its_blocks_and_says_where_there_are_none(
    registered: list[type[nn.Module]], caplog: pytest.LogCaptureFixture
) -> None:
    model(Mixed)
    trainer = small_trainer(optimizer="muon")
    assert trainer.update(trainer.collect()) is not None
    state = trainer.learner.optimizer.state
    of_one = {name for name, p in trainer.policy.named_parameters() if "exp_avg_sq" not in state[p]}
    assert of_one == {"trunk.network.blocks.0.weight", "head.market.weight", "head.mix.weight"}
    trainer.log_sizes()
    assert "optimizer=muon" not in caplog.text
    registered[:] = [Base]
    small_trainer(optimizer="muon").log_sizes()
    assert "optimizer=muon moves the head alone: the model has no matrices in self.blocks" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    trained: Checkpoint, registered: list[type[nn.Module]]
) -> None:
    def refusal() -> str:
        with pytest.raises(CheckpointError) as error:
            trained.policy(ALONE.device, "fp32")
        assert why_not_trained_here(trained.model_config, trained.model) in str(error.value)
        return str(error.value)

    (kept,) = registered
    registered[:] = [Base]
    assert "has the model Base, but it was trained with the model Convolutions; put that" in refusal()
    registered[:] = []
    assert "has no model, but it was trained with the model Convolutions" in refusal()
    with pytest.raises(OwnModelError, match=r"trained with the model Convolutions .* which has none"):
        Policy.from_sizes(trained.model_config)
    registered[:] = [type(kept.__name__, (Base,), {})]
    assert "its weights have other names or shapes, such as trunk.network.blocks.0.mix.bias" in refusal()
    registered[:] = [kept]
    of_the_transformer = {key: value for key, value in trained.model_config.items() if key != "own_model"}
    assert "was trained with the transformer" in why_not_trained_here(of_the_transformer, trained.model)


def test_a_changed_file_that_makes_the_same_weights_is_a_warning(
    trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained.policy(ALONE.device, "fp32")
    assert not caplog.messages
    edited = tmp_path / "own_model.py"
    edited.write_text("# another text")
    monkeypatch.setattr(own, "OWN_FILE", edited)
    trained.policy(ALONE.device, "fp32")
    assert "models/own_model.py has changed since" in caplog.text


@pytest.mark.parametrize("has_blocks", [True, False])
def test_shards_are_the_bits_of_the_whole(
    example: type[nn.Module], has_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_blocks:
        monkeypatch.setattr(OwnTrunk, "blocks", ())
    sizes = policy_sizes(SETTINGS, FEATURES)
    whole = new_policy(sizes, "fp32", 7, ALONE, sharded=False)
    held = []
    for rank in range(2):
        with one_rank(rank, 2) as ranks:
            policy = new_policy(sizes, "fp32", 7, ranks, sharded=True)
            held.append({name: local(weight).clone() for name, weight in policy.state_dict().items()})
    for name, weight in whole.state_dict().items():
        parts = [shards[name] for shards in held]
        assert torch.equal(torch.cat(parts) if name.startswith("trunk") else parts[0], weight), name


def test_the_memory_plan_counts_what_a_backward_of_it_keeps(example: type[nn.Module]) -> None:
    of_transformer = replace(SETTINGS, context_bars=64, horizon=128, episode_bars=128)
    needs = MemoryNeeds.of(of_transformer, 0, 1, "fp32")
    assert needs.own is not None
    policy = Policy.from_sizes(policy_sizes(of_transformer, len(chosen_features(of_transformer.features))))
    assert needs.own.trunk_parameters == count(policy.trunk)
    assert needs.own.block_parameters == count(policy.trunk.blocks[0])  # type: ignore[index]
    kept = dict[int, torch.UntypedStorage]()
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.hidden(torch.randn(1, 192, policy.num_features), 128)
    assert needs.own.segment_bytes == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)
    chosen = plan(needs, needs.fixed_bytes * 2)
    assert not chosen.recompute and chosen.micro_batch_segments >= 1
    with pytest.raises(DoesNotFit, match=r"set .* to"):
        plan(needs, int(needs.fixed_bytes * 1.05))
