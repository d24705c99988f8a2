"""An exam in parts: every rank walks some of the symbols, and rank 0 puts the walks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from envs.market import Market, NoSegment
from evaluation.exam import Walk
from models.policy import Policy
from training.distributed import Ranks


class Stopped(Exception):
    """The program was asked to stop now: the checkpoint is saved without an exam."""


class TooLong(Exception):
    """The exam has used its time: the checkpoint is saved without one."""


class PartFailed(Exception):
    """A rank could not walk its symbols; the text names it and the reason."""


@dataclass(frozen=True)
class Part:
    """What a rank brings: walks by contestant, none where its symbols have too few bars; or why it has none."""

    walks: Mapping[str, list[Walk]] = field(default_factory=dict)
    is_stopped: bool = False
    is_late: bool = False
    failure: str = ""


def symbols_of(ranks: Ranks, market: Market, start_ns: int) -> list[str]:
    """Return the symbols that this rank walks: dealt out by their bars, so that ranks are done together."""
    first, last = market.offsets[:-1], market.offsets[1:]
    began = torch.cat((market.open_time.new_zeros(1), (market.open_time < start_ns).cumsum(0)))
    to_walk = (last - first - (began[last] - began[first])).tolist()
    numbers = sorted(range(len(to_walk)), key=lambda number: -to_walk[number])
    return [market.symbols[number] for number in sorted(numbers[ranks.rank :: ranks.world_size])]


def join(parts: Sequence[Part], symbols: Sequence[str]) -> dict[str, list[Walk]]:
    """Put the walks of all ranks together, in the order of ``symbols``.

    Raises:
        Stopped, TooLong, PartFailed: a rank was asked to stop, was too slow, or failed.
        NoSegment: no rank had a symbol to walk.
    """
    if any(part.is_stopped for part in parts):
        raise Stopped
    failures = [f"rank {rank}: {part.failure}" for rank, part in enumerate(parts) if part.failure]
    if failures:
        raise PartFailed(failures[0] if len(parts) > 1 else parts[0].failure)
    if any(part.is_late for part in parts):
        raise TooLong
    place = {symbol: number for number, symbol in enumerate(symbols)}
    walks: dict[str, list[Walk]] = {}
    for part in parts:
        for name, own in part.walks.items():
            walks[name] = sorted([*walks.get(name, ()), *own], key=lambda walk: place[walk.symbol])
    if not walks:
        raise NoSegment("no symbol has a segment to walk")
    return walks


def on_every_rank(policy: Policy | None, sizes: Mapping[str, object], ranks: Ranks, precision: str) -> Policy:
    """Return rank 0's policy on every rank's device (all ranks take part).

    Args:
        policy: of rank 0; None on the others.
        sizes: of it, on all ranks.
        ranks: of the training.
        precision: of the trunk.

    Raises:
        torch.OutOfMemoryError: on every rank, if one has too little memory.
    """
    reason = ""
    try:
        with torch.random.fork_rng(devices=[]):
            policy = policy or Policy.from_sizes(sizes, precision).eval()
        policy = policy.to(ranks.device)
    except torch.OutOfMemoryError as error:
        reason = str(error)
    if ranks.any(bool(reason)):
        raise torch.OutOfMemoryError(reason or "another rank ran out of memory")
    assert policy is not None
    for parameter in policy.parameters():
        ranks.copy_from_first(parameter.detach())
    return policy
