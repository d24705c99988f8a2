"""Silent corruption: numbers that a GPU or a host got wrong without an error (Hochschild et al., HotOS 2021).

Three comparisons to the bit, none of which waits for the device before a checkpoint (docs/reliability.md):

* weights and optimizer moments of a rank just before an optimizer step are those that the step before left;
* ranks that hold the same weights and moments hold the same bits;
* one micro-batch gives the same losses and gradients twice.

A checksum is the sum of a tensor's bits as integers: no order of adding changes it, and every flipped bit does.
"""

from __future__ import annotations

import logging
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from runtime.control import EXIT_DOES_NOT_FIT, ExitProgram
from runtime.wording import first_of
from training.distributed import Ranks
from training.losses import Objective, Targets
from training.parallel import is_sharded

log = logging.getLogger("continuous_training")

MOST_SEGMENTS = 8  # of the micro-batch that is computed twice, without a compiler: it takes more memory
REPETITIONS = 12  # the first time, and where two differ
MOST_IN_A_ROW = 3  # returns to a checkpoint without a sound one in between
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Sample = tuple[Tensor, Tensor, Targets, Tensor | None]  # bars, accounts, targets, depth of a micro-batch


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of bits of each tensor, (n,) int64, on its device."""
    sums = [
        tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    return torch.stack(sums)


class Seal:
    """Checksums of what only the optimizer may change, taken after it, compared before its next step."""

    def __init__(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """``tensors`` returns weights, then moments, by name; moments are missing before the first step."""
        self._tensors = tensors
        self.close()

    def close(self) -> None:
        """Accept the tensors as they are."""
        self.sums = self._checksums()
        self.broken = torch.zeros_like(self.sums, dtype=torch.bool)

    def check(self) -> None:
        """Note, on the device, which tensors have changed since they were sealed."""
        self.broken |= self._checksums() != self.sums

    def renew(self) -> None:
        """Seal the tensors after a step; what was broken before stays noted."""
        before = {name: place for place, name in enumerate(self.names)}
        self.sums = self._checksums()
        if len(self.names) > len(before):  # the first step makes the moments, or some of them
            places = [before.get(name, len(before)) for name in self.names]
            none = self.broken.new_zeros(1)
            self.broken = torch.cat((self.broken, none))[torch.tensor(places, device=none.device)]

    def _checksums(self) -> Tensor:
        tensors = self._tensors()
        self.names = list(tensors)
        return checksums(list(tensors.values()))


class Inspections:
    """The inspections of one start of the program, over returns to a checkpoint."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def is_corrupt(self, find: Callable[[], tuple[str, str]]) -> bool:
        """Whether ``find`` finds numbers that are wrong: then they are named in a warning (all ranks).

        Raises:
            ExitProgram: it is the fourth time without a sound inspection in between.
        """
        found, warning = find()
        if warning:
            log.warning(warning)
        self._in_a_row = self._in_a_row + 1 if found else 0
        if self._in_a_row > MOST_IN_A_ROW:
            raise ExitProgram(
                EXIT_DOES_NOT_FIT,
                f"Wrong numbers again: {found}. Test that device and its memory, and train without it; "
                "the newest checkpoint is good",
            )
        if found:
            log.warning(f"wrong numbers: {found}; back to the newest checkpoint")
        return bool(found)


class Inspector:
    """Compares what a rank holds and computes, with itself and with the other ranks."""

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self._objective, self._ranks = objective, ranks
        self._names = [name for name, _ in objective.learnt()]
        self._shards = {name for name, parameter in objective.learnt() if hasattr(parameter, "to_local")}
        self._unstable: set[str] | None = None  # what no rank computes twice alike; None: not known yet

    def find(self, seal: Seal, sample: Sample | None) -> tuple[str, str]:
        """Compare everything (all ranks take part; waits for the device).

        Args:
            seal: of this rank's weights and moments.
            sample: a micro-batch to compute twice; None, on all ranks: there is none yet.

        Returns:
            What is corrupt and on which rank, in one line, "" if nothing; and what cannot be compared, the same.
        """
        seal.check()
        broken = [name for name, is_broken in zip(seal.names, seal.broken.tolist(), strict=True) if is_broken]
        sums = zip(seal.names, seal.sums.tolist(), strict=True)
        held = {name: total for name, total in sums if name.rpartition(" ")[2] not in self._shards}
        verdicts = self._compute_twice(sample) if sample is not None else {}
        by_rank = self._ranks.gather((_place_of(self._ranks), broken, held, verdicts))
        found = [
            f"{place}: {first_of(broken)} changed between two optimizer steps"
            for place, broken, _, _ in by_rank
            if broken
        ]
        found = found or _odd_ones([(place, held) for place, _, held, _ in by_rank])
        verdicts_of = [(place, verdicts) for place, _, _, verdicts in by_rank]
        is_first = self._unstable is None and sample is not None
        if is_first:
            self._unstable = _unstable(verdicts_of)
        unstable = self._unstable or set()
        for place, verdicts in verdicts_of:
            if names := [name for name in verdicts if name not in unstable]:
                found.append(f"{place}: {first_of(names)} came out differently when computed again")
        warning = f"not compared, as no rank computes it twice alike: {first_of(sorted(unstable))}"
        return "; ".join(found), warning if is_first and unstable else ""

    def _compute_twice(self, sample: Sample) -> dict[str, int]:
        """Return how many computations gave another value than most, for every figure for which any did."""
        names = ["losses", "gradient of the bars", *(f"gradient of {name}" for name in self._names)]
        with eager_and_deterministic():
            runs = [self._compute(sample) for _ in range(2)]
            differ = {name for name, one, other in zip(names, *runs, strict=True) if one != other}
            if self._ranks.any(self._unstable is None or bool(differ - self._unstable)):
                runs += [self._compute(sample) for _ in range(REPETITIONS - 2)]
        odd = {
            name: len(runs) - Counter(values).most_common(1)[0][1]
            for name, *values in zip(names, *runs, strict=True)
        }
        return {name: count for name, count in odd.items() if count}

    def _compute(self, sample: Sample) -> list[int]:
        bars, accounts, targets, depth = sample
        bars = bars.clone().requires_grad_()
        parameters = [parameter for _, parameter in self._objective.learnt()]
        # Not by a call: hooks on the objective are the training's.
        losses = self._objective.forward(bars, accounts, targets, targets.valid.numel(), depth)
        if is_sharded(self._objective.policy):  # its gradients exist only where a backward reduces them
            losses.total.backward()
            gradients = [bars.grad, *(p.grad for p in parameters)]
            self._objective.zero_grad()
        else:  # no reduction: a rank's own gradients
            gradients = list(torch.autograd.grad(losses.total, [bars, *parameters]))
        parts = torch.stack([losses.total.detach(), losses.policy, losses.value, losses.entropy])
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients if g is not None]
        sums: list[int] = checksums([parts, *local]).tolist()
        return sums


def sample_of(
    bars: Tensor, accounts: Tensor, targets: Targets, depth: Tensor | None, num_segments: int
) -> Sample:
    """Copy the first segments of a rollout, half a micro-batch at most, to compute them twice later."""
    rows = torch.arange(min(MOST_SEGMENTS, max(1, num_segments // 2), len(bars)), device=bars.device)
    return bars[rows], accounts[rows], targets[rows], None if depth is None else depth[rows]


@contextmanager
def eager_and_deterministic() -> Iterator[None]:
    """Compute without compiled code, and attention's backward without atomic additions, whose order varies."""
    was, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that may differ: if they do, they are left out
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)


def _place_of(ranks: Ranks) -> str:
    return f"rank {ranks.rank} ({socket.gethostname()}, {ranks.device})"


def _odd_ones(held: list[tuple[str, dict[str, int]]]) -> list[str]:
    """Name the ranks whose replicas differ from most; all of them where no value has a majority."""
    differing: dict[str, list[str]] = {}
    for name in held[0][1]:
        sums = [own[name] for _, own in held]
        most, count = Counter(sums).most_common(1)[0]
        if count < len(sums):
            is_settled = count > len(sums) / 2
            odd = [
                place for (place, _), total in zip(held, sums, strict=True) if not is_settled or total != most
            ]
            differing.setdefault(" and ".join(odd), []).append(name)
    return [
        f"{places}: {first_of(names)} differs from the other ranks'" for places, names in differing.items()
    ]


def _unstable(verdicts: list[tuple[str, dict[str, int]]]) -> set[str]:
    """Return what varies on every rank, and more than once: a kernel's own nondeterminism, no corruption."""
    everywhere = set.intersection(*(set(own) for _, own in verdicts))
    return {name for name in everywhere if sum(own[name] for _, own in verdicts) > 1}
