"""The trunk: causality, rotary positions, and the arithmetic that its docstring states."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.transformer import Attention, RMSNorm, TransformerConfig, Trunk, rms_norm, rotary_angles, rotate

CONFIG = TransformerConfig(num_features=5, d_model=32, num_layers=2, num_heads=4, max_length=24)


def trunk(config: TransformerConfig = CONFIG) -> Trunk:
    torch.manual_seed(0)
    return Trunk(config)


@pytest.mark.parametrize("changed", [0, 1, 11, 23])
def test_a_bar_changes_nothing_before_it_and_everything_after(changed: int) -> None:
    model = trunk()
    bars = torch.randn(3, 24, 5)
    other = bars.clone()
    other[:, changed] += 1.0
    before, after = model(bars), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(dim=-1).all()


def test_a_longer_segment_gives_the_same_hidden_states_for_its_beginning() -> None:
    model, bars = trunk(), torch.randn(2, 24, 5)
    torch.testing.assert_close(model(bars)[:, :17], model(bars[:, :17]), rtol=1e-5, atol=1e-5)


def test_only_the_last_bars_are_the_same_as_all_of_them() -> None:
    model, bars = trunk(), torch.randn(2, 24, 5)
    weights = torch.randn(2, 7, model.config.d_model)
    (model(bars)[:, -7:] * weights).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    hidden = model(bars, 7)
    assert hidden.shape == weights.shape
    torch.testing.assert_close(hidden, model(bars)[:, -7:], rtol=1e-4, atol=1e-5)
    (hidden * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_the_scale_of_attention_is_of_what_it_adds() -> None:
    angles = rotary_angles(7, 8)
    x = torch.randn(2, 7, 32)
    torch.manual_seed(1)
    whole = Attention(CONFIG)
    torch.manual_seed(1)
    scaled = Attention(replace(CONFIG, attention_scale=0.25))
    place = angles.cos(), angles.sin()
    assert torch.equal(scaled(x, *place), 0.25 * whole(x, *place))


def test_attention_equals_its_definition() -> None:
    torch.manual_seed(1)
    attention, x = Attention(CONFIG).double(), torch.randn(2, 7, 32, dtype=torch.float64)
    angles = rotary_angles(7, 8).double()
    out = attention(x, angles.cos(), angles.sin())

    qkv = attention.qkv(x).view(2, 7, 3, 4, 8).detach()

    def normalised(v: Tensor) -> Tensor:  # (8,), to unit mean square
        return v / math.sqrt(float((v * v).mean()) + torch.finfo(torch.float64).eps)

    expected = torch.zeros(2, 7, 32, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            for t in range(7):
                weights = []
                for s in range(t + 1):
                    q = rotate(
                        normalised(qkv[b, t, 0, head])[None], angles.cos()[t : t + 1], angles.sin()[t : t + 1]
                    )
                    k = rotate(
                        normalised(qkv[b, s, 1, head])[None], angles.cos()[s : s + 1], angles.sin()[s : s + 1]
                    )
                    weights.append(math.exp(float((q * k).sum()) / math.sqrt(8)))
                for s, weight in enumerate(weights):
                    part = weight / sum(weights) * qkv[b, s, 2, head]
                    expected[b, t, head * 8 : head * 8 + 8] += part.detach()
    torch.testing.assert_close(out, attention.out(expected), rtol=1e-9, atol=1e-9)


def test_rotary_scores_depend_on_distance_only() -> None:
    angles = rotary_angles(20, 8)
    q, k = torch.randn(8), torch.randn(8)

    def score(i: int, j: int) -> float:
        a = rotate(q[None], angles[i : i + 1].cos(), angles[i : i + 1].sin())
        b = rotate(k[None], angles[j : j + 1].cos(), angles[j : j + 1].sin())
        return float((a * b).sum())

    assert score(7, 3) == pytest.approx(score(19, 15), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)


def test_the_promised_size_has_604_million_weights_in_its_blocks() -> None:
    with torch.device("meta"):
        model = Trunk(
            TransformerConfig(num_features=20, d_model=2048, num_layers=12, num_heads=32, max_length=193)
        )
    assert round(sum(p.numel() for p in model.blocks.parameters()) / 1e6) == 604


def test_wrong_shapes_raise() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, S <= 24, 5\), was \(1, 25, 5\)"):
        trunk()(torch.zeros(1, 25, 5))
    with pytest.raises(ValueError, match="even number"):
        TransformerConfig(num_features=5, d_model=30, num_layers=1, num_heads=4, max_length=8)


@pytest.mark.parametrize("num_last", [None, 7])
def test_counted_operations_are_those_of_the_matrix_products_and_of_half_the_attention(num_last):
    trunk = Trunk(TransformerConfig(num_features=6, d_model=32, num_layers=3, num_heads=4, max_length=20))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trunk(torch.randn(1, 20, 6), num_last)
    attention = 3 * 2 * 20**2 * 32  # the counter ignores that attention is causal
    assert trunk.forward_flops(20, num_last) == counter.get_total_flops() - attention


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_norms_keep_the_precision_of_their_input(device: str) -> None:
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    norm = RMSNorm(8).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert norm(x).dtype == rms_norm(x).dtype == torch.bfloat16
    assert norm(x.float()).dtype == torch.float32
