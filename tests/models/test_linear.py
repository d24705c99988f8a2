"""The trunk's linear layer equals torch's, with either library."""

import copy

import pytest
import torch
from torch import nn

from models import linear
from models.linear import FEWEST_ROWS, HAS_ONEDNN, Linear

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="oneDNN is used on CPUs with AVX-512 only")


def layers(bias: bool = True, inputs: int = 24, outputs: int = 40) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    ours, reference = (kind(inputs, outputs, bias=bias) for kind in (Linear, nn.Linear))
    reference.load_state_dict(ours.state_dict())
    return ours, reference.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, FEWEST_ROWS])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24)])
def test_output_and_gradients_are_those_of_double_precision(
    inputs: int, outputs: int, rows: int, bias: bool
) -> None:
    ours, reference = layers(bias, inputs, outputs)
    x = torch.randn(2, rows, inputs, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    weights = torch.randn(2, rows, outputs)
    y, expected = ours(x), reference(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    for own, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_views_that_are_not_contiguous_give_the_same() -> None:
    ours, reference = layers()
    x = torch.randn(24, 2 * FEWEST_ROWS).t()
    torch.testing.assert_close(ours(x).double(), reference(x.double()), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24)])
def test_the_compiler_gets_the_exact_shapes_and_strides(inputs: int, outputs: int) -> None:
    ops = torch.ops.trading_models
    gradient, x = torch.randn(FEWEST_ROWS, outputs), torch.randn(FEWEST_ROWS, inputs)
    given = (
        (ops.product, (x, torch.randn(outputs, inputs))),
        (ops.product, (gradient, torch.randn(outputs, inputs).t())),
        (ops.weight_gradient, (gradient, x)),
    )
    for operator, arguments in given:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_onednn
def test_onednn_is_used_for_many_float32_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = linear._Product.apply
    monkeypatch.setattr(linear._Product, "apply", lambda x, w: calls.append(x.shape) or apply(x, w))
    ours, _ = layers()
    ours(torch.randn(FEWEST_ROWS, 24))
    assert calls == [(FEWEST_ROWS, 24)]
    ours(torch.randn(FEWEST_ROWS - 1, 24))
    copy.deepcopy(ours).double()(torch.randn(FEWEST_ROWS, 24, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.randn(FEWEST_ROWS, 24)).dtype == torch.bfloat16
    any_rows = {"x": {0: torch.export.Dim("rows", min=1, max=2 * FEWEST_ROWS)}}
    torch.export.export(ours, (torch.randn(FEWEST_ROWS, 24),), dynamic_shapes=any_rows)
    assert len(calls) == 1
