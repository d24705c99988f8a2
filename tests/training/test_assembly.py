"""The micro-batch is what a GPU's memory allows, whoever uses it at the moment."""

from __future__ import annotations

import pytest

from training.assembly import micro_batch_that_fits

GIB = 2**30
FULL = (2_048, 12, 192)  # d_model, num_layers, segment_bars: 34 x 2,048 x 12 x 192 bytes a segment in bf16


@pytest.mark.parametrize(
    ("memory_bytes", "bf16", "segments"),
    [
        (24 * GIB, True, 50),  # (24 GiB - 9.66 GB) / 2 / 160.4 MB
        (24 * GIB, False, 25),
        (80 * GIB, True, 128),  # more would make no step quicker
        (80 * GIB, False, 118),
        (8 * GIB, True, 1),  # the weights alone do not fit: the GPU's own message tells it
        (None, True, 16),
    ],
)
def test_the_full_model_gets_what_its_weights_leave(
    memory_bytes: int | None, bf16: bool, segments: int
) -> None:
    assert micro_batch_that_fits(memory_bytes, *FULL, bf16) == segments


def test_a_wider_deeper_or_longer_model_gets_fewer() -> None:
    most = micro_batch_that_fits(24 * GIB, *FULL, True)
    for larger in ((2_560, 12, 192), (2_048, 16, 192), (2_048, 12, 384)):
        assert 1 <= micro_batch_that_fits(24 * GIB, *larger, True) < most
