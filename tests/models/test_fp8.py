"""fp8 products: those of a plain reference, blind to later bars and other segments; they learn what bf16 does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import fp8
from models.policy import Policy, precision_on
from models.transformer import TransformerConfig

CONFIG = TransformerConfig(num_features=5, d_model=32, num_layers=2, num_heads=4, max_length=24)


def policy(precision: str) -> Policy:
    torch.manual_seed(0)
    model = Policy(CONFIG, 6, 3, precision)
    for layer in (model.head.logits, model.head.value):
        torch.nn.init.normal_(layer.weight)
    return model


def rounded(x: Tensor, kind: torch.dtype, scale: float) -> Tensor:
    """What is left of numbers after fp8, as float64."""
    return (x.double() / scale).to(kind).double() * scale


@pytest.mark.parametrize("rows", [16, 23])
def test_output_and_gradients_are_those_of_rounded_numbers_in_double_precision(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(48, 32) / 6).bfloat16().float().requires_grad_()
    gradient = 1e-3 * torch.randn(rows, 48, dtype=torch.bfloat16)
    y = fp8.linear(x, weight)
    y.backward(gradient)
    left = rounded(x, torch.float8_e4m3fn, 1.0)
    right = rounded(weight, torch.float8_e4m3fn, float(weight.detach().abs().max()) / 448)
    down = rounded(gradient, torch.float8_e5m2, float(gradient.abs().max()) / 57_344)
    for ours, expected in ((y, left @ right.t()), (x.grad, down @ right), (weight.grad, down.t() @ left)):
        assert ours is not None and ours.shape == expected.shape
        error = (ours.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 ** (-8 if ours.dtype == torch.bfloat16 else -20)


def test_rounding_saturates_takes_zeros_and_passes_on_what_is_not_finite() -> None:
    assert fp8.unscaled(torch.tensor([1e4, -1e4, 0.001])).numbers.tolist() == [448.0, -448.0, 2**-10 + 2**-10]
    numbers, scale = fp8.scaled(torch.zeros(3))
    assert (numbers.float() * scale).tolist() == [0.0] * 3
    for spoiled in (float("nan"), float("inf")):  # so that a step with such gradients is skipped
        numbers, scale = fp8.scaled(torch.tensor([1.0, spoiled]), fp8.GRADIENT)
        assert (numbers.float() * scale).isnan().any()


def test_a_decision_depends_on_no_later_bar_and_no_other_segment() -> None:
    model, bars, accounts = policy("fp8"), torch.randn(4, 24, 5), torch.randn(4, 8, 6)
    other = bars.clone()
    other[1:] *= 100.0
    other[0, -1] += 1_000.0
    before, after = model(bars, accounts)[0], model(other, accounts)[0]
    assert torch.equal(before[0, :-1], after[0, :-1])
    assert (before[0, -1] != after[0, -1]).any()


def test_gradients_point_where_those_of_bf16_do() -> None:
    bars, accounts = torch.randn(8, 24, 5), torch.randn(8, 8, 6)
    found = []
    for precision in ("bf16", "fp8"):
        model = policy(precision)
        logits, values = model(bars, accounts)
        (logits.square().mean() + values.square().mean()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert {tensor.dtype for tensor in (*model.parameters(), *gradients)} == {torch.float32}
        found.append([gradient.flatten() for gradient in gradients])
    for expected, ours in zip(*found, strict=True):
        assert F.cosine_similarity(expected, ours, dim=0) > 0.98


def test_it_learns_what_bf16_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    bars = torch.randn(16, 24, 5, generator=generator)
    wanted = torch.sin(bars[..., 0].cumsum(1))[:, -8:]  # of all bars so far
    left = {}
    for precision in ("bf16", "fp8"):
        model, accounts = policy(precision), torch.zeros(16, 8, 6)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            loss = F.mse_loss(model(bars, accounts)[1], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[precision] = float(loss.detach() / wanted.var())
    assert left["bf16"] < 0.5
    assert left["fp8"] < 1.1 * left["bf16"]


def test_only_the_blocks_multiply_in_fp8_and_only_where_there_are_kernels() -> None:
    model = policy("fp8")
    inside = {name for name, module in model.named_modules() if getattr(module, "in_fp8", False)}
    assert len(inside) == 4 * CONFIG.num_layers
    assert all(name.startswith("trunk.blocks.") for name in inside)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert precision_on(gpu, "fp8", (8, 9)) == precision_on(cpu, "fp8") == "fp8"
    assert precision_on(gpu, "fp8", (8, 0)) == "bf16"
    assert [precision_on(gpu, "auto", (9, 0)), precision_on(gpu, "auto", (7, 5))] == ["bf16", "fp32"]
