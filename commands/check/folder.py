"""Settings and checkpoint folder: what the start scripts look at before any process trains, and a little more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from commands.check.line import Line
from runtime.control import EXIT_LOCKED, EXIT_SETTING
from training import checkpoint, validation

if TYPE_CHECKING:
    from continuous_training import Settings


def before_a_start(settings: Settings, world_size: int, writes: bool) -> Iterator[Line]:
    """Check the batch against the number of processes, and that nobody trains in the folder.

    Args:
        settings: valid by themselves.
        world_size: processes over all machines.
        writes: False on machines that never hold the folder.
    """
    try:
        validation.check_batch(settings, world_size)
        yield Line("settings", "OK", f"valid for {world_size} process{'es' if world_size > 1 else ''}")
    except ValueError as error:
        yield Line.setting(str(error))
    try:
        with checkpoint.exclusive(Path(settings.checkpoint_dir), writes):
            pass
        yield Line("folder", "OK", f"{settings.checkpoint_dir} can be written, and nobody trains in it")
    except checkpoint.FolderInUse as reason:
        yield Line("folder", "error", str(reason), EXIT_LOCKED)
    except checkpoint.CheckpointError as reason:
        yield Line("folder", "error", str(reason), EXIT_SETTING)


def newest_checkpoint(settings: Settings) -> Iterator[Line]:
    """Read the checkpoint that a start would go on from, and compare it with the settings."""
    saved, warnings = checkpoint.newest(Path(settings.checkpoint_dir))
    for warning in warnings:
        yield Line("checkpoint", "warning", warning)
    if saved is None:
        yield Line(
            "checkpoint", "OK", f"none in {settings.checkpoint_dir} to go on from: training begins anew"
        )
        return
    if mismatch := saved.mismatch(settings):
        yield Line("checkpoint", "error", mismatch, EXIT_SETTING)
    else:
        yield Line("checkpoint", "OK", f"goes on from {saved.path}, {saved.transitions:,} transitions")
