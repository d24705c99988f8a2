"""Bits that flip as in bad memory or a bad unit."""

from collections.abc import Callable

import torch
from torch import Tensor


def flip(tensor: Tensor, bit: int = 13) -> None:
    """Flip one bit of the first value, unseen by autograd."""
    tensor.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)


def flip_gradient_once(weight: Tensor) -> None:
    """Let the next gradient of this weight have a flipped bit."""
    waiting = [True]

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        if waiting:
            waiting.clear()
            flip(gradient)
        return gradient

    weight.register_hook(spoil)


def vary_gradient(weight: Tensor) -> Callable[[], None]:
    """Let every gradient differ in a bit, as the order of atomic additions does; returns how to end it."""
    generator = torch.Generator().manual_seed(0)

    def vary(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        flip(gradient, int(torch.randint(3, (), generator=generator)))
        return gradient

    return weight.register_hook(vary).remove
