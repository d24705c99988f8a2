"""Muon: the same step as torch.optim.Muon, none where a gradient is not finite, and the way from and to AdamW."""

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.training.rollouts import ALONE, made_up_rollout, small_learner, small_policy
from training.learner import Learner
from training.losses import Objective
from training.muon import MOMENTUM, Muon, orthogonalise
from training.parallel import Replicated

RATE = 1e-2


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    matrices[2] *= 1e-6
    found = orthogonalise(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = values / values.norm(dim=-1, keepdim=True) > 0.02  # smaller ones have not come up yet
    rotated = left.mT @ found @ right.mT
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert kept.sum() >= 3 and diagonal[kept].min() > 0.6 and diagonal[kept].max() < 1.3
    torch.testing.assert_close(rotated, torch.diag_embed(diagonal), rtol=0, atol=1e-4)
    for matrix, own in zip(matrices, found, strict=True):
        torch.testing.assert_close(orthogonalise(matrix[None])[0], own)


def test_zeros_stay_zeros() -> None:
    assert not orthogonalise(torch.zeros(2, 4, 3)).any()


class Model(nn.Module):
    """Matrices of three shapes, one alone, and one vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8)]
        self.matrices = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.gain = nn.Parameter(torch.randn(8))


def muon_of(model: Model, dtype: torch.dtype = torch.float32, decay: float = 0.1) -> Muon:
    objective = Objective(small_policy(), small_learner(small_policy()).settings)
    matrices = list(model.matrices)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": [model.gain], "weight_decay": 0.0}]
    parallel = Replicated(objective, ALONE)
    return Muon(groups, [matrices[:4], matrices[4:]], parallel, dtype, lr=RATE, betas=(0.9, 0.95), fused=True)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_step(optimizer: Muon, skipped: float = 0.0) -> None:
    optimizer.found_inf = torch.tensor(skipped)
    optimizer.step()


@pytest.mark.parametrize("most", [1, 100, 1 << 25])
def test_steps_are_those_of_torchs_muon_and_of_adamw(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.muon.MOST_AT_ONCE", most)
    model, plain = Model(), Model()
    ours = muon_of(model, torch.bfloat16)
    reference = torch.optim.Muon(
        list(plain.matrices), lr=RATE, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([plain.gain], lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(4):
        give_gradients(model, step)
        give_gradients(plain, step)
        take_step(ours)
        reference.step()
        adamw.step()
    moved = RATE * 0.2 * 24**0.5 * 4  # at most, by one element
    for own, theirs in zip(model.matrices, plain.matrices, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0.01 * moved)
    assert torch.equal(model.gain, plain.gain)


def test_float32_computes_what_bf16_rounds() -> None:
    exact, rounded = Model(), Model()
    for model, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        give_gradients(model, 0)
        take_step(muon_of(model, dtype))
    parts = zip(exact.matrices, rounded.matrices, Model().matrices, strict=True)
    for one, other, before in ([weight.detach() for weight in weights] for weights in parts):
        assert 0 < (one - other).norm() < 0.05 * (one - before).norm()


def test_a_step_that_is_skipped_changes_nothing_to_the_bit() -> None:
    model, other = Model(), Model()
    ours, unbroken = muon_of(model), muon_of(other)
    for step, spoil in enumerate((False, True, False, True, False)):
        give_gradients(model, step)
        if spoil:
            gradient = model.matrices[step].grad
            assert gradient is not None
            gradient[0, 0] = float("nan") if step == 1 else float("inf")
        take_step(ours, float(spoil))
        if not spoil:
            give_gradients(other, step)
            take_step(unbroken)
    for one, clean in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, clean)
        assert torch.equal(ours.state[one]["exp_avg"], unbroken.state[clean]["exp_avg"])


def trained(optimizer: Literal["adamw", "muon"], **changes: int) -> Learner:
    learner = small_learner(small_policy(), optimizer=optimizer, **changes)
    learner.update(made_up_rollout(small_policy(), 8), run_fraction=0.0)
    return learner


def names_of(learner: Learner, moment: str) -> set[str]:
    """Names of the weights that have this moment."""
    named = learner.policy.named_parameters()
    return {name for name, weight in named if moment in learner.optimizer.state.get(weight, {})}


def test_matrices_between_hidden_units_have_one_moment_and_all_others_two() -> None:
    learner = trained("muon")
    weights = dict(learner.policy.named_parameters())
    matrices = {name for name in weights if "blocks" in name and weights[name].dim() == 2}
    matrices |= {"head.market.weight", "head.mix.weight"}
    assert len(matrices) == 4 * 2 + 2
    assert names_of(learner, "exp_avg") == set(weights)
    assert names_of(learner, "exp_avg_sq") == set(weights) - matrices


def test_blocks_may_share_a_matrix() -> None:
    policy = small_policy()
    first, second = policy.trunk.blocks
    second.up = first.up
    before = first.up.weight.detach().clone()
    learner = small_learner(policy, optimizer="muon")
    learner.update(made_up_rollout(policy, 8), run_fraction=0.0)
    assert second.up is first.up and not torch.equal(first.up.weight, before)
    assert learner.find_corruption() == ("", "")


@pytest.mark.parametrize("micro", [1, 3])
def test_the_micro_batch_size_changes_nothing(micro: int) -> None:
    other, whole = (trained("muon", minibatch=8, micro=size).policy.state_dict() for size in (micro, 8))
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def weights_after_one_more(
    learner: Learner, optimizer: Literal["adamw", "muon"]
) -> tuple[Learner, dict[str, Tensor]]:
    policy = small_policy()
    policy.load_state_dict(learner.policy.state_dict())
    other = small_learner(policy, optimizer=optimizer)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    kept = {name: weight.clone() for name, weight in _first_moments(other).items()}
    other.generator.set_state(learner.generator.get_state())
    other.update(made_up_rollout(small_policy(), 8, seed=5), run_fraction=0.5)
    assert other.find_corruption() == ("", "")
    return other, kept


def _first_moments(learner: Learner) -> dict[str, Tensor]:
    state = learner.optimizer.state
    return {name: state[w]["exp_avg"] for name, w in learner.policy.named_parameters() if w in state}


def test_muon_goes_on_to_the_bit() -> None:
    learner = trained("muon")
    other, _ = weights_after_one_more(learner, "muon")
    learner.update(made_up_rollout(small_policy(), 8, seed=5), run_fraction=0.5)
    for name, value in learner.policy.state_dict().items():
        assert torch.equal(value, other.policy.state_dict()[name]), name


def test_a_training_that_turns_to_muon_keeps_its_momentum() -> None:
    learner = trained("adamw")
    saved = {name: moment.clone() for name, moment in _first_moments(learner).items()}
    other, kept = weights_after_one_more(learner, "muon")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(moment, kept[name]) for name, moment in saved.items())
    assert "trunk.blocks.0.up.weight" not in names_of(other, "exp_avg_sq")


def test_one_that_turns_back_to_adamw_begins_the_moments_of_matrices_afresh() -> None:
    learner = trained("muon")
    other, kept = weights_after_one_more(learner, "adamw")
    assert set(kept) == names_of(learner, "exp_avg_sq")
    assert names_of(other, "exp_avg_sq") == set(dict(learner.policy.named_parameters()))
