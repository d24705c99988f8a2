"""This machine: its GPUs, and whether the training fits memory, disks and installed libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.requirements import InvalidRequirement, Requirement

from commands.check.report import Line
from commands.check.sources import lake_of, stored_rows
from data_sources import snapshot
from data_sources.errors import LakeError
from data_sources.flow import SPARE_BYTES, missing_flow
from data_sources.sources import DataRequest
from data_sources.universe import plain_names, top_of
from envs.features import chosen_features
from models.policy import precision_on
from monitoring.format import size
from runtime.control import EXIT_CRASH, EXIT_DOES_NOT_FIT
from runtime.files import free_bytes
from runtime.launch import Launch
from training import checkpoint
from training.devices import Devices
from training.kept_features import KEPT_TABLES
from training.memory import USABLE, DoesNotFit, MemoryNeeds, num_parameters, plan
from training.retention import most_files

if TYPE_CHECKING:
    from continuous_training import Settings

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements_simple.txt"
# By runtime/install.py: the choice, and what became of it.
INSTALLED_TORCH = Path(sys.prefix) / "installed-torch"
LARGE = 50_000_000  # parameters that a CPU needs hours per epoch for
# Per parameter: a checkpoint's weights, and the optimizer's two moments beside it.
WEIGHT_BYTES, RESUME_BYTES = 4, 8
FEATURE_BYTES = 2  # per bar and feature, in the table and on the device
LAKE_BYTES_PER_BAR = 30  # as written, where the lake holds nothing to measure
MINUTES_PER_WEEK = {"stock": 5 * 390, "crypto": 7 * 1_440, "perpetual": 7 * 1_440}


def check_devices(found: Devices, settings: Settings) -> Iterator[Line]:
    """Report what the training would compute on, and what would slow it down there."""
    if not found.gpus and num_parameters(settings) > LARGE:
        text = "an epoch of this model takes hours there; use --preset small"
        yield Line("GPU", "warning", f"trains {found.text}: {text}")
    else:
        yield Line("GPU", "OK", f"trains {found.text}")
    for text in found.warnings:
        yield Line("GPU", "warning", text)


def bar_bytes(settings: Settings) -> int:
    """Return the bytes of one bar in envs.market.Market, and of accounts over groups in envs.grid.Grid."""
    of_grid = 0 if settings.account == "single" else 4 + 4
    return FEATURE_BYTES * len(chosen_features(settings.features)) + 5 * 4 + 8 + 2 + of_grid


def check_memory(
    found: Devices, memory_total: int, settings: Settings, request: DataRequest, launch: Launch
) -> Line:
    """Compare the needs of one process with its GPU's memory, or with its part of the RAM (bytes)."""
    gpu_bytes = min((gpu.memory_total for gpu in found.gpus), default=None)
    precision = precision_on(torch.device(found.kind), settings.precision, found.capability)
    market_bytes = (num_bars(request) + found_bars(settings, request)) * bar_bytes(settings)
    needs = MemoryNeeds.of(settings, market_bytes, launch.num_ranks, precision)
    try:
        chosen = plan(needs, gpu_bytes, settings.micro_batch_segments)
    except DoesNotFit as error:
        return Line("memory", "error", str(error), EXIT_DOES_NOT_FIT)
    if gpu_bytes is not None:
        text = f"{chosen}; the GPU has {gpu_bytes / 2**30:.1f} GiB"
        wanted = settings.micro_batch_segments
        if wanted and chosen.micro_batch_segments < wanted:
            text += f": micro_batch_segments={wanted} would not fit"
            return Line("memory", "warning", text)
        return Line("memory", "OK", text)
    available = memory_total // launch.num_ranks
    part = f"machine's part for one of {launch.num_ranks} processes"
    place = "machine" if launch.num_ranks == 1 else part
    if chosen.training_bytes <= USABLE * available:
        return Line("memory", "OK", f"{chosen}; the {place} has {available / 2**30:.1f} GiB")
    fix = replace(chosen, memory_bytes=available).suggest_fix(place)
    if chosen.training_bytes <= available:
        return Line("memory", "warning", f"it barely fits: {fix}")
    return Line("memory", "error", fix, EXIT_DOES_NOT_FIT)


def num_bars(request: DataRequest) -> int:
    """Estimate the bars of a request, as if every minute of trading had one."""
    if not request.needs_lake:
        return request.simulated_symbols * request.simulated_bars
    weeks = (request.end_ns - request.start_ns) / (7 * 86_400e9)
    return int(weeks * bars_per_week(request))


def found_bars(settings: Settings, request: DataRequest) -> int:
    """Count the lake's bars of symbols that no setting lists; 0 where it cannot be read."""
    lake = lake_of(settings.data_dir)
    datasets = [
        (source.name, group.dataset_in(request))
        for source in request.chosen
        for group in source.groups
        if not group.setting
    ]
    try:
        return sum(
            part.rows for name, dataset in datasets for part in lake.parts(name, dataset or "").values()
        )
    except LakeError:
        return 0


def bars_per_week(request: DataRequest) -> int:
    """Estimate the bars of a week; a rule such as top:500 counts as that many symbols."""
    bars: dict[str, int] = {}  # by setting: sources that share a list of stocks have the same minutes
    for source in request.chosen:
        for group in source.groups:
            names = group.symbols(request)
            count = len(plain_names(names)) + (top_of(names) if group.dataset else 0)
            minutes = count * MINUTES_PER_WEEK[group.asset_class]
            bars[group.setting] = max(minutes, bars.get(group.setting, 0))
    return sum(bars.values())


def check_disks(settings: Settings, request: DataRequest) -> Iterator[Line]:
    """Report what checkpoints and lake will take, and whether the disks have it."""
    parameters, folder = num_parameters(settings), Path(settings.checkpoint_dir)
    weights = parameters * WEIGHT_BYTES + checkpoint.SPARE_BYTES
    resume = parameters * RESUME_BYTES + checkpoint.SPARE_BYTES
    # New files are written before old ones are removed.
    total = (most_files(settings) + 1) * weights + (checkpoint.NUM_RESUME_STATES + 1) * resume
    text = (
        f"checkpoints: {size(weights)} each and {size(resume)} a resume state, {size(total)} in all with "
        f"--keep-checkpoints {settings.keep_checkpoints} and --keep-runs {settings.keep_runs}, and "
        f"{size(weights)} more a week"
    )
    missing = max(0, total - _size_of(folder, "*.pt"))
    yield _on_disk(text, folder, missing, weights + resume, "lower --keep-checkpoints or --keep-runs")
    if not request.needs_lake:
        return
    lake, rows = Path(settings.data_dir), stored_rows(settings)
    stored = sum(_size_of(lake / source, "*.parquet") for source in request.sources)
    per_bar = stored / rows if rows else LAKE_BYTES_PER_BAR
    week = int(bars_per_week(request) * per_bar)
    fetched = int(max(0, num_bars(request) - rows) * per_bar)
    text = f"lake: {size(stored)} so far, at most {size(fetched)} to fetch, then {size(week)} a week"
    yield _on_disk(text, lake, fetched + week, week, "lower --history-days")
    bars = num_bars(request) + found_bars(settings, request)
    table = bars * FEATURE_BYTES * len(chosen_features(settings.features))
    missing = max(0, KEPT_TABLES * table - _size_of(lake, f"*{snapshot.FEATURES_SUFFIX}"))
    text = f"features: at most {size(table)} a run, of which {KEPT_TABLES} are kept"
    yield _on_disk(text, lake, missing, 0, "without room a run computes them again")
    with contextlib.suppress(LakeError):  # reported with its bars
        flow = missing_flow(lake_of(settings.data_dir), request, time.time_ns())
        if not flow.files:
            return
        yield _on_disk(str(flow), lake, flow.kept_bytes + SPARE_BYTES, 0, "it waits until there is room")


def _on_disk(text: str, folder: Path, wanted: int, needed: int, fix: str) -> Line:
    """Compare with the free space: ``needed`` for a useful start, ``wanted`` in the long run."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = free_bytes(place)
    if free is None:
        return Line("disk", "OK", f"{text}; {place} does not say how much is free")
    text = f"{text}; {size(free)} are free"
    if free < needed:
        return Line("disk", "error", f"{text}: free {size(needed - free)} more", EXIT_DOES_NOT_FIT)
    if free < wanted:
        return Line("disk", "warning", f"{text}: {fix}, or free {size(wanted - free)} more")
    return Line("disk", "OK", text)


def _size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern)) if folder.is_dir() else 0


def check_versions(requirements: Path = REQUIREMENTS) -> Iterator[Line]:
    """Compare the installed libraries with the requirements."""
    fix = f"python -m pip install -r {requirements.name}"
    try:
        text = requirements.read_text(encoding="utf-8")
    except OSError as error:
        yield Line("versions", "warning", f"not compared: {requirements} cannot be read: {error.strerror}")
        return
    faults = []
    for line in text.splitlines():
        try:
            wanted = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:
            continue  # a comment
        try:
            have = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(Line("versions", "error", f"{wanted} is not installed: {fix}", EXIT_CRASH))
            continue
        if wanted.name == "torch" and INSTALLED_TORCH.is_file():  # what this driver runs may be another one
            wanted = Requirement(INSTALLED_TORCH.read_text(encoding="utf-8").splitlines()[1])
        if not wanted.specifier.contains(have, prereleases=True):
            faults.append(Line("versions", "warning", f"{wanted} is wanted, {have} is installed: {fix}"))
    yield from faults
    if not faults:
        python = f"Python {platform.python_version()}, torch {torch.__version__}"
        yield Line("versions", "OK", f"{python}, and the libraries of {requirements.name}")
