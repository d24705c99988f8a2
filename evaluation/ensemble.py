"""One checkpoint or several, for every command that acts: several decide by the average of their probabilities.

Members must agree on what a decision means (positions, accounts, costs), on the symbols, the names of the features
and the bars that they are of. They may differ in size, context, scale of the features, and training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from envs.config import EnvConfig
from envs.features import FeatureStatistics
from evaluation.trained_policy import TrainedPolicy
from models.ensemble import Decider, Ensemble, View
from models.policy import Policy
from runtime.wording import first_of
from training.checkpoint import WEIGHTS_DEPEND_ON

if TYPE_CHECKING:
    from continuous_training import Settings

MAY_DIFFER = ("num_envs", "context_bars", "group")  # of EnvConfig
OF_GROUPS = ("account", "group_size", "gross_exposure", "net_exposure")  # which make the last one
# Settings that say which bars a policy decides on, if it has the source; None: with any source.
OF_BARS = {
    "sources": None,
    "extended_hours": None,
    "end_date": None,
    "files_dir": "files",
    "files_timezone": "files",
    "simulated_symbols": "simulated",
    "simulated_bars": "simulated",
}


def read(
    paths: Sequence[Path], settings_class: type[Settings], device: torch.device | str = "cpu", **changes: Any
) -> TrainedPolicy:
    """Read one checkpoint or more as one policy; of a single one it is that checkpoint's, to the bit.

    Args:
        paths: files that trainings wrote, each once.
        settings_class: the settings dataclass.
        device: for all members.
        **changes: settings that differ from those of the trainings, for all members. Of folders that the members
            disagree on, the first one's count.

    Raises:
        CheckpointError: a file is missing or damaged, or of another format, version or features.
        FeatureError: envs/own_features.py cannot be run.
        ValueError: the members cannot decide together, or a changed setting is wrong; names file and value.
    """
    members = [TrainedPolicy.read(path, settings_class, device, **changes) for path in paths]
    return members[0] if len(members) == 1 else join(members)


def join(members: Sequence[TrainedPolicy]) -> TrainedPolicy:
    """Combine two members or more, each of one checkpoint.

    Raises:
        ValueError: they cannot decide together; names the first member that differs, and the value.
    """
    first = members[0]
    checkpoints = tuple(member.checkpoint for member in members)
    together = TrainedPolicy(
        checkpoints,
        first.settings,
        first.policy,
        first.statistics,
        changes=first.changes,
        members=tuple(members),
    )
    names = together.names
    for number, (name, member) in enumerate(zip(names, members, strict=True)):
        for other, earlier in zip(names[:number], members, strict=False):
            if _is_same(member, earlier):
                raise ValueError(f"{name} is the same checkpoint as {other}: name each member once")
        for difference in _differences(member, first):
            raise ValueError(f"{name} cannot decide together with {names[0]}: {difference}")
    places, statistics = side_by_side([member.statistics for member in members])
    context_bars = max(member.settings.context_bars for member in members)
    views = [
        View(context_bars - member.settings.context_bars, place)
        for member, place in zip(members, places, strict=True)
    ]
    policies = [member.policy for member in members]
    assert all(isinstance(policy, Policy) for policy in policies)
    return replace(
        together,
        settings=replace(first.settings, context_bars=context_bars),
        policy=Ensemble([policy for policy in policies if isinstance(policy, Policy)], views),
        statistics=statistics,
    )


def side_by_side(scales: Sequence[FeatureStatistics]) -> tuple[list[int], FeatureStatistics]:
    """Return the place of each scale of the same features among those that differ, and these side by side."""
    different: list[FeatureStatistics] = []
    places = []
    for scale in scales:
        same = [place for place, other in enumerate(different) if _is_same_scale(other, scale)]
        places.append(same[0] if same else len(different))
        different += [] if same else [scale]
    if len(different) == 1:
        return places, different[0]
    mean, std = (torch.stack([getattr(scale, name) for scale in different]) for name in ("mean", "std"))
    return places, replace(different[0], mean=mean, std=std)


def reading_like(trained: TrainedPolicy, policy: Policy) -> Decider:
    """Let a policy of the context and scale of the first member read the market of all; it decides alone."""
    if not isinstance(trained.policy, Ensemble):
        return policy
    return Ensemble([policy], trained.policy.views[:1])


def _differences(member: TrainedPolicy, first: TrainedPolicy) -> Iterator[str]:
    """Yield in words what a member would have to share with the first one."""
    names, others = member.statistics.names, first.statistics.names
    if names != others:
        yield f"it sees other features: {', '.join(sorted(set(names) ^ set(others))) or 'in another order'}"
    settings, theirs = member.settings, first.settings
    accounts = [f.name for f in fields(EnvConfig) if f.name not in MAY_DIFFER]
    bars = [name for name, source in OF_BARS.items() if source is None or source in settings.sources]
    for name in (*accounts, *OF_GROUPS, *bars):
        mine, other = getattr(settings, name), getattr(theirs, name)
        if mine != other:
            flag = f"--{name.replace('_', '-')}"
            fix = "leave one of them out" if name in WEIGHTS_DEPEND_ON else f"{flag} sets one for all"
            yield f"{name}={_shown(mine)}, not {_shown(other)}; {fix}"
    ours, known = set(member.symbols), set(first.symbols)
    if ours != known:
        without, more = sorted(known - ours), sorted(ours - known)
        parts = [f"without {first_of(without)}"] if without else []
        parts += [f"with {first_of(more)}"] if more else []
        yield f"it was trained on other symbols, {', '.join(parts)}; leave one of them out"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_same(one: TrainedPolicy, other: TrainedPolicy) -> bool:
    """Whether both have the same weights: a champion is a second name of a checkpoint."""
    mine, theirs = one.checkpoint.model, other.checkpoint.model
    return (
        one.checkpoint.transitions == other.checkpoint.transitions
        and mine.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    )


def _is_same_scale(one: FeatureStatistics, other: FeatureStatistics) -> bool:
    return torch.equal(one.mean.cpu(), other.mean.cpu()) and torch.equal(one.std.cpu(), other.std.cpu())
