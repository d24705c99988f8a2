"""The policy: a float32 head on a trunk that may compute in bf16, step by step equal to all at once."""

import pytest
import torch

from models.policy import Policy
from models.transformer import TransformerConfig

CONFIG = TransformerConfig(num_features=5, d_model=32, num_layers=2, num_heads=4, max_length=20)


def policy(precision: str = "fp32") -> Policy:
    torch.manual_seed(0)
    model = Policy(CONFIG, num_account_features=6, num_positions=3, precision=precision)
    # An untrained head has only zeros, which would prove nothing.
    for layer in (model.head.logits, model.head.value):
        torch.nn.init.normal_(layer.weight)
    return model


def test_an_untrained_policy_is_undecided() -> None:
    torch.manual_seed(0)
    logits, values = Policy(CONFIG, 6, 3)(torch.randn(2, 20, 5), torch.randn(2, 8, 6))
    assert torch.equal(logits, torch.zeros(2, 8, 3))
    assert torch.equal(values, torch.zeros(2, 8))


def test_deciding_step_by_step_equals_the_update_forward() -> None:
    model, bars, accounts = policy(), torch.randn(4, 20, 5), torch.randn(4, 8, 6)
    logits, values = model(bars, accounts)
    projected = model.encode(bars, 8)
    for t in range(8):
        step_logits, step_values = model.head.decide(projected[:, t], accounts[:, t])
        torch.testing.assert_close(step_logits, logits[:, t], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(step_values, values[:, t], rtol=1e-6, atol=1e-6)


def test_the_last_decision_sees_the_last_bar_and_the_first_one_does_not() -> None:
    model, bars, accounts = policy(), torch.randn(4, 20, 5), torch.randn(4, 8, 6)
    other = bars.clone()
    other[:, 19] += 1.0
    before, after = model(bars, accounts)[0], model(other, accounts)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7] != after[:, 7]).any(dim=-1).all()


def test_the_account_matters() -> None:
    model, bars = policy(), torch.randn(4, 20, 5)
    first, second = (model(bars, torch.randn(4, 8, 6))[0] for _ in range(2))
    assert (first != second).any(dim=-1).all()


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.1), ("fp8", 0.5)])
def test_the_trunk_rounds_and_the_head_stays_float32(precision: str, most: float) -> None:
    bars, accounts = torch.randn(2, 20, 5), torch.randn(2, 8, 6)
    exact, rounded = policy(), policy(precision)
    logits, values = rounded(bars, accounts)
    assert logits.dtype == values.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    difference = (logits - exact(bars, accounts)[0]).abs().max()
    scale = logits.detach().abs().mean()
    assert 0 < float(difference.detach() / scale) < most
