"""The piecewise-linear encoding equals its definition, a feature and an interval at a time."""

from itertools import pairwise

import pytest
import torch

from models.embedding import EDGES, PiecewiseLinear
from models.transformer import TransformerConfig, Trunk

AWKWARD = [-1e4, -8.0, -3.0, -2.25, -1.5, -0.25, -0.0, 0.0, 1e-8, 0.5, 1.0, 1.5, 2.999, 3.0, 8.0, 1e4]


def encoded(value: float) -> list[float]:
    """Encode one feature as the paper defines it, shifted to -1 to 1."""
    columns = [value]
    for low, high in pairwise(EDGES):
        if value < low:
            columns.append(-1.0)
        elif value >= high:
            columns.append(1.0)
        else:
            columns.append(2.0 * (value - low) / (high - low) - 1.0)
    return columns


@pytest.mark.parametrize("num_features", [1, 3])
def test_each_feature_is_followed_by_its_places_between_the_edges(num_features: int) -> None:
    layer = PiecewiseLinear(num_features, 8)
    layer.fill_edges()
    values = torch.tensor(AWKWARD)
    rows = torch.stack([values.roll(number) for number in range(num_features)], dim=-1)
    expected = torch.tensor([[column for value in row for column in encoded(value)] for row in rows.tolist()])
    torch.testing.assert_close(layer.encode(rows), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(rows), expected @ layer.weight.t() + layer.bias)


def test_a_trunk_made_without_memory_has_the_same_edges_once_it_is_filled() -> None:
    config = TransformerConfig(5, 32, 1, 4, 24, feature_encoding="piecewise")
    with torch.device("meta"):
        model = Trunk(config)
    model.to_empty(device="cpu")
    model.reset_parameters()
    torch.testing.assert_close(model.embed.edges, torch.tensor(EDGES))
    assert "embed.edges" not in model.state_dict()


def test_a_tail_can_be_treated_otherwise_than_the_middle() -> None:
    # |x| is out of reach for a plain linear layer. Here it falls over each interval below 0, and then rises.
    layer = PiecewiseLinear(1, 1)
    layer.fill_edges()
    slopes = [(high - low) / 2 * (1 if low >= 0 else -1) for low, high in pairwise(EDGES)]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, *slopes]]))
        layer.bias.fill_(EDGES[-1] + sum(slopes))
    x = torch.linspace(-3, 3, 61)[:, None]
    torch.testing.assert_close(layer(x), x.abs(), atol=1e-6, rtol=0)
