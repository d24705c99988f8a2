"""The mirror: whether it takes a file, gives it back and lets it be removed, as copies of checkpoints ask."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from commands.check.report import Line
from runtime.control import EXIT_SETTING
from training import mirror
from training.checkpoint import CheckpointError

if TYPE_CHECKING:
    from continuous_training import Settings

PATIENCE_SECONDS = 30.0  # a library of some vendor may try for ever


def check_mirror(settings: Settings, has_checkpoint: bool, offline: bool) -> Iterator[Line]:
    """Try the mirror, if one is set.

    Args:
        settings: each valid by itself.
        has_checkpoint: a start would resume from the folder; else it reads the mirror, and ends if it cannot.
        offline: contact no server.
    """
    if not settings.mirror:
        return
    if offline and not mirror.is_local(settings.mirror):
        yield Line("mirror", "OK", f"{settings.mirror} is not contacted, for --offline")
        return
    ended: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
    threading.Thread(target=_try, args=(settings.mirror, ended), daemon=True).start()
    try:
        found = ended.get(timeout=PATIENCE_SECONDS)
    except queue.Empty:
        found = CheckpointError(f"no answer within {PATIENCE_SECONDS:.0f} s")
    if isinstance(found, str):
        text = f"{settings.mirror} takes a file and gives it back; newest copy: {found or 'none'}"
        yield Line("mirror", "OK", text)
        return
    text = f"{settings.mirror} cannot be used: {mirror.reason(found)}"
    if has_checkpoint:
        yield Line("mirror", "warning", f"{text}. Training would go on without copies")
    else:
        yield Line("mirror", "error", f"{text}. An empty folder is filled from it first", EXIT_SETTING)


def _try(url: str, ended: queue.SimpleQueue[str | Exception]) -> None:
    try:
        ended.put(mirror.try_out(url))
    except Exception as error:  # noqa: BLE001 - of whatever library
        ended.put(error)
