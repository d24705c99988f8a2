"""A model of one's own in the place of the transformer: the class with ``@model`` in models/own_model.py.

The head, and so what a policy is, stays the same. Shapes: as in models/transformer.py.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from models.transformer import TransformerConfig

MODULE = "models.own_model"
OWN_FILE = Path(__file__).with_name("own_model.py")
_registered: list[type[nn.Module]] = []


class OwnModelError(ValueError):
    """Weights are of another model than that of models/own_model.py; the message is one line."""


def model(network: type[nn.Module]) -> type[nn.Module]:
    """Make this class the trunk of new policies."""
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise TypeError("a model must be a class of nn.Module")
    if _registered:
        raise ValueError(f"{_registered[0].__name__} is the model already: there can be only one")
    _registered.append(network)
    return network


def own_model() -> type[nn.Module] | None:
    """Return the class of models/own_model.py, None without one; raises whatever that file does."""
    try:
        importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
    return _registered[0] if _registered else None


def identify_own() -> dict[str, str]:
    """Return what a checkpoint remembers of the model of one's own, {} without one."""
    network = own_model()
    return {} if network is None else {"name": network.__name__, "sha256": _digest()}


def differs(identity: Mapping[str, str]) -> bool:
    """Whether models/own_model.py is another file than the one that these weights were trained with."""
    return bool(identity) and identity["sha256"] != _digest()


def _digest() -> str:
    return hashlib.sha256(OWN_FILE.read_bytes()).hexdigest() if OWN_FILE.exists() else ""


class OwnTrunk(nn.Module):
    """What the program asks of a trunk, of a network that only turns bars into vectors."""

    recompute = False  # never set: a network of one's own keeps its activations

    def __init__(self, config: TransformerConfig, identity: Mapping[str, str]) -> None:
        """``identity``: of ``identify_own``, when the policy was new.

        Raises:
            OwnModelError: models/own_model.py has another model, or none.
        """
        super().__init__()
        network, name = own_model(), identity["name"]
        if network is None or network.__name__ != name:
            has = f"has {network.__name__}" if network else "has none"
            raise OwnModelError(
                f"it was trained with the model {name} of models/own_model.py, which {has}: put it back"
            )
        self.config = config
        self.identity = dict(identity)
        self.network = network(config)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Modules that are called one after the other: compiled and sharded one by one."""
        found = getattr(self.network, "blocks", ())
        return found if isinstance(found, nn.ModuleList) else ()

    def forward_flops(self, length: int, num_last: int | None = None) -> int:
        """Count two operations per weight of a matrix and bar; products of bars with bars are not counted."""
        return 2 * length * sum(p.numel() for p in self.network.parameters() if p.dim() > 1)

    def forward(self, bars: Tensor, num_last: int | None = None) -> Tensor:
        """Normalised features (B, S, F) -> hidden (B, S, D) float32; of the last ``num_last`` bars, if given."""
        hidden: Tensor = self.network(bars).float()
        first = 0 if num_last is None else bars.shape[1] - num_last
        return hidden[:, first:].clone()  # FSDP's hooks take no view
