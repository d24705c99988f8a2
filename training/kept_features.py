"""The features of a run's bars as a file beside them: ranks map it, restarts open it, the next run adds to it.

    data_dir/.ready/<copy>-<key>.features        (B, F) float16, the rows of all bars, as the market has them
    data_dir/.ready/<copy>-<key>.features.json   written once that is safe on disk: else the file does not count

``key`` stands for all that decides a value beside the bars: features, their code, statistics, torch, device. Bars
of a new run that an older copy has, too, keep their rows (``envs/feature_reuse.py``). Removing the file costs the
time to compute it again. Rank 0 computes and writes; without room every rank computes for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data_sources import snapshot
from data_sources.bars import Bars
from data_sources.errors import LakeError
from envs.feature_errors import FeatureError
from envs.feature_reuse import FormerTable, TableDiffersError, table_parts
from envs.features import FeatureFunction, FeatureStatistics, compute, panel_of
from envs.panel import Panel
from runtime.control import heartbeat, heartbeat_while_waiting
from runtime.files import TEMPORARY_SUFFIX, move_over, sync_file, write_atomically
from training.distributed import Ranks

log = logging.getLogger("continuous_training")

ENVS = Path(__file__).resolve().parent.parent / "envs"
MARKER = ".json"
KEPT_TABLES = 4  # of a folder: the run's and the former one, of two trainings


@dataclass(frozen=True)
class KeptFeatures:
    """What a market is made with beside its bars."""

    statistics: FeatureStatistics
    table: Tensor | None  # (B, F) float16, mapped; None: there was no room for the file


def provide(
    copy: Path,
    bars: Sequence[Bars],
    training_bars: Sequence[int],
    functions: Mapping[str, FeatureFunction],
    statistics: FeatureStatistics | None,
    ranks: Ranks,
) -> KeptFeatures:
    """Map the features of a run's bars, computed now as far as they are not known (all ranks).

    Args:
        copy: the mapped copy of the bars, in ``data_dir/.ready``.
        bars: all that it has.
        training_bars: per symbol, the number of bars before the holdout.
        functions: name -> feature.
        statistics: of the training; None: measured on the training bars.
        ranks: all take part; they share the folder.

    Raises:
        ValueError: no symbol has enough bars to measure; FeatureError where a feature failed (all ranks).
    """
    name, state, failure = "", None, None
    if ranks.is_first:
        panel = panel_of(bars, ranks.device, functions)
        try:
            statistics = statistics or _measure(bars, training_bars, functions, panel, ranks.device)
            name = _provide(copy, bars, functions, statistics, panel, ranks.device)
        except OSError as error:
            log.warning(
                f"every rank computes all features, and each restart again: {copy.parent} cannot be written: "
                f"{error.strerror or error}"
            )
        except ValueError as error:
            failure = str(error), isinstance(error, FeatureError)
        state = statistics.state_dict() if statistics else None
    with heartbeat_while_waiting():
        name, state, failure = ranks.broadcast((name, state, failure))
    if failure is not None:
        text, is_of_feature = failure
        raise (FeatureError if is_of_feature else ValueError)(text)
    shape = sum(map(len, bars)), len(functions)
    table = None
    if name:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile by another training of this folder
            table = _map(copy.with_name(name), shape)
    return KeptFeatures(FeatureStatistics.from_state_dict(state), table)


def _measure(
    bars: Sequence[Bars],
    training_bars: Sequence[int],
    functions: Mapping[str, FeatureFunction],
    panel: Panel,
    device: torch.device,
) -> FeatureStatistics:
    def raw_of(series: Bars) -> Tensor:
        heartbeat()
        return compute(series, device, functions, panel)

    return FeatureStatistics.measure(tuple(functions), map(raw_of, bars), training_bars)


def _provide(
    copy: Path,
    bars: Sequence[Bars],
    functions: Mapping[str, FeatureFunction],
    statistics: FeatureStatistics,
    panel: Panel,
    device: torch.device,
) -> str:
    """Return the name of the file, written now if there is none."""
    key = _key(statistics, device)
    path = copy.with_name(f"{copy.stem}-{key}{snapshot.FEATURES_SUFFIX}")
    if _is_whole(path):
        os.utime(path)
        return path.name
    former = _former(copy.parent, key, len(functions))
    try:
        _write(path, bars, functions, statistics, panel, device, former)
    except TableDiffersError as error:
        log.warning(f"{error}: all are computed again")
        _write(path, bars, functions, statistics, panel, device, None)
    _prune(copy.parent)
    return path.name


def _write(
    path: Path,
    bars: Sequence[Bars],
    functions: Mapping[str, FeatureFunction],
    statistics: FeatureStatistics,
    panel: Panel,
    device: torch.device,
    former: FormerTable | None,
) -> None:
    """Write the file; what makes it count follows in the background, when the disk has it."""
    _marker(path).unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    file = temporary.open("xb")
    try:
        for part in table_parts(bars, functions, statistics, device, former, panel):
            heartbeat()
            file.write(part.contiguous().numpy().data)
        file.flush()
        move_over(temporary, path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    threading.Thread(target=_make_durable, args=(path, file), name="features").start()


def _make_durable(path: Path, file: BinaryIO) -> None:
    """Sync a file that was written, then write its marker: training need not wait for the disk."""
    try:
        with file:
            sync_file(file, path.parent)
            content = json.dumps({"bytes": file.tell()}).encode()
        write_atomically(_marker(path), lambda marker: marker.write(content))
    except OSError as error:
        log.warning(
            f"the next start computes all features again: {path} was not written: {error.strerror or error}"
        )


def _former(folder: Path, key: str, num_features: int) -> FormerTable | None:
    """Return the newest table of the same key whose bars are still there."""
    suffix = f"-{key}{snapshot.FEATURES_SUFFIX}"
    for path in sorted(folder.glob(f"*{suffix}"), key=_modification_time, reverse=True):
        if not _is_whole(path):
            continue
        with contextlib.suppress(LakeError, OSError, ValueError):  # gone meanwhile, or damaged: an older one
            bars = snapshot.open_snapshot(folder / f"{path.name.removesuffix(suffix)}{snapshot.SUFFIX}").bars
            table = _map(path, (sum(map(len, bars)), num_features))
            rows = table.split([len(series) for series in bars])
            symbols = [series.symbol for series in bars]
            return FormerTable(dict(zip(symbols, bars, strict=True)), dict(zip(symbols, rows, strict=True)))
    return None


def _map(path: Path, shape: tuple[int, int]) -> Tensor:
    """Map a table; writing to it would change this process's view only."""
    return torch.from_numpy(np.memmap(path, np.float16, mode="c", shape=shape))


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads(_marker(path).read_bytes())["bytes"] == path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _marker(path: Path) -> Path:
    return path.with_name(path.name + MARKER)


def _key(statistics: FeatureStatistics, device: torch.device) -> str:
    """Return a few hex digits for all that decides a feature's value beside the bars."""
    digest = hashlib.sha256()
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    for text in (*statistics.names, torch.__version__, str(torch.version.cuda), device.type, kind):
        digest.update(f"{text}\n".encode())
    for values in (statistics.mean, statistics.std):
        digest.update(values.cpu().numpy().tobytes())
    for source in sorted(ENVS.glob("*.py")):  # more than features are made of: better computed once too often
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def _prune(folder: Path) -> None:
    tables = folder.glob(f"*{snapshot.FEATURES_SUFFIX}")
    for path in sorted(tables, key=_modification_time, reverse=True)[KEPT_TABLES:]:
        with contextlib.suppress(PermissionError):  # Windows: another process has it mapped
            path.unlink(missing_ok=True)
            _marker(path).unlink(missing_ok=True)


def _modification_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
