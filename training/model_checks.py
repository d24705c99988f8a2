"""A model of one's own, tried before training on made-up bars: its interface, and that it looks ahead nowhere.

The checks take milliseconds, as the model is small: an error is one line within a second.
Shapes: B = segments, S = bars of a segment, F = features of a bar, D = d_model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from envs.feature_errors import FeatureError, describe, import_own, place_of
from envs.features import chosen_features
from models.own import MODULE, OWN_FILE, OwnModelError, OwnTrunk, differs, identify_own, own_model
from models.policy import Policy
from models.transformer import TransformerConfig

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

WIDTH, LAYERS, HEADS, SEGMENTS = 64, 2, 4, 3
# Of a vector's largest number: what an FFT or another order of sums may differ by.
TOLERANCE = 1e-4
NOISE = 0.1  # on all weights, as a model may begin with layers of zeros, through which nothing can be seen


def identify_model() -> dict[str, dict[str, str]]:
    """Return what ``Policy.from_sizes`` needs beside the sizes: the model of one's own, {} without one.

    Raises:
        FeatureError: models/own_model.py cannot be run.
    """
    import_own(MODULE, OWN_FILE, "a model of your own")
    identity = identify_own()
    return {"own_model": identity} if identity else {}


def describe_model() -> str:
    """Return the model of one's own with its place, "" without one."""
    identify_model()
    network = own_model()
    return f"Model: {network.__name__} of {_place(network)}, instead of the transformer" if network else ""


def why_not_trained_here(sizes: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Return why weights are not those of the network that models/own_model.py makes now, "" if they are.

    Raises:
        FeatureError: that file cannot be run.
    """
    ours, theirs = identify_model().get("own_model", {}), sizes.get("own_model", {})
    if ours.get("name") != theirs.get("name"):
        has = (
            f"models/own_model.py has the model {ours['name']}"
            if ours
            else "models/own_model.py has no model"
        )
        was = f"the model {theirs['name']}" if theirs else "the transformer"
        return f"{has}, but it was trained with {was}"
    if theirs and _shapes(weights) != (made := _shapes(_without_memory(sizes).state_dict())):
        odd = sorted(made.items() ^ _shapes(weights).items())
        name = odd[0][0]
        return (
            f"models/own_model.py has changed since: its weights have other names or shapes, such as {name}"
        )
    return ""


def warn_if_changed(sizes: Mapping[str, Any], path: object) -> None:
    """Warn where the weights in ``path`` are of an earlier text of models/own_model.py."""
    if differs(sizes.get("own_model", {})):
        log.warning(
            f"models/own_model.py has changed since {path} was trained: it may compute something else"
        )


def _without_memory(sizes: Mapping[str, Any]) -> Policy:
    with torch.device("meta"):
        return Policy.from_sizes(sizes)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _place(network: type[nn.Module]) -> str:
    return place_of(network.__init__) if "__init__" in vars(network) else place_of(network.forward)


def _file() -> Path:
    network = own_model()
    return Path(network.forward.__code__.co_filename) if network else OWN_FILE


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnNeeds:
    """What the memory plan must know of a model of one's own."""

    trunk_parameters: int
    block_parameters: int  # of the largest block; of all of it, where it has none
    segment_bytes: int  # kept for the backward of one segment, in float32


def needs_of(policy: Policy, length: int) -> OwnNeeds | None:
    """Count them by a forward without memory: ``policy`` is on the device meta; None of a transformer.

    Raises:
        FeatureError: the model does not run there.
    """
    trunk = policy.trunk
    if not isinstance(trunk, OwnTrunk):
        return None
    weights = {p.untyped_storage()._cdata for p in (*trunk.parameters(), *trunk.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    bars = torch.zeros(1, length, trunk.config.num_features, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(trunk, bars, "on the device meta, without memory, as the memory plan counts it")
    blocks = [count(block) for block in trunk.blocks] or [count(trunk)]
    return OwnNeeds(count(trunk), max(blocks), sum(storage.nbytes() for storage in kept.values()))


def count(module: nn.Module) -> int:
    """Count the weights."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- checks ---------------------------------------------------------------------------------------------------


def check_own_model(settings: Settings) -> None:
    """Check the model of one's own, if any, on made-up bars.

    Raises:
        FeatureError: one line, with file and line.
    """
    identity = identify_model().get("own_model")
    network = own_model()
    if identity is None or network is None:
        return
    place = f"{_place(network)}: model {network.__name__}"
    if settings.precision == "fp8":
        raise FeatureError(
            f"{place} cannot compute in fp8, which is for the transformer: set precision to auto"
        )
    if settings.stochastic_depth:
        raise FeatureError(
            f"{place} cannot skip blocks, which is for the transformer: set stochastic_depth to 0"
        )
    length = settings.context_bars + settings.horizon + 1
    num_features = len(chosen_features(settings.features))
    config = TransformerConfig(num_features, WIDTH, LAYERS, HEADS, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check(place, lambda: _make(config, identity), config)


def _check(place: str, make: Callable[[], OwnTrunk], config: TransformerConfig) -> None:
    def refuse(fault: str) -> NoReturn:
        raise FeatureError(f"{place} {fault}")

    trunk = make()
    if not list(trunk.parameters()):
        refuse("has no weights to train: give them to self as layers, or as nn.Parameter")
    for name, parameter in trunk.network.named_parameters():
        if parameter.dtype != torch.float32 or not parameter.requires_grad:
            refuse(f"must have float32 weights that can be trained, {name} is {parameter.dtype}")
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    bars = torch.randn(SEGMENTS, config.max_length, config.num_features)
    given = bars.clone()
    with torch.no_grad():
        if not bool(_vectors(trunk, bars, refuse).isfinite().all()):
            refuse("must return finite numbers for bars that are about one")
        if not torch.equal(given, bars):
            refuse("changes its bars in place: work on a clone()")
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
        _check_forward(trunk, bars, refuse)
    if any(not torch.equal(before[name], buffer) for name, buffer in trunk.named_buffers()):
        refuse("changes its buffers in a forward: no batch norm and no memory of earlier calls")
    hidden = _vectors(trunk, bars, refuse)
    (hidden * torch.randn_like(hidden)).sum().backward()
    if unused := [name for name, p in trunk.network.named_parameters() if p.grad is None]:
        refuse(
            f"has weights that no gradient reaches, such as {unused[0]}: use them in forward, or take them out"
        )
    with torch.device("meta"):
        twin = make()
    _run(twin, bars.to("meta"), "on the device meta: make new tensors on the device of the bars")


def _check_forward(trunk: OwnTrunk, bars: Tensor, refuse: Callable[[str], NoReturn]) -> None:
    """Check what decisions rest on: no later bar, no other segment, no chance."""
    whole = _vectors(trunk, bars, refuse)

    def same(other: Tensor, expected: Tensor) -> bool:
        return bool(((other - expected).abs().max() <= TOLERANCE * expected.abs().max()).all())

    if not same(_vectors(trunk, bars, refuse), whole):
        refuse("computes something else in every call: no dropout, no random numbers, no memory")
    if not same(_vectors(trunk, bars[1:2], refuse), whole[1:2]):
        refuse("mixes the segments of a batch: one alone has other vectors, as with batch norm")
    trunk.eval()
    if not same(_vectors(trunk, bars, refuse), whole):
        refuse("computes something else in evaluation than in training")
    trunk.train()
    length = bars.shape[1]
    for first in sorted({1, 2, length // 4, length // 2, length - 2, length - 1} - {0}):
        later = torch.cat((bars[:, :first], torch.randn_like(bars[:, first:])), dim=1)
        if not same(_vectors(trunk, later, refuse)[:, :first], whole[:, :first]):
            refuse(f"looks ahead: changed bars from bar {first} on change the vector of an earlier bar")
        if first > 1 and not same(_vectors(trunk, bars[:, :first], refuse), whole[:, :first]):
            refuse(
                f"depends on the length of a segment: the first {first} bars alone have other vectors than as "
                f"the first of {length}"
            )


def _make(config: TransformerConfig, identity: Mapping[str, str]) -> OwnTrunk:
    try:
        return OwnTrunk(config, identity)
    except (OwnModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise FeatureError(
            f"model {identity['name']} cannot be made of {config}: {describe(error, _file())}"
        ) from error


def _vectors(trunk: OwnTrunk, bars: Tensor, refuse: Callable[[str], NoReturn]) -> Tensor:
    returned = _run(trunk, bars, f"on bars of shape {tuple(bars.shape)}")
    wanted = f"({', '.join(map(str, (*bars.shape[:2], trunk.config.d_model)))})"
    if not isinstance(returned, Tensor) or not returned.is_floating_point():
        what = str(returned.dtype) if isinstance(returned, Tensor) else type(returned).__name__
        refuse(f"must return a tensor of floats of shape {wanted}, was {what}")
    if tuple(returned.shape) != (*bars.shape[:2], trunk.config.d_model):
        refuse(
            f"must return a vector for every bar, {wanted} (segments, bars, d_model) for bars "
            f"{tuple(bars.shape)}, was {tuple(returned.shape)}"
        )
    return returned


def _run(trunk: OwnTrunk, bars: Tensor, how: str) -> Any:
    try:
        return trunk.network(bars)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = trunk.identity["name"]
        raise FeatureError(f"model {name} failed {how}: {describe(error, _file())}") from error
