"""The command ``check``: all that can be known before a start, line by line, each fault with its fix.

It trains nothing and keeps nothing that it fetches. The exit code is the one that a start would end with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from commands.check import machine, sources
from commands.check.days import check_days
from commands.check.features import check_features, check_model, check_reward
from commands.check.mirror import check_mirror
from commands.check.report import Line, print_report
from commands.check.watchers import check_watchers
from data_sources import refresh
from data_sources.sources import Answer, DataRequest
from monitoring.machine import memory_bytes
from runtime.control import EXIT_LOCKED, EXIT_SETTING
from runtime.files import NO_LINKS, can_link, find_lacks
from runtime.launch import Launch
from runtime.locking import NO_LOCKS, can_lock
from training import checkpoint, devices, validation
from training.checkpoint import Checkpoint
from training.data_feed import data_request
from training.devices import Devices

if TYPE_CHECKING:
    from continuous_training import Settings

__all__ = ["check_all", "check_folder", "check_room", "check_watchers", "plan_launch", "print_report"]


def check_all(
    settings: Settings, environment: Mapping[str, str], offline: bool, sends_test: bool = False
) -> Iterator[Line]:
    """Run every check, in the order in which a start would meet its errors.

    Args:
        settings: each valid by itself.
        environment: keys, NPROC and its like.
        offline: contact no source.
        sends_test: send a message to every target of messages.
    """
    launch, found = Launch(), None
    try:
        launch, found = plan_launch(settings, environment)
    except devices.DeviceError as error:
        yield Line("GPU", "error", str(error), EXIT_SETTING)
    except ValueError as error:
        yield Line.setting(str(error))
    now_ns = time.time_ns()
    request = data_request(settings, now_ns)
    yield from check_folder(settings, launch.world_size, launch.node_rank in ("", "0"))
    model = list(check_model(settings))
    own = [*check_features(settings, now_ns), *check_reward(settings), *model]
    yield from own
    saved = None
    try:
        saved, warnings = checkpoint.newest(Path(settings.checkpoint_dir))
        if not any(line.code for line in own):  # else its features differ, too
            yield from _check_checkpoint(saved, warnings, settings)
    except checkpoint.CheckpointError as error:
        yield Line("checkpoint", "error", str(error), EXIT_SETTING)
    yield from _check_file_systems(settings, request.needs_lake)
    yield from check_mirror(settings, saved is not None, offline)
    yield from sources.check_keys(request, environment)
    yield from sources.check_bars(settings, request)
    yield from check_days(settings, request, launch.world_size)
    answers: list[Answer] = []
    if offline:
        yield Line("sources", "OK", "not contacted, for --offline")
    elif request.needs_lake:
        answers = refresh.probe(request, now_ns)
        yield from sources.check_answers(answers, settings)
        yield sources.check_clock(answers)
    if saved is not None:
        yield from sources.check_run_bars(saved, settings, answers, offline)
    if not any(line.code for line in model):  # else it has no size
        if found:
            yield from machine.check_devices(found, settings)
        yield from check_room(settings, request, launch, found)
    yield from check_watchers(settings, environment, sends_test)
    yield from machine.check_versions()


def plan_launch(settings: Settings, environment: Mapping[str, str]) -> tuple[Launch, Devices]:
    """Decide how many ranks this machine starts, and on what; a start and ``check`` both ask here.

    Raises:
        ValueError: one of the variables is invalid.
        DeviceError: the GPUs that are asked for, or built in, cannot be used.
    """
    launch = Launch.from_environment(environment)
    found = devices.find(settings, environment)
    return replace(launch, num_ranks=found.num_ranks), found


def check_room(
    settings: Settings, request: DataRequest, launch: Launch, found: Devices | None
) -> Iterator[Line]:
    """Compare the needs of the training with memory and disks."""
    if found:
        yield machine.check_memory(found, memory_bytes(), settings, request, launch)
    yield from machine.check_disks(settings, request)


def _check_file_systems(settings: Settings, needs_lake: bool) -> Iterator[Line]:
    """Write, sync, rename and lock as the program does; a line for each folder that cannot promise something."""
    for name, folder in validation.folders(settings):
        if name == "files_dir" or (name == "data_dir" and not needs_lake):
            continue  # not written
        place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
        try:
            lacks = find_lacks(place) + ([] if can_lock(place) else [NO_LOCKS])
            if name == "checkpoint_dir" and not can_link(place):
                lacks.append(NO_LINKS)
        except OSError as error:
            lacks = [f"{place} cannot be written: {error.strerror or error}"]
        if lacks:
            yield Line("folder", "warning", f"{name} {folder}: {'; '.join(lacks)}")


def check_folder(settings: Settings, world_size: int, writes: bool) -> Iterator[Line]:
    """Check the batch against the number of processes, and that no other training holds the folder.

    Args:
        settings: each valid by itself.
        world_size: processes over all machines.
        writes: False on machines that never lock the folder.
    """
    try:
        validation.check_training(settings, world_size)
        yield Line("settings", "OK", f"valid for {world_size} process{'es' if world_size > 1 else ''}")
    except ValueError as error:
        yield Line.setting(str(error))
    try:
        with checkpoint.exclusive(Path(settings.checkpoint_dir), writes, is_trial=True):
            pass
        yield Line("folder", "OK", f"{settings.checkpoint_dir} is writable, and no other training uses it")
    except checkpoint.FolderInUse as reason:
        yield Line("folder", "error", str(reason), EXIT_LOCKED)
    except checkpoint.CheckpointError as reason:
        yield Line("folder", "error", str(reason), EXIT_SETTING)


def _check_checkpoint(
    saved: Checkpoint | None, warnings: Iterable[str], settings: Settings
) -> Iterator[Line]:
    """Compare the checkpoint that a start would resume from with the settings."""
    for warning in warnings:
        yield Line("checkpoint", "warning", warning)
    impossible = validation.impossible_shorts(settings)
    if impossible and saved is None:
        yield Line.setting(f"{impossible}; {validation.WITHOUT_SHORTS}")
    elif impossible:
        yield Line("settings", "warning", f"{impossible}; the checkpoint {validation.KEPT_SHORTS}")
    if saved is None:
        text = f"none in {settings.checkpoint_dir} to resume from: training starts from scratch"
        yield Line("checkpoint", "OK", text)
    elif mismatch := saved.mismatch(settings):
        yield Line("checkpoint", "error", mismatch, EXIT_SETTING)
    else:
        yield Line("checkpoint", "OK", f"resumes from {saved.path}, {saved.transitions:,} transitions")
